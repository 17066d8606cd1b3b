"""Prefect workers of this machine, each with one run at a time; `shardmill worker` starts this.

    python -m shardmill.flows.worker [--pool POOL] [--devices all | 0,1,…] [--name NAME]

With devices there is one worker for each: it and every run that it starts see that device alone. A worker that ends is
started again; a request to stop is passed on, and Prefect's worker hands it to the run in work.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Final

from shardmill.errors import DeploymentInvalid, Problem

CPU_POOL: Final = "shardmill-cpu"
GPU_POOL: Final = "shardmill-gpu"
VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
"""What a process sees of the machine's devices; HIP reads it, too."""
ALL: Final = "all"
_DEVICE: Final = re.compile(r"[0-9]+|(GPU|MIG)-[0-9A-Za-z/-]+")
_QUIET_SECONDS: Final = 60.0
"""A worker that lived as long did not fail at once."""
_WAKE_SECONDS: Final = 0.5
_LONGEST_PAUSE_SECONDS: Final = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Start workers and stay until asked to stop; returns the exit code of the command line."""
    chosen = _parse(arguments)
    try:
        devices = name_devices(chosen.devices, os.environ)
    except DeploymentInvalid as error:
        sys.stderr.write(f"refused: {error}\n")
        return 2
    pool = chosen.pool or (GPU_POOL if devices else CPU_POOL)
    name = chosen.name or os.uname().nodename
    return watch(list(workers(pool, name, devices)))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="shardmill worker",
        description="Work on the runs of the Prefect server of PREFECT_API_URL, one at a time, or one for each device.",
        allow_abbrev=False,
    )
    parser.add_argument("--pool", help=f"work pool (default: {CPU_POOL}, with --devices {GPU_POOL})")
    parser.add_argument("--devices", default="", help="`all`, or numbers or UUIDs such as 0,1: one worker for each")
    parser.add_argument("--name", help="name of the worker, before its device (default: the machine's)")
    return parser.parse_args(arguments)


def name_devices(asked: str, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The devices that are to have a worker each.

    >>> name_devices("0, 1", {}), name_devices("all", {VISIBLE: "2,3"}), name_devices("", {})
    (('0', '1'), ('2', '3'), ())

    Raises:
        DeploymentInvalid: no device, one that has no such name, or one that is named twice.
    """
    if not asked:
        return ()
    listed = environment.get(VISIBLE) if asked == ALL else asked
    names = _found_devices() if listed is None else tuple(part.strip() for part in listed.split(","))
    wrong = [name for name in names if not _DEVICE.fullmatch(name)]
    if not names or wrong or len(set(names)) < len(names):
        found = f"`{','.join(names)}`" if names else "no device"
        message = f"expected `all`, or devices such as 0,1, each once; found {found}"
        raise DeploymentInvalid([Problem(kind="devices", message=message, way_out="leave --devices out for the CPU")])
    return names


def _found_devices() -> tuple[str, ...]:
    """Numbers of the machine's devices."""
    import torch

    return tuple(map(str, range(torch.cuda.device_count())))


@dataclass(slots=True, kw_only=True)
class Worker:
    """One worker process, again and again."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause: float = 1.0
    """Before it is started again."""
    due: float = field(default=0.0)

    def start(self) -> None:
        """Start it."""
        self.process = subprocess.Popen(self.command, env=self.environment)  # noqa: S603 - our own interpreter
        self.started = time.monotonic()

    def look_after(self) -> None:
        """Start it when it is due; pause longer each time that it ends at once."""
        now = time.monotonic()
        if self.process is None:
            if now >= self.due:
                self.start()
            return
        code = self.process.poll()
        if code is None:
            return
        self.pause = 1.0 if now - self.started >= _QUIET_SECONDS else min(2 * self.pause, _LONGEST_PAUSE_SECONDS)
        self.process, self.due = None, now + self.pause
        sys.stderr.write(f"worker ended with code {code}; again in {self.pause:.0f} s: {shlex.join(self.command)}\n")

    def stop(self) -> None:
        """Ask it to stop."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        """Wait until it has stopped."""
        if self.process is not None:
            self.process.wait()


def workers(pool: str, name: str, devices: Sequence[str]) -> Sequence[Worker]:
    """The workers of a machine: one, or one for each device."""

    def one(suffix: str, extra: Mapping[str, str]) -> Worker:
        command = (
            *(sys.executable, "-P", "-m", "prefect", "--no-prompt", "worker", "start"),
            *("--pool", pool, "--name", f"{name}{suffix}", "--limit", "1"),
            *("--install-policy", "never", "--no-create-pool-if-not-found"),
        )
        return Worker(command=command, environment=os.environ | extra)

    return [one(f"-{device}", {VISIBLE: device}) for device in devices] or [one("", {})]


def watch(found: Sequence[Worker]) -> int:
    """Keep workers alive until this process is asked to stop; they are asked then, and waited for."""
    stop = threading.Event()

    def handle(_signal: int, _frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not stop.is_set():
            for worker in found:
                worker.look_after()
            stop.wait(_WAKE_SECONDS)
        for worker in found:
            worker.stop()
        for worker in found:
            worker.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


if __name__ == "__main__":
    sys.exit(main())
