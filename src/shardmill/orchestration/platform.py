"""What a server should hold: pools, deployments and the automation for dead runs, read from files.

    platform.yaml      heartbeat, pools
    pool-<type>.json   what a pool of that type starts for each run
    prefect.yaml       deployments, in Prefect's own form

The files lie in the installed package; people who change them keep copies of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import yaml
from prefect.flows import Flow, load_flow_from_entrypoint
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from shardmill.errors import DeploymentInvalid, Problem

FILE_NAMES: Final = (
    "README.md",
    "platform.yaml",
    "pool-docker.json",
    "pool-kubernetes.json",
    "pool-process.json",
    "prefect.yaml",
    "shardmill-server.service",
    "shardmill-worker@.service",
)
"""What a folder of one's own holds; the README and the units are for people."""
HEARTBEAT_VARIABLE: Final = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"
LEAST_HEARTBEAT_SECONDS: Final = 30
"""Prefect sends no quicker heartbeats."""
_PLACEHOLDER: Final = re.compile(r"\{\{\s*(\w+)\s*\}\}")
_LARGEST_FILE: Final = 1_000_000

Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^/%&><\x00-\x1f]+$")]
_Form = TypeVar("_Form", bound=BaseModel)


class _Strict(BaseModel):
    """A part of a file; a word that it does not know is refused instead of passed over."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PoolForm(_Strict):
    """A pool in platform.yaml."""

    name: Name
    type: Literal["process", "docker", "kubernetes"]
    description: str = ""
    concurrency_limit: int | None = Field(default=None, ge=0)
    variables: dict[str, Any] = Field(default_factory=dict)


class PlatformForm(_Strict):
    """platform.yaml."""

    heartbeat_seconds: int = Field(ge=LEAST_HEARTBEAT_SECONDS, le=3600)
    pools: tuple[PoolForm, ...]


class WorkPoolForm(_Strict):
    """Where the runs of a deployment go."""

    name: Name
    job_variables: dict[str, Any] = Field(default_factory=dict)


class LimitForm(_Strict):
    """How many runs of a deployment there may be at a time, and what becomes of further ones."""

    limit: int = Field(ge=1)
    collision_strategy: Literal["ENQUEUE", "CANCEL_NEW"] = "ENQUEUE"


class ScheduleForm(_Strict):
    """When a deployment runs by itself."""

    slug: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]+$")]
    cron: str
    timezone: str = "UTC"
    active: bool = False
    parameters: dict[str, Any] = Field(default_factory=dict)


class DeploymentForm(_Strict):
    """A deployment in prefect.yaml."""

    name: Name
    entrypoint: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)+$")]
    """Module and flow; workers import it from what is installed."""
    description: str = ""
    tags: tuple[str, ...] = ()
    work_pool: WorkPoolForm
    parameters: dict[str, Any] = Field(default_factory=dict)
    concurrency_limit: LimitForm | None = None
    schedules: tuple[ScheduleForm, ...] = ()


class PrefectForm(_Strict):
    """prefect.yaml, as far as a flow that is installed needs it."""

    name: str
    pull: Annotated[list[Any], Field(max_length=0)]
    definitions: dict[str, Any] = Field(default_factory=dict)
    deployments: tuple[DeploymentForm, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """A pool as the server should have it."""

    form: PoolForm
    template: Mapping[str, Any]
    """The base job template, with the pool's own defaults in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """A deployment as the server should have it."""

    form: DeploymentForm
    flow: Flow[..., Any]

    @property
    def full_name(self) -> str:
        """Flow and deployment."""
        return f"{self.flow.name}/{self.form.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """All that a server should hold."""

    pools: tuple[Pool, ...]
    deployments: tuple[Deployed, ...]
    heartbeat_seconds: int

    @property
    def flow_names(self) -> tuple[str, ...]:
        """Flows whose runs are looked after."""
        return tuple(sorted({deployed.flow.name for deployed in self.deployments}))


def packaged_folder() -> Path:
    """Where the files lie that came with this release."""
    return Path(str(files("shardmill.deployments")))


def export_files(folder: Path) -> tuple[Path, ...]:
    """Write copies of the files, to be changed.

    Raises:
        DeploymentInvalid: one of them is there already.
    """
    targets = tuple(folder / name for name in FILE_NAMES)
    problems = [
        Problem(file=str(target), kind="file-exists", message="a file of this name is there already")
        for target in targets
        if target.exists()
    ]
    if problems:
        raise DeploymentInvalid(problems)
    folder.mkdir(parents=True, exist_ok=True)
    for target in targets:
        target.write_bytes((packaged_folder() / target.name).read_bytes())
    return targets


def read_platform(folder: Path) -> Platform:
    """Read the files of a folder.

    Raises:
        DeploymentInvalid: a file is missing or wrong, or the files do not fit together.
    """
    wanted = _parse(PlatformForm, folder / "platform.yaml")
    specified = _parse(PrefectForm, folder / "prefect.yaml")
    problems = [*_doubles(wanted, specified), *_homeless(wanted, specified, folder / "prefect.yaml")]
    if problems:
        raise DeploymentInvalid(problems)
    return Platform(
        pools=tuple(_pool(form, folder, wanted.heartbeat_seconds) for form in wanted.pools),
        deployments=tuple(
            Deployed(form=form, flow=_load_flow(form, folder / "prefect.yaml")) for form in specified.deployments
        ),
        heartbeat_seconds=wanted.heartbeat_seconds,
    )


def _invalid(file: Path, kind: str, message: str, way_out: str = "") -> DeploymentInvalid:
    return DeploymentInvalid([Problem(file=str(file), kind=kind, message=message, way_out=way_out)])


def _read(file: Path) -> str:
    try:
        if file.stat().st_size > _LARGEST_FILE:
            raise _invalid(file, "file-large", f"expected at most {_LARGEST_FILE} bytes")
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        way_out = "`shardmill setup --export FOLDER` writes a complete set"
        raise _invalid(file, "file-unreadable", f"cannot be read: {reason}", way_out) from error


def _parse(form: type[_Form], file: Path) -> _Form:
    try:
        return form.model_validate(yaml.safe_load(_read(file)))
    except yaml.YAMLError as error:
        raise _invalid(file, "file-malformed", f"not valid YAML: {str(error).splitlines()[0]}") from error
    except ValidationError as error:
        raise DeploymentInvalid(
            Problem(
                file=str(file),
                kind="file-malformed",
                message=f"{'.'.join(map(str, found['loc'])) or 'the document'}: {found['msg'].lower()}",
            )
            for found in error.errors(include_url=False, include_input=False)
        ) from error


def _doubles(wanted: PlatformForm, specified: PrefectForm) -> Iterable[Problem]:
    names = [form.name for form in wanted.pools]
    deployments = [f"{form.entrypoint}/{form.name}" for form in specified.deployments]
    for file, kind, found in [("platform.yaml", "pool", names), ("prefect.yaml", "deployment", deployments)]:
        for name in sorted({name for name in found if found.count(name) > 1}):
            yield Problem(file=file, kind=f"{kind}-twice", message=f"{kind} `{name}` is there more than once")


def _homeless(wanted: PlatformForm, specified: PrefectForm, file: Path) -> Iterable[Problem]:
    pools = {form.name for form in wanted.pools}
    for form in specified.deployments:
        if form.work_pool.name not in pools:
            message = f"deployment `{form.name}`: expected a pool of platform.yaml, found `{form.work_pool.name}`"
            yield Problem(file=str(file), kind="pool-unknown", message=message, way_out=f"pools: {sorted(pools)}")


def _pool(form: PoolForm, folder: Path, heartbeat_seconds: int) -> Pool:
    file = folder / f"pool-{form.type}.json"
    try:
        template = json.loads(_read(file))
        used = set(_PLACEHOLDER.findall(json.dumps(template["job_configuration"])))
        properties = template["variables"]["properties"]
        required = template["variables"].get("required", ())
    except (ValueError, KeyError, TypeError) as error:
        message = f"expected JSON with job_configuration and variables.properties: {error}"
        raise _invalid(file, "template-malformed", message) from error
    undefined = sorted(used - set(properties))
    if undefined:
        raise _invalid(
            file, "template-malformed", f"job_configuration uses undefined variables: {', '.join(undefined)}"
        )
    variables = dict(form.variables)
    variables["env"] = {HEARTBEAT_VARIABLE: str(heartbeat_seconds)} | variables.get("env", {})
    unknown = sorted(set(variables) - set(properties))
    absent = sorted(name for name in required if name not in variables and "default" not in properties[name])
    if unknown:
        message = f"pool `{form.name}` sets variables that {file.name} does not have: {', '.join(unknown)}"
        raise _invalid(folder / "platform.yaml", "variable-unknown", message)
    if absent:
        message = f"pool `{form.name}` of type {form.type} needs variables: {', '.join(absent)}"
        raise _invalid(folder / "platform.yaml", "variable-missing", message)
    for name, value in variables.items():
        properties[name]["default"] = value
    return Pool(form=form, template=template)


def _load_flow(form: DeploymentForm, file: Path) -> Flow[..., Any]:
    try:
        return load_flow_from_entrypoint(form.entrypoint)
    except Exception as error:
        message = f"deployment `{form.name}`: {form.entrypoint} is no flow that can be imported: {error}"
        raise _invalid(file, "flow-unknown", message) from error
