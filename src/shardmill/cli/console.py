"""stderr: talk, warnings of the log, and progress in bytes; stdout is for results alone."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, TextIO

from shardmill.core.summary import human_bytes

if TYPE_CHECKING:
    from tqdm import tqdm

LINE_SECONDS: Final = 5.0
"""Between two lines of progress where there is no terminal."""
_LOGGER: Final = "shardmill"


def print_document(document: Mapping[str, Any]) -> None:
    """Print one JSON document on stdout."""
    print_result(json.dumps(document, indent=2))


def print_result(text: str) -> None:
    """Print a result on stdout, and make sure that it got there."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class Console:
    """What a command says on stderr."""

    def __init__(self, verbosity: int, stream: TextIO) -> None:
        self.verbosity = verbosity
        self.stream = stream
        self._progress: Progress | None = None

    @classmethod
    @contextlib.contextmanager
    def opened(cls, verbosity: int) -> Iterator[Console]:
        """A console that shows the log's warnings as long as it is open."""
        console = cls(verbosity, sys.stderr)
        handler = _LogHandler(console)
        logger = logging.getLogger(_LOGGER)
        before = logger.level, logger.propagate
        logger.addHandler(handler)
        logger.setLevel({-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG))
        logger.propagate = False
        try:
            yield console
        finally:
            console.close_progress()
            logger.removeHandler(handler)
            logger.level, logger.propagate = before

    def error(self, text: str) -> None:
        """Say something that is always said."""
        if self._progress is not None:
            self._progress.clear()
        self.stream.write(f"{text}\n")
        self.stream.flush()

    def say(self, text: str) -> None:
        """Say something unless told to be quiet."""
        if self.verbosity >= 0:
            self.error(text)

    def progress(self, label: str, total: int, unit_count: int = 0) -> Progress:
        """Begin to show the progress of a pass over `total` bytes in `unit_count` shards."""
        self.close_progress()
        self._progress = Progress(self, label, total, unit_count)
        return self._progress

    def count_bytes(self, size: int) -> None:
        """Count bytes of what is shown, if anything is."""
        if self._progress is not None:
            self._progress.add(size)

    def close_progress(self) -> None:
        """End what is shown, if anything is."""
        if self._progress is not None:
            self._progress.close()
            self._progress = None


class _LogHandler(logging.Handler):
    """Shows records of the log as lines of the console."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.error(f"{record.levelname} {record.getMessage()}")


class Progress:
    """A bar on a terminal, a line every few seconds elsewhere, nothing when quiet; called from worker threads."""

    def __init__(self, console: Console, label: str, total: int, shards: int) -> None:
        self.console = console
        self.label = label
        self.total = total
        self.shards = shards
        self.done_bytes = 0
        self.done_shards = 0
        self.hits = 0
        self._lock = threading.RLock()
        self._started = self._told = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if console.verbosity >= 0 and console.stream.isatty():
            from tqdm import tqdm  # only who sees a bar pays for it

            self._bar = tqdm(
                desc=label, total=total, unit="B", unit_scale=True, file=console.stream, dynamic_ncols=True, leave=False
            )

    def add(self, count: int) -> None:
        """Count bytes."""
        with self._lock:
            self.done_bytes += count
            if self._bar is not None:
                self._bar.update(count)
            elif time.monotonic() - self._told >= LINE_SECONDS:
                self._told = time.monotonic()
                self.console.say(self.line())

    def add_shard(self, *, is_hit: bool) -> None:
        """Count a finished shard."""
        with self._lock:
            self.done_shards += 1
            self.hits += is_hit
            if self._bar is not None:
                self._bar.set_postfix_str(f"{self.done_shards}/{self.shards} shards, {self.hits} hits")

    def line(self) -> str:
        """The state in one line."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = self.done_bytes / seconds
        rest = f"{(self.total - self.done_bytes) / rate:.0f} s" if rate else "unknown"
        share = self.done_bytes / self.total if self.total else 1.0
        of_shards = f", {self.done_shards} of {self.shards} shards, {self.hits} hits" if self.shards else ""
        size = f"{human_bytes(self.done_bytes)} of {human_bytes(self.total)} ({share:.0%})"
        return f"{self.label}: {size}, {rate / 1e9:.2f} GB/s, ETA {rest}{of_shards}"

    def clear(self) -> None:
        """Take the bar off the terminal, so that a line can be written; the next update brings it back."""
        if self._bar is not None:
            self._bar.clear()

    def close(self) -> None:
        """Take the bar off the terminal for good."""
        with self._lock:
            if self._bar is not None:
                self._bar.close()
                self._bar = None
