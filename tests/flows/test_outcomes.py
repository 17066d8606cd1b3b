"""How runs of a deployment end: what becomes of one that is cancelled, suspended, or whose processes are killed.

Each case stops a run of 24 shards after the fifth, and lets it go on where it did not end by itself. `pytest -s` shows
the table that `docs/outcomes.md` holds.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.states import AwaitingRetry, Cancelling, Suspended

import checkpoints
from served import left_behind
from workers import Service, serving, shard_runs, start, state_of, wait_until

pytestmark = pytest.mark.slow

SHARDS: Final = 24
STOPPED_AFTER: Final = 5
SLOW: Final = {"PYTHONPATH": str(Path(__file__).parent / "slow_storage")}
HEARTBEAT_SECONDS: Final = 30
"""The least that Prefect takes."""
SILENCE: Final = timedelta(seconds=70)
PATIENCE_SECONDS: Final = 180


@dataclass
class Trial:
    """One run of a case, and what was seen of it."""

    service: Service
    client: SyncPrefectClient
    folder: Path
    worker: subprocess.Popen[bytes]
    run: UUID
    seen: dict[str, float] = field(default_factory=dict)
    """Seconds after it was asked or killed, by name of state."""

    @property
    def store(self) -> Path:
        return self.folder / ".shardmill"

    @property
    def result(self) -> Path:
        return self.folder / "result"

    def receipts(self) -> list[Path]:
        return sorted((self.store / "receipts").glob("*.json"))

    def finished(self) -> dict[Path, tuple[int, int]]:
        """Inode and time of every receipt and of the blob that it vouches for."""
        receipts = self.receipts()
        files = (*receipts, *(self.store / "blobs" / f"{path.stem}.safetensors" for path in receipts))
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}

    def flow(self) -> psutil.Process:
        """The process of the flow."""
        return self.service.processes("prefect.engine")[0]

    def reach(self, *states: str) -> str:
        """Wait for one of these states, and note how long it took."""
        began = time.monotonic()
        while (found := state_of(self.client, self.run)) not in states:
            lasted = time.monotonic() - began
            assert lasted < PATIENCE_SECONDS, f"the run is {found}, not {' or '.join(states)}, after {lasted:.0f} s"
            time.sleep(0.5)
        self.seen[found] = time.monotonic() - began
        return found

    def leave(self) -> float:
        """Wait until no process of the flow is left; the seconds it took."""
        began = time.monotonic()
        wait_until("the flow's process ends", lambda: not self.service.processes("prefect.engine"), 60)
        seconds = time.monotonic() - began
        if self.worker.poll() is None:  # it starts a process for hooks, and then tells once more that a run crashed
            wait_until("the worker is done with the run", lambda: not psutil.Process(self.worker.pid).children(), 60)
            time.sleep(2)
        return seconds


def cancel(trial: Trial) -> str:
    trial.client.set_flow_run_state(trial.run, Cancelling())
    return trial.reach("Cancelled")


def suspend(trial: Trial) -> str:
    trial.client.set_flow_run_state(trial.run, Suspended(timeout_seconds=3600))
    return trial.reach("Suspended")


def kill_worker(trial: Trial) -> str:
    trial.worker.kill()
    return trial.reach("Completed")


def kill_flow(trial: Trial) -> str:
    trial.flow().kill()
    return trial.reach("Crashed")


def terminate_worker(trial: Trial) -> str:
    trial.worker.terminate()
    return trial.reach("Crashed")


def kill_both(trial: Trial) -> str:
    flow = trial.flow()
    trial.worker.kill()
    flow.kill()
    return trial.reach("Crashed")


Case = Callable[[Trial], str]
CASES: Final[dict[str, Case]] = {
    "cancelled in the UI": cancel,
    "suspended, later resumed": suspend,
    "worker killed": kill_worker,
    "flow process killed": kill_flow,
    "worker told to end": terminate_worker,
    "worker and flow process killed": kill_both,
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A server that takes a run for crashed which gives no sign of life."""
    ends = ("Completed", "Failed", "Cancelled", "Crashed", "Suspended", "Paused", "AwaitingRetry")
    silence = EventTrigger(
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{state}" for state in ends)},
        match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=SILENCE,
    )
    crash = ChangeFlowRunState(
        name="Crashed", state=StateType.CRASHED, message="no sign of life from the flow", force=False
    )
    heartbeat = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS)}
    with serving(tmp_path_factory.mktemp("served"), **heartbeat) as found, found.client as client:
        client.create_automation(AutomationCore(name="silent runs", trigger=silence, actions=[crash]))
        yield found


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 24 shards."""
    weights = {f"model.layers.{n}.mlp.down_proj.weight": checkpoints.gaussian(n, 128, 256) for n in range(SHARDS)}
    return checkpoints.write(tmp_path_factory.mktemp("large") / "source", checkpoints.deal(weights, SHARDS))


@pytest.fixture(scope="module")
def expected(large: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What `shardmill run` makes of it."""
    destination = tmp_path_factory.mktemp("plain") / "result"
    command = [sys.executable, "-P", "-m", "shardmill.cli", "run", str(large), str(destination), "--device", "cpu"]
    subprocess.run([*command, "--scheme", "NVFP4A16"], check=True, capture_output=True)
    return files(destination)


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Rows to print when all cases are through."""
    columns = ("what happened", "state", "after s", "flow gone after s", "then", "Completed after s")
    rows: list[str] = []
    yield rows
    print(f"\n| {' | '.join((*columns, 'finished', 'redone', 'left over'))} |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", *rows, sep="\n")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def go_on(trial: Trial, state: str) -> str:
    """Let a stopped run go on, as the UI does; what was done for it."""
    if state == "Completed":
        return "nothing to do"
    if state == "Suspended":
        trial.client.resume_flow_run(trial.run)
        return "resume"
    trial.client.set_flow_run_state(trial.run, AwaitingRetry())
    return "retry"


def states_since(trial: Trial, moment: datetime) -> list[str]:
    """States of the shards that a finished run began after a moment; the server shows them late.

    A retry counts as another attempt of a run and a resumption does not, so the clock tells.
    """

    def found() -> list[str]:
        runs = shard_runs(trial.client, trial.run)
        return [run.state.name or "" for run in runs if run.state and run.start_time and run.start_time >= moment]

    def are_final() -> bool:
        return len(found()) == SHARDS and set(found()) <= {"Completed", "Cached"}

    wait_until("the server knows of every shard", are_final, 60)
    return found()


@pytest.mark.parametrize("case", CASES)
def test_a_run_ends_or_goes_on_and_no_finished_shard_is_done_again(
    case: str, service: Service, large: Path, expected: dict[str, bytes], table: list[str], tmp_path: Path
) -> None:
    request: dict[str, Any] = {"source": str(large), "destination": str(tmp_path / "result"), "workers": 2}
    request |= {"scheme": "NVFP4A16", "device": "cpu"}
    with service.client as client, service.worker(**SLOW) as worker:
        trial = Trial(service, client, tmp_path, worker, start(client, request))
        wait_until(f"{STOPPED_AFTER} shards are finished", lambda: len(trial.receipts()) >= STOPPED_AFTER)
        assert len(trial.receipts()) < SHARDS, "the run is at work"

        state = CASES[case](trial)

        gone = trial.leave()
        stopped = datetime.fromtimestamp(0, UTC) if state == "Completed" else datetime.now(UTC)
        at_once, before = left_behind(tmp_path), trial.finished()
        count = 0 if state == "Completed" else len(trial.receipts())
        with service.worker("another", **SLOW):
            done = go_on(trial, state)
            trial.reach("Completed")
            trial.leave()
            states = states_since(trial, stopped)
    redone = states.count("Completed") - (SHARDS - count)
    at_end = left_behind(tmp_path)
    again = f"{trial.seen['Completed']:.1f}" if state != "Completed" else ""
    cells = (case, state, f"{trial.seen[state]:.1f}", f"{gone:.1f}", done, again, count or SHARDS, redone)
    table.append(f"| {' | '.join(map(str, cells))} | {len(at_once)}, then {len(at_end)} |")
    print(table[-1])

    assert redone == 0
    assert {path: trial.finished()[path] for path in before} == before
    assert at_end == []
    assert files(trial.result) == expected
    if state in ("Cancelled", "Suspended"):
        assert at_once == []
