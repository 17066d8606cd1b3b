"""What Retry in the UI does to a run, replayed: the same run begins again, and only what is missing is done."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State, StateType, TaskRun
from prefect.flow_engine import run_flow
from prefect.states import AwaitingRetry

from checkpoints import poison
from served import Ask
from shardmill.flows.parameters import QuantizeRequest
from shardmill.flows.quantize_checkpoint import quantize_checkpoint
from workers import wait_until

BROKEN = "model-00002-of-00004.safetensors"


def first_attempt(request: QuantizeRequest, last: StateType) -> UUID:
    """Run to an end, and let the server know it as that end."""
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(quantize_checkpoint, parameters={"request": request.model_dump()})
        run_flow(quantize_checkpoint, run, {"request": request}, return_type="state")
        client.set_flow_run_state(run.id, State(type=last), force=True)
    return run.id


def retry(run: UUID, request: QuantizeRequest) -> Any:
    """Ask for another attempt as the UI does, and do it as a worker does; the state in which it ends."""
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run, AwaitingRetry(), force=True)
        again = client.read_flow_run(run)
    return run_flow(quantize_checkpoint, again, {"request": request}, return_type="state")


def shard_states(run: UUID, attempt: int, count: int) -> dict[str, str]:
    """State by task run name, of the shards of one attempt."""

    def finals() -> list[TaskRun]:
        with get_client(sync_client=True) as client:
            runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run])))
        found = [r for r in runs if r.name.startswith("quantize ") and r.flow_run_run_count == attempt]
        return [r for r in found if r.state and r.state.is_final()] if len(found) == count else []

    runs = wait_until("all task runs are final", lambda: finals() if len(finals()) == count else None, 60)
    return {r.name: r.state.name for r in runs}


def descriptions(run: UUID) -> Counter[tuple[str, bool]]:
    """How many artifacts a run has, by key and whether they name the second attempt."""
    with get_client(sync_client=True) as client:
        chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]))
        found = client.read_artifacts(artifact_filter=chosen)
    return Counter((a.key, (a.description or "").startswith("Attempt 2: ")) for a in found if a.key)


@pytest.mark.parametrize("last", [StateType.FAILED, StateType.CRASHED, StateType.CANCELLED])
def test_another_attempt_does_only_what_is_missing_and_adds_its_artifacts(
    ask: Ask, source: Path, computed: list[str], last: StateType
) -> None:
    whole = poison(source / BROKEN)
    request = ask()
    run = first_attempt(request, last)
    assert len(computed) == 4
    (source / BROKEN).write_bytes(whole)
    computed.clear()

    state = retry(run, request)

    assert state.is_completed()
    assert computed == [BROKEN]
    states = shard_states(run, 2, 4)
    assert states.pop(f"quantize {BROKEN} of source-FP8_DYNAMIC") == "Completed"
    assert set(states.values()) == {"Cached"}
    first, second = ["plan", "progress", "failures"], ["plan", "progress", "report"]
    assert descriptions(run) == Counter([(key, False) for key in first] + [(key, True) for key in second])


def test_another_attempt_of_a_finished_run_finds_everything_done(ask: Ask, computed: list[str]) -> None:
    request = ask()
    run = first_attempt(request, StateType.COMPLETED)
    computed.clear()

    state = retry(run, request)

    assert state.is_completed()
    assert computed == []
    assert set(shard_states(run, 2, 4).values()) == {"Cached"}
