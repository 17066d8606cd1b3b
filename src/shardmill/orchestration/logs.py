"""What the library says, in the logs of the run."""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Final, cast

from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging.handlers import APILogHandler, PrefectConsoleHandler

from shardmill.core.markdown import plain
from shardmill.core.outcome import ShardOutcome
from shardmill.core.plan import ShardPlan
from shardmill.core.summary import human_bytes
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
    outlive_reader()
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


class _LastingOutput:
    """A stream that can be written to when nobody reads it any more."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or drop the text where the reader is gone."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            drop_unread_output(self._stream.fileno())
            return len(text)

    def flush(self) -> None:
        """Flush, or drop what is left where the reader is gone."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            drop_unread_output(self._stream.fileno())


def outlive_reader() -> None:
    """Let this process go on when whoever reads its output dies, as a worker does that is killed.

    Prefect's console would end the process at the next line it logs. It logs after the flow has returned as well, so
    this is for good.
    """
    loggers = list(logging.root.manager.loggerDict.values())  # at once: other threads may add some
    for handler in (found for logger in loggers for found in getattr(logger, "handlers", ())):
        if isinstance(handler, PrefectConsoleHandler) and not isinstance(handler.console.file, _LastingOutput):
            handler.console.file = cast("IO[str]", _LastingOutput(handler.console.file))


def drop_unread_output(*more: int) -> None:
    """Lead standard output, standard error and further descriptors to nowhere, if they are pipes that nobody reads."""
    unread = select.poll()
    for fd in {1, 2, *more}:
        unread.register(fd, 0)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for fd, _ in unread.poll(0):
        os.dup2(nowhere, fd)
    os.close(nowhere)
