"""What people see: throttled, escaped, cut, and never the reason for a failure."""

from __future__ import annotations

import re
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from shardmill.core.manifest import Totals
from shardmill.core.receipt import WeightRecord
from shardmill.core.statistics import Statistics
from shardmill.core.summary import Summary
from shardmill.errors import CheckpointInvalid, Problem, StorageFailed
from shardmill.flows import artifacts

NASTY = "model`\n~~~~~~\n<script>|[x](y)\x1b[31m" + "x" * 5000


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """`(key, data)` of every artifact that is written."""
    found: list[tuple[str, Any]] = []

    def note(key: str, data: Any) -> UUID:
        found.append((key, data))
        return uuid4()

    def note_table(table: Any, key: str, description: str) -> UUID:
        return note(key, (table, description))

    monkeypatch.setattr(artifacts, "create_table_artifact", note_table)
    monkeypatch.setattr(artifacts, "create_markdown_artifact", lambda markdown, key, **_: note(key, markdown))
    monkeypatch.setattr(artifacts, "create_progress_artifact", lambda progress, key, **_: note(key, progress))
    monkeypatch.setattr(artifacts, "update_progress_artifact", lambda _id, progress: note("update", progress))
    return found


def test_progress_is_shown_at_most_every_two_seconds_and_at_the_end(written: list[tuple[str, Any]]) -> None:
    now = iter([0.0, 0.5, 1.9, 2.0, 3.0, 3.1])
    progress = artifacts.Progress(100, clock=lambda: next(now))
    for _ in range(5):
        progress.advance(20)
    assert written == [("progress", 0.0), ("update", 60.0), ("update", 100.0)]


def test_failures_name_the_way_out_and_foreign_text_is_tamed(written: list[tuple[str, Any]]) -> None:
    refused = CheckpointInvalid(
        [Problem(file=NASTY, tensor=NASTY, kind="k", message=NASTY, way_out="add it to `ignore`")]
    )
    artifacts.show_failures([("shard", refused), (NASTY, StorageFailed(NASTY))])

    [(key, (rows, _))] = written
    assert key == "failures"
    assert [row["way out"] for row in rows] == ["add it to `ignore`", artifacts.RUN_AGAIN]
    assert all(text.isprintable() and len(text) <= 700 for row in rows for text in row.values())
    assert not any("](" in text for row in rows for text in row.values())


def test_a_table_shows_a_thousand_rows_and_says_so(written: list[tuple[str, Any]]) -> None:
    artifacts.show_problems(Problem(file=f"{n}", kind="k", message="m") for n in range(1001))

    [(_, (rows, description))] = written
    assert len(rows) == 1000
    assert "1000 of 1001" in description


def test_the_report_keeps_foreign_text_inside_its_fence(written: list[tuple[str, Any]]) -> None:
    totals = Totals(
        source_bytes=8, output_bytes=4, quantized_weights=2, quantized_bytes=2, copied_weights=1, copied_bytes=2
    )
    worst = (WeightRecord(NASTY, NASTY, Statistics(count=1, squared_error=1, squared_weight=2)),)
    warnings = (Problem(file=NASTY, kind="k", message="m"),)
    summary = Summary(totals=totals, shards=1, decisions=(), worst=worst, warnings=warnings)

    artifacts.show_report(summary, {"shards": 1})

    [(key, markdown)] = written
    assert key == "report"
    assert len(re.findall(r"^~~~~~~", markdown, re.MULTILINE)) == 2
    assert markdown.endswith("\n~~~~~~")
    assert "\x1b" not in markdown


@pytest.mark.parametrize("error", [httpx.ConnectError("no server"), OSError("no network")])
def test_an_artifact_that_cannot_be_written_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> UUID:
        raise error

    monkeypatch.setattr(artifacts, "create_table_artifact", fail)
    monkeypatch.setattr(artifacts, "create_progress_artifact", fail)

    artifacts.show_problems([Problem(kind="k", message="m")])
    artifacts.Progress(1).advance(1)

    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
