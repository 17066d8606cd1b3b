"""Checkpoints of a batch, each in a run of its own that a deployment makes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, TypeVar
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Cancelling

from shardmill.core.digest import digest_json
from shardmill.errors import DeploymentInvalid, Problem

T = TypeVar("T")
log = logging.getLogger(__name__)
POLL_SECONDS: Final = 2.0
_PATIENCE_SECONDS: Final = 120.0
"""After which a run that nobody has begun is worth a line in the log."""
_OUTAGE_SECONDS: Final = 300.0
"""How long a server may not answer before a batch gives up; its children go on."""
_LIMIT: Final = 200
"""Runs that a server tells of at a time."""


def _sleep(seconds: float) -> None:
    time.sleep(seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A flow run to be made."""

    label: str
    """For its name."""
    key: str
    """Tells it from the others of its parent, in every attempt."""
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What became of a child."""

    is_completed: bool
    message: str
    """Of its last state; foreign text."""
    seconds: float
    run: str = ""
    """Names its flow run."""


def is_served() -> bool:
    """Whether there is a server that can make runs of deployments."""
    return bool(PREFECT_API_URL.value())


def ended(state: State[Any], seconds: float, run: str = "") -> Ended:
    """What a final state tells."""
    message = (state.message or state.name or "").removeprefix("Flow run encountered an exception: ")
    return Ended(is_completed=state.is_completed(), message=message, seconds=seconds, run=run)


@dataclass(slots=True)
class Deployment:
    """Makes a run for each child, with at most `max_parallel` at a time."""

    name: str
    max_parallel: int
    parent: UUID | None
    """The run of the batch."""
    attempt: int
    """Of that run; another one makes new runs of what failed."""
    key_of: Callable[[Mapping[str, Any]], str]
    """The key of a child by its parameters."""
    _running: dict[UUID, Child] = field(default_factory=dict, init=False)
    _begun: dict[UUID, float] = field(default_factory=dict, init=False)
    _told: set[UUID] = field(default_factory=set, init=False)

    def map(self, children: Sequence[Child]) -> Generator[tuple[Child, Ended], None, None]:
        """Run every child and yield what became of it, in the order in which they end.

        Runs that an earlier attempt of the batch left at work are waited for, and not made twice. Whatever ends this
        early cancels those that are at work.

        Raises:
            DeploymentInvalid: there is no such deployment.
        """
        with get_client(sync_client=True) as client:
            self._check(client)
            waiting = self._adopt(client, children)
            try:
                while True:
                    for child in islice(waiting, self.max_parallel - len(self._running)):
                        self._start(child)
                    if not self._running:
                        return
                    _sleep(POLL_SECONDS)
                    yield from self._collect(client)
            except BaseException:
                self._cancel(client)
                raise

    def _check(self, client: SyncPrefectClient) -> None:
        try:
            client.read_deployment_by_name(self.name)
        except ObjectNotFound:
            message = "there is no such deployment on the server"
            way_out = "deploy it (see deployments/README.md), or leave `deployment` empty"
            problem = Problem(file=self.name, kind="deployment-missing", message=message, way_out=way_out)
            raise DeploymentInvalid([problem]) from None

    def _adopt(self, client: SyncPrefectClient, children: Sequence[Child]) -> Iterator[Child]:
        """Take over runs of an earlier attempt; returns the children that have none."""
        left = {self.key_of(run.parameters): run for run in self._unfinished(client)}
        rest = []
        for child in children:
            run = left.get(child.key)
            if run is None:
                rest.append(child)
            else:
                self._note(run, child)
        return iter(rest)

    def _unfinished(self, client: SyncPrefectClient) -> list[FlowRun]:
        if self.parent is None:
            return []
        chosen = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[self.parent]))
        found: list[FlowRun] = []
        while page := client.read_flow_runs(flow_run_filter=chosen, limit=_LIMIT, offset=len(found)):
            found += page
        return [run for run in found if run.state is not None and not run.state.is_final()]

    def _start(self, child: Child) -> None:
        run = _patiently(
            lambda: run_deployment(
                self.name,
                parameters=dict(child.parameters),
                flow_run_name=child.label,
                timeout=0,
                as_subflow=True,
                idempotency_key=digest_json([str(self.parent), self.attempt, child.key]),  # a reply may be lost
            )
        )
        if not isinstance(run, FlowRun):
            raise TypeError(f"expected a flow run, found {run!r}")
        self._note(run, child)

    def _note(self, run: FlowRun, child: Child) -> None:
        self._running[run.id] = child
        self._begun[run.id] = time.monotonic()
        log.info("%s: run %s", child.label, run.id)

    def _collect(self, client: SyncPrefectClient) -> Iterator[tuple[Child, Ended]]:
        """Children that have ended; tells once of each that nobody begins."""
        for run in self._look(client):
            if run.state is None:
                continue
            seconds = time.monotonic() - self._begun[run.id]
            if run.state.is_final():
                spent = run.estimated_run_time.total_seconds() or seconds
                yield self._running.pop(run.id), ended(run.state, spent, str(run.id))
            elif run.state.is_scheduled() and seconds > _PATIENCE_SECONDS and run.id not in self._told:
                self._told.add(run.id)
                log.warning("%s waits for a worker since %.0f s; is one started?", self._running[run.id].label, seconds)

    def _look(self, client: SyncPrefectClient) -> list[FlowRun]:
        """The runs at work, as the server knows them."""
        chosen = FlowRunFilter(id=FlowRunFilterId(any_=list(self._running)))
        return _patiently(lambda: client.read_flow_runs(flow_run_filter=chosen, limit=_LIMIT))

    def _cancel(self, client: SyncPrefectClient) -> None:
        """Ask every run at work to stop; there may be little time, so nothing is waited for."""
        for run in self._running:
            with suppress(httpx.HTTPError, ObjectNotFound):
                state = client.read_flow_run(run).state
                is_begun = state is not None and state.type not in (StateType.SCHEDULED, StateType.PENDING)
                message = "the batch was stopped"
                client.set_flow_run_state(run, Cancelling(message=message) if is_begun else Cancelled(message=message))


def _patiently(call: Callable[[], T]) -> T:
    """Ask a server that may be away for a while, which costs nothing but time."""
    deadline = time.monotonic() + _OUTAGE_SECONDS
    while True:
        try:
            return call()
        except httpx.TransportError as error:
            if time.monotonic() > deadline:
                raise
            log.warning("the server does not answer (%s); runs go on", type(error).__name__)
            _sleep(POLL_SECONDS)


def in_turn(children: Iterable[Child], call: Callable[[Child], State[Any]]) -> Iterator[tuple[Child, Ended]]:
    """Run children one after the other in this process."""
    for child in children:
        started = time.monotonic()
        state = call(child)
        run = state.state_details.flow_run_id
        yield child, ended(state, time.monotonic() - started, str(run or ""))
