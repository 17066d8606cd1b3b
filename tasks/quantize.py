"""The tasks around stage 3, one run per shard; torch is imported by the first shard that is computed."""

from __future__ import annotations

from typing import Any, cast

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from shardmill.core.outcome import ShardOutcome
from shardmill.core.plan import ShardPlan
from shardmill.orchestration.bench import Job, bench_of
from shardmill.orchestration.cache import CACHED, StageCachePolicy
from shardmill.orchestration.logs import library_logs
from shardmill.orchestration.names import shard_run_name
from shardmill.orchestration.retry import is_transient
from shardmill.stages import quantize


@task(
    name="quantize",
    task_run_name=cast("Any", shard_run_name),
    cache_policy=StageCachePolicy(stage="quantize"),
    persist_result=True,
    result_serializer="json",
    cache_result_in_memory=False,  # a copy in memory would not be looked at again
    retries=2,
    retry_delay_seconds=[2, 10],  # short: a waiting retry does not hear a request to stop
    retry_jitter_factor=0.5,
    retry_condition_fn=is_transient,
)
def quantize_shard(shard: ShardPlan, job: Job) -> ShardOutcome | State[ShardOutcome]:
    """Make sure that the store holds the result of one shard."""
    bench = bench_of(job)
    with library_logs():  # the flow's may be in another process
        outcome = quantize.find_stored(shard, bench.source, bench.store)
        if outcome is None:
            outcome = quantize.quantize_shard(shard, bench.source, bench.store, bench.controls_of(shard.name))
    return cached(outcome) if outcome.is_hit else outcome


@task(
    name="quantize",
    task_run_name=cast("Any", shard_run_name),
    cache_policy=NO_CACHE,
    persist_result=False,
    cache_result_in_memory=False,
)
def confirm_shard(shard: ShardPlan, job: Job) -> State[None]:
    """Show a shard of a destination that was found finished; there is nothing to look up and nothing to compute."""
    del shard, job  # for the name of the run
    return Completed(name=CACHED, message="the destination holds it")


def cached(outcome: ShardOutcome) -> State[ShardOutcome]:
    """The state of a shard that was not computed."""
    return Completed(name=CACHED, message=f"receipt {outcome.receipt.key[:12]}", data=outcome)
