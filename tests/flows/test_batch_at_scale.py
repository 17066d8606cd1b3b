"""Twenty checkpoints through a server, a worker for batches and one for conversions; two of them are broken."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import torch
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
)

import checkpoints
from workers import Service, end_of, serving, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

COUNT = 20
BROKEN = ("m07", "m13")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A server with the deployments, and two workers."""
    with (
        serving(tmp_path_factory.mktemp("batches")) as found,
        found.worker("conversions"),
        found.worker("batches", pool="shardmill-batch"),
    ):
        yield found


def write(folder: Path, seed: int, *, is_broken: bool) -> None:
    weights = checkpoints.llama()
    broken = torch.full((64, 128), float("nan"), dtype=torch.bfloat16)
    weights["model.layers.0.mlp.down_proj.weight"] = broken if is_broken else checkpoints.gaussian(seed, 64, 128)
    checkpoints.write(folder, checkpoints.deal(weights, 3))


def rows(client: SyncPrefectClient, run: UUID) -> dict[str, dict[str, Any]]:
    """The table of a batch by checkpoint."""
    chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]))
    (found,) = [one for one in client.read_artifacts(artifact_filter=chosen) if one.key == "batch"]
    return {Path(row["source"]).name: row for row in json.loads(str(found.data))}


def children(client: SyncPrefectClient, run: UUID) -> list[str]:
    chosen = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run]))
    return sorted(found.name for found in client.read_flow_runs(flow_run_filter=chosen))


def test_two_broken_checkpoints_of_twenty_are_told_and_tried_again(service: Service, tmp_path: Path) -> None:
    names = [f"m{number:02d}" for number in range(COUNT)]
    for number, name in enumerate(names):
        write(tmp_path / "in" / name, number, is_broken=name in BROKEN)
    request = {
        "sources": [f"{tmp_path}/in/*"],
        "destination": f"{tmp_path}/out/{{name}}-{{scheme}}",
        "device": "cpu",
        "workers": 1,
        "max_parallel": 4,
    }
    with service.client as client:
        first = start(client, request, "quantize-batch/cpu")
        assert end_of(client, first, 900) == "Failed"
        told = rows(client, first)
        assert Counter(row["status"] for row in told.values()) == {"converted": 18, "failed": 2}
        assert sorted(name for name, row in told.items() if row["status"] == "failed") == list(BROKEN)
        assert all("down_proj" in told[name]["message"] for name in BROKEN)
        assert len(list((tmp_path / "out").glob("m*/config.json"))) == COUNT - len(BROKEN)

        second = start(client, request, "quantize-batch/cpu")
        assert end_of(client, second, 300) == "Failed"
        assert children(client, second) == [f"quantize-{name}-FP8_DYNAMIC" for name in BROKEN]
        assert Counter(row["status"] for row in rows(client, second).values()) == {"unchanged": 18, "failed": 2}

        for number, name in enumerate(BROKEN):
            shutil.rmtree(tmp_path / "in" / name)
            write(tmp_path / "in" / name, number, is_broken=False)
        third = start(client, request, "quantize-batch/cpu")
        assert end_of(client, third, 300) == "Completed"
        assert children(client, third) == [f"quantize-{name}-FP8_DYNAMIC" for name in BROKEN]

        fourth = start(client, request, "quantize-batch/cpu")
        assert end_of(client, fourth, 300) == "Completed"
        assert children(client, fourth) == []
        assert Counter(row["status"] for row in rows(client, fourth).values()) == {"unchanged": COUNT}
