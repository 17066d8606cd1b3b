"""How far a run is, in bytes: what is counted, and the artifact that says it while shards are worked on."""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Final, Self
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from shardmill.core.outcome import ShardOutcome
from shardmill.core.summary import human_bytes

log = logging.getLogger(__name__)
PROGRESS_SECONDS: Final = 2.0
"""Least time between two updates of the artifact."""
_WINDOW: Final = 30
"""Updates over which the rate is taken."""
_JOIN_SECONDS: Final = 5.0
_SLOW: Final = 5e6
"""Bytes per second below which two decimals of a GB say nothing."""


def speed(rate: float) -> str:
    """Write bytes per second.

    >>> speed(352e6), speed(1200)
    ('0.35 GB/s', '1.2 kB/s')
    """
    return f"{rate / 1e9:.2f} GB/s" if rate >= _SLOW else f"{human_bytes(rate)}/s"


def clock_time(seconds: float) -> str:
    """Write a duration as a clock would.

    >>> clock_time(7.4), clock_time(3675)
    ('0:07', '1:01:15')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Tally:
    """Counts of a run: shards that are settled, and the bytes of those in work.

    The rate is that of bytes that were computed in the last minute, since hits take no time; so is what is left.
    """

    def __init__(self, sizes: Mapping[str, int], expected_hits: Collection[str], now: float) -> None:
        self._open = dict(sizes)
        self._expected = set(expected_hits)
        self._total_bytes = sum(sizes.values())
        self._shards = len(sizes)
        self._done_bytes = self._computed_bytes = 0
        self.hits = self.misses = self.failed = 0
        self._began = now
        self._samples: deque[tuple[float, int]] = deque([(now, 0)], maxlen=_WINDOW)

    def settle(self, shard: str, outcome: object) -> None:
        """Count a shard that is not worked on any more."""
        size = self._open.pop(shard)
        if not isinstance(outcome, ShardOutcome):
            self.failed += 1
            return
        self._done_bytes += size
        if outcome.is_hit:
            self.hits += 1
        else:
            self.misses += 1
            self._computed_bytes += size

    def _in_work(self, counts: Mapping[str, int]) -> int:
        return sum(min(size, counts.get(shard, 0)) for shard, size in self._open.items())

    def share(self, counts: Mapping[str, int]) -> float:
        """Percentage of the source that is done.

        Args:
            counts: Bytes by shard, of those in work.
        """
        if not self._total_bytes:
            return 100.0
        return round(100.0 * (self._done_bytes + self._in_work(counts)) / self._total_bytes, 1)

    def say(self, counts: Mapping[str, int], now: float) -> str:
        """Say how far the run is; call it regularly, since the rate is taken between calls.

        Args:
            counts: Bytes by shard, of those in work.
            now: On the clock that told when the tally began.
        """
        in_work = self._in_work(counts)
        computed = self._computed_bytes + in_work
        then, before = self._samples[0]
        self._samples.append((now, computed))
        rate = max(0, computed - before) / (now - then) if now > then else 0.0
        parts = [f"{human_bytes(self._done_bytes + in_work)} of {human_bytes(self._total_bytes)}"]
        if rate:
            left = sum(size for shard, size in self._open.items() if shard not in self._expected) - in_work
            parts += [speed(rate), f"ETA {clock_time(max(0, left) / rate)}"]
        return f"{', '.join(parts)}; {self._said_shards()}"

    def say_end(self, counts: Mapping[str, int], now: float) -> str:
        """Say how the run ended."""
        seconds = now - self._began
        done = human_bytes(self._done_bytes)
        whole = "" if self._done_bytes == self._total_bytes else f" of {human_bytes(self._total_bytes)}"
        parts = [f"{done}{whole} in {clock_time(seconds)}"]
        computed = self._computed_bytes + self._in_work(counts)
        if computed and seconds:
            parts.append(f"{speed(computed / seconds)} computed")
        return f"{', '.join(parts)}; {self._said_shards()}"

    def _said_shards(self) -> str:
        hits = f"{self.hits} hit{'' if self.hits == 1 else 's'}"
        said = f"{self.hits + self.misses} of {self._shards} shards done, {hits}"
        return f"{said}, {self.failed} failed" if self.failed else said


class Progress:
    """Shows a tally as an artifact as long as the block lasts; it moves while a shard is worked on.

    What cannot be written costs one warning and never a shard.
    """

    def __init__(
        self,
        tally: Tally,
        counts: Callable[[], Mapping[str, int]],
        *,
        prefix: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with nothing shown.

        Args:
            tally: On the same clock.
            counts: Tells the bytes by shard, of those in work in this process.
            prefix: Of everything that is said.
        """
        self._tally = tally
        self._counts = counts
        self._prefix = prefix
        self._clock = clock
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._artifact: UUID | None = None
        self._shown: tuple[float, str] | None = None
        self._is_warned = False
        context = contextvars.copy_context()  # Prefect's settings and the run's log
        self._ticker = threading.Thread(target=context.run, args=(self._tick,), name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._write(lambda share, text: create_progress_artifact(share, key="progress", description=text))
        self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._ticker.join(_JOIN_SECONDS)  # it may wait for a server that is gone, and dies with the process
        self._update(self._tally.say_end)

    def settle(self, shard: str, outcome: object) -> None:
        """Count a shard that is not worked on any more."""
        with self._lock:
            self._tally.settle(shard, outcome)

    def _tick(self) -> None:
        while not self._ended.wait(PROGRESS_SECONDS):
            self._update(self._tally.say)

    def _update(self, say: Callable[[Mapping[str, int], float], str]) -> None:
        artifact = self._artifact
        if artifact is not None:
            self._write(lambda share, text: update_progress_artifact(artifact, share, text), say)

    def _write(
        self,
        write: Callable[[float, str], object],
        say: Callable[[Mapping[str, int], float], str] | None = None,
    ) -> None:
        counts = self._counts()
        with self._lock:
            text = self._prefix + (say or self._tally.say)(counts, self._clock())
            now = self._tally.share(counts), text
        if now == self._shown:
            return
        try:
            found = write(*now)
        except Exception as error:  # noqa: BLE001  whatever it is: what a run shows must not cost what it did
            if not self._is_warned:
                log.warning("artifact progress could not be written: %s", error)
            self._is_warned = True
            return
        self._shown = now
        if isinstance(found, UUID):
            self._artifact = found
