"""Every storage operation passes here: it is named in its errors, can be recorded, and can be made to fail.

`SHARDMILL_FAULT=kill@17` kills the process instead of its 17th storage operation; `ENOSPC@17` (or any other errno name)
fails that operation, `ENOSPC@17+` every one from there on. So a test can stop a run at each point where it may stop.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from shardmill.errors import StorageFailed, show

FAULT_VARIABLE: Final = "SHARDMILL_FAULT"
_KILL: Final = "kill"
_FAULT: Final = re.compile(r"([A-Za-z0-9]+)@([1-9][0-9]*)(\+?)")


@dataclass(slots=True)
class Faults:
    """Counts operations, and makes one of them fail."""

    what: str = ""
    """`kill`, or the name of an errno; empty to count only."""
    at: int = 0
    """Number of the operation, from 1; 0 for none."""
    is_lasting: bool = False
    """Whether all operations from there on fail."""
    log: list[tuple[str, str]] = field(default_factory=list)
    """Name and place of every operation so far."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def parse(cls, text: str) -> Faults:
        """Read `what@number`, with `+` behind the number for a fault that lasts.

        Raises:
            ValueError: it is nothing of the kind.

        >>> Faults.parse("ENOSPC@3+").at
        3
        """
        found = _FAULT.fullmatch(text)
        if found is None or (found[1] != _KILL and not isinstance(getattr(errno, found[1], None), int)):
            raise ValueError(f"{FAULT_VARIABLE}: expected kill@N or an errno name such as ENOSPC@N, found {text!r}")
        return cls(found[1], int(found[2]), is_lasting=bool(found[3]))

    def reach(self, name: str, where: str) -> None:
        """Note an operation that is about to be done.

        Raises:
            OSError: it is the one that has to fail.
        """
        with self._lock:
            self.log.append((name, where))
            count = len(self.log)
            if not self.at or count < self.at or (count > self.at and not self.is_lasting):
                return
            if self.what == _KILL:
                os.kill(os.getpid(), signal.SIGKILL)
        code = getattr(errno, self.what)
        raise OSError(code, os.strerror(code))


def _from_environment() -> Faults | None:
    text = os.environ.get(FAULT_VARIABLE)
    return Faults.parse(text) if text else None


_active: Faults | None = _from_environment()


@contextlib.contextmanager
def watched(faults: Faults) -> Iterator[Faults]:
    """Record, and if asked to disturb, every operation of this process meanwhile."""
    global _active  # noqa: PLW0603 - operations of all threads count, so there is one place for it
    before, _active = _active, faults
    try:
        yield faults
    finally:
        _active = before


@contextlib.contextmanager
def operation(name: str, where: str | Path) -> Iterator[None]:
    """Do one storage operation; an `OSError` becomes a `StorageFailed` that names operation and place."""
    try:
        if _active is not None:
            _active.reach(name, str(where))
        yield
    except StorageFailed:
        raise
    except OSError as error:
        message = f"{name} {show(str(where), 200)} failed: {error.strerror or error}"
        raise StorageFailed(error.errno, message) from error
