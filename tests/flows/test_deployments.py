"""deployments/prefect.yaml: it deploys from anywhere, and a worker runs what it deploys."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import ConcurrencyLimitStrategy
from prefect.client.schemas.sorting import LogSort
from prefect.exceptions import ObjectAlreadyExists, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL
from prefect.states import AwaitingRetry, Cancelling

import checkpoints
from served import Ask
from shardmill.flows.quantize_checkpoint import quantize_checkpoint
from workers import (
    FILE,
    POOL,
    POOLS,
    Service,
    answers,
    deploy,
    end_of,
    free_port,
    running,
    serving,
    shard_runs,
    start,
    state_of,
    wait_until,
)

SPECIFICATION: dict[str, Any] = yaml.safe_load(FILE.read_text())
CHECKPOINT = "shardmill.flows.quantize_checkpoint.quantize_checkpoint"
BATCH = "shardmill.flows.quantize_batch.quantize_batch"


def test_workers_pull_nothing() -> None:
    assert SPECIFICATION["pull"] == []


def test_a_batch_shares_no_slot_with_the_runs_that_it_waits_for() -> None:
    pools: dict[str, set[str]] = {CHECKPOINT: set(), BATCH: set()}
    for deployment in SPECIFICATION["deployments"]:
        pools[deployment["entrypoint"]].add(deployment["work_pool"]["name"])

    assert pools == {CHECKPOINT: {POOL, "shardmill-gpu"}, BATCH: {"shardmill-batch"}}
    names = [(deployment["entrypoint"], deployment["name"]) for deployment in SPECIFICATION["deployments"]]
    assert {name for flow, name in names if flow == BATCH} <= {name for flow, name in names if flow == CHECKPOINT}


def test_nightly_schedules_wait_to_be_switched_on() -> None:
    schedules = [
        schedule for deployment in SPECIFICATION["deployments"] for schedule in deployment.get("schedules", ())
    ]

    assert {(schedule["slug"], schedule["active"]) for schedule in schedules} == {("nightly", False)}
    assert len(schedules) == 2


def test_it_deploys_and_the_server_refuses_bad_parameters(tmp_path: Path, ask: Ask) -> None:
    with get_client(sync_client=True) as client:
        for pool in POOLS:
            with suppress(ObjectAlreadyExists):  # another test of this server was first
                client.create_work_pool(WorkPoolCreate(name=pool, type="process"))

        deploy(PREFECT_API_URL.value() or "", tmp_path)

        found = client.read_deployment_by_name("quantize-checkpoint/cpu")
        assert found.entrypoint == "shardmill.flows.quantize_checkpoint.quantize_checkpoint"
        assert found.pull_steps in (None, [])
        assert found.work_pool_name == POOL
        assert found.global_concurrency_limit is not None
        assert found.global_concurrency_limit.limit == 1
        assert found.concurrency_options is not None
        assert found.concurrency_options.collision_strategy == ConcurrencyLimitStrategy.ENQUEUE
        assert found.parameter_openapi_schema == quantize_checkpoint.parameters.model_dump_for_openapi()
        good = ask().model_dump()
        for field, bad in [("scheme", "FP9"), ("workers", -1), ("source", "s3://a:b@c/m"), ("speed", "fast")]:
            with pytest.raises(PrefectHTTPStatusError, match="409") as caught:
                client.create_flow_run_from_deployment(found.id, parameters={"request": good | {field: bad}})
            assert "Validation failed" in caught.value.response.text
            assert field in caught.value.response.text
        assert client.create_flow_run_from_deployment(found.id, parameters={"request": good}).deployment_id == found.id

        batch = client.read_deployment_by_name("quantize-batch/gpu")
        assert batch.work_pool_name == "shardmill-batch"
        assert [(schedule.slug, schedule.active) for schedule in batch.schedules] == [("nightly", False)]
        nightly = batch.schedules[0].parameters["request"]
        assert nightly["destination"] == "/models/quantized/{name}-{scheme}-{version}"
        assert client.create_flow_run_from_deployment(batch.id, parameters={"request": nightly}).parameters["request"]


# ---- a real server and a real worker ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A server with the deployment, and a worker."""
    with serving(tmp_path_factory.mktemp("served")) as found, found.worker():
        yield found


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A checkpoint that keeps a run busy for a while."""
    weights = {f"model.layers.{n}.mlp.down_proj.weight": checkpoints.gaussian(n, 2048, 8192) for n in range(40)}
    return checkpoints.write(tmp_path / "large", checkpoints.deal(weights, 8))


@pytest.mark.slow
def test_a_worker_runs_the_deployment_twice_and_the_second_time_all_is_cached(
    service: Service, ask: Ask, tmp_path: Path
) -> None:
    time.sleep(2.1)  # the worker does not remember digests of younger files
    with service.client as client:
        first = start(client, ask(destination=str(tmp_path / "a")).model_dump())
        assert end_of(client, first) == "Completed"
        again = start(client, ask(destination=str(tmp_path / "b")).model_dump())
        assert end_of(client, again) == "Completed"

        def shard_states() -> list[str]:
            return [run.state.name or "" for run in shard_runs(client, again) if run.state]

        wait_until("four shards are cached", lambda: shard_states() == ["Cached"] * 4)
    assert (tmp_path / "a" / "shardmill.json").read_bytes() == (tmp_path / "b" / "shardmill.json").read_bytes()


@pytest.mark.slow
def test_cancelling_stops_a_run_that_is_at_work(service: Service, ask: Ask, large: Path, tmp_path: Path) -> None:
    request = ask(source=str(large), scheme="NVFP4A16", workers=2).model_dump()
    blobs = tmp_path / ".shardmill" / "blobs"
    with service.client as client:
        run = start(client, request)
        wait_until("a shard is being written", lambda: any(blobs.glob(".shardmill-*.tmp")))
        client.set_flow_run_state(run, Cancelling())
        wait_until("the run is cancelled", lambda: state_of(client, run) == "Cancelled", 60)
    assert list(blobs.glob(".shardmill-*.tmp")) == []
    assert not (tmp_path / "result").exists()


# ---- a server with a password, set up by one command ------------------------------------------------------------

AUTH = "operator:correct-horse-battery"
QUICK = "heartbeat_seconds: 30"
"""The quickest heartbeat that Prefect sends; a silent run is Crashed after 110 s then."""


@dataclass(frozen=True)
class Served:
    """A server that wants a password, and what processes of its users need to know."""

    home: Path
    environment: dict[str, str]

    @property
    def url(self) -> str:
        """The URL of its API."""
        return self.environment["PREFECT_API_URL"]

    def setup(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """`shardmill setup` from a folder that is no clone, with changes of the environment."""
        command = [str(Path(sys.executable).with_name("shardmill")), "setup", *arguments]
        environment = self.environment | changes
        return subprocess.run(command, check=False, capture_output=True, text=True, cwd=self.home, env=environment)

    def client(self) -> SyncPrefectClient:
        """A client that knows the password."""
        return SyncPrefectClient(self.url, auth_string=AUTH)

    @contextmanager
    def worker(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """`shardmill worker` as long as the block lasts."""
        log = self.home / f"worker-{len(list(self.home.glob('worker-*')))}.log"
        with running([*arguments], log, self.environment, self.home, module="shardmill.flows.worker") as process:
            yield process


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with a password and CSRF protection, and nothing on it."""
    home, port = tmp_path_factory.mktemp("team"), free_port()
    environment = os.environ | {
        "PREFECT_API_AUTH_STRING": AUTH,
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_HOME": str(home),
        "PREFECT_LOCAL_STORAGE_PATH": str(home / "records"),
        "PREFECT_WORKER_QUERY_SECONDS": "1",
    }
    server = environment | {
        "PREFECT_SERVER_API_AUTH_STRING": AUTH,
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
    }
    with running(["server", "start", "--port", str(port)], home / "server.log", server, home):
        wait_until("the server answers", lambda: answers(environment["PREFECT_API_URL"]))
        yield Served(home, environment)


@pytest.mark.slow
def test_a_password_is_asked_for_and_setup_is_idempotent(served: Served) -> None:
    for changes in ({"PREFECT_API_AUTH_STRING": ""}, {"PREFECT_API_AUTH_STRING": "operator:wrong"}):
        refused = served.setup(**changes)
        assert refused.returncode == 1
        assert "does not let us in (401); set PREFECT_API_AUTH_STRING" in refused.stderr
        assert "wrong" not in refused.stderr

    first, second = served.setup(), served.setup()

    assert first.returncode == 0, first.stderr
    assert "10 created, 0 updated, 0 unchanged" in first.stdout
    assert second.returncode == 0, second.stderr
    assert "0 created, 0 updated, 10 unchanged" in second.stdout
    assert AUTH not in first.stdout + first.stderr


def descendants(pid: int) -> list[psutil.Process]:
    """Processes that `pid` started, and theirs."""
    found: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        found += psutil.Process(pid).children(recursive=True)
    return found


def flow_processes(pid: int) -> list[psutil.Process]:
    """Processes of a worker that run a flow."""
    found = []
    for process in descendants(pid):
        with suppress(psutil.NoSuchProcess):
            if "PREFECT__FLOW_RUN_ID" in process.environ():
                found.append(process)
    return found


def _lines(client: SyncPrefectClient, run: UUID) -> list[str]:
    """What a run said; the server shows it a little later."""
    chosen = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run]))

    def found() -> list[str]:
        lines = [log.message for log in client.read_logs(chosen, sort=LogSort.TIMESTAMP_DESC)]
        return lines if any("were done before" in line for line in lines) else []

    lines: list[str] = wait_until("the run's last words", found, 60)
    return lines


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_that_dies_with_its_worker_becomes_crashed_and_its_retry_completes(
    served: Served, ask: Ask, large: Path, tmp_path: Path
) -> None:
    assert served.setup("--export", "quick").returncode == 0
    platform = served.home / "quick" / "platform.yaml"
    platform.write_text(re.sub("heartbeat_seconds: [0-9]+", QUICK, platform.read_text()))
    done = served.setup("--files", "quick")
    assert done.returncode == 0, done.stderr
    receipts = tmp_path / ".shardmill" / "receipts"
    with served.client() as client:
        with served.worker() as worker:
            run = start(client, ask(source=str(large), scheme="NVFP4A16", workers=1).model_dump())
            wait_until("two shards are finished", lambda: len(list(receipts.glob("*.json"))) >= 2, 400)
            for process in [*descendants(worker.pid), psutil.Process(worker.pid)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        finished = len(list(receipts.glob("*.json")))
        assert state_of(client, run) == "Running"
        assert not (tmp_path / "result").exists()

        wait_until("the silent run is crashed", lambda: state_of(client, run) == "Crashed", 400)

        assert "No heartbeat" in str(client.read_flow_run(run).state)
        client.set_flow_run_state(run, AwaitingRetry())  # what the button in the UI does
        with served.worker():
            wait_until("the retry ends", lambda: state_of(client, run) in ("Completed", "Failed"), 400)
        assert state_of(client, run) == "Completed"
        hits = [line for line in _lines(client, run) if re.search(rf"\b{finished} of 8 shards were done before", line)]
    assert 2 <= finished < 8
    assert hits, "the retry did again what was finished"
    assert (tmp_path / "result" / "config.json").exists()


@pytest.mark.slow
def test_a_run_sees_the_device_of_its_worker_alone(served: Served, ask: Ask, large: Path, tmp_path: Path) -> None:
    done = served.setup()
    assert done.returncode == 0, done.stderr
    with served.client() as client, served.worker("--devices", "0,1", "--name", "box") as worker:
        runs = [
            start(
                client, ask(source=str(large), destination=str(tmp_path / name)).model_dump(), "quantize-checkpoint/gpu"
            )
            for name in ("a", "b")
        ]
        seen: dict[str, str] = {}

        def both_seen() -> bool:
            for process in flow_processes(worker.pid):
                with suppress(psutil.NoSuchProcess):
                    environment = process.environ()
                    seen[environment["PREFECT__FLOW_RUN_ID"]] = environment["CUDA_VISIBLE_DEVICES"]
            return len(seen) == 2

        wait_until("two runs are at work", both_seen)
        for run in runs:
            assert end_of(client, run, 400) == "Completed"
        assert set(seen) == {str(run) for run in runs}
        assert sorted(seen.values()) == ["0", "1"]


@pytest.mark.slow
def test_a_batch_completes_where_a_conversion_has_one_slot(served: Served, source: Path) -> None:
    """One worker with one run at a time for each, and limits of one: a batch holds nothing that its child needs."""
    assert served.setup().returncode == 0
    request = {"sources": [str(source)], "destination": str(source.parent / "{name}-{scheme}")}
    with served.client() as client, served.worker(), served.worker("--pool", "shardmill-batch"):
        assert end_of(client, start(client, request, "quantize-batch/cpu"), 400) == "Completed"
    assert (source.parent / "source-FP8_DYNAMIC" / "config.json").exists()
