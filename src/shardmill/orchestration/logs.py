"""What the library says, in the logs of the run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging.handlers import APILogHandler


class _RunLogHandler(APILogHandler):
    """Sends what the library says within a run to the run's log; elsewhere there is no run to send it to."""

    def emit(self, record: logging.LogRecord) -> None:
        if FlowRunContext.get() is not None or TaskRunContext.get() is not None:
            super().emit(record)


@contextmanager
def library_logs() -> Iterator[None]:
    """Show the library's own log lines, INFO and above, in the logs of the run."""
    logger = logging.getLogger("shardmill")
    handler, level = _RunLogHandler(logging.INFO), logger.level
    logger.addHandler(handler)
    if logger.getEffectiveLevel() > logging.INFO:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
