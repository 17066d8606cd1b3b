"""What a run shows to people in Prefect's UI before and after its work: plan, failures, report, output.

File and tensor names are foreign text: they are escaped and cut. An artifact that cannot be written costs a warning and
never a finished shard. Descriptions are markdown, and a list of artifacts shows the first few words of them.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import quote
from uuid import UUID

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.runtime import flow_run

from shardmill.core.assemble import totals
from shardmill.core.manifest import Manifest, Totals
from shardmill.core.markdown import code, plain
from shardmill.core.plan import Plan
from shardmill.core.summary import Summary, human_bytes
from shardmill.errors import NAME_LIMIT, Problem, Refused, show
from shardmill.flows.report import report_markdown
from shardmill.pages.page import render_page
from shardmill.stages.plan import Locations
from shardmill.stages.report import make_report
from shardmill.storage.documents import write_document

log = logging.getLogger(__name__)
PROBLEMS_RAISED: Final = 10
"""Problems that a refusal repeats; the artifact `failures` has all of them."""
ROWS: Final = 1000
"""Rows that a table shows."""
RUN_AGAIN: Final = "run again: finished shards are kept"
_MESSAGE_LIMIT: Final = 600
_DESCRIBED: Final = 5
"""Failures that stand in the description, where long lines wrap; in the table they do not."""
_STORED: Final = {True: "hit", False: "miss", None: "unknown"}


def attempt_prefix() -> str:
    """Tell the artifacts of a run that was retried apart."""
    count = flow_run.run_count or 1
    return f"Attempt {count}: " if count > 1 else ""


def _try(what: str, write: Callable[[str], object]) -> None:
    try:
        write(attempt_prefix())
    except Exception as error:  # noqa: BLE001  whatever it is: what a run shows must not cost what it did
        log.warning("artifact %s could not be written: %s", what, error)


def _table(key: str, rows: Sequence[Mapping[str, Any]], description: str) -> None:
    if len(rows) > ROWS:
        description += f"\n\nThe first {ROWS} of {len(rows)} rows."
    shown = [dict(row) for row in rows[:ROWS]]
    _try(key, lambda prefix: create_table_artifact(shown, key=key, description=prefix + description))


def show_plan(plan: Plan, stored: Mapping[str, bool | None]) -> None:
    """Show every shard and what is known about it so far.

    Args:
        stored: by shard name, whether the store has it; None where that takes reading the source.
    """
    rows = [
        {
            "shard": _cell(shard.name),
            "store": _STORED[stored.get(shard.name)],
            "in": human_bytes(shard.size),
            "out": human_bytes(shard.sizes().output_bytes),
            "tensors": len(shard.tensors),
            "quantized": shard.quantized_tensors,
        }
        for shard in plan.shards
    ]
    sizes = Summary(totals=Totals(**totals(plan)), shards=len(plan.shards), decisions=(), worst=(), warnings=())
    _table("plan", rows, _described_plan(sizes, Counter(stored.values())))


def _described_plan(summary: Summary, stored: Mapping[bool | None, int]) -> str:
    found = ", ".join(f"{stored[known]} {word}" for known, word in _STORED.items() if stored.get(known))
    until = " until read" if stored.get(None) else ""
    return f"{_sizes(summary)}; {summary.shards} shards: {found}{until}."


def _sizes(summary: Summary) -> str:
    source, output = summary.totals.source_bytes, summary.totals.output_bytes
    return (
        f"{human_bytes(source)} in, {human_bytes(output)} out ({summary.ratio:.0%}), "
        f"{summary.bits_per_weight:.2f} bits per weight"
    )


def _cell(text: str, limit: int = NAME_LIMIT) -> str:
    """Foreign text for a cell: one line, cut, and without links."""
    return plain(text, limit).replace("](", "] (")


def problem_row(problem: Problem) -> dict[str, str]:
    """One row of the table of failures."""
    return {
        "file": _cell(problem.file),
        "kind": problem.kind,
        "tensor": _cell(problem.tensor),
        "message": _cell(problem.message, _MESSAGE_LIMIT),
        "way out": _cell(problem.way_out, _MESSAGE_LIMIT),
    }


def _described(rows: Sequence[Mapping[str, str]]) -> str:
    """The first failures, as a list."""
    lines = []
    for row in rows[:_DESCRIBED]:
        subject = ", ".join(code(row[name]) for name in ("file", "tensor") if row[name]) or row["kind"]
        way_out = f"; **way out**: {code(row['way out'], _MESSAGE_LIMIT)}" if row["way out"] else ""
        lines.append(f"- {subject}: {code(row['message'], _MESSAGE_LIMIT)}{way_out}")
    if len(rows) > _DESCRIBED:
        lines.append(f"- and {len(rows) - _DESCRIBED} more, in the table")
    return "\n".join(lines)


def show_problems(problems: Iterable[Problem]) -> None:
    """Show why a run was refused before it began."""
    rows = [problem_row(problem) for problem in problems]
    noun = "problem" if len(rows) == 1 else "problems"
    _table("failures", rows, f"{len(rows)} {noun}, so nothing was written.\n\n{_described(rows)}")


@contextmanager
def refusals_shown() -> Iterator[None]:
    """Show every problem of a refusal as an artifact, and fail with a few of them."""
    try:
        yield
    except Refused as error:
        show_problems(error.problems)
        rest = len(error.problems) - PROBLEMS_RAISED
        if rest <= 0:
            raise
        more = Problem(kind="more", message=f"{rest} more problems than these; the artifact `failures` lists all")
        raise type(error)([*error.problems[:PROBLEMS_RAISED], more]) from None


class BatchTable:
    """What becomes of every checkpoint of a batch: one artifact, kept up to date."""

    def __init__(self) -> None:
        self._artifact: UUID | None = None

    def show(self, rows: Sequence[Mapping[str, Any]], description: str) -> None:
        """Show all rows anew; texts are foreign."""
        shown = [
            {name: _cell(value, _MESSAGE_LIMIT) if isinstance(value, str) else value for name, value in row.items()}
            for row in rows[:ROWS]
        ]
        if len(rows) > ROWS:
            description += f" The first {ROWS} of {len(rows)} rows."
        _try("batch", lambda prefix: self._write(shown, prefix + description))

    def _write(self, rows: Sequence[Mapping[str, Any]], description: str) -> None:
        if self._artifact is None:
            made = create_table_artifact([dict(row) for row in rows], key="batch", description=description)
            self._artifact = made if isinstance(made, UUID) else None
            return
        with get_client(sync_client=True) as client:
            client.update_artifact(self._artifact, ArtifactUpdate(data=json.dumps(rows), description=description))


def show_failures(failures: Sequence[tuple[str, BaseException]], done: int) -> None:
    """Show the shards that failed, and why.

    Args:
        done: Shards that are finished.
    """
    rows: list[dict[str, str]] = []
    for shard, error in failures:
        if isinstance(error, Refused):
            rows += [problem_row(problem) for problem in error.problems]
        else:
            rows.append(
                problem_row(Problem(file=shard, kind=type(error).__name__, message=str(error), way_out=RUN_AGAIN))
            )
    said = (
        f"{len(failures)} of {len(failures) + done} shards failed; {done} are finished and kept in the store. "
        "When the cause is mended, **Retry** does only what is missing."
    )
    _table("failures", rows, f"{said}\n\n{_described(rows)}")


def show_report(manifest: Manifest, summary: Summary, figures: Mapping[str, Any]) -> None:
    """Show the report of a finished run."""
    _try(
        "report",
        lambda prefix: create_markdown_artifact(
            report_markdown(manifest, summary, figures), key="report", description=f"{prefix}{_sizes(summary)}."
        ),
    )


def show_output(destination: str) -> None:
    """Link to the result, where it is at an URL."""
    _link("output", destination, "Where the result is.")


def _link(key: str, location: str, description: str) -> None:
    if "://" not in location:
        return
    link, text = quote(location, safe="/:@%+,;=~?&"), code(location, 300)
    _try(key, lambda prefix: create_link_artifact(link, link_text=text, key=key, description=prefix + description))


def write_page(location: str, locations: Locations, seconds: float) -> str:
    """Write the page of a finished result, and link to it; returns where it is, or nothing where it could not be.

    What was done is not lost with it: `shardmill report` writes the page at any time.
    """
    try:
        report = make_report(locations.destination, source=locations.source, seconds=seconds, with_histograms=True)
        write_document(location, render_page(report).encode())
    except Exception as error:  # noqa: BLE001  whatever it is: what a run shows must not cost what it did
        log.warning("the page %s could not be written: %s", show(location, 200), error)
        return ""
    _link("page", location, "A page with pictures of the result.")
    return location
