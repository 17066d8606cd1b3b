"""deployments/pool-*.json, Dockerfile and units: what Prefect's own workers make of them."""

from __future__ import annotations

import asyncio
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.workers.base import BaseJobConfiguration

from shardmill.orchestration.platform import HEARTBEAT_VARIABLE, packaged_folder, read_platform

FOLDER = packaged_folder()
WORKERS = {
    "process": ("prefect.workers.process", "ProcessWorker"),
    "docker": ("prefect_docker.worker", "DockerWorker"),
    "kubernetes": ("prefect_kubernetes.worker", "KubernetesWorker"),
}
PLACEHOLDER = re.compile(r"\{\{ (\w+) \}\}")
IMAGE = "registry.example.org/shardmill:1"


def template(kind: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((FOLDER / f"pool-{kind}.json").read_text())
    return read


def worker(kind: str) -> Any:
    """Prefect's worker of a kind; importing the one for kubernetes takes seconds."""
    module, name = WORKERS[kind]
    return getattr(importlib.import_module(module), name)


def configured(kind: str, values: dict[str, Any]) -> Any:
    """What the worker of that kind would start for a run."""
    configuration: type[BaseJobConfiguration] = worker(kind).job_configuration
    return asyncio.run(configuration.from_template_and_values(template(kind), values))


@pytest.mark.parametrize("kind", sorted(WORKERS))
def test_every_placeholder_is_a_variable_and_every_variable_is_used(kind: str) -> None:
    found = template(kind)

    assert set(PLACEHOLDER.findall(json.dumps(found["job_configuration"]))) == set(found["variables"]["properties"])
    for name, variable in found["variables"]["properties"].items():
        assert variable["description"], name
        assert variable["title"], name


@pytest.mark.parametrize("kind", sorted(WORKERS))
def test_no_template_holds_a_credential(kind: str) -> None:
    properties = template(kind)["variables"]["properties"]

    assert "default" not in properties["env"]
    assert "in clear" in properties["env"]["description"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(WORKERS))
def test_a_template_has_every_part_that_prefects_own_has(kind: str) -> None:
    own, ours = worker(kind).get_default_base_job_template(), template(kind)

    assert set(own["job_configuration"]) <= set(ours["job_configuration"])
    # What a deployment may override with Prefect's own template, it may with ours, unless we fixed it.
    fixed = {"docker": {"privileged", "container_create_kwargs"}, "kubernetes": {"backoff_limit"}}
    assert set(own["variables"]["properties"]) - set(ours["variables"]["properties"]) == fixed.get(kind, set())


@pytest.mark.slow
def test_containers_get_folders_devices_and_no_privileges() -> None:
    from docker.types import HostConfig

    devices = [{"Driver": "nvidia", "Count": -1, "Capabilities": [["gpu"]]}]  # as platform.yaml shows it
    found = configured("docker", {"image": IMAGE, "device_requests": devices, "env": {"A": "b"}, "mem_limit": "24g"})

    assert found.image == IMAGE
    assert found.env == {"A": "b"}
    assert found.volumes == ["/models:/models", "/etc/shardmill/credentials:/run/secrets/shardmill:ro"]
    options = found.container_create_kwargs
    assert options["user"] == "10001:10001"
    assert "cpuset_cpus" not in options
    host = HostConfig(
        version="1.43",
        **{name: options[name] for name in ("shm_size", "cap_drop", "security_opt", "init", "device_requests")},
        mem_limit=found.mem_limit,
        privileged=found.privileged,
    )
    assert host["DeviceRequests"] == [
        {"Driver": "nvidia", "Count": -1, "DeviceIDs": [], "Capabilities": [["gpu"]], "Options": {}}
    ]
    assert (host["ShmSize"], host["Memory"], host["CapDrop"]) == (2 << 30, 24 << 30, ["ALL"])
    assert not host.get("Privileged")


@pytest.mark.slow
def test_pods_get_volumes_devices_and_credentials_by_reference() -> None:
    from prefect.client.schemas.objects import FlowRun

    found = configured("kubernetes", {"image": IMAGE, "gpus": "1", "env": {"A": "b"}})
    found.prepare_for_flow_run(FlowRun.model_construct(id="f", name="n", flow_id="x", tags=[], labels={}))
    job = found.job_manifest["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]

    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")  # retries are Prefect's
    assert container["image"] == IMAGE
    assert container["resources"]["limits"] == {"memory": "24Gi", "nvidia.com/gpu": "1"}
    assert container["envFrom"] == [{"secretRef": {"name": "shardmill-credentials", "optional": True}}]
    assert {"name": "A", "value": "b"} in container["env"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"models": "/models", "shm": "/dev/shm"}  # noqa: S108 - a mount, no temporary file
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert "nodeSelector" not in pod
    assert PLACEHOLDER.findall(json.dumps(found.job_manifest)) == []


def test_a_gpu_is_asked_for_only_where_a_pool_says_so() -> None:
    limits = template("kubernetes")["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]["containers"][0]

    assert limits["resources"]["limits"]["nvidia.com/gpu"] == "{{ gpus }}"
    assert "default" not in template("kubernetes")["variables"]["properties"]["gpus"]


def test_what_platform_yaml_shows_in_comments_can_be_used(tmp_path: Path) -> None:
    text = (FOLDER / "platform.yaml").read_text()
    for kind in ("docker", "kubernetes"):
        folder = tmp_path / kind
        shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
        (shown,) = re.findall(rf"# With type {kind}: +(\{{.*\}})", text)
        document = yaml.safe_load(text)
        document["pools"][1] |= {"type": kind, "variables": yaml.safe_load(shown.replace("…", IMAGE))}
        (folder / "platform.yaml").write_text(json.dumps(document))

        pool = read_platform(folder).pools[1]

        defaults = pool.template["variables"]["properties"]
        assert defaults["image"]["default"] == IMAGE
        assert defaults["env"]["default"] == {HEARTBEAT_VARIABLE: "60"}


# ---- Dockerfile and units ---------------------------------------------------------------------------------------


def test_the_dockerfile_passes_its_linter() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, "--no-color", FOLDER / "Dockerfile"], check=False, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr


def test_an_image_gets_every_folder_of_the_package_and_runs_as_nobody_special() -> None:
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    copied = {name for line in lines if re.match("COPY [^-]", line) for name in line.split()[1:-1]}

    assert {"src", "flows", "tasks", "deployments", "pyproject.toml", "constraints.txt", "README.md"} <= copied
    assert {name for name in copied if not (FOLDER.parent / name).exists()} == set()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == [template("docker")["variables"]["properties"]["user"]["default"]] == ["10001:10001"]
    assert all("--constraint constraints.txt" in line for line in lines if "pip install" in line)


@pytest.mark.parametrize("name", ["shardmill-server.service", "shardmill-worker@.service"])
def test_units_start_what_is_installed(name: str) -> None:
    unit = (FOLDER / name).read_text()

    programs = set(re.findall(r"/opt/shardmill/bin/([\w-]+)", unit))
    assert programs <= {"shardmill", "prefect"}
    assert programs
    assert {program for program in programs if not Path(sys.executable).with_name(program).exists()} == set()
