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
