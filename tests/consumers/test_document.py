"""docs/consumers.md tells of every case."""

from __future__ import annotations

from collections.abc import Iterator

from consumers.cases import CASES, EXPERTS, FROM_AWQ, IN_VLLM, UNSHARED
from reference.compare_quality import ROOT
from zoo.battery import FURTHER_SCHEMES

DOCUMENT = ROOT / "docs" / "consumers.md"


def names(title: str, columns: int) -> Iterator[tuple[str, ...]]:
    """First cells of the rows below a title."""
    section = DOCUMENT.read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][2:]
    yield from (tuple(cell.strip() for cell in row.split("|")[1 : 1 + columns]) for row in rows)


def test_the_document_has_a_row_for_every_case() -> None:
    assert list(names("vLLM on CPU", 1)) == [(case.name,) for case in (*IN_VLLM, UNSHARED)]
    assert list(names("Dense models in transformers", 1)) == [(case.name,) for case in (*CASES, *FROM_AWQ, UNSHARED)]
    assert list(names("Experts", 2)) == [(name, scheme) for name in EXPERTS for scheme in FURTHER_SCHEMES]
