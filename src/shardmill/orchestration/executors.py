"""Where the shards of a run are worked on; the executor's name is in no key."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Final, Protocol, TypeAlias

from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import Task

from shardmill.core.outcome import ShardOutcome
from shardmill.core.plan import ShardPlan
from shardmill.errors import ExecutorInvalid, Problem, ShardmillError
from shardmill.kernels.threads import cores
from shardmill.orchestration.bench import Job, Workbench, uninspected
from shardmill.orchestration.cache import CACHED
from shardmill.stages.devices import resolve_devices

ShardResult: TypeAlias = ShardOutcome | BaseException
"""What became of one shard."""
Submit: TypeAlias = Callable[[ShardPlan], PrefectFuture[Any]]
"""Hands a shard to whoever works on it."""
_WAKE_SECONDS: Final = 0.5


class Executor(Protocol):
    """Runs one task per shard somewhere; its name is in no key."""

    def map_shards(
        self, task: Task[..., Any], shards: Iterable[ShardPlan], **const: Any
    ) -> Generator[tuple[ShardPlan, ShardResult], None, None]:
        """Yield every shard with its outcome or its error, in the order in which they are settled."""
        ...


class Window:
    """Shards that were submitted and are not settled yet."""

    def __init__(self, shards: Iterable[ShardPlan]) -> None:
        self.pending: dict[PrefectFuture[Any], ShardPlan] = {}
        self._waiting = iter(shards)
        self._settled: queue.SimpleQueue[PrefectFuture[Any]] = queue.SimpleQueue()

    def fill(self, size: int, submit: Submit) -> None:
        """Submit shards until `size` are pending."""
        for shard in islice(self._waiting, max(0, size - len(self.pending))):
            self.submit(shard, submit)

    def submit(self, shard: ShardPlan, submit: Submit) -> None:
        """Submit a shard."""
        future = submit(shard)
        self.pending[future] = shard
        future.add_done_callback(self._settled.put)

    def next(self) -> tuple[ShardPlan, PrefectFuture[Any]] | None:
        """A finished task with its shard; None after a short while, so that a request to stop is seen.

        A signal that another thread receives wakes nobody who waits without end.
        """
        try:
            done = self._settled.get(timeout=_WAKE_SECONDS)
        except queue.Empty:
            return None
        return self.pending.pop(done), done


@dataclass(frozen=True, slots=True)
class Threads:
    """The default executor: threads of this process."""

    workers: int
    stop: threading.Event
    """Set when the caller gives up, so that running shards end soon."""

    def map_shards(
        self, task: Task[..., Any], shards: Iterable[ShardPlan], **const: Any
    ) -> Generator[tuple[ShardPlan, ShardResult], None, None]:
        """Run `task(shard=…, **const)` for every shard, with at most two per worker outstanding.

        Every future is resolved here: one that nobody asks for its result fails in silence.
        """
        window = Window(shards)
        with ThreadPoolTaskRunner[Any](max_workers=self.workers) as runner:

            def submit(shard: ShardPlan) -> PrefectFuture[Any]:
                return runner.submit(task, {"shard": uninspected(shard), **const})

            try:
                while True:
                    window.fill(0 if self.stop.is_set() else 2 * self.workers, submit)
                    if not window.pending:
                        return
                    if found := window.next():
                        yield found[0], settle(found[1])
            except BaseException:
                self.stop.set()
                raise


def choose_executor(name: str, scheduler: str, job: Job, bench: Workbench, *, is_stored: bool) -> Executor:
    """The executor of a run; the only place that knows all of them.

    Args:
        name: `threads` or `dask`.
        scheduler: Address of a Dask scheduler; empty for a cluster on this machine.
        is_stored: Whether the store seems to hold every shard: then no device is named and no cluster is started.

    Raises:
        ExecutorInvalid: the choices do not fit together, or what the executor needs is not installed.
    """
    options = job.options
    if name == "threads" and scheduler:
        raise invalid("dask-scheduler", "a scheduler was given to the executor `threads`", "set executor to dask")
    if is_stored and not scheduler:
        return Threads(options.workers or cores(), bench.stop)
    if name == "threads":
        return Threads(len(bench.controls().devices.devices), bench.stop)
    try:
        from shardmill.orchestration.dask import Dask
    except ImportError as error:
        message = f"the executor `dask` is not installed: {error}"
        raise invalid("dask-missing", message, "pip install 'shardmill[dask]'") from None
    devices = () if scheduler else resolve_devices(options.device, options.workers)
    return Dask(scheduler=scheduler, devices=devices, stop=bench.stop)


def invalid(kind: str, message: str, way_out: str) -> ExecutorInvalid:
    """An `ExecutorInvalid` that holds one problem."""
    return ExecutorInvalid([Problem(kind=kind, message=message, way_out=way_out)])


def settle(future: PrefectFuture[Any]) -> ShardResult:
    """The outcome of a finished task, or its error; nothing else counts."""
    future.wait()
    result = future.result(raise_on_failure=False)
    if isinstance(result, BaseException):
        return result
    state: State[Any] = future.state
    if not isinstance(result, ShardOutcome):
        return ShardmillError(f"expected the outcome of a shard, found {type(result).__name__} in state {state.name}")
    if state.name == CACHED and state.message is None:  # from a record, which tells what it cost back then
        return replace(result, is_hit=True, bytes_read=0, seconds=0.0)
    return result
