"""The tasks around stage 4; cheap, idempotent and never cached."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from shardmill.core.outcome import ShardOutcome
from shardmill.core.plan import Plan
from shardmill.orchestration.bench import Job, bench_of
from shardmill.orchestration.retry import is_transient
from shardmill.stages import finalize
from shardmill.storage.claim import Claim


@task(
    name="finalize",
    task_run_name="finalize",
    cache_policy=NO_CACHE,
    persist_result=False,
    cache_result_in_memory=False,
    retries=2,
    retry_delay_seconds=[2, 10],
    retry_jitter_factor=0.5,
    retry_condition_fn=is_transient,
)
def finalize_checkpoint(plan: Plan, outcomes: tuple[ShardOutcome, ...], job: Job, claim: Claim) -> dict[str, Any]:
    """Publish the result and return its manifest."""
    return finalize.finalize(plan, outcomes, job.locations, bench_of(job).store, claim)


@task(
    name="finalize",
    task_run_name="compare destination",
    cache_policy=NO_CACHE,
    persist_result=False,
    cache_result_in_memory=False,
)
def find_published(plan: Plan, job: Job) -> dict[str, Any]:
    """Return the manifest of a destination that holds this very result; refuse one that does not."""
    bench = bench_of(job)
    manifest = finalize.published_result(plan, job.locations, bench.store)
    finalize.clear_claim(plan, bench.source, job.locations)
    return manifest
