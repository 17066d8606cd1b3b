"""The four stages in order, in one process with worker threads and no server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Final

from shardmill.core.outcome import ShardOutcome
from shardmill.core.plan import Plan, ShardPlan
from shardmill.core.recipe import Recipe
from shardmill.errors import BlobsGone, Interrupted, ShardFailures
from shardmill.stages.devices import DevicePool, resolve_devices
from shardmill.stages.finalize import claim_of, clear_claim, finalize, published_result
from shardmill.stages.nonfinite import find_kept
from shardmill.stages.plan import Locations, look_up, make_plan
from shardmill.stages.quantize import Controls, failed_checks, find_stored, quantize_shard
from shardmill.stages.validate import pin_readable, refuse_problems, validate_locations, validate_plan
from shardmill.storage.shared import Companion
from shardmill.storage.source import SourceFolder
from shardmill.storage.store import FAST, Store

ROUNDS: Final = 3
"""Times that shards are looked up and done before a run gives up on a store that keeps losing them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a run works; none of it changes bytes."""

    device: str = "auto"
    workers: int = 0
    """Shards in work at a time; 0 chooses by cores or devices."""
    verify: str = FAST


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a finished run has to tell."""

    plan: Plan
    outcomes: tuple[ShardOutcome, ...]
    """In the order of the plan; only those in the store when the destination held the result already."""
    manifest: dict[str, Any]
    seconds: float
    store_checks_failed: int = 0
    """Records and blobs of the store that were found bad, and were not used."""


@dataclass(slots=True)
class Watcher:
    """Callbacks of a run for whoever shows its progress."""

    on_plan: Callable[[Plan], None] = field(default=lambda _plan: None)
    on_bytes: Callable[[int], None] = field(default=lambda _count: None)
    on_shard: Callable[[ShardOutcome], None] = field(default=lambda _outcome: None)
    on_failure: Callable[[str, BaseException], None] = field(default=lambda _shard, _error: None)


def run(
    locations: Locations, recipe: Recipe, options: RunOptions = RunOptions(), *, watcher: Watcher | None = None,
    stop: threading.Event | None = None,
) -> RunResult:  # fmt: skip
    """Convert a checkpoint.

    Raises:
        Refused: the input or the request; every problem is in it and nothing was written to the destination.
        ShardFailures: some shards failed; all others are in the store.
        Interrupted: `stop` was set; finished shards are in the store.
    """
    prepared = prepare(locations, recipe, options)
    return execute(prepared, options, watcher or Watcher(), stop or threading.Event())


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run that may begin: nothing stands against it."""

    plan: Plan
    source: SourceFolder
    store: Store
    locations: Locations
    """With the commit of a Hub source in place of its branch."""
    started: float
    """On the monotonic clock."""


def prepare(locations: Locations, recipe: Recipe, options: RunOptions) -> Prepared:
    """Plan and validate; writes nothing.

    Raises:
        Refused: the input or the request; every problem is in it.
    """
    started = time.monotonic()
    store = locations.open_store(options.verify)
    locations = pin_readable(locations, store)
    source = locations.open_source()
    plan = make_plan(source, recipe)
    refuse_problems([*validate_plan(plan), *validate_locations(plan, locations, store)])
    return Prepared(plan=plan, source=source, store=store, locations=locations, started=started)


def execute(
    prepared: Prepared, options: RunOptions, watch: Watcher, stopping: threading.Event,
    companion: Companion | None = None,
) -> RunResult:  # fmt: skip
    """Do what was prepared.

    Args:
        companion: of a run that shares its reads of the source with others.

    Raises:
        Refused: weights that hold NaN or Inf were to be found, and what follows from them is refused.
        ShardFailures: some shards failed; all others are in the store.
        Interrupted: `stopping` was set; finished shards are in the store.
    """
    plan, source, store = prepared.plan, prepared.source, prepared.store
    locations, started = prepared.locations, prepared.started
    store.prepare()
    if plan.recipe.allow_nonfinite:
        plan = make_plan(source, plan.recipe, find_kept(plan, source, store, stopping.is_set))
        refuse_problems([*validate_plan(plan), *validate_locations(plan, locations, store)])
    watch.on_plan(plan)
    destination = locations.open_destination()
    if not destination.is_free():
        return _finished(plan, locations, store, watch, started)
    claim = claim_of(plan, source)
    with destination.claimed(claim):
        for left in reversed(range(ROUNDS)):
            outcomes = quantize_all(plan, source, store, options, watch, stopping, companion)
            try:
                manifest = finalize(plan, outcomes, locations, store, claim)
                break
            except BlobsGone:  # they were deleted since they were found or done
                if not left:
                    raise
    seconds, failed = time.monotonic() - started, failed_checks(outcomes, store)
    return RunResult(plan=plan, outcomes=outcomes, manifest=manifest, seconds=seconds, store_checks_failed=failed)


def _finished(plan: Plan, locations: Locations, store: Store, watch: Watcher, started: float) -> RunResult:
    """Succeed at once when the destination holds this very result; nothing is computed for one that does not."""
    manifest = published_result(plan, locations, store)
    source = locations.open_source()
    clear_claim(plan, source, locations)
    stored = tuple(outcome for shard in plan.shards if (outcome := find_stored(shard, source, store)))
    for outcome in stored:
        watch.on_shard(outcome)
    watch.on_bytes(plan.source_bytes)
    seconds, failed = time.monotonic() - started, failed_checks(stored, store)
    return RunResult(plan=plan, outcomes=stored, manifest=manifest, seconds=seconds, store_checks_failed=failed)


def quantize_all(
    plan: Plan, source: SourceFolder, store: Store, options: RunOptions, watch: Watcher, stop: threading.Event,
    companion: Companion | None = None,
) -> tuple[ShardOutcome, ...]:  # fmt: skip
    """Quantize every shard that the store does not have; hits are told without starting a worker."""
    found: dict[str, ShardOutcome] = {}
    misses: list[ShardPlan] = []
    stored = look_up(plan.shards, lambda shard: find_stored(shard, source, store), store.folder, source.folder)
    for shard, outcome in zip(plan.shards, stored, strict=True):
        if outcome is None:
            misses.append(shard)
        else:
            found[shard.name] = outcome
            watch.on_bytes(shard.size)
            watch.on_shard(outcome)
            if companion is not None:
                companion.pass_over(shard.name)
    work = _worker(source, store, companion)
    failures = (
        _quantize_misses(misses, work, options, watch, stop, found, is_shared=companion is not None) if misses else []
    )
    if stop.is_set():
        raise Interrupted(
            f"stopped on request; {len(found)} of {len(plan.shards)} shards are finished, run again to go on"
        )
    if failures:
        raise ShardFailures(failures, len(found))
    return tuple(found[shard.name] for shard in plan.shards)


def _worker(
    source: SourceFolder, store: Store, companion: Companion | None
) -> Callable[[ShardPlan, Controls], ShardOutcome]:
    """What works on one shard."""

    def work(shard: ShardPlan, controls: Controls) -> ShardOutcome:
        if companion is None:
            return quantize_shard(shard, source, store, controls)
        with companion.taking(shard.name) as shared:
            return quantize_shard(shard, shared, store, controls)

    return work


def _quantize_misses(
    misses: Sequence[ShardPlan], work: Callable[[ShardPlan, Controls], ShardOutcome], options: RunOptions,
    watch: Watcher, stop: threading.Event, found: dict[str, ShardOutcome], *, is_shared: bool,
) -> list[tuple[str, BaseException]]:  # fmt: skip
    devices = resolve_devices(options.device, options.workers)
    controls = Controls(DevicePool(devices), stop.is_set, watch.on_bytes)
    failures: list[tuple[str, BaseException]] = []
    # one more than devices: while a finished shard waits for its disk, the next is computed; runs that share a source
    # take shards strictly in order, so that no two wait for each other
    threads = len(devices) + (0 if is_shared else 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="shard") as pool:
        pending: dict[Future[ShardOutcome], str] = {pool.submit(work, shard, controls): shard.name for shard in misses}
        try:
            while pending:
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    _collect(pending.pop(future), future, found, failures, watch)
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return failures


def _collect(
    name: str,
    future: Future[ShardOutcome],
    found: dict[str, ShardOutcome],
    failures: list[tuple[str, BaseException]],
    watch: Watcher,
) -> None:
    error = future.exception()
    if error is None:
        found[name] = future.result()
        watch.on_shard(found[name])
    elif not isinstance(error, Interrupted):
        failures.append((name, error))
        watch.on_failure(name, error)
