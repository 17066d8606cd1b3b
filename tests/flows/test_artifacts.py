"""What people see: escaped, cut, and never the reason for a failure."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from shardmill.core.digest import Digest
from shardmill.core.manifest import Manifest, ManifestShard, Totals
from shardmill.core.receipt import WeightRecord
from shardmill.core.recipe import uniform
from shardmill.core.statistics import Statistics
from shardmill.core.summary import Decision, Summary
from shardmill.errors import CheckpointInvalid, Problem, StorageFailed
from shardmill.flows import artifacts
from shardmill.flows.report import report_markdown
from shardmill.stages.plan import Locations

NASTY = "model`\n~~~~~~\n<script>|[x](y) ![z](http://e.example/z)\x1b[31m" + "x" * 5000


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
    monkeypatch.setattr(
        artifacts, "create_link_artifact", lambda link, link_text, key, **_: note(key, (link, link_text))
    )
    return found


def test_failures_name_the_way_out_and_foreign_text_is_tamed(written: list[tuple[str, Any]]) -> None:
    refused = CheckpointInvalid(
        [Problem(file=NASTY, tensor=NASTY, kind="k", message=NASTY, way_out="add it to `ignore`")]
    )
    artifacts.show_failures([("shard", refused), (NASTY, StorageFailed(NASTY))], done=3)

    [(key, (rows, description))] = written
    assert description.startswith("2 of 5 shards failed; 3 are finished")
    assert_tame(description)
    assert "add it to 'ignore'" in description
    assert key == "failures"
    assert [row["way out"] for row in rows] == ["add it to `ignore`", artifacts.RUN_AGAIN]
    assert all(text.isprintable() and len(text) <= 700 for row in rows for text in row.values())
    assert not any("](" in text for row in rows for text in row.values())


def test_a_table_shows_a_thousand_rows_and_says_so(written: list[tuple[str, Any]]) -> None:
    artifacts.show_problems(Problem(file=f"{n}", kind="k", message="m") for n in range(1001))

    [(_, (rows, description))] = written
    assert len(rows) == 1000
    assert "1000 of 1001" in description


def assert_tame(markdown: str) -> None:
    """Outside of code nothing is left that is more than words, tables and our own picture."""
    outside = re.sub(r"`[^`\n]*`|!\[[A-Za-z0-9 ,.;%-]+\]\(data:image/svg\+xml;base64,[A-Za-z0-9+/=]+\)", "", markdown)
    assert "`" not in outside
    assert not re.search(r"[<\[\]~\\]|http|script", outside)
    assert len(max(markdown.split("|"), key=len)) < 30_000
    assert "\x1b" not in markdown


FIGURES = {"destination": NASTY, "shards": 1, "hits": 0, "bytes_read": 8, "seconds": 2.0}


def a_result(module: str = NASTY, error: float = 1.0) -> tuple[Manifest, Summary]:
    totals = Totals(
        source_bytes=8, output_bytes=4, quantized_weights=2, quantized_bytes=2, copied_weights=1, copied_bytes=2
    )
    worst = (
        WeightRecord(module, NASTY, Statistics(count=1, squared_error=error, squared_weight=2, nonzero=4, zeroed=1)),
    )
    warnings = (Problem(file=NASTY, kind="k", message="m"),)
    decisions = (Decision(action="quantize", reason=NASTY, scheme=NASTY, count=9, names=(NASTY,) * 6),)
    digest = Digest("sha256", "0" * 64)
    shard = ManifestShard(name=NASTY, key="k", size=4, digest=digest, tensors=(), weights=worst)
    manifest = Manifest(plan="p", recipe=uniform("W4A16"), files=(), warnings=warnings, totals=totals, shards=(shard,))
    return manifest, Summary(totals=totals, shards=1, decisions=decisions, worst=worst, warnings=warnings)


def test_the_report_keeps_foreign_text_in_code(written: list[tuple[str, Any]]) -> None:
    artifacts.show_report(*a_result(), FIGURES)

    [(key, markdown)] = written
    assert key == "report"
    assert_tame(markdown)
    rows = [line for line in markdown.split("\n") if line.startswith("|")]
    assert {row.count("|") for row in rows} == {3, 5, 6}
    assert "2 more" in markdown
    assert "does not measure" in markdown


@pytest.mark.parametrize("error", [0.0, 1.0, float("nan"), float("inf")])
def test_the_report_has_a_picture_for_each_stack_of_layers(error: float) -> None:
    manifest, summary = a_result(f"{NASTY}.7.mlp", error)

    markdown = report_markdown(manifest, summary, FIGURES)

    assert_tame(markdown)
    assert (
        markdown.count("![relative error of 1 layers; ")
        == markdown.count("![heat map of SQNR by layer and module")
        == 1
    )


def test_a_page_that_cannot_be_written_is_a_warning(
    written: list[tuple[str, Any]], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    locations = Locations(source=str(tmp_path / "source"), destination=str(tmp_path / "nothing"))

    assert artifacts.write_page(str(tmp_path / "page.html"), locations, 1.0) == ""

    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert written == []


def test_only_an_url_is_linked(written: list[tuple[str, Any]]) -> None:
    artifacts.show_output("/models/out")
    artifacts.show_output("s3://bucket/a (b)`](http://e.example/")

    assert written == [
        ("output", ("s3://bucket/a%20%28b%29%60%5D%28http://e.example/", "`s3://bucket/a (b)'](http://e.example/`"))
    ]


@pytest.mark.parametrize("error", [httpx.ConnectError("no server"), OSError("no network")])
def test_an_artifact_that_cannot_be_written_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> UUID:
        raise error

    monkeypatch.setattr(artifacts, "create_table_artifact", fail)
    monkeypatch.setattr(artifacts, "create_link_artifact", fail)

    artifacts.show_problems([Problem(kind="k", message="m")])
    artifacts.show_output("s3://bucket/result")

    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
