"""deployments/prefect.yaml: it deploys from anywhere, and a worker runs what it deploys."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import ConcurrencyLimitStrategy
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelling

import checkpoints
from served import Ask
from shardmill.flows.quantize_checkpoint import quantize_checkpoint
from workers import DEPLOYMENT, FILE, POOL, deploy, run_to_its_end, served_worker, start, state_of, wait_until


def test_workers_pull_nothing() -> None:
    assert yaml.safe_load(FILE.read_text())["pull"] == []


def test_it_deploys_and_the_server_refuses_bad_parameters(tmp_path: Path, ask: Ask) -> None:
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))

        deploy(PREFECT_API_URL.value() or "", tmp_path)

        found = client.read_deployment_by_name(DEPLOYMENT)
        assert found.entrypoint == "shardmill.flows.quantize_checkpoint.quantize_checkpoint"
        assert found.pull_steps in (None, [])
        assert found.work_pool_name == POOL
        assert found.global_concurrency_limit is not None
        assert found.global_concurrency_limit.limit == 1
        assert found.concurrency_options is not None
        assert found.concurrency_options.collision_strategy == ConcurrencyLimitStrategy.ENQUEUE
        assert found.parameter_openapi_schema == quantize_checkpoint.parameters.model_dump_for_openapi()
        good = ask().model_dump()
        for field, bad in [("scheme", "FP9"), ("workers", -1), ("source", "s3://a:b@c/m"), ("speed", "fast")]:
            with pytest.raises(PrefectHTTPStatusError, match="409") as caught:
                client.create_flow_run_from_deployment(found.id, parameters={"request": good | {field: bad}})
            assert "Validation failed" in caught.value.response.text
            assert field in caught.value.response.text
        assert client.create_flow_run_from_deployment(found.id, parameters={"request": good}).deployment_id == found.id


# ---- a real server and a real worker ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with the deployment, a pool and a worker; the URL of its API."""
    with served_worker(tmp_path_factory.mktemp("served")) as url:
        yield url


@pytest.mark.slow
def test_a_worker_runs_the_deployment_twice_and_the_second_time_all_is_cached(
    worker: str, ask: Ask, tmp_path: Path
) -> None:
    time.sleep(2.1)  # the worker does not remember digests of younger files
    with SyncPrefectClient(worker) as client:
        run_to_its_end(client, ask(destination=str(tmp_path / "a")).model_dump())
        again = run_to_its_end(client, ask(destination=str(tmp_path / "b")).model_dump())

        def shard_states() -> list[str]:
            chosen = FlowRunFilter(id=FlowRunFilterId(any_=[again.id]))
            runs = client.read_task_runs(flow_run_filter=chosen)
            return [run.state.name or "" for run in runs if run.name.startswith("quantize") and run.state]

        wait_until("four shards are cached", lambda: shard_states() == ["Cached"] * 4)
    assert (tmp_path / "a" / "shardmill.json").read_bytes() == (tmp_path / "b" / "shardmill.json").read_bytes()


@pytest.mark.slow
def test_cancelling_stops_a_run_that_is_at_work(worker: str, ask: Ask, tmp_path: Path) -> None:
    weights = {f"model.layers.{n}.mlp.down_proj.weight": checkpoints.gaussian(n, 2048, 8192) for n in range(40)}
    source = checkpoints.write(tmp_path / "large", checkpoints.deal(weights, 8))
    request = ask(source=str(source), scheme="NVFP4A16", workers=2).model_dump()
    blobs = tmp_path / ".shardmill" / "blobs"
    with SyncPrefectClient(worker) as client:
        run = start(client, request)
        wait_until("a shard is being written", lambda: any(blobs.glob(".shardmill-*.tmp")))
        client.set_flow_run_state(run.id, Cancelling())
        wait_until("the run is cancelled", lambda: state_of(client, run) == "Cancelled", 60)
    assert list(blobs.glob(".shardmill-*.tmp")) == []
    assert not (tmp_path / "result").exists()
