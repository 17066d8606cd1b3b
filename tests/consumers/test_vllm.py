"""Results in vLLM on CPU: its own loader, its own matching of names, its own merging of layers."""

from __future__ import annotations

import pytest

from consumers.cases import IN_VLLM, UNSHARED, Case
from consumers.judging import Judge, control_problems

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800), pytest.mark.usefixtures("_vllm")]


@pytest.mark.parametrize("case", IN_VLLM, ids=lambda case: case.name)
def test_vllm_reads_what_was_written(judge: Judge, case: Case) -> None:
    assert judge.in_vllm(case).problems == []


def test_vllm_notices_global_scales_that_are_not_shared(judge: Judge) -> None:
    row = judge.in_vllm(UNSHARED)
    assert judge.in_transformers(UNSHARED).problems == []  # every tensor by itself is right
    assert row.problems != []
    assert control_problems(row) == []
