"""Every format of dense models in transformers, against weights that another reader gives back."""

from __future__ import annotations

import pytest

from consumers.cases import CASES, FROM_AWQ, Case
from consumers.judging import Judge

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("case", [*CASES, *FROM_AWQ], ids=lambda case: case.name)
def test_transformers_reads_what_was_written(judge: Judge, case: Case) -> None:
    assert judge.in_transformers(case).problems == []


@pytest.mark.parametrize("case", [case for case in CASES if case.is_emulated], ids=lambda case: case.name)
def test_transformers_rounds_activations_to_four_bits_as_told(judge: Judge, case: Case) -> None:
    assert judge.with_activations(case).problems == []
