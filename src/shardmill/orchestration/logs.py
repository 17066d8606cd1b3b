"""What the library says, in the logs of the run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging.handlers import APILogHandler

from shardmill.core.outcome import ShardOutcome
from shardmill.core.plan import ShardPlan
from shardmill.core.summary import human_bytes
from shardmill.orchestration.names import plain
from shardmill.orchestration.progress import speed


class _RunLogHandler(APILogHandler):
    """Sends what the library says within a run to the run's log; elsewhere there is no run to send it to."""

    def emit(self, record: logging.LogRecord) -> None:
        if FlowRunContext.get() is not None or TaskRunContext.get() is not None:
            super().emit(record)


_CAUSE_LIMIT: Final = 300
_SHORTEST: Final = 0.001
"""Seconds below which a rate says nothing."""
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


def log_shard(
    logger: logging.Logger | logging.LoggerAdapter[logging.Logger],
    shard: ShardPlan,
    result: ShardOutcome | BaseException,
) -> None:
    """Write the one line that a shard gets, and at DEBUG one for each of its weights that was computed."""
    name = plain(shard.name)
    if not isinstance(result, ShardOutcome):
        first = str(result).partition("\n")[0]
        logger.error("shard %s: failed, %s: %s", name, type(result).__name__, plain(first, _CAUSE_LIMIT))
        return
    took = f" in {result.seconds:.1f} s, {speed(shard.size / result.seconds)}" if result.seconds >= _SHORTEST else ""
    logger.info("shard %s: %s%s, %s", name, human_bytes(shard.size), took, "hit" if result.is_hit else "miss")
    if result.is_hit or not logger.isEnabledFor(logging.DEBUG):
        return
    for weight in result.receipt.weights:
        error = weight.statistics.relative_error
        logger.debug("tensor %s: %s, relative error %.4f", plain(weight.module), weight.scheme, error)
