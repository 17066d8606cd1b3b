"""What the tasks of one flow run share: the job they are told, and a workbench per process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

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


class Workbench:
    """What the tasks of one flow run share inside one process: source, store, devices and the request to stop."""

    def __init__(self, job: Job) -> None:
        self.store = job.locations.open_store(job.options.verify)
        self.stop = threading.Event()
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
                devices = resolve_devices(self._job.options.device, self._job.options.workers)
                self._controls = Controls(DevicePool(devices), self.stop.is_set)
            return self._controls


_benches: dict[str, Workbench] = {}
_benches_lock = threading.Lock()


def bench_of(job: Job) -> Workbench:
    """The workbench of a flow run in this process."""
    with _benches_lock:
        if job.run not in _benches:
            _benches[job.run] = Workbench(job)
        return _benches[job.run]


@contextmanager
def workbench(job: Job) -> Iterator[Workbench]:
    """The workbench as long as the flow runs; whatever ends the flow early asks its shards to stop.

    Cancelling raises in the main thread only, so the threads that work on shards must be told.
    """
    bench = bench_of(job)
    try:
        yield bench
    except BaseException:
        bench.stop.set()
        raise
    finally:
        with _benches_lock:
            _benches.pop(job.run, None)


def uninspected(value: T) -> T:
    """Keep Prefect from visiting every part of a large parameter, which takes longer than the task.

    Typed as what the task receives.
    """
    return cast(T, quote(value))
