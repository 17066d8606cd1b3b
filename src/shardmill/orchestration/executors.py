"""Where the shards of a run are worked on; the executor's name is in no key."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Final, Protocol, TypeAlias

from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import Task

from shardmill.core.outcome import ShardOutcome
from shardmill.core.plan import ShardPlan
from shardmill.errors import ShardmillError
from shardmill.orchestration.bench import uninspected
from shardmill.orchestration.cache import CACHED

ShardResult: TypeAlias = ShardOutcome | BaseException
"""What became of one shard."""
_WAKE_SECONDS: Final = 0.5


class Executor(Protocol):
    """Runs one task per shard somewhere; its name is in no key."""

    def map_shards(
        self, task: Task[..., Any], shards: Iterable[ShardPlan], **const: Any
    ) -> Generator[tuple[ShardPlan, ShardResult], None, None]:
        """Yield every shard with its outcome or its error, in the order in which they are settled."""
        ...


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
        waiting = iter(shards)
        settled: queue.SimpleQueue[PrefectFuture[Any]] = queue.SimpleQueue()
        pending: dict[PrefectFuture[Any], ShardPlan] = {}
        with ThreadPoolTaskRunner[Any](max_workers=self.workers) as runner:
            try:
                while True:
                    free = 0 if self.stop.is_set() else 2 * self.workers - len(pending)
                    for shard in islice(waiting, free):
                        future = runner.submit(task, {"shard": uninspected(shard), **const})
                        pending[future] = shard
                        future.add_done_callback(settled.put)
                    if not pending:
                        return
                    done = _next(settled)
                    yield pending.pop(done), _settle(done)
            except BaseException:
                self.stop.set()
                raise


def _next(settled: queue.SimpleQueue[PrefectFuture[Any]]) -> PrefectFuture[Any]:
    """Wait for a finished task; wakes up often, because a signal that another thread receives wakes nobody."""
    while True:
        with suppress(queue.Empty):
            return settled.get(timeout=_WAKE_SECONDS)


def _settle(future: PrefectFuture[Any]) -> ShardResult:
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
