"""A real Prefect server with the deployment, a pool and a worker, as separate processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "deployments" / "prefect.yaml"
POOL = "shardmill-cpu"
DEPLOYMENT = "quantize-checkpoint/cpu"
LAST_STATES = ("Completed", "Failed", "Crashed", "Cancelled")


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
    deadline = time.monotonic() + seconds
    while not (found := is_so()):
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.2)
    return found


@contextmanager
def running(arguments: list[str], log: Path, environment: dict[str, str], cwd: Path) -> Iterator[None]:
    """A Prefect process and all it starts, as long as the block lasts."""
    command = [sys.executable, "-P", "-m", "prefect", *arguments]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=cwd, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def served_worker(home: Path) -> Iterator[str]:
    """A server with the deployment, a pool and a worker; the URL of its API, and logs in `home`."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    environment = os.environ | {
        "PREFECT_HOME": str(home),
        "PREFECT_LOCAL_STORAGE_PATH": str(home / "records"),
        "PREFECT_API_URL": url,
        "PREFECT_WORKER_QUERY_SECONDS": "1",
    }
    with running(["server", "start", "--port", str(port)], home / "server.log", environment, home):
        wait_until("the server answers", lambda: answers(url))
        prefect("work-pool", "create", "--type", "process", POOL, api_url=url, cwd=home)
        deploy(url, home)
        with running(["worker", "start", "--pool", POOL], home / "worker.log", environment, home):
            yield url


def start(client: SyncPrefectClient, request: dict[str, Any]) -> FlowRun:
    deployment = client.read_deployment_by_name(DEPLOYMENT)
    return client.create_flow_run_from_deployment(deployment.id, parameters={"request": request})


def state_of(client: SyncPrefectClient, run: FlowRun) -> str:
    state = client.read_flow_run(run.id).state
    return state.name or "" if state else ""


def wait_for_end(client: SyncPrefectClient, run: FlowRun, attempt: int = 1) -> str:
    """The state in which the run ends, or that attempt of it."""

    def last_state() -> str:
        now = client.read_flow_run(run.id)
        name = now.state.name or "" if now.state else ""
        return name if now.run_count >= attempt and name in LAST_STATES else ""

    return str(wait_until(f"attempt {attempt} of the run ends", last_state))


def run_to_its_end(client: SyncPrefectClient, request: dict[str, Any]) -> FlowRun:
    run = start(client, request)
    assert wait_for_end(client, run) == "Completed"
    return run
