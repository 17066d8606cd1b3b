"""The batch: what is new or changed is converted, each checkpoint in a run of its own; what is done costs a look."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

import httpx
import pytest
import torch
import yaml
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.states import Completed, Failed, Running

import checkpoints
from served import artifacts, run_id
from shardmill.core.recipe import uniform
from shardmill.errors import BatchFailures, DeploymentInvalid, Refused
from shardmill.flows.parameters import BatchRequest, QuantizeRequest
from shardmill.flows.quantize_batch import BatchSummary, quantize_batch
from shardmill.flows.quantize_checkpoint import quantize_checkpoint
from shardmill.orchestration import children
from shardmill.orchestration.children import Child, Deployment
from shardmill.stages import pipeline
from shardmill.stages.plan import Locations, make_plan


class AskBatch(Protocol):
    def __call__(self, **choices: object) -> BatchRequest: ...


@pytest.fixture
def incoming(tmp_path: Path) -> Path:
    """Three checkpoints and some folders that are none."""
    folder = tmp_path / "incoming"
    for name, seed in [("alpha", 1), ("beta", 2), ("gamma", 3)]:
        add(folder / name, seed)
    (folder / "notes").mkdir()
    (folder / "notes" / "config.json").write_text("{}")
    add(folder / ".trash", 4)
    return folder


def add(folder: Path, seed: int) -> Path:
    weights = checkpoints.llama()
    weights["model.layers.0.mlp.down_proj.weight"] = checkpoints.gaussian(seed, 64, 128)
    return checkpoints.write(folder, checkpoints.deal(weights, 2))


def spoil(folder: Path) -> None:
    """A weight that holds NaN fails its shard."""
    weights = checkpoints.llama()
    weights["model.layers.0.mlp.down_proj.weight"] = torch.full((64, 128), float("nan"), dtype=torch.bfloat16)
    shutil.rmtree(folder)
    checkpoints.write(folder, checkpoints.deal(weights, 2))


@pytest.fixture
def ask(incoming: Path, tmp_path: Path) -> AskBatch:
    """Make a request for all checkpoints, to be converted in this process; keywords override."""

    def make(**choices: object) -> BatchRequest:
        fixed = {
            "sources": [f"{incoming}/*"],
            "destination": f"{tmp_path}/out/{{name}}-{{scheme}}",
            "deployment": None,
            "device": "cpu",
            "workers": 1,
        }
        return BatchRequest.model_validate(fixed | choices)

    return make


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sources of the conversions that were begun."""
    begun: list[str] = []
    convert = make_plan

    def note(source: Any, *arguments: Any) -> Any:
        begun.append(Path(source.folder.url).name)
        return convert(source, *arguments)

    monkeypatch.setattr("shardmill.tasks.plan.make_plan", note)
    return begun


def statuses(summary: BatchSummary) -> dict[str, str]:
    return {Path(row.source).name: row.status for row in summary.checkpoints}


def table(state: State[Any]) -> dict[str, dict[str, Any]]:
    """Rows of the artifact `batch` by the last part of their source."""
    rows = json.loads(artifacts(run_id(state))["batch"])
    return {Path(row["source"]).name: row for row in rows}


# ---- in this process --------------------------------------------------------------------------------------------


def test_everything_new_is_converted_and_the_next_batch_has_nothing_to_do(
    ask: AskBatch, tmp_path: Path, converted: list[str]
) -> None:
    first = quantize_batch(ask())
    assert statuses(first) == dict.fromkeys(["alpha", "beta", "gamma"], "converted")
    assert (first.converted, first.unchanged) == (3, 0)
    for row in first.checkpoints:
        assert row.destination == f"{tmp_path}/out/{Path(row.source).name}-FP8_DYNAMIC"
        assert (Path(row.destination) / "config.json").exists()
        assert 0 < row.output_bytes < row.source_bytes
    assert sorted(converted) == ["alpha", "beta", "gamma"]
    converted.clear()
    second = quantize_batch(ask())
    assert statuses(second) == dict.fromkeys(["alpha", "beta", "gamma"], "unchanged")
    assert converted == []


def test_bytes_are_those_of_a_conversion_alone(ask: AskBatch, incoming: Path, tmp_path: Path) -> None:
    quantize_batch(ask(scheme="NVFP4A16"))
    alone = Locations(source=str(incoming / "beta"), destination=str(tmp_path / "alone" / "beta"))
    pipeline.run(alone, uniform("NVFP4A16"))
    made, expected = tmp_path / "out" / "beta-NVFP4A16", tmp_path / "alone" / "beta"
    assert {path.name: path.read_bytes() for path in made.iterdir()} == {
        path.name: path.read_bytes() for path in expected.iterdir()
    }


def test_what_was_added_and_what_is_gone_is_converted(ask: AskBatch, incoming: Path, tmp_path: Path) -> None:
    quantize_batch(ask())
    add(incoming / "delta", 5)
    shutil.rmtree(tmp_path / "out" / "alpha-FP8_DYNAMIC")
    again = quantize_batch(ask())
    assert statuses(again) == {
        "alpha": "converted",
        "beta": "unchanged",
        "gamma": "unchanged",
        "delta": "converted",
    }


def test_what_changed_gets_a_destination_of_its_own(ask: AskBatch, incoming: Path, tmp_path: Path) -> None:
    versioned = ask(destination=f"{tmp_path}/out/{{name}}-{{version}}")
    first = {row.source: row.destination for row in quantize_batch(versioned).checkpoints}
    shutil.rmtree(incoming / "beta")
    add(incoming / "beta", 9)
    again = quantize_batch(versioned)
    assert statuses(again) == {"alpha": "unchanged", "beta": "converted", "gamma": "unchanged"}
    moved = [row for row in again.checkpoints if first[row.source] != row.destination]
    assert [Path(row.source).name for row in moved] == ["beta"]
    assert len(list((tmp_path / "out").glob("beta-*"))) == 2


def test_what_changed_is_refused_where_the_old_result_stands(ask: AskBatch, incoming: Path) -> None:
    quantize_batch(ask())
    shutil.rmtree(incoming / "beta")
    add(incoming / "beta", 9)
    with pytest.raises(BatchFailures, match="another plan") as caught:
        quantize_batch(ask())
    assert [Path(source).name for source, _ in caught.value.failures] == ["beta"]


def test_a_broken_checkpoint_keeps_no_other_waiting_and_is_tried_again(
    ask: AskBatch, incoming: Path, converted: list[str]
) -> None:
    spoil(incoming / "beta")
    state = quantize_batch(ask(), return_state=True)
    assert state.is_failed()
    assert "1 of 3 checkpoints were not converted" in (state.message or "")
    rows = table(state)
    assert {name: row["status"] for name, row in rows.items()} == {
        "alpha": "converted",
        "beta": "failed",
        "gamma": "converted",
    }
    assert "down_proj" in rows["beta"]["message"]
    converted.clear()
    shutil.rmtree(incoming / "beta")
    add(incoming / "beta", 2)
    assert statuses(quantize_batch(ask()))["beta"] == "converted"
    assert converted == ["beta"]


def test_a_checkpoint_in_the_making_is_left_for_later(ask: AskBatch, incoming: Path, tmp_path: Path) -> None:
    missing = min((incoming / "beta").glob("*.safetensors"))
    missing.rename(tmp_path / "kept")
    first = quantize_batch(ask())
    assert statuses(first) == {"alpha": "converted", "beta": "left for later", "gamma": "converted"}
    assert "1 of 2 shards are not there yet" in next(row.message for row in first.checkpoints if row.message)
    (tmp_path / "kept").rename(missing)
    assert statuses(quantize_batch(ask()))["beta"] == "converted"


def test_young_checkpoints_are_left_for_later(ask: AskBatch, incoming: Path) -> None:
    for path in (incoming / "alpha").iterdir():
        os.utime(path, (time.time() - 7200, time.time() - 7200))
    assert statuses(quantize_batch(ask(min_age_minutes=60))) == {
        "alpha": "converted",
        "beta": "left for later",
        "gamma": "left for later",
    }


def test_a_manifest_says_what_is_different_for_whom(ask: AskBatch, incoming: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "nightly.yaml"
    entries = [
        f"{incoming}/alpha",
        {
            "source": f"{incoming}/[bg]*",
            "scheme": "W4A16",
            "group_size": 32,
            "destination": f"{tmp_path}/int4/{{path}}",
        },
    ]
    manifest.write_text(yaml.safe_dump({"checkpoints": entries}))
    made = quantize_batch(ask(sources=[], manifest=str(manifest)))
    assert {Path(row.destination).relative_to(tmp_path).as_posix() for row in made.checkpoints} == {
        "out/alpha-FP8_DYNAMIC",
        "int4/beta",
        "int4/gamma",
    }
    config = json.loads((tmp_path / "int4" / "beta" / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"].values()
    assert [group["weights"]["group_size"] for group in groups] == [32]


def test_all_that_is_wrong_with_a_batch_is_told_at_once(ask: AskBatch, tmp_path: Path, converted: list[str]) -> None:
    manifest = tmp_path / "nightly.json"
    entries: list[dict[str, object]] = [
        {"source": "/models/a", "scheme": "FP9"},
        {"source": "/models/b", "speed": 3},
        {"source": "/models/c", "destination": "/out/{nam}"},
    ]
    manifest.write_text(json.dumps(entries))
    with pytest.raises(Refused) as caught:
        quantize_batch(ask(manifest=str(manifest)))
    assert [problem.kind for problem in caught.value.problems] == ["batch-destination"]
    entries[2]["destination"] = "/out/{name}"
    manifest.write_text(json.dumps(entries))
    with pytest.raises(Refused) as caught:
        quantize_batch(ask(manifest=str(manifest), sources=[f"{tmp_path}/absent/*"]))
    told = {problem.file: problem.message for problem in caught.value.problems}
    assert set(told) == {"/models/a", "/models/b", f"{tmp_path}/absent"}
    assert "scheme" in told["/models/a"]
    assert "speed" in told["/models/b"]
    assert converted == []


def test_two_checkpoints_at_one_destination_are_refused(ask: AskBatch, tmp_path: Path, converted: list[str]) -> None:
    with pytest.raises(Refused, match="two checkpoints would be written there"):
        quantize_batch(ask(destination=f"{tmp_path}/out/{{scheme}}"))
    assert converted == []


def test_a_checkpoint_that_is_named_twice_is_converted_once(
    ask: AskBatch, incoming: Path, converted: list[str]
) -> None:
    made = quantize_batch(ask(sources=[f"{incoming}/alpha", f"{incoming}/al*", f"{incoming}/alpha/"]))
    assert statuses(made) == {"alpha": "converted"}
    assert converted == ["alpha"]


def test_a_source_that_is_not_there_fails_alone(ask: AskBatch, incoming: Path) -> None:
    with pytest.raises(BatchFailures, match="1 of 2 checkpoints") as caught:
        quantize_batch(ask(sources=[f"{incoming}/alpha", f"{incoming}/zeta"]))
    assert [Path(source).name for source, _ in caught.value.failures] == ["zeta"]


def test_a_batch_needs_something_to_look_at(ask: AskBatch) -> None:
    with pytest.raises(ValueError, match="give sources or a manifest"):
        ask(sources=[])


# ---- through a deployment ---------------------------------------------------------------------------------------


@pytest.fixture
def deployment() -> str:
    """A deployment of the flow that no worker looks after; for one test, since runs of others may be left."""
    name = f"by-hand-{secrets.token_hex(4)}"
    with get_client(sync_client=True) as client:
        flow_id = client.create_flow(quantize_checkpoint)
        client.create_deployment(
            flow_id=flow_id,
            name=name,
            parameter_openapi_schema=quantize_checkpoint.parameters.model_dump_for_openapi(),
        )
    return f"quantize-checkpoint/{name}"


def runs_of(client: SyncPrefectClient, deployment: str) -> list[FlowRun]:
    """The runs of a deployment."""
    found = client.read_deployment_by_name(deployment)
    chosen = DeploymentFilter(id=DeploymentFilterId(any_=[found.id]))
    return client.read_flow_runs(deployment_filter=chosen)


class Hand:
    """Does what a worker would, whenever the batch waits; counts how many runs wait or work at a time."""

    def __init__(self, deployment: str, end: Callable[[SyncPrefectClient, FlowRun], None]) -> None:
        self.deployment = deployment
        self.end = end
        self.most = 0

    def __call__(self, _seconds: float) -> None:
        with get_client(sync_client=True) as client:
            scheduled = [run for run in runs_of(client, self.deployment) if run.state and not run.state.is_final()]
            self.most = max(self.most, len(scheduled))
            for run in scheduled:
                self.end(client, run)


def convert(client: SyncPrefectClient, run: FlowRun) -> None:
    asked = QuantizeRequest.model_validate(run.parameters["request"])
    try:
        pipeline.run(asked.locations, asked.to_recipe(), pipeline.RunOptions(device="cpu", workers=1))
    except Exception as error:  # noqa: BLE001 - the state tells it, as the engine does
        client.set_flow_run_state(run.id, Failed(message=f"Flow run encountered an exception: {error}"), force=True)
    else:
        client.set_flow_run_state(run.id, Completed(), force=True)


@pytest.fixture
def hand(deployment: str, monkeypatch: pytest.MonkeyPatch) -> Hand:
    found = Hand(deployment, convert)
    monkeypatch.setattr(children, "_sleep", found)
    return found


def test_each_checkpoint_is_a_run_of_the_deployment(ask: AskBatch, incoming: Path, deployment: str, hand: Hand) -> None:
    spoil(incoming / "beta")
    state = quantize_batch(ask(deployment=deployment, max_parallel=2), return_state=True)
    assert state.is_failed()
    assert hand.most == 2
    rows = table(state)
    assert {name: row["status"] for name, row in rows.items()} == {
        "alpha": "converted",
        "beta": "failed",
        "gamma": "converted",
    }
    assert "down_proj" in rows["beta"]["message"]
    with get_client(sync_client=True) as client:
        chosen = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run_id(state)]))
        made = client.read_flow_runs(flow_run_filter=chosen)
    assert sorted(run.name for run in made) == [f"quantize-{name}-FP8_DYNAMIC" for name in ("alpha", "beta", "gamma")]
    assert {str(run.id) for run in made} == {row["run"] for row in rows.values()}


def test_a_batch_starts_runs_of_the_deployment_that_is_called_as_its_own(
    ask: AskBatch, deployment: str, hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__NAME", deployment.rpartition("/")[2])
    state = quantize_batch(ask(deployment=None, max_parallel=3), return_state=True)
    assert state.is_completed()
    assert hand.most == 3
    assert all(row["run"] for row in table(state).values())


def test_a_batch_cannot_start_itself(ask: AskBatch) -> None:
    with pytest.raises(ValueError, match="deployment"):
        ask(deployment="quantize-batch/cpu")


def test_a_missing_deployment_is_refused(ask: AskBatch, converted: list[str]) -> None:
    with pytest.raises(DeploymentInvalid, match="no such deployment"):
        quantize_batch(ask(deployment="quantize-checkpoint/absent"))
    assert converted == []


def test_a_batch_that_is_stopped_cancels_the_runs_at_work(
    ask: AskBatch, deployment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is at work and one waits for a worker when the signal comes."""
    seen: list[UUID] = []

    def stop(_seconds: float) -> None:
        with get_client(sync_client=True) as client:
            seen.extend(run.id for run in runs_of(client, deployment))
            client.set_flow_run_state(seen[0], Running(), force=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(children, "_sleep", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize_batch(ask(deployment=deployment, max_parallel=2))
    with get_client(sync_client=True) as client:
        left = [client.read_flow_run(run).state for run in seen]
    assert len(left) == 2
    assert sorted(state.name or "" for state in left if state) == ["Cancelled", "Cancelling"]


def test_a_server_that_is_away_for_a_while_costs_only_time(
    ask: AskBatch, deployment: str, hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request to make a run arrives, its reply does not: asked again, the server makes no second one."""
    lost: list[object] = []

    def lose_replies(*args: Any, **kwargs: Any) -> FlowRun:
        made = run_deployment(*args, **kwargs)
        assert isinstance(made, FlowRun)
        if len(lost) < 2:
            lost.append(made)
            raise httpx.ReadError("connection lost")
        return made

    monkeypatch.setattr(children, "run_deployment", lose_replies)
    state = quantize_batch(ask(deployment=deployment, max_parallel=1), return_state=True)
    assert state.is_completed()
    assert hand.most == 1
    with get_client(sync_client=True) as client:
        chosen = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run_id(state)]))
        assert len(client.read_flow_runs(flow_run_filter=chosen)) == 3


def test_another_attempt_waits_for_runs_that_are_still_at_work(deployment: str, hand: Hand, ask: AskBatch) -> None:
    """The run of the batch was killed, its children were not."""
    asked = ask(sources=["/models/a"], deployment=deployment)
    request = asked.request_for("/models/a", "/out/a", {}).model_dump(mode="json")
    child = Child(label="quantize-a", key="/out/a", parameters={"request": request})

    def complete(client: SyncPrefectClient, run: FlowRun) -> None:
        client.set_flow_run_state(run.id, Completed(), force=True)

    hand.end = complete

    @flow
    def parent() -> tuple[int, list[str]]:
        from prefect.runtime import flow_run

        run_deployment(deployment, parameters={"request": request}, timeout=0, as_subflow=True)
        made = Deployment(
            name=deployment,
            max_parallel=1,
            parent=UUID(flow_run.id or ""),
            attempt=2,
            key_of=lambda given: str(given["request"]["destination"]),
        )
        ended = [end.run for _, end in made.map([child])]
        with get_client(sync_client=True) as client:
            chosen = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[UUID(flow_run.id or "")]))
            return len(client.read_flow_runs(flow_run_filter=chosen)), ended

    count, ended = parent()
    assert count == 1
    assert len(ended) == 1
