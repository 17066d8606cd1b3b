"""The task around stage 1."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from shardmill.core.nonfinite import Kept
from shardmill.core.plan import Plan
from shardmill.core.recipe import Recipe
from shardmill.orchestration.bench import Job, bench_of
from shardmill.stages import nonfinite
from shardmill.stages.plan import make_plan


@task(name="plan", task_run_name="plan", cache_policy=NO_CACHE, persist_result=False, cache_result_in_memory=False)
def plan_checkpoint(recipe: Recipe, job: Job, kept: Kept | None = None) -> Plan:
    """Read listing, index, config and headers; decide about every tensor. Cheap, and so never cached."""
    return make_plan(bench_of(job).source, recipe, kept)


@task(
    name="plan", task_run_name="look for NaN", cache_policy=NO_CACHE, persist_result=False, cache_result_in_memory=False
)
def find_kept(plan: Plan, job: Job) -> Kept:
    """Look at the values of every weight that is to be quantized; what the store holds is not read."""
    bench = bench_of(job)
    return nonfinite.find_kept(plan, bench.source, bench.store, bench.stop.is_set)
