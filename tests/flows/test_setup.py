"""`shardmill setup`: from an empty server to a complete one, and back to it after somebody changed something."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import (
    DeploymentScheduleCreate,
    DeploymentUpdate,
    GlobalConcurrencyLimitUpdate,
    WorkPoolCreate,
    WorkPoolUpdate,
)
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.schemas.automations import AutomationCore, EventTrigger
from prefect.events.schemas.events import ResourceSpecification
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from shardmill import __version__
from shardmill.flows import setup
from shardmill.orchestration.platform import FILE_NAMES, HEARTBEAT_VARIABLE, packaged_folder, read_platform
from shardmill.orchestration.provision import AUTOMATION, silent_runs

POOLS = ("shardmill-batch", "shardmill-cpu", "shardmill-gpu")
DEPLOYMENTS = ("quantize-batch/cpu", "quantize-batch/gpu", "quantize-checkpoint/cpu", "quantize-checkpoint/gpu")
TOTAL = len(POOLS) + len(DEPLOYMENTS) + 2 + 1
"""Two schedules and the automation, too."""

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def client() -> Iterator[SyncPrefectClient]:
    """A server with nothing of ours on it."""
    with get_client(sync_client=True) as found:
        for deployment in found.read_deployments():
            found.delete_deployment(deployment.id)
        for pool in found.read_work_pools():
            if pool.name.startswith("shardmill-"):
                found.delete_work_pool(pool.name)
        for automation in found.read_automations():
            found.delete_automation(automation.id)
        yield found


def run(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Set up, and what was told to machines."""
    assert setup.main([*map(str, arguments), "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def touched(told: dict[str, Any]) -> dict[str, tuple[str, list[str]]]:
    """What was not left alone: by name, action and fields."""
    return {
        change["name"]: (change["action"], [difference["field"] for difference in change["differences"]])
        for change in told["changes"]
        if change["action"] != "unchanged"
    }


def everything(client: SyncPrefectClient) -> list[Any]:
    """All that the server holds, with the times of its last changes."""
    automations = client.read_automations()
    # Workers and schedulers touch `status` and `last_polled` of what nobody changed.
    moving = {"status", "last_polled", "work_queue_id"}
    rows = [*client.read_work_pools(), *client.read_deployments(), *automations]
    return sorted((row.model_dump(mode="json", exclude=moving) for row in rows), key=lambda row: str(row["id"]))


def test_the_first_time_creates_all_and_the_second_changes_nothing(
    client: SyncPrefectClient, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(capsys=capsys)
    before = everything(client)
    second = run(capsys=capsys)

    assert first["counts"] == {"created": TOTAL, "updated": 0, "unchanged": 0}
    assert second["counts"] == {"created": 0, "updated": 0, "unchanged": TOTAL}
    assert everything(client) == before
    assert {pool.name for pool in client.read_work_pools()} >= set(POOLS)
    for name in DEPLOYMENTS:
        found = client.read_deployment_by_name(name)
        assert (found.version, found.pull_steps, found.tags) == (__version__, [], ["shardmill"])
    limit = client.read_deployment_by_name("quantize-checkpoint/cpu").global_concurrency_limit
    assert limit is not None
    assert limit.limit == 1
    (automation,) = client.read_automations_by_name(AUTOMATION)
    assert isinstance(automation.trigger, EventTrigger)
    assert automation.trigger.within == timedelta(seconds=200)
    env = client.read_work_pool("shardmill-gpu").base_job_template["variables"]["properties"]["env"]
    assert env["default"] == {HEARTBEAT_VARIABLE: "60"}


def test_what_somebody_changed_is_repaired_and_told(
    client: SyncPrefectClient, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys=capsys)
    cpu = client.read_deployment_by_name("quantize-checkpoint/cpu")
    gpu = client.read_deployment_by_name("quantize-checkpoint/gpu")
    batch = client.read_deployment_by_name("quantize-batch/cpu")
    assert cpu.global_concurrency_limit is not None
    client.update_global_concurrency_limit(
        cpu.global_concurrency_limit.name, GlobalConcurrencyLimitUpdate(limit=7, active=False)
    )
    client.update_deployment(gpu.id, DeploymentUpdate(concurrency_limit=3, tags=["mine"], description="?"))
    client.delete_deployment(batch.id)
    template = client.read_work_pool("shardmill-cpu").base_job_template
    template["variables"]["properties"]["env"]["default"] = {"AWS_SECRET_ACCESS_KEY": "in clear"}
    client.update_work_pool("shardmill-cpu", WorkPoolUpdate(base_job_template=template))
    client.update_work_pool("shardmill-batch", WorkPoolUpdate(concurrency_limit=0))
    (automation,) = client.read_automations_by_name(AUTOMATION)
    weak = automation.model_dump(exclude={"id", "owner_resource"})
    weak["trigger"]["within"] = timedelta(seconds=30)
    client.update_automation(automation.id, AutomationCore.model_validate(weak))

    assert setup.main(["--dry-run"]) == 0
    lines = capsys.readouterr().out
    told = run(capsys=capsys)

    assert touched(told) == {
        "quantize-checkpoint/cpu": ("updated", ["concurrency_limit", "limit_is_active"]),
        "quantize-checkpoint/gpu": (
            "updated",
            ["description", "tags", "concurrency_limit"],
        ),
        "quantize-batch/cpu": ("created", []),
        "quantize-batch/cpu nightly": ("created", []),
        "shardmill-cpu": ("updated", ["base_job_template"]),
        "shardmill-batch": ("updated", ["concurrency_limit"]),
        AUTOMATION: ("updated", ["trigger.within"]),
    }
    assert "concurrency_limit: 7 -> 1; limit_is_active: false -> true" in lines
    assert "concurrency_limit: 0 -> 8" in lines
    assert "base_job_template changed" in lines
    assert "2 created, 5 updated, 3 unchanged; dry run: nothing was changed" in lines
    assert run(capsys=capsys)["counts"]["unchanged"] == TOTAL


def test_what_operators_paused_or_scheduled_is_theirs(
    client: SyncPrefectClient, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys=capsys)
    batch = client.read_deployment_by_name("quantize-batch/cpu")
    (nightly,) = batch.schedules
    client.update_deployment_schedule(batch.id, nightly.id, active=True, schedule=CronSchedule(cron="30 3 * * 1"))
    own = DeploymentScheduleCreate(schedule=CronSchedule(cron="0 12 * * *"), active=False, slug="noon")
    client.create_deployment_schedules(batch.id, [own])
    client.pause_deployment(client.read_deployment_by_name("quantize-batch/gpu").id)
    client.update_work_pool("shardmill-gpu", WorkPoolUpdate(is_paused=True, description="changed"))
    (automation,) = client.read_automations_by_name(AUTOMATION)
    client.pause_automation(automation.id)

    told = run(capsys=capsys)

    assert touched(told) == {"shardmill-gpu": ("updated", ["description"])}
    notes = {change["name"]: change["note"] for change in told["changes"] if change["note"]}
    assert notes == {
        "shardmill-gpu": "paused",
        "quantize-batch/gpu": "paused",
        "quantize-batch/cpu nightly": "active",
        "quantize-batch/gpu nightly": "not active",
        AUTOMATION: "paused",
    }
    kept = {schedule.slug: schedule for schedule in client.read_deployment_by_name("quantize-batch/cpu").schedules}
    assert kept["nightly"].active
    assert kept["nightly"].schedule.model_dump()["cron"] == "30 3 * * 1"
    assert "noon" in kept
    assert client.read_work_pool("shardmill-gpu").is_paused
    assert not client.read_automations_by_name(AUTOMATION)[0].enabled


def test_a_dry_run_changes_nothing(client: SyncPrefectClient, capsys: pytest.CaptureFixture[str]) -> None:
    told = run("--dry-run", capsys=capsys)

    assert told["counts"] == {"created": TOTAL, "updated": 0, "unchanged": 0}
    assert told["dry_run"] is True
    assert everything(client) == []


def test_a_pool_of_another_type_is_refused_before_anything_is_changed(
    client: SyncPrefectClient, capsys: pytest.CaptureFixture[str]
) -> None:
    client.create_work_pool(WorkPoolCreate(name="shardmill-gpu", type="docker"))

    assert setup.main([]) == 2

    assert re.search(r"pool `shardmill-gpu`: expected type process, found docker; .*delete", capsys.readouterr().err)
    assert {pool.name for pool in client.read_work_pools()} & set(POOLS) == {"shardmill-gpu"}


def test_without_a_server_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert setup.main([]) == 2
        assert "export PREFECT_API_URL" in capsys.readouterr().err
    gone = {PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}
    with temporary_settings(gone):
        assert setup.main(["--json"]) == 1
    said = capsys.readouterr()
    assert "no server answers at http://127.0.0.1:9/api" in said.err
    assert json.loads(said.out)["status"] == "failed"


# ---- files of one's own -----------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """An exported folder."""
    folder = tmp_path / "platform"
    assert setup.main(["--export", str(folder)]) == 0
    assert f"shardmill setup --files {folder}" in capsys.readouterr().out
    return folder


def edit(file: Path, change: Edit) -> None:
    parse = json.loads if file.suffix == ".json" else yaml.safe_load
    document = parse(file.read_text())
    change(document)
    file.write_text(json.dumps(document))  # JSON is YAML


def test_exported_files_are_the_packaged_ones_and_are_not_overwritten(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {file.name: file.read_bytes() for file in own.iterdir()} == {
        name: (packaged_folder() / name).read_bytes() for name in FILE_NAMES
    }
    assert setup.main(["--export", str(own)]) == 2
    assert capsys.readouterr().err.count("a file of this name is there already") == len(FILE_NAMES)


def test_files_of_ones_own_replace_those_of_the_release(
    own: Path, client: SyncPrefectClient, capsys: pytest.CaptureFixture[str]
) -> None:
    def containers(document: dict[str, Any]) -> None:
        document["heartbeat_seconds"] = 30
        gpu = next(pool for pool in document["pools"] if pool["name"] == "shardmill-gpu")
        gpu |= {"type": "kubernetes", "concurrency_limit": 4}
        gpu["variables"] = {"image": "registry/shardmill:1", "gpus": "1", "env": {"RUST_LOG": "info"}}
        cpu = next(pool for pool in document["pools"] if pool["name"] == "shardmill-cpu")
        cpu |= {"type": "docker", "variables": {"image": "registry/shardmill:1", "cpuset": "0-15"}}

    edit(own / "platform.yaml", containers)

    run("--files", own, capsys=capsys)

    gpu = client.read_work_pool("shardmill-gpu")
    assert (gpu.type, gpu.concurrency_limit) == ("kubernetes", 4)
    defaults = {
        name: variable["default"]
        for name, variable in gpu.base_job_template["variables"]["properties"].items()
        if name in {"image", "gpus", "env"}
    }
    env = {HEARTBEAT_VARIABLE: "30", "RUST_LOG": "info"}
    assert defaults == {"image": "registry/shardmill:1", "gpus": "1", "env": env}
    assert client.read_work_pool("shardmill-cpu").type == "docker"
    trigger = client.read_automations_by_name(AUTOMATION)[0].trigger
    assert isinstance(trigger, EventTrigger)
    assert trigger.within == timedelta(seconds=110)
    assert run("--files", own, capsys=capsys)["counts"]["unchanged"] == TOTAL


def _no_home(document: dict[str, Any]) -> None:
    document["deployments"][0]["work_pool"]["name"] = "elsewhere"


def _twice(document: dict[str, Any]) -> None:
    document["pools"].append(document["pools"][0])


def _no_image(document: dict[str, Any]) -> None:
    document["pools"][0]["type"] = "kubernetes"


def _undefined(document: dict[str, Any]) -> None:
    document["job_configuration"]["name"] = "{{ nickname }}"


def _unknown(document: dict[str, Any]) -> None:
    document["pools"][0]["variables"] = {"colour": "blue"}


def _no_flow(document: dict[str, Any]) -> None:
    document["deployments"][0]["entrypoint"] = "shardmill.flows.quantize_checkpoint.absent"


def _quick(document: dict[str, Any]) -> None:
    document["heartbeat_seconds"] = 5


def _build(document: dict[str, Any]) -> None:
    document["build"] = []


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("prefect.yaml", _no_home, "expected a pool of platform.yaml, found `elsewhere`"),
        ("prefect.yaml", _no_flow, "is no flow that can be imported"),
        ("prefect.yaml", _build, "build: extra inputs are not permitted"),
        ("platform.yaml", _twice, "pool `shardmill-cpu` is there more than once"),
        ("platform.yaml", _no_image, "needs variables: image"),
        ("platform.yaml", _unknown, "sets variables that pool-process.json does not have: colour"),
        ("platform.yaml", _quick, "greater than or equal to 30"),
        ("pool-process.json", _undefined, "undefined variables: nickname"),
    ],
)
def test_wrong_files_are_refused_before_the_server_is_asked(
    own: Path, file: str, change: Edit, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(own / file, change)

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert setup.main(["--files", str(own)]) == 2

    told = capsys.readouterr().err
    assert said in told
    assert file in told or change in {_undefined, _twice}


def test_absent_and_broken_files_are_named(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "pool-process.json").write_text("{")
    assert setup.main(["--files", str(own)]) == 2
    assert "pool-process.json" in capsys.readouterr().err
    (own / "platform.yaml").unlink()
    assert setup.main(["--files", str(own)]) == 2
    assert re.search(r"platform.yaml`: cannot be read: .*--export", capsys.readouterr().err)


# ---- what the automation means ----------------------------------------------------------------------------------


def test_any_event_of_a_run_is_a_sign_of_life_and_only_our_flows_are_looked_after() -> None:
    platform = read_platform(packaged_folder())
    trigger = silent_runs(platform.flow_names, 60).trigger

    assert isinstance(trigger, EventTrigger)
    assert platform.flow_names == ("quantize-batch", "quantize-checkpoint")
    assert trigger.match_related == ResourceSpecification(
        {"prefect.resource.role": ["flow"], "prefect.resource.name": ["quantize-batch", "quantize-checkpoint"]}
    )
    assert trigger.expect == {"prefect.flow-run.*"}  # also Suspended, TimedOut and names of later releases
