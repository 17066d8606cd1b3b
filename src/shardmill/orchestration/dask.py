"""Shards on the workers of a Dask cluster; imported only by who chooses it, since it takes the extra `dask`."""

from __future__ import annotations

import asyncio
import logging
import os
import pkgutil
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from dask import config
from distributed import LocalCluster, Security, Worker, WorkerPlugin
from distributed.comm.core import CommClosedError
from distributed.scheduler import KilledWorker, NoValidWorkerError, NoWorkerError
from prefect.client.orchestration import get_client
from prefect.futures import PrefectFuture
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.tasks import Task
from prefect_dask.client import PrefectDaskClient
from prefect_dask.task_runners import PrefectDaskFuture

from shardmill.core.plan import ShardPlan
from shardmill.errors import WorkerLost, show
from shardmill.orchestration.bench import Job, bench_of, forget_bench, set_own_device, uninspected
from shardmill.orchestration.executors import ShardResult, Submit, Window, invalid, settle

GPU: Final = "GPU"
"""The resource that a worker with an accelerator offers, and that a shard takes one of."""
_CODE: Final = ("shardmill:__version__", "shardmill.core.digest:STAGE_VERSIONS", "prefect:__version__")
"""What must be the same on every worker as here."""
_JOIN_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 6.0
"""How long shards have to end after a request to stop."""
_LOST: Final = (
    KilledWorker,
    NoValidWorkerError,
    NoWorkerError,
    CancelledError,
    CommClosedError,
    asyncio.CancelledError,
)
_OWN_CLUSTER: Final = {
    # A worker that died is started again; after 15 s, which a busy machine needs, Dask would give it up for good.
    "distributed.deploy.lost-worker-timeout": "1 day",
    # Where no worker can be started any more, shards fail instead of waiting for ever.
    "distributed.scheduler.no-workers-timeout": "10 minutes",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dask:
    """Workers of a running scheduler, or of a cluster of worker processes on this machine."""

    scheduler: str
    """Address; empty for a cluster on this machine that lives as long as the shards are worked on."""
    devices: tuple[str, ...]
    """Without a scheduler: one worker process for each."""
    stop: threading.Event
    """Set when the caller gives up, so that running shards end soon."""

    def map_shards(
        self, task: Task[..., Any], shards: Iterable[ShardPlan], **const: Any
    ) -> Generator[tuple[ShardPlan, ShardResult], None, None]:
        """Run `task(shard=…, **const)` for every shard, with at most two per worker outstanding.

        A shard whose worker dies is begun again on another one; one that outlives no worker becomes a `WorkerLost`.

        Args:
            task: Run on the workers, which need what it needs, and reach source and store under the same names.
            shards: In the order in which they are submitted.
            const: Further arguments; `job` is among them.

        Raises:
            ExecutorInvalid: there is no such scheduler, it has no fitting workers, or they run other code.
        """
        with self._connected() as client, _reachable_server():
            resources = self._resources(client, const["job"])
            _check_code(client)
            threads = max(client.nthreads().values())
            job = _told(const["job"], threads)
            client.run(forget_bench, job.run)  # a run that was killed and is retried has the same name

            def submit(shard: ShardPlan) -> PrefectFuture[Any]:
                parameters = {"shard": uninspected(shard), **const, "job": job}
                future = client.submit(
                    task, parameters=parameters, return_type="state", resources=resources, pure=False
                )
                return PrefectDaskFuture[Any](wrapped_future=future, task_run_id=future.task_run_id)

            window = Window(shards)
            try:
                for shard, future in self._settled(client, window, submit, resources, job):
                    yield shard, _settle(future)
            except BaseException:
                self.stop.set()
                _end(client, window, job)
                raise
            finally:
                _leave(client, job)

    def _settled(
        self, client: PrefectDaskClient, window: Window, submit: Submit, resources: dict[str, int] | None, job: Job
    ) -> Iterator[tuple[ShardPlan, PrefectFuture[Any]]]:
        """Finished tasks as they come.

        When a worker dies, Dask suspects every shard that it was given, those that only waited there too. So suspects
        are tried again at the end, one at a time: only a shard that was alone with its worker can have killed it.
        """
        suspects: list[ShardPlan] = []
        is_alone = False
        while True:
            window.fill(0 if self.stop.is_set() else 2 * max(1, _slots(client, resources)), submit)
            if not window.pending and suspects and not self.stop.is_set():
                window.submit(suspects.pop(), submit)
                is_alone = True
            if not window.pending:
                return
            if found := window.next():
                if is_alone or not _was_killed(found[1]):
                    yield found
                else:
                    suspects.append(found[0])
            elif self.stop.is_set():
                client.run(_stop_shards, job, on_error="ignore")

    @contextmanager
    def _connected(self) -> Iterator[PrefectDaskClient]:
        if not self.scheduler:
            with (
                _quiet(),
                config.set(_OWN_CLUSTER),
                LocalCluster(
                    n_workers=len(self.devices),
                    threads_per_worker=1,
                    memory_limit=0,  # a worker needs two row blocks, whatever the shard; nothing is kept there
                    dashboard_address="127.0.0.1:0",  # None would take port 8787
                    security=Security.temporary(),  # who reaches a scheduler runs code
                ) as cluster,
                PrefectDaskClient(cluster, set_as_default=False) as client,
            ):
                client.register_plugin(_Share(self.devices))
                yield client
            return
        try:
            client = PrefectDaskClient(self.scheduler, set_as_default=False)
        except (OSError, ValueError) as error:
            message = f"no scheduler answers at {show(self.scheduler)}: {error}"
            raise invalid("dask-unreachable", message, "start one, or leave dask_scheduler empty") from error
        with client:
            yield client

    def _resources(self, client: PrefectDaskClient, job: Job) -> dict[str, int] | None:
        """What each shard takes of its worker."""
        try:
            client.wait_for_workers(1, timeout=_JOIN_SECONDS)
        except TimeoutError:
            message = f"the scheduler has no workers, {_JOIN_SECONDS:.0f} s after it was asked"
            raise invalid("dask-no-worker", message, "start workers: `dask worker ADDRESS --nthreads 1`") from None
        device = job.options.device
        if not self.scheduler or device == "cpu":
            return None
        if "," in device:
            message = f"device {show(device)} names several devices, and each worker takes what it sees"
            raise invalid("dask-devices", message, "name one kind, such as cuda, and start one worker per device")
        if _slots(client, {GPU: 1}):
            return {GPU: 1}
        if device == "auto":
            return None
        message = f"no worker offers the resource {GPU}, so shards on {show(device)} would wait for ever"
        raise invalid("dask-no-gpu", message, "start one worker per device: `dask worker ADDRESS --resources GPU=1`")


def _told(job: Job, threads: int) -> Job:
    """The job as workers are told: a worker process computes as many shards at a time as it has threads."""
    return replace(job, options=replace(job.options, workers=threads))


def _slots(client: PrefectDaskClient, resources: Mapping[str, int] | None) -> int:
    """Shards that the workers can take at a time, as of now; workers may come and go."""
    workers = client.scheduler_info()["workers"].values()
    if resources is None:
        return sum(worker["nthreads"] for worker in workers)
    return sum(min(int(worker["resources"].get(GPU, 0)), worker["nthreads"]) for worker in workers)


def _check_code(client: PrefectDaskClient) -> None:
    """Refuse workers that would write other bytes, or could not read what they are sent.

    Asked in words of the standard library, since a worker may know none of ours.
    """
    for name in _CODE:
        here = pkgutil.resolve_name(name)
        for worker, there in sorted(client.run(pkgutil.resolve_name, name, on_error="return").items()):
            if there != here:
                shown = show(f"{type(there).__name__}: {there}" if isinstance(there, Exception) else str(there))
                message = f"worker {show(worker)} has another {name.replace(':', '.')}: {shown}, here `{here}`"
                raise invalid("dask-other-code", message, "install the same release on every worker, and restart it")


def _was_killed(future: PrefectFuture[Any]) -> bool:
    return isinstance(future, PrefectDaskFuture) and isinstance(future.wrapped_future.exception(), KilledWorker)


def _settle(future: PrefectFuture[Any]) -> ShardResult:
    """The outcome of a shard, or its error."""
    try:
        return settle(future)
    except KilledWorker as error:
        message = (
            f"the worker that had it died {error.allowed_failures + 1} times, last {error.last_worker.address}; "
            "see that worker's log, give it more memory, or run again: finished shards are kept"
        )
        return WorkerLost(message)
    except _LOST as error:
        return WorkerLost(f"the scheduler gave it up: {error!r}; run again: finished shards are kept")
    except Exception as error:  # noqa: BLE001  an outcome that cannot be sent is that shard's error, and no other's
        return error


def _end(client: PrefectDaskClient, window: Window, job: Job) -> None:
    """Ask running shards to stop and wait a little for them, so that they remove what they began."""
    deadline = time.monotonic() + _STOP_SECONDS
    with suppress(*_LOST, OSError, TimeoutError):
        while window.pending and time.monotonic() < deadline:
            client.run(_stop_shards, job, on_error="ignore")  # again: a worker may have been started meanwhile
            window.next()
        client.cancel([future.wrapped_future for future in window.pending if isinstance(future, PrefectDaskFuture)])


def _leave(client: PrefectDaskClient, job: Job) -> None:
    """Keep nothing of the run on the workers, nor what killed ones left in the store."""
    with suppress(*_LOST, OSError, TimeoutError):
        client.run(forget_bench, job.run, on_error="ignore")
    bench_of(job).store.folder.sweep()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep a cluster of our own from telling how it starts and ends."""
    logger = logging.getLogger("distributed")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _reachable_server() -> Iterator[None]:
    """Name the server that Prefect started for this process, where there is no other: workers send it their states."""
    if PREFECT_API_URL.value():
        yield
        return
    with get_client(sync_client=True) as server:
        url = str(server.api_url)
    if not url.startswith("http://127.0.0.1"):
        yield
        return
    with temporary_settings({PREFECT_API_URL: url}):
        yield


# ---- on the workers ---------------------------------------------------------------------------------------------


class _Share(WorkerPlugin):
    """Gives each worker process of a machine its device and its share of the cores, also after a restart."""

    def __init__(self, devices: tuple[str, ...]) -> None:
        self.name = "shardmill-share"
        self._devices = devices

    def setup(self, worker: Worker) -> None:
        """Called on the worker when it joins; its name is its number."""
        number = int(str(worker.name))
        set_own_device(self._devices[number])
        cores = sorted(os.sched_getaffinity(0))
        share = cores[number :: len(self._devices)] or [cores[number % len(cores)]]
        for thread in Path("/proc/self/task").iterdir():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread.name), share)


def _stop_shards(job: Job) -> None:
    bench_of(job).stop.set()
