"""The main flow: plan, validate, quantize, finalize. Order and fan-out only; the stages do the work.

It gives the same bytes as the plain loop in `shardmill.stages.pipeline`. Every future is resolved, and a failed shard
fails the flow after all others are finished and kept in the store.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

from prefect import flow, get_run_logger
from prefect.runtime import flow_run

from shardmill.core.budget_recipe import render_solution
from shardmill.core.checks import source_names
from shardmill.core.manifest import parse_manifest
from shardmill.core.outcome import ShardOutcome
from shardmill.core.plan import Plan
from shardmill.core.recipe import Recipe
from shardmill.core.summary import human_bytes, summarize_manifest
from shardmill.errors import BlobsGone, Interrupted, Problem, ShardFailures
from shardmill.flows import artifacts
from shardmill.flows.parameters import QuantizeRequest
from shardmill.orchestration.bench import Job, Workbench, uninspected, workbench
from shardmill.orchestration.cache import bytes_to_digest
from shardmill.orchestration.executors import choose_executor
from shardmill.orchestration.logs import library_logs, log_shard
from shardmill.orchestration.progress import Progress, Tally
from shardmill.stages.finalize import claim_of
from shardmill.stages.pipeline import ROUNDS
from shardmill.stages.quantize import failed_checks
from shardmill.stages.validate import pin_readable, refuse_problems
from shardmill.storage.claim import Claim
from shardmill.storage.documents import check_document
from shardmill.storage.location import parse_location
from shardmill.tasks.budget import choose_schemes
from shardmill.tasks.finalize import finalize_checkpoint, find_published
from shardmill.tasks.plan import find_kept, plan_checkpoint
from shardmill.tasks.quantize import confirm_shard, quantize_shard
from shardmill.tasks.validate import CHUNK, validate_locations, validate_shards

WARNINGS_LOGGED = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowSummary:
    """What a finished flow run returns; sizes in bytes."""

    destination: str
    shards: int
    hits: int
    """Shards that were not computed."""
    store_checks_failed: int
    """Records and blobs of the store that were found bad, and were not used."""
    bytes_read: int
    """Source tensor bytes that were read, for digests and for values."""
    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    seconds: float


@flow(
    name="quantize-checkpoint",
    flow_run_name="quantize-{request.label}",
    validate_parameters=True,
    persist_result=False,  # a finished run can be retried from the UI, and looks at everything again
    retries=0,
)
def quantize_checkpoint(request: QuantizeRequest) -> FlowSummary:
    """Quantize a checkpoint without a model definition, shard by shard; finished shards are never done again.

    Args:
        request: What is quantized, how, and where.
    """
    started = time.monotonic()
    job = request.to_job(flow_run.id or "")
    with library_logs(), artifacts.refusals_shown():
        job = replace(job, locations=pin_readable(job.locations, job.locations.open_store()))
        return _convert(request, job, started)


def _convert(request: QuantizeRequest, job: Job, started: float) -> FlowSummary:
    if request.page is not None:
        check_document(request.page)
    with workbench(job) as bench:
        plan = _checked_plan(_recipe(request, job), job)
        bench.store.prepare()
        destination = job.locations.open_destination()
        if destination.is_free():
            claim = claim_of(plan, bench.source, job.run)
            with destination.claimed(claim):
                outcomes, document = _make(plan, request, job, bench, claim)
            hits, bytes_read = sum(o.is_hit for o in outcomes), sum(o.bytes_read for o in outcomes)
        else:
            outcomes = ()
            bytes_read = bytes_to_digest(plan.shards, bench.source, bench.store)
            document = find_published(uninspected(plan), job)
            hits = _confirm(plan, job)
        manifest = parse_manifest(document)
        summary = summarize_manifest(manifest)
        _tell(warning for warning in summary.warnings if warning.kind not in {known.kind for known in plan.warnings})
        result = FlowSummary(
            destination=str(parse_location(job.locations.destination)),
            shards=len(plan.shards),
            hits=hits,
            store_checks_failed=failed_checks(outcomes, bench.store),
            bytes_read=bytes_read,
            source_bytes=summary.totals.source_bytes,
            output_bytes=summary.totals.output_bytes,
            bits_per_weight=round(summary.bits_per_weight, 3),
            seconds=round(time.monotonic() - started, 1),
        )
        page = artifacts.write_page(request.page, job.locations, result.seconds) if request.page else ""
        artifacts.show_report(manifest, summary, asdict(result) | {"page": page})
        artifacts.show_output(result.destination)
        if result.store_checks_failed:
            get_run_logger().warning("store checks failed: %s; what failed was not used", result.store_checks_failed)
        get_run_logger().info(
            "%s of %s shards were done before, %s read", hits, len(plan.shards), human_bytes(bytes_read)
        )
        return result


def _make(
    plan: Plan, request: QuantizeRequest, job: Job, bench: Workbench, claim: Claim
) -> tuple[tuple[ShardOutcome, ...], dict[str, Any]]:
    """Quantize and publish; shards that somebody deletes from the store in between are done again."""
    for left in reversed(range(ROUNDS)):
        outcomes = _quantize(plan, request, job, bench)
        try:
            return outcomes, finalize_checkpoint(uninspected(plan), uninspected(outcomes), job, uninspected(claim))
        except BlobsGone:
            if not left:
                raise
    raise AssertionError(f"no round of {ROUNDS} ended")


def _recipe(request: QuantizeRequest, job: Job) -> Recipe:
    """The recipe that was asked for, or the one that keeps to a budget."""
    wish = request.wish
    if wish is None:
        return request.to_recipe()
    found = choose_schemes(uninspected(wish), job)
    for line in render_solution(found.solution):
        get_run_logger().info("%s", line)
    return found.recipe


def _checked_plan(recipe: Recipe, job: Job) -> Plan:
    """Plan and validate; every problem is found before the first tensor is read."""
    plan = plan_checkpoint(uninspected(recipe), job)
    _refuse(plan, job)
    if recipe.allow_nonfinite:
        kept = find_kept(uninspected(plan), job)
        plan = plan_checkpoint(uninspected(recipe), job, uninspected(kept))
        _refuse(plan, job)
    _tell(plan.warnings)
    return plan


def _refuse(plan: Plan, job: Job) -> None:
    """Refuse a plan with every problem of it, of its shards and of the places."""
    taken = source_names(plan)
    problems = [*plan.problems, *validate_locations(uninspected(plan), job)]
    for first in range(0, len(plan.shards), CHUNK):
        shards = plan.shards[first : first + CHUNK]
        problems += validate_shards(uninspected(shards), uninspected(taken), first + 1, first + len(shards))
    refuse_problems(problems)


def _tell(warnings: Iterable[Problem]) -> None:
    for warning in islice(warnings, WARNINGS_LOGGED):
        get_run_logger().warning("%s", warning)


def _quantize(plan: Plan, request: QuantizeRequest, job: Job, bench: Workbench) -> tuple[ShardOutcome, ...]:
    """Quantize every shard; one that fails is told at the end and stops no other."""
    stored = {shard.name: bench.store.seems_to_hold(shard, bench.source) for shard in plan.shards}
    artifacts.show_plan(plan, stored)
    tally = Tally(
        {shard.name: shard.size for shard in plan.shards},
        {name for name, is_stored in stored.items() if is_stored},
        time.monotonic(),
    )
    found: dict[str, ShardOutcome] = {}
    failures: list[tuple[str, BaseException]] = []
    executor = choose_executor(
        request.executor, request.dask_scheduler or "", job, bench, is_stored=all(stored.values())
    )
    with (
        Progress(tally, bench.meter.counts, prefix=artifacts.attempt_prefix()) as progress,
        closing(executor.map_shards(quantize_shard, plan.shards, job=job)) as results,
    ):
        for shard, result in results:
            if isinstance(result, ShardOutcome):
                found[shard.name] = result
            elif not isinstance(result, Interrupted):
                failures.append((shard.name, result))
            progress.settle(shard.name, result)
            if not isinstance(result, Interrupted):
                log_shard(get_run_logger(), shard, result)
    if bench.stop.is_set():
        raise Interrupted(
            f"stopped on request; {len(found)} of {len(plan.shards)} shards are finished, run again to go on"
        )
    if failures:
        artifacts.show_failures(failures, len(found))
        raise ShardFailures(failures, len(found))
    return tuple(found[shard.name] for shard in plan.shards)


def _confirm(plan: Plan, job: Job) -> int:
    """Show every shard of a finished destination as one that was not computed."""
    for shard in plan.shards:
        confirm_shard(uninspected(shard), job)
    return len(plan.shards)
