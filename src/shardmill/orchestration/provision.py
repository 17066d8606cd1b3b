"""Bring a Prefect server to what it should hold, and say what that took; a second time there is nothing to do.

Pausing is the operators' own: a pool, deployment, schedule or automation that was paused stays paused. So are schedules
as a whole, once they are there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Literal

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import (
    DeploymentScheduleCreate,
    DeploymentUpdate,
    GlobalConcurrencyLimitUpdate,
    WorkPoolCreate,
    WorkPoolUpdate,
)
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound

from shardmill import __version__
from shardmill.errors import DeploymentInvalid, Problem
from shardmill.orchestration.platform import Deployed, Platform, Pool, ScheduleForm

Action = Literal["created", "updated", "unchanged"]
AUTOMATION: Final = "shardmill: silent runs become Crashed"
"""Name of the automation, by which it is found again."""
SILENT_HEARTBEATS: Final = 3
"""Heartbeats that a run may miss: one lost event must not end a run that lives."""
LEEWAY_SECONDS: Final = 20
_SHOWN: Final = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One field that was not as it should be."""

    field: str
    found: Any
    wanted: Any

    def __str__(self) -> str:
        """`field: found -> wanted`, or only the field where that would be long."""
        before, after = json.dumps(self.found), json.dumps(self.wanted)
        return f"{self.field}: {before} -> {after}" if len(before + after) <= _SHOWN else f"{self.field} changed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What became of one thing on the server, or would become of it."""

    kind: str
    name: str
    action: Action
    differences: tuple[Difference, ...] = ()
    note: str = ""
    """What the operators did and what is kept."""

    def document(self) -> dict[str, Any]:
        """The form for machines."""
        return {
            "kind": self.kind,
            "name": self.name,
            "action": self.action,
            "differences": [{"field": d.field, "found": d.found, "wanted": d.wanted} for d in self.differences],
            "note": self.note,
        }


@dataclass(frozen=True, slots=True)
class Provision:
    """Compares a server with a platform and repairs it, unless that is only tried."""

    client: SyncPrefectClient
    platform: Platform
    is_trial: bool = False
    """Change nothing."""

    def changes(self) -> Iterator[Change]:
        """Every change, after it was made.

        Raises:
            DeploymentInvalid: a pool is there with another type; nothing was changed.
        """
        self._check_types()
        for pool in self.platform.pools:
            yield self._pool(pool)
        for deployed in self.platform.deployments:
            yield self._deployment(deployed)
            yield from self._schedules(deployed)
        yield self._automation()

    def _check_types(self) -> None:
        problems = []
        for pool in self.platform.pools:
            found = self._found_pool(pool.form.name)
            if found is not None and found.type != pool.form.type:
                message = f"pool `{pool.form.name}`: expected type {pool.form.type}, found {found.type}"
                way_out = "a pool keeps its type: delete it, or choose another name"
                problems.append(Problem(kind="pool-type", message=message, way_out=way_out))
        if problems:
            raise DeploymentInvalid(problems)

    def _settle(
        self,
        kind: str,
        name: str,
        wanted: Mapping[str, Any],
        found: Mapping[str, Any] | None,
        write: Callable[[], object],
        note: str = "",
    ) -> Change:
        """Write where `found` is not what is wanted."""
        differences = (
            ()
            if found is None
            else tuple(
                Difference(field=field, found=found.get(field), wanted=value)
                for field, value in wanted.items()
                if found.get(field) != value
            )
        )
        action: Action = "created" if found is None else "updated" if differences else "unchanged"
        if action != "unchanged" and not self.is_trial:
            write()
        return Change(kind=kind, name=name, action=action, differences=differences, note=note)

    # ---- pools --------------------------------------------------------------------------------------------------

    def _found_pool(self, name: str) -> Any:
        try:
            return self.client.read_work_pool(name)
        except ObjectNotFound:
            return None

    def _pool(self, pool: Pool) -> Change:
        name, found = pool.form.name, self._found_pool(pool.form.name)
        wanted: dict[str, Any] = {
            "description": pool.form.description,
            "concurrency_limit": pool.form.concurrency_limit,
            "base_job_template": dict(pool.template),
        }

        def write() -> None:
            if found is None:
                self.client.create_work_pool(WorkPoolCreate(name=name, type=pool.form.type, **wanted))
            else:
                self.client.update_work_pool(name, WorkPoolUpdate(**wanted))

        had = None if found is None else {field: getattr(found, field) for field in wanted}
        note = "paused" if found is not None and found.is_paused else ""
        return self._settle("pool", name, wanted, had, write, note)

    # ---- deployments --------------------------------------------------------------------------------------------

    def _found_deployment(self, full_name: str) -> DeploymentResponse | None:
        try:
            return self.client.read_deployment_by_name(full_name)
        except ObjectNotFound:
            return None

    def _deployment(self, deployed: Deployed) -> Change:
        found = self._found_deployment(deployed.full_name)
        wanted = _fields_of(deployed)

        def write() -> None:
            if found is None:
                self._create(deployed)
            else:
                self._update(found, deployed)

        note = "paused" if found is not None and found.paused else ""
        had = None if found is None else _fields_found(found)
        return self._settle("deployment", deployed.full_name, wanted, had, write, note)

    def _create(self, deployed: Deployed) -> None:
        self.client.create_deployment(
            flow_id=self.client.create_flow_from_name(deployed.flow.name),
            name=deployed.form.name,
            paused=False,
            **_payload(deployed),
        )

    def _update(self, found: DeploymentResponse, deployed: Deployed) -> None:
        limit, form = found.global_concurrency_limit, deployed.form.concurrency_limit
        self.client.update_deployment(found.id, DeploymentUpdate(**_payload(deployed)))
        if limit is not None and form is not None and not limit.active:
            update = GlobalConcurrencyLimitUpdate(active=True, limit=form.limit)
            self.client.update_global_concurrency_limit(limit.name, update)

    def _schedules(self, deployed: Deployed) -> Iterator[Change]:
        """Schedules are made once; whoever changes or switches one then is right."""
        found = self._found_deployment(deployed.full_name)
        there = {} if found is None else {schedule.slug: schedule.active for schedule in found.schedules}
        for form in deployed.form.schedules:
            is_new = form.slug not in there
            if is_new and found is not None and not self.is_trial:
                self.client.create_deployment_schedules(found.id, [_schedule(form)])
            yield Change(
                kind="schedule",
                name=f"{deployed.full_name} {form.slug}",
                action="created" if is_new else "unchanged",
                note="active" if there.get(form.slug, form.active) else "not active",
            )

    # ---- the automation -----------------------------------------------------------------------------------------

    def _automation(self) -> Change:
        wanted = silent_runs(self.platform.flow_names, self.platform.heartbeat_seconds)
        found = next(iter(self.client.read_automations_by_name(AUTOMATION)), None)

        def write() -> None:
            if found is None:
                self.client.create_automation(wanted)
            else:
                sent = wanted.model_dump(exclude={"owner_resource"}) | {"enabled": found.enabled}
                self.client.update_automation(found.id, AutomationCore.model_validate(sent))

        note = "paused" if found is not None and not found.enabled else ""
        had = None if found is None else _automation_fields(found)
        return self._settle("automation", AUTOMATION, _automation_fields(wanted), had, write, note)


def silent_runs(flow_names: tuple[str, ...], heartbeat_seconds: int) -> AutomationCore:
    """The automation that sets a run to Crashed whose process and worker are both gone.

    Any event of the run counts as a sign of life: its end under whatever name, and that it was suspended. A run that is
    in a final state already is left alone by the server.
    """
    return AutomationCore(
        name=AUTOMATION,
        description="A run whose process and worker both died sends no heartbeat any more, and nobody else reports it.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.*"},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            match_related=ResourceSpecification(
                {"prefect.resource.role": ["flow"], "prefect.resource.name": list(flow_names)}
            ),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=SILENT_HEARTBEATS * heartbeat_seconds + LEEWAY_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                name="Crashed",
                message="No heartbeat: the process and its worker are gone. Retry goes on where it was.",
                force=False,
            )
        ],
    )


def _automation_fields(automation: AutomationCore) -> dict[str, Any]:
    """What is compared, with everything that has no order in order."""
    fields: dict[str, Any] = automation.model_dump(mode="json", include={"description", "actions"})
    trigger = automation.trigger.model_dump(mode="json")
    for name, value in sorted(trigger.items()):
        fields[f"trigger.{name}"] = sorted(value) if isinstance(value, list) else value
    return fields


def _schedule(form: ScheduleForm) -> DeploymentScheduleCreate:
    return DeploymentScheduleCreate(
        schedule=CronSchedule(cron=form.cron, timezone=form.timezone),
        active=form.active,
        slug=form.slug,
        parameters=form.parameters,
    )


def _fields_of(deployed: Deployed) -> dict[str, Any]:
    """What is compared."""
    form, limit = deployed.form, deployed.form.concurrency_limit
    return {
        "entrypoint": form.entrypoint,
        "version": __version__,
        "description": form.description,
        "tags": sorted(form.tags),
        "work_pool": form.work_pool.name,
        "job_variables": form.work_pool.job_variables,
        "parameters": form.parameters,
        "form": deployed.flow.parameters.model_dump_for_openapi(),
        "enforce_form": True,
        "pull": [],
        "concurrency_limit": None if limit is None else limit.limit,
        "collision_strategy": None if limit is None else limit.collision_strategy,
        "limit_is_active": True,
    }


def _fields_found(found: DeploymentResponse) -> dict[str, Any]:
    limit, options = found.global_concurrency_limit, found.concurrency_options
    return {
        "entrypoint": found.entrypoint,
        "version": found.version,
        "description": found.description,
        "tags": sorted(found.tags),
        "work_pool": found.work_pool_name,
        "job_variables": found.job_variables,
        "parameters": found.parameters,
        "form": found.parameter_openapi_schema,
        "enforce_form": found.enforce_parameter_schema,
        "pull": found.pull_steps or [],
        "concurrency_limit": None if limit is None else limit.limit,
        "collision_strategy": None if limit is None or options is None else options.collision_strategy.value,
        "limit_is_active": limit is None or limit.active,
    }


def _payload(deployed: Deployed) -> dict[str, Any]:
    """What is sent."""
    form, limit = deployed.form, deployed.form.concurrency_limit
    strategy = None if limit is None else ConcurrencyLimitStrategy(limit.collision_strategy)
    return {
        "entrypoint": form.entrypoint,
        "version": __version__,
        "description": form.description,
        "tags": list(form.tags),
        "work_pool_name": form.work_pool.name,
        "job_variables": form.work_pool.job_variables,
        "parameters": form.parameters,
        "parameter_openapi_schema": deployed.flow.parameters.model_dump_for_openapi(),
        "enforce_parameter_schema": True,
        "pull_steps": [],
        "concurrency_limit": None if limit is None else limit.limit,
        "concurrency_options": None if strategy is None else ConcurrencyOptions(collision_strategy=strategy),
    }
