"""The batch: find checkpoints, leave those that are done, and convert every other one in a flow run of its own.

With a server each conversion is a run of a deployment, so that it waits for a worker, can be cancelled and retried, and
ends for itself; without one they run here, one after the other. A failed checkpoint fails the batch after all others
are done, and the next batch tries it again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Final, TypeVar
from uuid import UUID

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import deployment, flow_run

from shardmill.core.batch import Entry, Found, check_distinct, check_template, destination_of
from shardmill.core.plan import made_of
from shardmill.core.recipe import Recipe
from shardmill.core.summary import human_bytes
from shardmill.errors import BatchFailures, Problem, Refused, StorageFailed
from shardmill.flows import artifacts
from shardmill.flows.parameters import BatchRequest, QuantizeRequest
from shardmill.flows.quantize_checkpoint import quantize_checkpoint
from shardmill.orchestration.children import Child, Deployment, Ended, in_turn, is_served
from shardmill.orchestration.logs import library_logs
from shardmill.stages.batch import find_sources, is_done, look_at, read_entries, read_summary

T = TypeVar("T")
log = logging.getLogger("shardmill.flows.quantize_batch")
CONVERTED: Final = "converted"
UNCHANGED: Final = "unchanged"
WAITING: Final = "left for later"
FAILED: Final = "failed"
TO_DO: Final = "to do"
_ORDER: Final = (FAILED, TO_DO, WAITING, CONVERTED, UNCHANGED)
_LOOKS: Final = 16
"""Checkpoints that are looked at side by side."""
_MESSAGE_LIMIT: Final = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One checkpoint of a batch and what became of it; sizes in bytes."""

    source: str
    destination: str
    status: str
    message: str = ""
    """Why it failed, or is left for later."""
    seconds: float = 0.0
    source_bytes: int = 0
    output_bytes: int = 0
    bits_per_weight: float = 0.0
    run: str = ""
    """Names its flow run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSummary:
    """What a finished batch returns."""

    converted: int
    unchanged: int
    left_for_later: int
    checkpoints: tuple[Checkpoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    """A checkpoint with what is asked of it."""

    found: Found
    request: QuantizeRequest
    """Its destination is a template until the state of the source is known."""
    recipe: Recipe
    state: str = ""
    """Of the source, see `stages.batch.SourceState`."""


@flow(
    name="quantize-batch",
    flow_run_name="batch-{request.label}",
    validate_parameters=True,
    persist_result=False,  # a finished batch can be retried from the UI, and looks at everything again
    retries=0,
)
def quantize_batch(request: BatchRequest) -> BatchSummary:
    """Convert every checkpoint that is new or changed; those that are done cost a listing each.

    Args:
        request: Which checkpoints are converted, how, and where to.
    """
    with library_logs(), artifacts.refusals_shown():
        known, to_do = _sort(request, _gather(request))
        rows = {(row.source, row.destination): row for row in (*known, *(_row(item, TO_DO) for item in to_do))}
        table = artifacts.BatchTable()
        _show(table, tuple(rows.values()))
        for item, end in _convert(request, to_do):
            row = _settled(item, end)
            rows[row.source, row.destination] = row
            _tell(row, len(rows) - _count(rows.values(), TO_DO), len(rows))
            _show(table, tuple(rows.values()))
        return _conclude(tuple(rows.values()))


# ---- what there is to do ----------------------------------------------------------------------------------------


def _gather(request: BatchRequest) -> list[_Item]:
    """Every checkpoint that is named or found, with its request; whatever is wrong with the batch is told at once."""
    problems: list[Problem] = []
    entries = [Entry(source=source) for source in request.sources]
    if request.manifest is not None:
        entries += _attempt(partial(read_entries, request.manifest), problems, request.manifest) or ()
    for template in sorted({_template(request, entry) for entry in entries}):
        problems += check_template(template)
    items = [item for entry in entries for item in _items(request, entry, problems)] if not problems else []
    _refuse(problems)
    return items


def _template(request: BatchRequest, entry: Entry) -> str:
    return str(entry.choices.get("destination", request.destination))


def _items(request: BatchRequest, entry: Entry, problems: list[Problem]) -> Iterator[_Item]:
    """The checkpoints of one entry; their destination is still a template."""
    choices = {name: value for name, value in entry.choices.items() if name != "destination"}
    found = _attempt(partial(find_sources, entry.source), problems, entry.source)
    if found == ():
        log.warning("%s matches no checkpoint", entry.source)
    for one in found or ():
        ask = partial(request.request_for, one.source, _template(request, entry), choices)
        if (asked := _attempt(ask, problems, one.source)) is not None:
            recipe = _attempt(asked.to_recipe, problems, one.source)
            if recipe is not None:
                yield _Item(found=one, request=asked, recipe=recipe)


def _attempt(call: Callable[[], T], problems: list[Problem], place: str) -> T | None:
    """What a call gives; what is wrong goes to the problems."""
    try:
        return call()
    except Refused as error:
        problems += [problem if problem.file else replace(problem, file=place) for problem in error.problems]
    except StorageFailed as error:
        way_out = "check the location and the credentials"
        problems.append(Problem(file=place, kind="storage-unreachable", message=str(error), way_out=way_out))
    return None


def _refuse(problems: Sequence[Problem]) -> None:
    if problems:
        raise Refused(problems)


def _sort(request: BatchRequest, items: Sequence[_Item]) -> tuple[list[Checkpoint], list[_Item]]:
    """Rows of what is not converted now, and what is; a checkpoint that cannot be looked at keeps no other waiting."""
    with ThreadPoolExecutor(_LOOKS) as pool:
        looked = list(pool.map(partial(_look, request.min_age_minutes * 60.0), items))
    rows = [found for found in looked if isinstance(found, Checkpoint)]
    named: list[_Item] = []
    for found in looked:
        if isinstance(found, _Item) and all(found.request != other.request for other in named):
            named.append(found)
    _refuse(check_distinct((item.found.source, item.request.destination) for item in named))
    with ThreadPoolExecutor(_LOOKS) as pool:
        compared = list(pool.map(_compare, named))
    rows += [found for found in compared if isinstance(found, Checkpoint)]
    return rows, [found for found in compared if isinstance(found, _Item)]


def _look(min_age_seconds: float, item: _Item) -> _Item | Checkpoint:
    """Learn the state of a checkpoint and fill in its destination."""
    try:
        found = look_at(item.found, min_age_seconds)
    except (Refused, StorageFailed) as error:
        return _row(item, FAILED, str(error))
    version = made_of(found.state, item.recipe, allow_code=item.request.allow_code)
    destination = destination_of(item.request.destination, item.found, item.request.scheme_label, version)
    named = replace(item, request=item.request.model_copy(update={"destination": destination}), state=found.state)
    return _row(named, WAITING, found.waits_for) if found.waits_for else named


def _compare(item: _Item) -> _Item | Checkpoint:
    """The row of a checkpoint that is done already, or could not be told from one."""
    try:
        return _row(item, UNCHANGED) if is_done(item.request.locations, item.recipe, item.state) else item
    except (Refused, StorageFailed) as error:
        return _row(item, FAILED, str(error))


def _row(item: _Item, status: str, message: str = "") -> Checkpoint:
    return Checkpoint(source=item.found.source, destination=item.request.destination, status=status, message=message)


# ---- conversion -------------------------------------------------------------------------------------------------


def _convert(request: BatchRequest, items: Sequence[_Item]) -> Iterator[tuple[_Item, Ended]]:
    """Convert checkpoints and yield what became of each."""
    by_key = {item.request.destination: item for item in items}
    children = [
        Child(
            label=f"quantize-{item.request.label}",
            key=item.request.destination,
            parameters={"request": item.request.model_dump(mode="json")},
        )
        for item in items
    ]
    if not children:
        return
    name = request.deployment or _sibling()
    if name and is_served():
        made = Deployment(
            name=name,
            max_parallel=request.max_parallel,
            parent=UUID(flow_run.id) if flow_run.id else None,
            attempt=flow_run.run_count or 0,
            key_of=_destination,
        )
        with closing(made.map(children)) as ended:
            for child, end in ended:
                yield by_key[child.key], end
    else:
        for child, end in in_turn(children, lambda child: _call(by_key[child.key].request)):
            yield by_key[child.key], end


def _sibling() -> str:
    """The deployment of conversions that is called as the one of this batch; empty where it has none."""
    return f"{quantize_checkpoint.name}/{deployment.name}" if deployment.name else ""


def _call(request: QuantizeRequest) -> State[Any]:
    return quantize_checkpoint(request, return_state=True)


def _destination(parameters: Mapping[str, Any]) -> str:
    """What tells a child from the others of its batch."""
    asked = parameters.get("request")
    return str(asked.get("destination", "")) if isinstance(asked, Mapping) else ""


def _settled(item: _Item, end: Ended) -> Checkpoint:
    """The row of a checkpoint whose run has ended; its figures are those of the result that stands there now."""
    row = replace(_row(item, CONVERTED), seconds=round(end.seconds, 1), run=end.run)
    if not end.is_completed:
        return replace(row, status=FAILED, message=end.message[:_MESSAGE_LIMIT])
    try:
        summary = read_summary(item.request.destination)
    except (Refused, StorageFailed) as error:
        return replace(row, status=FAILED, message=f"its run ended well, but the result cannot be read: {error}")
    return replace(
        row,
        source_bytes=summary.totals.source_bytes,
        output_bytes=summary.totals.output_bytes,
        bits_per_weight=round(summary.bits_per_weight, 3),
    )


# ---- what people see --------------------------------------------------------------------------------------------


def _tell(row: Checkpoint, settled: int, total: int) -> None:
    level = logging.ERROR if row.status == FAILED else logging.INFO
    sizes = f", {human_bytes(row.source_bytes)} to {human_bytes(row.output_bytes)}" if row.output_bytes else ""
    why = f": {row.message}" if row.message else ""
    log.log(level, "%d of %d: %s %s in %.1f s%s%s", settled, total, row.source, row.status, row.seconds, sizes, why)


def _count(rows: Iterable[Checkpoint], status: str) -> int:
    return sum(row.status == status for row in rows)


def _show(table: artifacts.BatchTable, rows: Sequence[Checkpoint]) -> None:
    """Show the table, what needs a look first."""
    counts = [(status, _count(rows, status)) for status in _ORDER]
    described = ", ".join(f"{count} {status}" for status, count in counts if count) or "nothing"
    ordered = sorted(rows, key=lambda row: _ORDER.index(row.status))
    table.show([asdict(row) for row in ordered], f"{len(rows)} checkpoints: {described}.")


def _conclude(rows: tuple[Checkpoint, ...]) -> BatchSummary:
    """What the batch returns.

    Raises:
        BatchFailures: some checkpoints could not be converted.
    """
    failures = [(row.source, row.message) for row in rows if row.status == FAILED]
    if failures:
        raise BatchFailures(failures, len(rows) - len(failures))
    return BatchSummary(
        converted=_count(rows, CONVERTED),
        unchanged=_count(rows, UNCHANGED),
        left_for_later=_count(rows, WAITING),
        checkpoints=rows,
    )
