"""Who works on what, how much is in hand, and what is left after failures."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmill.kernels import crew as crew_module
from shardmill.kernels.crew import Crew, Window, crew_of
from shardmill.kernels.lanes import BlockSize, CpuLane

PATIENCE = 60.0
"""Seconds after which a thread that should have come is taken for lost."""


def never() -> bool:
    return False


def new_crew(threads: int) -> Crew:
    return Crew(threads, BlockSize(1 << 20), CpuLane)


@contextmanager
def started(*targets: Callable[[], Any]) -> Iterator[list[BaseException]]:
    """Run functions in threads of their own, and wait for them in the end; gives what they raised."""
    errors: list[BaseException] = []

    def guard(target: Callable[[], Any]) -> None:
        try:
            target()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            errors.append(error)

    threads = [threading.Thread(target=guard, args=(target,), daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    yield errors
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread brings about."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


# Window


@given(
    limit=st.integers(1, 40),
    sizes=st.lists(st.lists(st.integers(0, 60), max_size=12), min_size=1, max_size=4),
)
@settings(max_examples=30)
def test_a_window_holds_no_more_than_its_limit_but_for_one_alone(limit: int, sizes: list[list[int]]) -> None:
    window, lock = Window(limit), threading.Lock()
    held: list[int] = []
    broken: list[list[int]] = []

    def work(mine: list[int]) -> None:
        for nbytes in mine:
            assert window.book(nbytes, never)
            with lock:
                held.append(nbytes)
                if sum(held) > limit and sum(size > 0 for size in held) > 1:
                    broken.append(list(held))
            with lock:
                held.remove(nbytes)
            window.give_back(nbytes)

    with started(*(lambda mine=mine: work(mine) for mine in sizes)) as errors:
        pass
    assert errors == []
    assert broken == []
    assert window._booked == 0


def test_who_waits_for_room_gets_it_when_it_is_given_back() -> None:
    window, is_waiting = Window(10), threading.Event()

    def is_over() -> bool:
        is_waiting.set()
        return False

    assert window.book(10, never)
    found: list[bool] = []
    with started(lambda: found.append(window.book(1, is_over))):
        assert is_waiting.wait(PATIENCE)
        assert found == []
        window.give_back(10)
    assert found == [True]


def test_who_waits_for_room_leaves_when_it_is_over_and_holds_nothing() -> None:
    window = Window(10)
    assert window.book(7, never)
    over = threading.Event()
    found: list[bool] = []
    with started(lambda: found.append(window.book(4, over.is_set))):
        over.set()
    assert found == [False]
    assert window._booked == 7


def test_more_than_the_window_gets_in_when_it_is_empty() -> None:
    window = Window(10)
    assert window.book(11, never)
    assert not window.book(1, lambda: True)
    window.give_back(11)
    assert window.book(10, lambda: True)


# Crew


@dataclass
class Pieces:
    """A job of `count` pieces that counts what is done."""

    count: int
    on_piece: Callable[[int], object] = lambda _number: None
    done: list[int] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    ready: Callable[[], bool] = lambda: True
    lock: threading.Lock = field(default_factory=threading.Lock)
    taken: int = 0

    def is_ready(self) -> bool:
        return self.ready()

    def step(self) -> bool:
        with self.lock:
            number = self.taken
            if number == self.count:
                return False
            self.taken += 1
        self.on_piece(number)
        with self.lock:
            self.names.add(threading.current_thread().name)
            self.done.append(number)
        return True


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("jobs", [1, 3, 8])
def test_every_piece_of_every_job_is_done_once(threads: int, jobs: int) -> None:
    crew = new_crew(threads)
    work = [Pieces(n * 7) for n in range(jobs)]
    with started(*(lambda job=job: crew.work_on(job) for job in work)) as errors:
        pass
    assert errors == []
    assert [sorted(job.done) for job in work] == [list(range(job.count)) for job in work]


def test_work_on_returns_only_when_the_last_piece_is_done() -> None:
    first, second = threading.Barrier(2), threading.Event()

    def wait(number: int) -> None:
        first.wait(PATIENCE)
        if number == 0:
            assert second.wait(PATIENCE)
        else:
            second.set()

    job = Pieces(2, wait)
    new_crew(2).work_on(job)
    assert sorted(job.done) == [0, 1]


def test_all_threads_gather_on_a_job_that_is_alone() -> None:
    barrier = threading.Barrier(4)
    job = Pieces(4, lambda _number: barrier.wait(PATIENCE))
    new_crew(4).work_on(job)
    assert len(job.names) == 4


def test_threads_spread_over_two_jobs() -> None:
    # Two pieces of each are in work at a time: four threads that all served one job could not pass its barrier.
    met = {name: threading.Barrier(2) for name in "ab"}
    both = threading.Barrier(4)

    def meet(name: str) -> Callable[[int], None]:
        def on_piece(number: int) -> None:
            if number < 2:
                both.wait(PATIENCE)
                met[name].wait(PATIENCE)

        return on_piece

    crew = new_crew(4)
    jobs = [Pieces(9, meet(name)) for name in "ab"]
    gate = Pieces(4, lambda _number: gates.wait(PATIENCE))
    gates = threading.Barrier(5)  # keeps all threads busy until both jobs are there
    with started(lambda: crew.work_on(gate)) as gate_errors:
        until(lambda: gates.n_waiting == 4)
        with started(*(lambda job=job: crew.work_on(job) for job in jobs)) as errors:
            until(lambda: len(crew._shifts) == 3)
            gates.wait(PATIENCE)
    assert gate_errors == errors == []
    assert [len(job.done) for job in jobs] == [9, 9]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_job_that_is_not_ready_takes_no_thread_and_is_done_when_it_is(threads: int) -> None:
    crew, other = new_crew(threads), Pieces(20)
    late = Pieces(5, ready=lambda: len(other.done) == 20)
    with started(lambda: crew.work_on(late), lambda: crew.work_on(other)) as errors:
        pass
    assert errors == []
    assert (len(late.done), len(other.done)) == (5, 20)


def test_a_job_that_something_outside_the_crew_makes_ready_is_done() -> None:
    crew, event = new_crew(2), threading.Event()
    job = Pieces(3, ready=event.is_set)
    with started(lambda: crew.work_on(job)) as errors:
        until(lambda: crew._waiting == 2)
        event.set()
    assert errors == []
    assert len(job.done) == 3


def test_an_error_reaches_its_own_caller_and_ends_its_own_job() -> None:
    crew = new_crew(3)
    error = OSError("broken")
    failed = threading.Event()

    def fail(number: int) -> None:
        if number == 2:
            failed.set()
            raise error
        if number > 2:  # taken while the error was on its way
            assert failed.wait(PATIENCE)

    bad, good = Pieces(10_000, fail), Pieces(50, lambda _number: failed.wait(PATIENCE))
    with started(lambda: crew.work_on(bad), lambda: crew.work_on(good)) as errors:
        pass
    assert errors == [error]
    assert len(good.done) == 50
    taken = bad.taken
    after = Pieces(20)
    crew.work_on(after)
    assert len(after.done) == 20
    assert bad.taken == taken < 10_000
    assert crew._shifts == []


def test_an_error_waits_for_the_pieces_in_work() -> None:
    # Whoever gets the error closes files that those pieces still use.
    together = threading.Barrier(2)
    release = threading.Event()

    def work(number: int) -> None:
        together.wait(PATIENCE)
        if number == 0:
            raise OSError("broken")
        assert release.wait(PATIENCE)

    job, crew = Pieces(2, work), new_crew(2)
    returned = threading.Event()

    def give() -> None:
        try:
            crew.work_on(job)
        finally:
            returned.set()

    with started(give) as errors:
        until(lambda: [(shift.is_taken, shift.threads) for shift in crew._shifts] == [(True, 1)])
        assert not returned.is_set()
        release.set()
    assert [type(error) for error in errors] == [OSError]
    assert job.done == [1]


class Interrupting(threading.Event):
    """An event whose waiter is interrupted, once the job is in work."""

    in_work = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:  # noqa: ARG002 - as the base class has it
        assert self.in_work.wait(PATIENCE)
        raise KeyboardInterrupt


def test_an_interrupt_drops_the_job_and_leaves_the_crew_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = new_crew(2)
    plain = crew_module._Shift
    monkeypatch.setattr(crew_module, "_Shift", lambda job: plain(job, done=Interrupting()))
    job = Pieces(1 << 30, lambda _number: Interrupting.in_work.set())
    with pytest.raises(KeyboardInterrupt):
        crew.work_on(job)
    taken = job.taken
    assert 0 < len(job.done) == taken < 1 << 30
    monkeypatch.undo()
    after = Pieces(30)
    crew.work_on(after)
    assert len(after.done) == 30
    assert job.taken == taken
    assert crew._shifts == []


def test_a_machine_without_threads_fails_and_works_once_it_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    crew, job = new_crew(2), Pieces(5)

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="start new thread"):
            crew.work_on(job)
    monkeypatch.undo()
    crew.work_on(job)
    assert sorted(job.done) == [0, 1, 2, 3, 4]


def test_free_lanes_are_used_again_and_not_kept_without_end() -> None:
    crew = new_crew(2)
    lanes = [crew.take_lane() for _ in range(100)]
    assert len(set(map(id, lanes))) == 100
    for lane in lanes:
        crew.give_lane(lane)
    again = [crew.take_lane() for _ in range(100)]
    kept = set(map(id, lanes)) & set(map(id, again))
    assert 2 <= len(kept) <= 2 * crew_module._WINDOW_BLOCKS


# The crews of a process


@pytest.fixture
def no_crews() -> Iterator[None]:
    before = dict(crew_module._crews)
    crew_module._crews.clear()
    yield
    crew_module._crews.clear()
    crew_module._crews.update(before)


@pytest.mark.usefixtures("no_crews")
def test_shards_that_come_at_once_share_one_crew(monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)
    plain = crew_module._new_crew

    def slow(device: str, *, is_torch: bool) -> Crew:
        both.wait(PATIENCE)
        return plain(device, is_torch=is_torch)

    monkeypatch.setattr(crew_module, "_new_crew", slow)
    found: list[Crew] = []
    with started(*[lambda: found.append(crew_of("cpu", is_torch=False))] * 2) as errors:
        pass
    assert errors == []
    assert len(found) == 2
    assert found[0] is found[1] is crew_of("cpu", is_torch=False)


@pytest.mark.usefixtures("no_crews")
def test_kernels_have_crews_of_their_own() -> None:
    assert crew_of("cpu", is_torch=False) is not crew_of("cpu", is_torch=True)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_process_has_no_crew_of_its_parent() -> None:
    job = Pieces(3)
    crew_of("cpu", is_torch=False).work_on(job)
    assert len(job.done) == 3
    child = os.fork()
    if child == 0:
        os._exit(0 if not crew_module._crews else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert crew_module._crews
