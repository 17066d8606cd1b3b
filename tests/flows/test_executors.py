"""Where shards are worked on: what each executor is asked, what it refuses, and that it changes nothing else."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dask import config
from distributed import LocalCluster
from distributed.scheduler import KilledWorker
from pydantic import ValidationError

from served import Ask, artifacts, run_id, states
from shardmill import __version__
from shardmill.core.recipe import uniform
from shardmill.errors import ExecutorInvalid, Interrupted, ShardFailures, WorkerLost
from shardmill.flows.parameters import QuantizeRequest
from shardmill.flows.quantize_checkpoint import FlowSummary, quantize_checkpoint
from shardmill.orchestration import bench, dask
from shardmill.orchestration.bench import Job, bench_of, forget_bench, workbench
from shardmill.orchestration.dask import GPU, Dask
from shardmill.orchestration.executors import Threads, choose_executor
from shardmill.stages.pipeline import RunOptions, run
from shardmill.stages.plan import Locations
from shardmill.tasks.quantize import quantize_shard

MINIMAL = {"source": "/models/m", "destination": "/models/out"}
ADDRESSES = ["tcp://scheduler:8786", "tls://10.0.0.1:1", "tcp://[fe80::1]:8786", "tcp://a-b.c_d:65535"]
NO_ADDRESSES = [
    "",
    "scheduler:8786",
    "http://scheduler:8786",
    "tcp://scheduler",
    "tcp://name:word@scheduler:8786",
    "tcp://scheduler:8786/",
    "tcp://scheduler:8786\n",
    "tcp://:8786",
]


def a_job(tmp_path: Path, device: str = "cpu", workers: int = 0, name: str = "run") -> Job:
    locations = Locations(source=str(tmp_path), destination=str(tmp_path / "result"))
    return Job(run=name, locations=locations, options=RunOptions(device=device, workers=workers))


@pytest.fixture
def scheduler() -> Iterator[str]:
    """Address of a scheduler with two workers, all in this process, so that what a test patches is patched there."""
    with LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=False,
        dashboard_address="127.0.0.1:0",
        protocol="tcp",
        memory_limit=0,
    ) as cluster:
        yield cluster.scheduler_address


# ---- choosing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_of_a_scheduler_is_taken(address: str) -> None:
    request = QuantizeRequest.model_validate(MINIMAL | {"executor": "dask", "dask_scheduler": address})
    assert (request.executor, request.dask_scheduler) == ("dask", address)


@pytest.mark.parametrize("address", NO_ADDRESSES)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValidationError, match="dask_scheduler"):
        QuantizeRequest.model_validate(MINIMAL | {"executor": "dask", "dask_scheduler": address})


def test_threads_are_the_default_and_others_are_unknown() -> None:
    assert QuantizeRequest.model_validate(MINIMAL).executor == "threads"
    with pytest.raises(ValidationError, match="executor"):
        QuantizeRequest.model_validate(MINIMAL | {"executor": "ray"})


def test_the_executor_follows_the_choices(tmp_path: Path) -> None:
    job = a_job(tmp_path, workers=3)
    desk = bench.Workbench(job)

    assert choose_executor("threads", "", job, desk, is_stored=False) == Threads(3, desk.stop)
    assert choose_executor("dask", "", job, desk, is_stored=True) == Threads(3, desk.stop)
    local = Dask(scheduler="", devices=("cpu",) * 3, stop=desk.stop)
    assert choose_executor("dask", "", job, desk, is_stored=False) == local
    there = Dask(scheduler="tcp://h:1", devices=(), stop=desk.stop)
    assert choose_executor("dask", "tcp://h:1", job, desk, is_stored=True) == there


def test_a_scheduler_for_threads_is_refused(tmp_path: Path) -> None:
    job = a_job(tmp_path)
    with pytest.raises(ExecutorInvalid, match="set executor to dask"):
        choose_executor("threads", "tcp://h:1", job, bench.Workbench(job), is_stored=False)


def test_without_the_extra_the_way_out_is_told(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.delitem(sys.modules, "shardmill.orchestration.dask")

    state = quantize_checkpoint(ask(executor="dask"), return_state=True)

    assert isinstance(state.result(raise_on_failure=False), ExecutorInvalid)
    assert "pip install 'shardmill[dask]'" in artifacts(run_id(state))["failures"]
    assert not (tmp_path / "result").exists()


# ---- a scheduler and its workers --------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_running_scheduler_gives_the_bytes_of_the_plain_loop(
    source: Path, tmp_path: Path, ask: Ask, scheduler: str, computed: list[str]
) -> None:
    before = set(bench._benches)
    locations = Locations(source=str(source), destination=str(tmp_path / "loop" / "result"))
    run(locations, uniform("FP8_DYNAMIC"), RunOptions(device="cpu", workers=1))
    computed.clear()

    summary = quantize_checkpoint(ask(executor="dask", dask_scheduler=scheduler))

    assert (summary.shards, summary.hits, len(computed)) == (4, 0, 4)
    assert files(tmp_path / "result") == files(tmp_path / "loop" / "result")
    assert set(bench._benches) == before


def test_what_threads_have_done_is_cached_on_workers(
    tmp_path: Path, ask: Ask, scheduler: str, computed: list[str]
) -> None:
    quantize_checkpoint(ask())
    computed.clear()
    request = ask(executor="dask", dask_scheduler=scheduler, destination=str(tmp_path / "other"))

    state = quantize_checkpoint(request, return_state=True)

    summary: FlowSummary = state.result()
    assert (summary.hits, summary.bytes_read, computed) == (4, 0, [])
    assert set(states(run_id(state), 4).values()) == {"Cached"}


def test_a_shard_that_fails_stops_no_other_and_one_that_may_pass_is_tried_again(
    ask: Ask, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    from shardmill.stages import quantize

    real = quantize.quantize_shard

    def flaky(shard: Any, *args: Any) -> Any:
        begun.append(shard.name)
        if "00002" in shard.name:
            raise ValueError("never")
        if begun.count(shard.name) == 1:
            raise ConnectionResetError("reset")
        return real(shard, *args)

    monkeypatch.setattr("shardmill.tasks.quantize.quantize.quantize_shard", flaky)
    monkeypatch.setattr(quantize_shard, "retry_delay_seconds", [0])

    state = quantize_checkpoint(ask(executor="dask", dask_scheduler=scheduler), return_state=True)

    failures = state.result(raise_on_failure=False)
    assert isinstance(failures, ShardFailures)
    assert [(name, str(error)) for name, error in failures.failures] == [("model-00002-of-00004.safetensors", "never")]
    assert (failures.done, len(begun)) == (3, 7)


def test_an_error_that_cannot_be_sent_is_that_shards_failure(
    ask: Ask, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardmill.stages import quantize

    real = quantize.quantize_shard

    def fail(shard: Any, *args: Any) -> Any:
        if "00002" in shard.name:
            raise ValueError(threading.Lock())
        return real(shard, *args)

    monkeypatch.setattr("shardmill.tasks.quantize.quantize.quantize_shard", fail)

    state = quantize_checkpoint(ask(executor="dask", dask_scheduler=scheduler), return_state=True)

    failures = state.result(raise_on_failure=False)
    assert isinstance(failures, ShardFailures)
    assert ([name for name, _ in failures.failures], failures.done) == (["model-00002-of-00004.safetensors"], 3)


def test_a_request_to_stop_reaches_the_workers(ask: Ask, scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the caller sets is an event of its own, which workers elsewhere do not see."""
    stop = threading.Event()
    begun = threading.Barrier(2, action=stop.set)
    ended: list[str] = []

    def hang(shard: Any, *_: Any, should_stop: Any, **__: Any) -> Any:
        begun.wait(30)
        deadline = threading.Event()
        while not should_stop():
            assert not deadline.wait(0.05)
        ended.append(shard.name)
        raise Interrupted("stopped on request")

    def choose(_name: str, address: str, *_: Any, **__: Any) -> Dask:
        return Dask(scheduler=address, devices=(), stop=stop)

    monkeypatch.setattr("shardmill.kernels.shard.encode_shard", hang)
    monkeypatch.setattr("shardmill.flows.quantize_checkpoint.choose_executor", choose)

    state = quantize_checkpoint(ask(executor="dask", dask_scheduler=scheduler), return_state=True)

    assert isinstance(state.result(raise_on_failure=False), Interrupted)
    assert len(ended) == 2


@pytest.mark.parametrize(
    ("device", "way_out"),
    [("cuda", "--resources GPU=1"), ("cuda:0,cuda:1", "one worker per device")],
)
def test_an_accelerator_that_no_worker_offers_is_refused(ask: Ask, scheduler: str, device: str, way_out: str) -> None:
    state = quantize_checkpoint(ask(executor="dask", dask_scheduler=scheduler, device=device), return_state=True)

    refused = state.result(raise_on_failure=False)
    assert isinstance(refused, ExecutorInvalid)
    assert way_out in str(refused)


def test_a_moment_without_workers_loses_no_shard(ask: Ask, scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask, "_slots", lambda *_: 0)

    assert quantize_checkpoint(ask(executor="dask", dask_scheduler=scheduler)).shards == 4


def test_a_shard_takes_the_accelerator_of_its_worker(tmp_path: Path) -> None:
    workers = {"a": {"nthreads": 4, "resources": {GPU: 1.0}}, "b": {"nthreads": 2, "resources": {}}}
    client: Any = SimpleNamespace(wait_for_workers=lambda *_, **__: None, scheduler_info=lambda: {"workers": workers})
    executor = Dask(scheduler="tcp://h:1", devices=(), stop=threading.Event())

    for device, taken, slots in [("cuda", {GPU: 1}, 1), ("auto", {GPU: 1}, 1), ("cpu", None, 6)]:
        assert executor._resources(client, a_job(tmp_path, device)) == taken
        assert dask._slots(client, taken) == slots


def test_a_scheduler_that_does_not_answer_is_refused(ask: Ask) -> None:
    with config.set({"distributed.comm.timeouts.connect": "1s"}):
        state = quantize_checkpoint(ask(executor="dask", dask_scheduler="tcp://127.0.0.1:9"), return_state=True)
    refused = state.result(raise_on_failure=False)
    assert isinstance(refused, ExecutorInvalid)
    assert "no scheduler answers at `tcp://127.0.0.1:9`" in str(refused)


@pytest.mark.parametrize("there", ["0.0.1", ModuleNotFoundError("No module named 'shardmill'")])
def test_workers_with_other_code_are_refused(there: object) -> None:
    answers = {"tcp://good:1": __version__, "tcp://other:2": there}
    client: Any = SimpleNamespace(run=lambda *_, **__: answers)
    with pytest.raises(ExecutorInvalid, match=r"worker `tcp://other:2` has another shardmill\.__version__"):
        dask._check_code(client)


def test_a_shard_whose_workers_died_is_a_failure_with_a_way_out() -> None:
    def wait() -> None:
        raise KilledWorker("quantize-1", SimpleNamespace(address="tcp://w:1"), 3)  # type: ignore[arg-type]  # a stand-in

    lost = dask._settle(SimpleNamespace(wait=wait))  # type: ignore[arg-type]  # a stand-in

    assert isinstance(lost, WorkerLost)
    assert "died 4 times, last tcp://w:1" in str(lost)
    assert "run again" in str(lost)


# ---- workbenches of runs whose flow is elsewhere ----------------------------------------------------------------


def test_a_process_keeps_a_bounded_number_of_workbenches(tmp_path: Path) -> None:
    mine = a_job(tmp_path, name="mine")
    with workbench(mine) as held:
        first = bench_of(a_job(tmp_path, name="0"))
        for number in range(1, bench._KEPT + 1):
            bench_of(a_job(tmp_path, name=str(number)))

        assert len(bench._benches) == bench._KEPT + 1
        assert bench_of(mine) is held
        assert bench_of(a_job(tmp_path, name="0")) is not first
        forget_bench("mine")
        assert bench_of(mine) is held
    for name in list(bench._benches):
        forget_bench(name)
    assert bench._benches == {}


def test_a_process_with_a_device_of_its_own_uses_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_own_device", ())
    bench.set_own_device("cuda:1")
    assert bench.Workbench(a_job(tmp_path, workers=4)).controls().devices.devices == ("cuda:1",)
