"""What a run shows to people in Prefect's UI: plan, progress, failures, report.

File and tensor names are foreign text: they are escaped and cut. An artifact that cannot be written costs a warning and
never a finished shard.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final
from uuid import UUID

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate

from shardmill.core.plan import Plan
from shardmill.core.summary import Summary, render
from shardmill.errors import NAME_LIMIT, Problem, Refused
from shardmill.orchestration.names import plain

log = logging.getLogger(__name__)
PROBLEMS_RAISED: Final = 10
"""Problems that a refusal repeats; the artifact `failures` has all of them."""
ROWS: Final = 1000
"""Rows that a table shows."""
PROGRESS_SECONDS: Final = 2.0
"""Least time between two updates of the progress."""
RUN_AGAIN: Final = "run again: finished shards are kept"
_MESSAGE_LIMIT: Final = 600


def _try(what: str, write: Callable[[], object]) -> UUID | None:
    try:
        found = write()
    except Exception as error:  # noqa: BLE001  whatever it is: what a run shows must not cost what it did
        log.warning("artifact %s could not be written: %s", what, error)
        return None
    return found if isinstance(found, UUID) else None


def _table(key: str, rows: Sequence[Mapping[str, Any]], description: str) -> None:
    if len(rows) > ROWS:
        description += f" The first {ROWS} of {len(rows)} rows."
    shown = [dict(row) for row in rows[:ROWS]]
    _try(key, lambda: create_table_artifact(shown, key=key, description=description))


def show_plan(plan: Plan, stored: Mapping[str, bool | None]) -> None:
    """Show every shard and what is known about it so far.

    Args:
        stored: by shard name, whether the store has it; None where that takes reading the source.
    """
    words = {True: "hit", False: "miss", None: "source not read yet"}
    rows = [
        {
            "shard": _cell(shard.name),
            "bytes": shard.size,
            "tensors": len(shard.tensors),
            "quantized": shard.quantized_tensors,
            "store": words[stored.get(shard.name)],
        }
        for shard in plan.shards
    ]
    _table("plan", rows, f"{len(rows)} shards, {plan.source_bytes / 1e9:.2f} GB to read at most.")


def _cell(text: str, limit: int = NAME_LIMIT) -> str:
    """Foreign text for a cell: one line, cut, and without links."""
    return plain(text, limit).replace("](", "] (")


def problem_row(problem: Problem) -> dict[str, str]:
    """One row of the table of failures."""
    return {
        "file": _cell(problem.file),
        "tensor": _cell(problem.tensor),
        "kind": problem.kind,
        "message": _cell(problem.message, _MESSAGE_LIMIT),
        "way out": _cell(problem.way_out, _MESSAGE_LIMIT),
    }


def show_problems(problems: Iterable[Problem]) -> None:
    """Show why a run was refused before it began."""
    _table(
        "failures",
        [problem_row(problem) for problem in problems],
        "Nothing was written: every problem and the way out.",
    )


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
        if self._artifact is None:
            self._artifact = _try("batch", lambda: create_table_artifact(shown, key="batch", description=description))
        else:
            _try("batch", partial(_update_table, self._artifact, shown, description))


def _update_table(artifact: UUID, rows: Sequence[Mapping[str, Any]], description: str) -> None:
    with get_client(sync_client=True) as client:
        client.update_artifact(artifact, ArtifactUpdate(data=json.dumps(rows), description=description))


def show_failures(failures: Iterable[tuple[str, BaseException]]) -> None:
    """Show the shards that failed, and why."""
    rows: list[dict[str, str]] = []
    for shard, error in failures:
        if isinstance(error, Refused):
            rows += [problem_row(problem) for problem in error.problems]
        else:
            way_out = "run again: finished shards are kept"
            rows.append(
                problem_row(Problem(file=shard, kind=type(error).__name__, message=str(error), way_out=way_out))
            )
    _table("failures", rows, "Shards that failed; all others are finished and kept in the store.")


class Progress:
    """The share of the source that is done, in bytes."""

    def __init__(self, total_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._clock = clock
        self._shown_at = clock()
        self._artifact = _try(
            "progress", lambda: create_progress_artifact(0.0, key="progress", description="Bytes done.")
        )

    def advance(self, size_bytes: int) -> None:
        """Count a shard that is done; shown at most every two seconds, and at the end."""
        self._done_bytes += size_bytes
        now = self._clock()
        if now - self._shown_at >= PROGRESS_SECONDS or self._done_bytes >= self._total_bytes:
            self._shown_at = now
            self._show()

    def _show(self) -> None:
        artifact = self._artifact
        if artifact is not None:
            share = 100.0 * self._done_bytes / max(1, self._total_bytes)
            _try("progress", lambda: update_progress_artifact(artifact, min(100.0, share)))


def report_markdown(summary: Summary, figures: Mapping[str, Any]) -> str:
    """Write the report of a finished run: the run's figures and the summary as the terminal shows it.

    Foreign names stand inside a fenced block only, with control characters escaped, so that none can begin a line.
    """
    lines = [f"| {name} | {value} |" for name, value in figures.items()]
    return "\n".join(["| | |", "|---|---|", *lines, "", "~~~~~~text", render(summary), "~~~~~~"])


def show_report(summary: Summary, figures: Mapping[str, Any]) -> None:
    """Show the report of a finished run."""
    markdown = report_markdown(summary, figures)
    _try(
        "report",
        lambda: create_markdown_artifact(markdown, key="report", description="What was written and how well it fits."),
    )
