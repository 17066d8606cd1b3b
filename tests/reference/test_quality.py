"""Quality beside the reference system; see `compare_quality.py` for what is measured. Takes some ten minutes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from reference import compare_quality
from reference.compare_quality import AS_RUN, WEIGHTS, Bench, Case, Row

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(3600)]

Measure = Callable[[Case], tuple[Row, ...]]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    if not compare_quality.REFERENCE_PYTHON.exists():
        pytest.skip(f"{compare_quality.REFERENCE_PYTHON} does not exist; run `make .venv-reference/stamp`")
    return Bench.prepare(tmp_path_factory.mktemp("quality"))


@pytest.fixture(scope="module")
def measure(bench: Bench) -> Measure:
    """Rows of a case, measured once."""
    return cache(lambda case: tuple(bench.rows(case)))


@pytest.mark.parametrize("case", compare_quality.CASES, ids=lambda case: case.name)
def test_no_scheme_is_worse_than_the_reference_allows(case: Case, bench: Bench, measure: Measure) -> None:
    rows = measure(case)

    assert [row.mode for row in rows] == [WEIGHTS, AS_RUN][: 1 + case.quantizes_activations]
    assert compare_quality.too_bad(rows) == []
    assert all(0 < row.ours < 2 for row in rows)
    assert [row.theirs is None for row in rows] == [bench.errors[case.name] != ""] * len(rows)


def test_blocks_work_where_the_reference_fails(bench: Bench, measure: Measure) -> None:
    by_preset = {case.preset: case for case in compare_quality.CASES}
    rows = [row for preset in ("FP8_BLOCK", "FP8_DYNAMIC") for row in measure(by_preset[preset])]

    assert "non contiguous" in bench.errors["FP8_BLOCK"]
    assert compare_quality.too_bad(rows) == []


@pytest.mark.parametrize("case", compare_quality.UNFIT, ids=lambda case: case.name)
def test_groups_that_do_not_divide_are_refused_with_the_way_out_before_any_work(case: Case, bench: Bench) -> None:
    refusal = bench.refusal(case).splitlines()

    assert len(refusal) == 30 * 6  # layers, and matrices of 576 columns in each
    assert all("group_size 128 does not divide in_features 576" in line for line in refusal)
    assert all("`ignore`" in line and "64)" in line for line in refusal)
    assert not (bench.folder / "ours" / case.name).exists()
    assert "Unable to quantize" in bench.errors[case.name]


def test_too_bad_finds_what_is_worse_than_required() -> None:
    case, block, channel = Case("W8A8"), Case("FP8_BLOCK"), Case("FP8_DYNAMIC")

    bad = [Row(case, WEIGHTS, 0.0112, 0.01), Row(block, WEIGHTS, 0.04, None), Row(channel, WEIGHTS, 0.02, 0.02)]

    assert len(compare_quality.too_bad(bad)) == 2
