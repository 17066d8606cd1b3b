"""Which process is this, and does it still run: whoever leaves something behind says so, and others can tell."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Process:
    """A process, told apart from every other one of any machine; its texts are empty where no system says them."""

    host: str
    boot: str
    """Tells one start of the machine from another."""
    space: str
    """Namespace of process numbers: one container from another."""
    pid: int
    start: str
    """When the process started, in ticks since the machine did."""

    @classmethod
    def current(cls) -> Process:
        """This process."""
        return cls.numbered(os.getpid())

    @classmethod
    def numbered(cls, pid: int) -> Process:
        """A process of this machine; one that is gone has no start."""
        boot = space = ""
        with contextlib.suppress(OSError):
            space = str(Path("/proc/self/ns/pid").readlink())
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return cls(socket.gethostname(), boot, space, pid, _start_of(pid))

    @classmethod
    def parse(cls, raw: Any) -> Process | None:
        """Take what `asdict` made of a process, by way of JSON; None when it is no such thing."""
        try:
            found = cls(**raw)
        except TypeError:
            return None
        texts = (found.host, found.boot, found.space, found.start)
        return found if type(found.pid) is int and all(isinstance(text, str) for text in texts) else None

    def is_running(self) -> bool | None:
        """Whether the process runs; None for one of another machine, boot or namespace, where that cannot be told."""
        there = Process.numbered(self.pid)
        is_here = (self.host, self.boot, self.space) == (there.host, there.boot, there.space)
        return self.start == there.start if is_here and self.boot and self.start else None


def _start_of(pid: int) -> str:
    """When a process started; empty where it is no more."""
    with contextlib.suppress(OSError, IndexError):
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        fields = text.rpartition(")")[2].split()  # the name of the program, in parentheses, may hold anything
        return "" if fields[0] in "ZX" else fields[19]
    return ""
