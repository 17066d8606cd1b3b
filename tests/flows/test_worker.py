"""`shardmill worker`: one worker for each device, and what it starts sees that device alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardmill.errors import DeploymentInvalid
from shardmill.flows import worker
from shardmill.flows.worker import VISIBLE, Worker, name_devices, workers


@pytest.mark.parametrize(
    ("asked", "visible", "named"),
    [
        ("", "0,1", ()),
        ("0", None, ("0",)),
        ("1, 0", "5", ("1", "0")),
        ("all", "2,3", ("2", "3")),
        ("GPU-0a1b2c3d-1234,MIG-GPU-0a1b/1/0", None, ("GPU-0a1b2c3d-1234", "MIG-GPU-0a1b/1/0")),
    ],
)
def test_devices_are_named(asked: str, visible: str | None, named: tuple[str, ...]) -> None:
    assert name_devices(asked, {} if visible is None else {VISIBLE: visible}) == named


@pytest.mark.parametrize(("asked", "visible"), [("0,0", None), ("cuda:0", None), ("0,", None), ("all", "")])
def test_devices_that_cannot_be_are_refused(asked: str, visible: str | None) -> None:
    with pytest.raises(DeploymentInvalid, match="expected `all`, or devices such as 0,1, each once"):
        name_devices(asked, {} if visible is None else {VISIBLE: visible})


def test_a_machine_without_devices_has_no_worker_for_all_of_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker, "_found_devices", tuple)
    monkeypatch.delenv(VISIBLE, raising=False)

    assert worker.main(["--devices", "all"]) == 2

    assert "found no device; leave --devices out for the CPU" in capsys.readouterr().err


def test_each_device_has_a_worker_that_takes_one_run_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Worker] = []

    def record(these: list[Worker]) -> int:
        found.extend(these)
        return 0

    monkeypatch.setattr(worker, "watch", record)
    monkeypatch.delenv(VISIBLE, raising=False)

    assert worker.main(["--devices", "0,1", "--name", "box"]) == 0
    assert worker.main(["--name", "box"]) == 0

    told = [" ".join(one.command[5:]) for one in found]
    rest = "--limit 1 --install-policy never --no-create-pool-if-not-found"
    assert told == [
        f"worker start --pool shardmill-gpu --name box-0 {rest}",
        f"worker start --pool shardmill-gpu --name box-1 {rest}",
        f"worker start --pool shardmill-cpu --name box {rest}",
    ]
    assert [one.environment.get(VISIBLE) for one in found] == ["0", "1", None]


# Starts two workers that are programs of the test's own, and looks after them.
STAND_IN = """
import os, sys
from dataclasses import replace
from shardmill.flows.worker import watch, workers
program = "import os, sys, time; print(os.getpid(), os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(600)"
sys.exit(watch([replace(one, command=(sys.executable, "-c", program)) for one in workers("p", "n", ["0", "1"])]))
"""


def wait_until(is_so: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while not (found := is_so()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_a_worker_that_dies_is_started_again_and_all_stop_when_asked(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def lives(count: int) -> list[list[str]]:
        lines = [line.split() for line in log.read_text().splitlines() if not line.startswith("worker ended")]
        return lines if len(lines) >= count else []

    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-P", "-c", STAND_IN], stdout=out, stderr=out)
    try:
        first = wait_until(lambda: lives(2))
        assert sorted(device for _, device in first) == ["0", "1"]
        victim = next(int(pid) for pid, device in first if device == "1")
        os.kill(victim, signal.SIGKILL)
        again = wait_until(lambda: lives(3))[2]
        assert again[1] == "1"
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0

    assert "worker ended with code -9; again in 2 s" in log.read_text()
    for pid, _ in lives(3):
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_a_worker_that_fails_at_once_is_started_ever_more_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    (one,) = [Worker(command=(sys.executable, "-c", ""), environment=os.environ) for _ in workers("p", "n", ())]
    pauses = []
    for _ in range(8):
        now = one.due
        one.look_after()
        one.wait()
        one.look_after()
        pauses.append(one.pause)
    assert pauses == [2, 4, 8, 16, 32, 60, 60, 60]
