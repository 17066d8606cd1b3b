"""A crew: the threads that work on the row blocks of all shards in hand, and the memory that they share.

Whoever has a shard gives its job to the crew of a device and waits. Threads spread over the jobs: with as many shards
as threads each has its own, and all of them work on one that is alone. Memory is bounded in bytes: a piece of work
first books what it will hold, and waits while others hold too much. So it depends on neither shards nor tensors.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol

from shardmill.kernels.lanes import CPU_BLOCK_BYTES, DEVICE_BLOCK_BYTES, BlockSize, CpuLane, Lane, TorchLane
from shardmill.kernels.threads import cores

DEVICE_LANES: Final = 3
"""Threads per accelerator: one reads and sends, one computes, one fetches and writes."""
_WINDOW_BLOCKS: Final = 3
"""Row blocks, in staging memory and as codes, that a thread may have in hand on average."""
_LEAST_WINDOW: Final = 64 << 20
_WAKE_SECONDS: Final = 0.5
"""A thread that waits without end hears no signal."""


class Job(Protocol):
    """Work in pieces that several threads do together."""

    def is_ready(self) -> bool:
        """Whether a step would not have to wait for other jobs. Asked under a lock of the crew, and raises nothing."""

    def step(self) -> bool:
        """Take a piece and finish it; False when none was left to take."""


@dataclass(slots=True)
class _Shift:
    """A job that the crew works on."""

    job: Job
    threads: int = 0
    """In `step` now."""
    is_taken: bool = False
    """Whether no piece is left to take."""
    error: BaseException | None = None
    """The first that a step raised."""
    done: threading.Event = field(default_factory=threading.Event)


class Window:
    """A budget of bytes that many threads book from."""

    def __init__(self, nbytes: int) -> None:
        self._limit = nbytes
        self._booked = 0
        self._changed = threading.Condition()

    def book(self, nbytes: int, is_over: Callable[[], bool]) -> bool:
        """Wait for room, and take it; what exceeds the whole window is alone in it. False where `is_over` says so."""
        with self._changed:
            while self._booked and self._booked + nbytes > self._limit:
                if is_over():
                    return False
                self._changed.wait(_WAKE_SECONDS)
            self._booked += nbytes
            return True

    def give_back(self, nbytes: int) -> None:
        """Free what was booked."""
        with self._changed:
            self._booked -= nbytes
            self._changed.notify_all()


class Crew:
    """The threads of one device."""

    def __init__(self, threads: int, block: BlockSize, new_lane: Callable[[], Lane]) -> None:
        self.block = block
        self.window = Window(max(_LEAST_WINDOW, threads * _WINDOW_BLOCKS * 2 * block.nbytes))
        self._size = threads
        self._new_lane = new_lane
        self._lanes: deque[Lane] = deque()
        self._shifts: list[_Shift] = []
        self._changed = threading.Condition()
        self._started = 0
        self._waiting = 0
        """Threads that wait for a job to get ready."""

    def take_lane(self) -> Lane:
        """A lane that nobody uses; give it back when what it encoded is written."""
        try:
            return self._lanes.pop()
        except IndexError:
            return self._new_lane()

    def give_lane(self, lane: Lane) -> None:
        """Let others use a lane; dropped where as many as can be busy are free, because the memory of each is kept."""
        if len(self._lanes) < self._size * _WINDOW_BLOCKS:
            self._lanes.append(lane)

    def work_on(self, job: Job) -> None:
        """Do all of a job.

        Raises:
            Exception: the first that a step raised; no step runs any more.
        """
        shift = _Shift(job)
        try:
            with self._changed:
                self._start_threads()
                self._shifts.append(shift)
                self._changed.notify_all()
            while not shift.done.wait(_WAKE_SECONDS):
                pass
        except BaseException:
            self._drop(shift)
            raise
        if shift.error is not None:
            raise shift.error

    def _drop(self, shift: _Shift) -> None:
        """Take no more pieces of a job, and wait for those in work."""
        with self._changed:
            shift.is_taken = True
            if shift in self._shifts:
                self._shifts.remove(shift)
            while shift.threads:
                self._changed.wait(_WAKE_SECONDS)

    def _start_threads(self) -> None:
        while self._started < self._size:
            threading.Thread(target=self._serve, name=f"crew-{self._started + 1}", daemon=True).start()
            self._started += 1

    def _serve(self) -> None:
        while True:
            with self._join_a_shift() as shift:
                try:
                    more = shift.job.step()
                except BaseException as error:  # noqa: BLE001 - it is raised where the job was given
                    shift.error = shift.error or error
                    more = False
                if not more:
                    shift.is_taken = True

    @contextmanager
    def _join_a_shift(self) -> Iterator[_Shift]:
        """Wait for a job with pieces left that is ready, and choose the one that fewest threads work on."""
        with self._changed:
            while not (ready := [shift for shift in self._shifts if not shift.is_taken and shift.job.is_ready()]):
                self._wait_for_jobs()
            shift = min(ready, key=lambda shift: shift.threads)
            shift.threads += 1
        try:
            yield shift
        finally:
            with self._changed:
                shift.threads -= 1
                if shift.is_taken and not shift.threads:
                    if shift in self._shifts:
                        self._shifts.remove(shift)
                    shift.done.set()
                    self._changed.notify_all()
                elif self._waiting:
                    self._changed.notify_all()  # what this step gave back may be what another job waits for

    def _wait_for_jobs(self) -> None:
        """Wait for a job; also for one to get ready, which something outside the crew may bring about unheard."""
        has_some = any(not shift.is_taken for shift in self._shifts)
        self._waiting += 1
        self._changed.wait(_WAKE_SECONDS if has_some else None)
        self._waiting -= 1


_crews: Final[dict[tuple[str, bool], Crew]] = {}


def crew_of(device: str, *, is_torch: bool) -> Crew:
    """The crew of a device in this process."""
    key = device, is_torch
    if key not in _crews:
        # two shards may come here at once; a spare crew has no thread yet, and everybody gets the first
        _crews.setdefault(key, _new_crew(device, is_torch=is_torch))
    return _crews[key]


def _new_crew(device: str, *, is_torch: bool) -> Crew:
    if not is_torch:
        return Crew(cores(), BlockSize(CPU_BLOCK_BYTES), CpuLane)
    import torch  # takes seconds, and the CPU needs none of it

    is_cpu = torch.device(device).type == "cpu"
    threads = max(1, cores() // torch.get_num_threads()) if is_cpu else DEVICE_LANES
    block = BlockSize(CPU_BLOCK_BYTES if is_cpu else DEVICE_BLOCK_BYTES)
    return Crew(threads, block, lambda: TorchLane(device, block))


os.register_at_fork(after_in_child=_crews.clear)  # threads do not survive a fork
