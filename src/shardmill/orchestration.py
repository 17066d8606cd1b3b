"""Where Prefect meets shardmill: cache policy, retry condition, executor, workbench, logs.

The store is the truth and Prefect a thin layer over it: a task's key is its job key, and a result record counts only
when it is one of ours and says what the store says. Nothing here computes, and nothing here changes bytes.
"""

from __future__ import annotations

import errno
import json
import logging
import queue
import socket
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias, TypeVar, cast

from prefect.cache_policies import CachePolicy
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import FlowRunContext, TaskRunContext
from prefect.filesystems import LocalFileSystem
from prefect.futures import PrefectFuture
from prefect.logging.handlers import APILogHandler
from prefect.serializers import JSONSerializer
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import Task
from prefect.utilities.annotations import quote

from shardmill.core.outcome import ShardOutcome
from shardmill.core.plan import ShardPlan
from shardmill.errors import NAME_LIMIT, Interrupted, Refused, ShardmillError, SourceChanged, StorageUnavailable
from shardmill.stages.devices import DevicePool, resolve_devices
from shardmill.stages.pipeline import RunOptions
from shardmill.stages.plan import Locations
from shardmill.stages.quantize import Controls, find_stored
from shardmill.storage.source import SourceFolder
from shardmill.storage.store import FULL, Store

T = TypeVar("T")
CACHED: Final = "Cached"
"""Name of the state of a shard that was not computed; Prefect uses the same word."""

STORED_TYPE: Final = f"{ShardOutcome.__module__}.{ShardOutcome.__qualname__}"
"""The class that a result record may name; reading a record calls what it names."""
RECORD_FIELDS: Final = frozenset({"storage_key", "expiration", "serializer", "prefect_version", "storage_block_id"})
"""Of a record's metadata, as this Prefect writes them; a record with others is foreign."""

ShardResult: TypeAlias = ShardOutcome | BaseException
"""What became of one shard."""


# ---- what the tasks of one flow run share -----------------------------------------------------------------------


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


# ---- cache ------------------------------------------------------------------------------------------------------


def bytes_to_digest(shards: Iterable[ShardPlan], source: SourceFolder, store: Store) -> int:
    """Bytes of the shards whose digest is not known and must be taken."""
    is_full = store.verify_level == FULL
    return sum(shard.size for shard in shards if is_full or store.known_digest(source.identity(shard.name)) is None)


@dataclass
class StageCachePolicy(CachePolicy):
    """A stage's key is its job key; a record under it counts only while the store vouches for it.

    Prefect takes any readable record for a hit, and reading one imports and calls what it names. So every record is
    looked at before Prefect does, and removed unless it is ours and agrees with the store.
    """

    stage: str = "quantize"

    def compute_key(
        self, task_ctx: TaskRunContext, inputs: dict[str, Any], flow_parameters: dict[str, Any], **_: Any
    ) -> str | None:
        """Name the work, and leave a record under that name only if it can be trusted.

        Returns:
            The key, or None where naming the job takes reading the source, or where records do not lie on this
            machine's disk: then nothing is looked up or recorded, and the body asks the store.
        """
        del flow_parameters
        shard, bench = inputs["shard"], bench_of(inputs["job"])
        with suppress(Refused):  # the body says what is wrong with the source
            job = bench.store.known_job(shard, bench.source)
            key = f"{self.stage}-{job.key}" if job is not None else ""
            record = _record_path(task_ctx, key) if key else None
            if record is not None and record.exists():
                stored = find_stored(shard, bench.source, bench.store)
                if stored is None or not agrees(record.read_bytes(), stored):
                    record.unlink(missing_ok=True)
            return None if record is None else key
        return None


def _record_path(task_ctx: TaskRunContext, key: str) -> Path | None:
    """Where the engine will look for the record of `key`."""
    storage = task_ctx.result_store.result_storage
    if not isinstance(storage, LocalFileSystem) or not storage.basepath:
        return None
    return Path(storage.basepath).expanduser().resolve() / key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a JSON object names a key twice")
    return found


def _is_ours(value: Any) -> bool:
    """Whether everything that a decoder would import or call below `value` is one of our types."""
    if isinstance(value, list):
        return all(map(_is_ours, value))
    if not isinstance(value, dict):
        return True
    named = value.get("__class__", STORED_TYPE)
    return named == STORED_TYPE and "__exc_type__" not in value and all(map(_is_ours, value.values()))


def is_own_record(content: bytes) -> bool:
    """Whether a result record can be decoded without running anything foreign.

    The decoder obeys the serializer, the classes and even the older field names that a record holds, so a record must
    have exactly the form in which it is written.
    """
    try:
        record = json.loads(content, object_pairs_hook=_unique)
        metadata, result = record["metadata"], json.loads(record["result"], object_pairs_hook=_unique)
        return (
            set(record) == {"metadata", "result"}
            and set(metadata) == RECORD_FIELDS
            and metadata["serializer"] == JSONSerializer().model_dump()
            and metadata["storage_block_id"] is None
            and isinstance(result, dict)
            and result.get("__class__") == STORED_TYPE
            and _is_ours(result)
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def agrees(content: bytes, stored: ShardOutcome) -> bool:
    """Whether a result record is ours and holds what the store holds for the same sources."""
    if not is_own_record(content):
        return False
    try:
        recorded = JSONSerializer[ShardOutcome]().loads(json.loads(content)["result"].encode())
    except (ValueError, KeyError, TypeError):
        return False
    if (recorded.shard, recorded.sources) != (stored.shard, stored.sources):
        return False
    # A receipt is stored with rounded figures, and a record may hold them as they were computed.
    return recorded.receipt == stored.receipt or recorded.receipt.to_bytes() == stored.receipt.to_bytes()


# ---- what is worth another try ----------------------------------------------------------------------------------

_TRANSIENT_ERRNO: Final = frozenset(
    {
        errno.EAGAIN,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.EPIPE,
        errno.ESTALE,
        errno.ETIMEDOUT,
        socket.EAI_AGAIN,
    }
)
_TRANSIENT_STATUS: Final = frozenset({408, 429, 500, 502, 503, 504})
_TRANSIENT_TYPES: Final = frozenset(
    {
        "aiohttp.ClientConnectionError",
        "aiohttp.ClientPayloadError",
        "botocore.ConnectionClosedError",
        "botocore.EndpointConnectionError",
        "botocore.HTTPClientError",
        "httpx.TransportError",
        "requests.ConnectionError",
        "requests.Timeout",
    }
)
"""Errors of storage libraries that are no `ConnectionError` or `TimeoutError`; importing them would cost time."""
_CAUSES: Final = 8


def is_transient_error(error: BaseException | None) -> bool:
    """Whether the same work may succeed a little later: connection, server error or timeout.

    >>> is_transient_error(ConnectionResetError()), is_transient_error(OSError(errno.ENOSPC, "no space"))
    (True, False)
    """
    for _ in range(_CAUSES):
        if error is None or isinstance(error, Refused | SourceChanged | Interrupted):
            return False
        names = {f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(error).__mro__}
        if isinstance(error, ConnectionError | TimeoutError | StorageUnavailable) or names & _TRANSIENT_TYPES:
            return True
        if (isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO) or _status(error) in _TRANSIENT_STATUS:
            return True
        error = error.__cause__
    return False


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error carries, as httpx, requests, botocore and aiohttp do."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {})
        found = response.get("HTTPStatusCode") if isinstance(response, dict) else None
    else:
        found = getattr(response, "status_code", getattr(error, "status", None))
    return found if isinstance(found, int) else None


def is_transient(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Retry condition of tasks that move bytes."""
    return is_transient_error(state.data if isinstance(state.data, BaseException) else None)


# ---- executor ---------------------------------------------------------------------------------------------------


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


def shard_run_name(parameters: dict[str, Any]) -> str:
    """Name of the task run of a shard; the shard's name is foreign text."""
    return f"quantize {plain(parameters['shard'].name)}"


def plain(text: str, limit: int = NAME_LIMIT) -> str:
    r"""Foreign text for a name or a table cell: control characters escaped, cut at `limit` characters.

    >>> plain("model\n-1.safetensors")
    'model\\n-1.safetensors'
    """
    safe = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: limit + 1])
    return safe if len(safe) <= limit else f"{safe[: limit - 1]}…"


# ---- logs -------------------------------------------------------------------------------------------------------


class _RunLogHandler(APILogHandler):
    """Sends what the library says within a run to the run's log; elsewhere there is no run to send it to."""

    def emit(self, record: logging.LogRecord) -> None:
        if FlowRunContext.get() is not None or TaskRunContext.get() is not None:
            super().emit(record)


@contextmanager
def library_logs() -> Iterator[None]:
    """Show the library's own log lines, INFO and above, in the logs of the run."""
    logger = logging.getLogger("shardmill")
    handler, level = _RunLogHandler(logging.INFO), logger.level
    logger.addHandler(handler)
    if logger.getEffectiveLevel() > logging.INFO:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
