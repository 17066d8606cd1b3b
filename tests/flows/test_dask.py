"""Worker processes of a Dask cluster: one dies, a run is stopped, a scheduler is shared by several runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from dask import config
from distributed import Client, LocalCluster
from prefect.settings import PREFECT_API_URL, PREFECT_LOCAL_STORAGE_PATH

import checkpoints
from served import Ask, artifacts, left_behind, library_lines, run_id, states
from shardmill.core.recipe import uniform
from shardmill.errors import ExecutorInvalid, ShardFailures, WorkerLost
from shardmill.flows.quantize_checkpoint import quantize_checkpoint
from shardmill.stages.pipeline import RunOptions, run
from shardmill.stages.plan import Locations

pytestmark = pytest.mark.slow

SHARDS = 24

# Every worker process runs this when it starts, a restarted one too. It notes what is computed and what is finished.
PRELOAD = """
import logging, os, signal, time
from pathlib import Path
import shardmill
from shardmill.errors import Interrupted
from shardmill.kernels import shard as kernels
from shardmill.stages import quantize
from shardmill.storage import local

notes = Path({notes!r})

def note(word, name):
    with notes.open("a") as file:
        file.write(f"{{word}} {{name}} {{os.getpid()}} {{sorted(os.sched_getaffinity(0))}}\\n")

def real(function):
    return getattr(function, "real", function)  # preloading runs a program twice

compute = real(quantize._compute)

def noted(sources, *args):
    note("begun", sources.shard.name)
    logging.getLogger("shardmill.preload").info("begun")
    return compute(sources, *args)

noted.real = compute
quantize._compute = noted
{more}
"""
DIE_ONCE = """
commit, count = real(local.FileWriter.commit), 0

def commit_or_die(self, name="", **options):
    global count
    count += name.endswith(".safetensors")
    if count == 3:
        try:
            os.close(os.open({notes!r} + ".killed", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    return commit(self, name, **options)

commit_or_die.real = commit
local.FileWriter.commit = commit_or_die
"""
DIE_ALWAYS = """
def noted(sources, *args):
    if "00002" in sources.shard.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(sources, *args)

noted.real = compute
quantize._compute = noted
"""
HANG = """
def hang(shard, _read, write, *, should_stop, **_):
    write(memoryview(b"some bytes"))
    note("hangs", shard.name)
    while not should_stop():
        time.sleep(0.05)
    note("stopped", shard.name)
    raise Interrupted("stopped on request")

kernels.encode_shard = hang
"""
OTHER_CODE = """
shardmill.__version__ = "0.0.1"
"""


class Notes:
    """What worker processes wrote down."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def preload(self, more: str = "") -> Path:
        """Write the program that workers run when they start."""
        program = self._path.with_name("preload.py")
        told = {"notes": str(self._path)}
        program.write_text(PRELOAD.format(**told, more=more.format(**told)))
        return program

    def of(self, word: str) -> list[list[str]]:
        """The notes that begin with a word: shard, process, cores."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        return [line.split(" ", 3)[1:] for line in lines if line.startswith(word)]


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes")


@pytest.fixture
def many(tmp_path: Path) -> Path:
    weights = [{f"model.layers.{n}.mlp.down_proj.weight": checkpoints.gaussian(n, 64, 128)} for n in range(SHARDS)]
    return checkpoints.write(tmp_path / "many", weights)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_worker_that_dies_mid_shard_costs_that_shard_only(many: Path, tmp_path: Path, ask: Ask, notes: Notes) -> None:
    locations = Locations(source=str(many), destination=str(tmp_path / "loop" / "result"))
    run(locations, uniform("FP8_DYNAMIC"), RunOptions(device="cpu", workers=1))
    request = ask(source=str(many), executor="dask", workers=2)

    with config.set({"distributed.worker.preload": [str(notes.preload(DIE_ONCE))]}):
        state = quantize_checkpoint(request, return_state=True)

    summary = state.result()
    begun = Counter(shard for shard, *_ in notes.of("begun"))
    assert (tmp_path / "notes.killed").exists()
    assert (summary.shards, len(begun)) == (SHARDS, SHARDS)
    assert sorted(begun.values()) == [1] * (SHARDS - 1) + [2], "only the shard that was in work is begun again"
    assert len({process for _, process, _ in notes.of("begun")}) == 3
    assert len(states(run_id(state), SHARDS)) == SHARDS
    assert files(tmp_path / "result") == files(tmp_path / "loop" / "result")
    assert left_behind(tmp_path) == []
    assert _workers(psutil.Process()) == []


def _workers(process: psutil.Process) -> list[psutil.Process]:
    """Worker processes below a process."""
    return [child for child in process.children(recursive=True) if "spawn_main" in " ".join(child.cmdline())]


def test_workers_of_one_machine_share_its_cores_and_tell_the_run(source: Path, ask: Ask, notes: Notes) -> None:
    with config.set({"distributed.worker.preload": [str(notes.preload())]}):
        state = quantize_checkpoint(ask(source=str(source), executor="dask", workers=2), return_state=True)

    assert library_lines(run_id(state), "begun", 4) == [("shardmill.preload", "begun", True)] * 4
    cores = [set(map(int, cores.strip("[]").split(", "))) for _, _, cores in notes.of("begun")]
    everything = os.sched_getaffinity(0)
    assert len(cores) == 4
    assert all(len(share) <= max(1, -(-len(everything) // 2)) for share in cores)
    assert set().union(*cores) <= everything


def test_a_shard_that_kills_its_workers_fails_and_the_others_finish(
    source: Path, tmp_path: Path, ask: Ask, notes: Notes
) -> None:
    request = ask(source=str(source), executor="dask", workers=2)

    with config.set({"distributed.worker.preload": [str(notes.preload(DIE_ALWAYS))]}):
        state = quantize_checkpoint(request, return_state=True)

    failures = state.result(raise_on_failure=False)
    assert isinstance(failures, ShardFailures)
    assert [(name, type(error)) for name, error in failures.failures] == [
        ("model-00002-of-00004.safetensors", WorkerLost)
    ]
    assert failures.done == 3
    assert "finished shards are kept" in artifacts(run_id(state))["failures"]
    assert left_behind(tmp_path) == []


def test_a_worker_that_is_slow_to_come_back_is_waited_for(source: Path, ask: Ask, notes: Notes) -> None:
    impatient = {"distributed.deploy.lost-worker-timeout": "1ms"}  # a start takes seconds, on busy machines many

    with config.set(impatient | {"distributed.worker.preload": [str(notes.preload(DIE_ONCE))]}):
        state = quantize_checkpoint(ask(source=str(source), executor="dask", workers=1), return_state=True)

    assert state.result().shards == 4
    assert len({process for _, process, _ in notes.of("begun")}) == 2


STOPPED_RUN = """
import signal, sys
from dask import config
from shardmill.flows.parameters import QuantizeRequest
from shardmill.flows.quantize_checkpoint import quantize_checkpoint

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with config.set({"distributed.worker.preload": [sys.argv[2]]}):
        quantize_checkpoint(QuantizeRequest.model_validate_json(sys.argv[1]))
"""


def test_a_stopped_run_leaves_no_worker_and_no_temporary_file(
    source: Path, tmp_path: Path, ask: Ask, notes: Notes
) -> None:
    program = tmp_path / "stopped.py"
    program.write_text(STOPPED_RUN)
    environment = os.environ | {
        "PREFECT_API_URL": PREFECT_API_URL.value() or "",
        "PREFECT_LOCAL_STORAGE_PATH": str(PREFECT_LOCAL_STORAGE_PATH.value()),
    }
    request = ask(source=str(source), executor="dask", workers=2).model_dump_json()
    command = [sys.executable, "-P", str(program), request, str(notes.preload(HANG))]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as flow:
        try:
            while len(notes.of("hangs")) < 2:
                assert flow.poll() is None, flow.stderr and flow.stderr.read()
                time.sleep(0.1)
            workers = _workers(psutil.Process(flow.pid))
            assert left_behind(tmp_path), "the files that must go are there"
            asked = time.monotonic()
            flow.send_signal(signal.SIGINT)
            _, told = flow.communicate(timeout=60)
            print(f"ended {time.monotonic() - asked:.1f} s after it was asked")
        finally:
            flow.kill()

    assert b"KeyboardInterrupt" in told
    assert sorted(notes.of("stopped")) == sorted(notes.of("hangs"))
    assert len(notes.of("stopped")) == 2
    assert len(workers) == 2
    assert not any(worker.is_running() for worker in workers)
    assert left_behind(tmp_path) == []
    assert not (tmp_path / "result").exists()


# ---- a scheduler that was there before --------------------------------------------------------------------------


@pytest.fixture
def cluster(notes: Notes, request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    """Two worker processes that stay; parametrized by what they run when they start."""
    preload = str(notes.preload(getattr(request, "param", "")))
    with (
        config.set({"distributed.worker.preload": [preload]}),
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", memory_limit=0) as cluster,
    ):
        yield cluster


def test_a_scheduler_serves_one_run_after_the_other(
    source: Path, tmp_path: Path, ask: Ask, notes: Notes, cluster: LocalCluster
) -> None:
    chosen = {"source": str(source), "executor": "dask", "dask_scheduler": cluster.scheduler_address}

    def count_benches() -> int:  # defined here, it is sent as it is: workers cannot import this file
        from shardmill.orchestration.bench import _benches

        return len(_benches)

    first = quantize_checkpoint(ask(**chosen), return_state=True)
    second = quantize_checkpoint(ask(**chosen, destination=str(tmp_path / "other")), return_state=True)

    assert (first.result().hits, second.result().hits) == (0, 4)
    assert len(notes.of("begun")) == 4
    assert set(states(run_id(second), 4).values()) == {"Cached"}
    assert files(tmp_path / "other") == files(tmp_path / "result")
    assert library_lines(run_id(first), "begun", 4) == [("shardmill.preload", "begun", True)] * 4
    with Client(cluster, set_as_default=False) as client:
        assert list(client.run(count_benches).values()) == [0, 0]


@pytest.mark.parametrize("cluster", [OTHER_CODE], indirect=True)
def test_workers_of_another_release_get_no_shard(ask: Ask, notes: Notes, cluster: LocalCluster) -> None:
    request = ask(executor="dask", dask_scheduler=cluster.scheduler_address)

    state = quantize_checkpoint(request, return_state=True)

    assert isinstance(state.result(raise_on_failure=False), ExecutorInvalid)
    assert "`0.0.1`, here" in artifacts(run_id(state))["failures"]
    assert notes.of("begun") == []
