"""A run that failed on one machine and is retried on another does only what failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prefect.states import AwaitingRetry

import checkpoints
from served import left_behind
from workers import end_of, serving, shard_runs, start, wait_until

pytestmark = pytest.mark.slow
SHARDS = 6
BROKEN = "model-00004-of-00006.safetensors"


def test_a_retry_on_another_worker_does_only_the_shard_that_failed(tmp_path: Path) -> None:
    weights = {f"model.layers.{n}.mlp.down_proj.weight": checkpoints.gaussian(n, 128, 256) for n in range(SHARDS)}
    source = checkpoints.write(tmp_path / "source", checkpoints.deal(weights, SHARDS))
    whole = (source / BROKEN).read_bytes()
    (source / BROKEN).write_bytes(whole[:-2] + b"\xc0\x7f")  # the last weight is no number
    request: dict[str, Any] = {"source": str(source), "destination": str(tmp_path / "result")}
    request |= {"scheme": "FP8_DYNAMIC", "device": "cpu", "workers": 2}
    other = tmp_path / "other"
    elsewhere = {"PREFECT_HOME": str(other), "PREFECT_LOCAL_STORAGE_PATH": str(other / "records")}

    with serving(tmp_path / "served") as service, service.client as client:
        with service.worker("first"):
            run = start(client, request)
            assert end_of(client, run) == "Failed"
        assert left_behind(tmp_path) == []
        (source / BROKEN).write_bytes(whole)
        with service.worker("second", **elsewhere):
            client.set_flow_run_state(run, AwaitingRetry())
            wait_until("the run goes on", lambda: client.read_flow_run(run).run_count == 2)
            assert end_of(client, run) == "Completed"

        def states() -> dict[str, str]:
            runs = [found for found in shard_runs(client, run) if found.flow_run_run_count == 2 and found.state]
            return {found.name.split()[1]: found.state.name or "" for found in runs if found.state}

        expected = {f"model-{n:05d}-of-{SHARDS:05d}.safetensors": "Cached" for n in range(1, SHARDS + 1)}
        expected[BROKEN] = "Completed"
        wait_until("the server knows of every shard", lambda: states() == expected, 60)
    assert list((other / "records").iterdir()), "the second worker has records of its own"
    assert left_behind(tmp_path) == []
    assert sorted(path.name for path in (tmp_path / "result").glob("*.safetensors")) == sorted(expected)
