"""What tests ask a Prefect server, and requests for the flow."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import State

from shardmill.flows.parameters import QuantizeRequest

Ask = Callable[..., QuantizeRequest]
"""Makes a request; keywords override."""


def run_id(state: State[Any]) -> UUID:
    """The flow run that a state belongs to."""
    found = state.state_details.flow_run_id
    assert found is not None
    return found


def _subject(name: str, task: str) -> str:
    """What a task run is about: `quantize SHARD of MODEL-SCHEME` is about SHARD."""
    return name.removeprefix(f"{task} ").partition(" of ")[0]


def states(flow_run_id: UUID, count: int, task: str = "quantize") -> dict[str, str]:
    """State name by shard, or what else the runs of a task are about, once `count` of them are final.

    The server lags behind.
    """
    deadline = time.monotonic() + 60
    while True:
        with get_client(sync_client=True) as client:
            chosen = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
            runs = [run for run in client.read_task_runs(flow_run_filter=chosen) if run.name.startswith(task)]
        found = {_subject(run.name, task): run.state.name or "" for run in runs if run.state}
        if sum(bool(run.state and run.state.is_final()) for run in runs) >= count:
            return found
        assert time.monotonic() < deadline, f"expected {count} final task runs, found {found}"
        time.sleep(0.1)


def artifacts(flow_run_id: UUID) -> dict[str, str]:
    """The artifacts of a flow run by key."""
    with get_client(sync_client=True) as client:
        chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
        return {artifact.key or "": str(artifact.data) for artifact in client.read_artifacts(artifact_filter=chosen)}


def library_lines(flow_run_id: UUID, wanted: str, count: int) -> list[tuple[str, str, bool]]:
    """`(logger, message, is of a task run)` of the library's lines, once `wanted` is there `count` times."""
    deadline = time.monotonic() + 60
    while True:
        with get_client(sync_client=True) as client:
            logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id])))
        found = [
            (log.name, log.message, log.task_run_id is not None) for log in logs if log.name.startswith("shardmill")
        ]
        if sum(message == wanted for _, message, _ in found) >= count:
            return found
        assert time.monotonic() < deadline, f"expected {wanted!r} in the log, found {found}"
        time.sleep(0.2)


def left_behind(folder: Path) -> list[str]:
    """Temporary files, partial folders and claims."""
    marks = (".tmp", ".shardmill-claim")
    return [str(path) for path in folder.rglob("*") if path.name.endswith(marks) or ".partial-" in path.name]
