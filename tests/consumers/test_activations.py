"""Rounding in docs/activations.md is that of the slow reader, and the page has a row for every policy."""

from __future__ import annotations

import pytest
import torch

from checkpoints import gaussian
from consumers.activations import CALIBRATED, CONSTANTS, rounded
from kernels.plain_decoding import nvfp4_activations
from reference.compare_quality import ROOT


@pytest.mark.parametrize("scale", [0.25, 2.0, 64.0, 4096.0])
def test_both_round_alike(scale: float) -> None:
    values = gaussian(1, 64, 256, dtype=torch.float32, std=20.0)
    values[0] = 0
    values[1, :16] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6] * 2)  # ties
    ours = rounded(values, scale).double()
    plain = torch.from_numpy(nvfp4_activations(values.double().numpy(), scale))
    assert ((ours - plain).abs() <= 1e-6 * plain.abs()).float().mean() > 0.999


def test_the_page_has_a_row_for_every_policy() -> None:
    page = (ROOT / "docs" / "activations.md").read_text()
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")][2:]
    assert rows == ["bf16", "weights only, as NVFP4A16", CALIBRATED, *(f"`constant:{v}`" for v in CONSTANTS)]
