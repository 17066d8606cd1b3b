"""The tasks around stage 2: they return every problem and change nothing."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from shardmill.core.plan import Plan, ShardPlan
from shardmill.errors import Problem
from shardmill.orchestration.bench import Job, bench_of
from shardmill.stages import validate

CHUNK = 32
"""Shards that one task run checks: a run of its own for each would cost more than the check."""


@task(
    name="validate",
    task_run_name="validate shards {first}-{last}",
    cache_policy=NO_CACHE,
    persist_result=False,
    cache_result_in_memory=False,
)
def validate_shards(shards: tuple[ShardPlan, ...], taken: frozenset[str], first: int, last: int) -> list[Problem]:
    """Check shards `first` to `last` of a plan."""
    del first, last  # for the name of the run
    return validate.validate_shards(shards, taken)


@task(
    name="validate",
    task_run_name="validate locations",
    cache_policy=NO_CACHE,
    persist_result=False,
    cache_result_in_memory=False,
)
def validate_locations(plan: Plan, job: Job) -> list[Problem]:
    """Check destination and store: free, writable, large enough."""
    return validate.validate_locations(plan, job.locations, bench_of(job).store)
