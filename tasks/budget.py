"""The task before stage 1, where a size is asked for instead of a scheme."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from shardmill.core.budget import Wish
from shardmill.orchestration.bench import Job, bench_of
from shardmill.stages.budget import Solved, solve_budget


@task(name="budget", task_run_name="budget", cache_policy=NO_CACHE, persist_result=False, cache_result_in_memory=False)
def choose_schemes(wish: Wish, job: Job) -> Solved:
    """Measure what candidates leave, unless the store knows, and choose among them."""
    bench = bench_of(job)
    return solve_budget(bench.source, bench.store, wish, job.options, stop=bench.stop)
