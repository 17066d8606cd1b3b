"""What the library says, in the logs of the run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging.handlers import APILogHandler


class _RunLogHandler(APILogHandler):
    """Sends what the library says within a run to the run's log; elsewhere there is no run to send it to."""

    def emit(self, record: logging.LogRecord) -> None:
        if FlowRunContext.get() is not None or TaskRunContext.get() is not None:
            super().emit(record)


_handler: Final = _RunLogHandler(logging.INFO)
_users: list[int] = []
"""The level that the logger had before, once for everybody who wants its lines."""
_users_lock = threading.Lock()


@contextmanager
def library_logs() -> Iterator[None]:
    """Show the library's own log lines, INFO and above, in the logs of the run.

    One handler serves all runs and tasks of a process, so that no line is sent twice.
    """
    logger = logging.getLogger("shardmill")
    with _users_lock:
        _users.append(_users[0] if _users else logger.level)
        logger.addHandler(_handler)
        if logger.getEffectiveLevel() > logging.INFO:
            logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        with _users_lock:
            level = _users.pop()
            if not _users:
                logger.removeHandler(_handler)
                logger.setLevel(level)
