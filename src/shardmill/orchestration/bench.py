"""What the tasks of one flow run share: the job they are told, and a workbench per process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar, cast

from prefect.utilities.annotations import quote

from shardmill.stages.devices import DevicePool, resolve_devices
from shardmill.stages.pipeline import RunOptions
from shardmill.stages.plan import Locations
from shardmill.stages.quantize import Controls
from shardmill.storage.source import SourceFolder

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every task of one flow run is told: plain values, which can cross to another process."""

    run: str
    """Names the flow run."""
    locations: Locations
    options: RunOptions
    label: str = ""
    """Checkpoint and scheme, for people; foreign text that was made printable and cut."""


class Meter:
    """Source bytes that shards in work in this process have read so far."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}

    def begin(self, shard: str) -> Callable[[int], None]:
        """Count a shard's bytes from nothing, also when it is tried again; returns what is told about them."""

        def count(size: int) -> None:
            with self._lock:
                self._counts[shard] += size

        with self._lock:
            self._counts[shard] = 0
        return count

    def counts(self) -> dict[str, int]:
        """Bytes by shard, of those that were begun, the finished ones among them."""
        with self._lock:
            return dict(self._counts)


class Workbench:
    """What the tasks of one flow run share inside one process: source, store, devices and the request to stop."""

    def __init__(self, job: Job) -> None:
        self.store = job.locations.open_store(job.options.verify)
        self.stop = threading.Event()
        self.meter = Meter()
        self._job = job
        self._lock = threading.Lock()
        self._controls: Controls | None = None

    @property
    def source(self) -> SourceFolder:
        """The source.

        Raises:
            CheckpointInvalid: there is no such folder.
        """
        return self._job.locations.open_source()

    def controls(self) -> Controls:
        """Devices and the request to stop; made at the first miss, since naming devices may take torch."""
        with self._lock:
            if self._controls is None:
                devices = _own_device or resolve_devices(self._job.options.device, self._job.options.workers)
                self._controls = Controls(DevicePool(devices), self.stop.is_set)
            return self._controls

    def controls_of(self, shard: str) -> Controls:
        """The same for one shard, whose bytes are counted."""
        return replace(self.controls(), on_bytes=self.meter.begin(shard))


_KEPT: Final = 64
"""Workbenches that a process keeps of runs whose flow is elsewhere, and may have died without a word."""
_benches: dict[str, Workbench] = {}
"""By run, the last used at the end."""
_held: set[str] = set()
"""Runs whose flow is in this process."""
_benches_lock = threading.Lock()
_own_device: tuple[str, ...] = ()


def bench_of(job: Job) -> Workbench:
    """The workbench of a flow run in this process."""
    with _benches_lock:
        bench = _benches.pop(job.run, None) or Workbench(job)
        _benches[job.run] = bench
        for run in [run for run in _benches if run not in _held][:-_KEPT]:
            del _benches[run]
        return bench


def forget_bench(run: str) -> None:
    """Drop the workbench of a run whose flow is in another process."""
    with _benches_lock:
        if run not in _held:
            _benches.pop(run, None)


def set_own_device(device: str) -> None:
    """Let this process compute on one device, whatever a job says: it is one of several that share a machine."""
    global _own_device  # noqa: PLW0603  a property of the process
    _own_device = (device,)


@contextmanager
def workbench(job: Job) -> Iterator[Workbench]:
    """The workbench as long as the flow runs; whatever ends the flow early asks its shards to stop.

    Cancelling raises in the main thread only, so the threads that work on shards must be told.
    """
    with _benches_lock:
        _held.add(job.run)
    bench = bench_of(job)
    try:
        yield bench
    except BaseException:
        bench.stop.set()
        raise
    finally:
        with _benches_lock:
            _held.discard(job.run)
        forget_bench(job.run)


class _Uninspected(quote):
    """Prefect's annotation, which alone does not survive pickling: it comes back around a tuple."""

    __slots__ = ()

    def __getnewargs__(self) -> tuple[Any]:
        return (self.unquote(),)


def uninspected(value: T) -> T:
    """Keep Prefect from visiting every part of a large parameter, which takes longer than the task.

    Typed as what the task receives.
    """
    return cast(T, _Uninspected(value))
