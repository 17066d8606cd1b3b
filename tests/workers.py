"""A Prefect server with the deployments of this repository, and worker processes: what long tests of the flow need."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import httpx
import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, TaskRunFilter, TaskRunFilterName
from prefect.client.schemas.objects import TaskRun

ROOT: Final = Path(__file__).resolve().parents[1]
FILE: Final = ROOT / "deployments" / "prefect.yaml"
POOL: Final = "shardmill-cpu"
POOLS: Final = (POOL, "shardmill-gpu", "shardmill-batch")
DEPLOYMENT: Final = "quantize-checkpoint/cpu"
ENDS: Final = frozenset({"Completed", "Failed", "Crashed", "Cancelled"})
"""Names of the states in which a run stays until somebody asks for more."""
_MARK: Final = "SHARDMILL_TEST_SERVICE"
"""Variable that everything which a service starts inherits, so that nothing of it goes unnoticed."""
_PAGE: Final = 200


def prefect(*arguments: str, api_url: str, cwd: Path) -> None:
    """Run the command line of Prefect."""
    command = [sys.executable, "-P", "-m", "prefect", "--no-prompt", *arguments]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=cwd, env=os.environ | {"PREFECT_API_URL": api_url}
    )
    assert done.returncode == 0, done.stdout + done.stderr


def deploy(api_url: str, cwd: Path) -> None:
    """Deploy from a folder that is not the repository."""
    prefect("deploy", "--all", "--prefect-file", str(FILE), api_url=api_url, cwd=cwd)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(what: str, is_so: Callable[[], Any], seconds: float = 180) -> Any:
    """Wait for a true answer and return it."""
    deadline = time.monotonic() + seconds
    while not (found := is_so()):
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.1)
    return found


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def running(
    arguments: list[str], log: Path, environment: Mapping[str, str], cwd: Path, module: str = "prefect"
) -> Iterator[subprocess.Popen[bytes]]:
    """A process and all it starts, as long as the block lasts; what it says is added to a file."""
    command = [sys.executable, "-P", "-m", module, *arguments]
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=cwd, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@dataclass(frozen=True)
class Service:
    """A server with the deployments, and the environment of its workers."""

    home: Path
    """Prefect's home of server and workers, with their logs."""
    url: str
    environment: Mapping[str, str]

    @property
    def client(self) -> SyncPrefectClient:
        """A client of the server, to be used in a `with` statement."""
        return SyncPrefectClient(self.url)

    @contextmanager
    def worker(self, name: str = "worker", pool: str = POOL, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
        """A worker of a pool, as long as the block lasts, or until somebody kills it."""
        arguments = ["worker", "start", "--pool", pool, "--name", name]
        log = self.home / f"{name}.log"
        with running(arguments, log, dict(self.environment) | environment, self.home) as process:
            yield process

    def processes(self, *words: str) -> list[psutil.Process]:
        """Every process that this service or one of its workers started, with these words in its command line."""
        found = []
        for process in psutil.process_iter():
            try:
                is_ours = process.environ().get(_MARK) == self.environment[_MARK]
                if is_ours and process.status() != psutil.STATUS_ZOMBIE and set(words) <= set(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue  # it ended meanwhile, or belongs to somebody else
        return found


@contextmanager
def serving(home: Path, **environment: str) -> Iterator[Service]:
    """A server with a pool and the deployments; kills at the end whatever a worker left alive."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    temporary = home / "tmp"
    temporary.mkdir(parents=True)
    variables = os.environ | {
        "PREFECT_HOME": str(home),
        "PREFECT_LOCAL_STORAGE_PATH": str(home / "records"),
        "PREFECT_API_URL": url,
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "TMPDIR": str(temporary),
        _MARK: secrets.token_hex(8),
    }
    service = Service(home, url, variables | environment)
    try:
        with running(["server", "start", "--port", str(port)], home / "server.log", service.environment, home):
            wait_until("the server answers", lambda: answers(url))
            for pool in POOLS:
                prefect("work-pool", "create", "--type", "process", pool, api_url=url, cwd=home)
            deploy(url, home)
            yield service
    finally:
        for process in service.processes():
            process.kill()


def start(client: SyncPrefectClient, request: Mapping[str, Any], deployment: str = DEPLOYMENT) -> UUID:
    """Ask for a run of a deployment."""
    found = client.read_deployment_by_name(deployment)
    return client.create_flow_run_from_deployment(found.id, parameters={"request": dict(request)}).id


def state_of(client: SyncPrefectClient, run: UUID) -> str:
    """Name of the state of a run."""
    state = client.read_flow_run(run).state
    return state.name or "" if state else ""


def end_of(client: SyncPrefectClient, run: UUID, seconds: float = 180, attempt: int = 1) -> str:
    """Wait until a run, or that attempt of it, ends; the name of its state."""

    def last_state() -> str:
        found = client.read_flow_run(run)
        name = found.state.name or "" if found.state else ""
        return name if found.run_count >= attempt and name in ENDS else ""

    return str(wait_until(f"attempt {attempt} of the run ends", last_state, seconds))


def shard_runs(client: SyncPrefectClient, run: UUID) -> list[TaskRun]:
    """The task runs of the shards of a run, of all attempts."""
    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
    named = TaskRunFilter(name=TaskRunFilterName(like_="quantize "))
    found: list[TaskRun] = []
    while True:
        page = client.read_task_runs(flow_run_filter=chosen, task_run_filter=named, limit=_PAGE, offset=len(found))
        found += page
        if len(page) < _PAGE:
            return found
