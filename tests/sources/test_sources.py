"""Every source format: what is decoded is what an independent reader gives, and what is quantized follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoints import as_bytes, deal, read, write
from quantized import CASES, config_of, encode_all, small
from shardmill.core.recipe import Recipe, dequantizing, uniform
from shardmill.stages.compare import verify_against
from shardmill.stages.pipeline import run
from shardmill.stages.plan import Locations
from shardmill.stages.verify import verify

QUICK = frozenset({"fp8 blocks", "ModelOpt nvfp4", "CT packed int4 asymmetric", "AWQ", "GPTQ int4, with act-order, v2"})
"""Cases whose second test is not for the night."""


def convert(source: Path, destination: Path, recipe: Recipe) -> dict[str, Tensor]:
    run(Locations(source=str(source), destination=str(destination)), recipe)
    return read(destination)


def bf16(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_an_independent_reader(tmp_path: Path, case: str) -> None:
    maker, section = CASES[case]
    stored, plain = encode_all(small(), maker)
    source = write(tmp_path / "source", deal(stored, 2), config_of(section))
    found = convert(source, tmp_path / "plain", dequantizing())
    assert as_bytes(found) == as_bytes(bf16(plain))
    assert "quantization_config" not in (tmp_path / "plain" / "config.json").read_text()
    assert verify(str(tmp_path / "plain")) == []
    assert verify_against(str(tmp_path / "plain"), str(source))[1] == []


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in CASES]
)
def test_one_pass_gives_the_bytes_of_dequantizing_and_then_quantizing(tmp_path: Path, case: str) -> None:
    maker, section = CASES[case]
    stored, plain = encode_all(small(), maker)
    once = write(tmp_path / "stored", deal(stored, 3), config_of(section))
    twice = write(tmp_path / "float32", deal(plain, 3))
    recipe = uniform("W8A8" if "fp4" in case else "NVFP4A16")  # 4-bit floats need not be quantized to become NVFP4
    assert as_bytes(convert(once, tmp_path / "one", recipe)) == as_bytes(convert(twice, tmp_path / "two", recipe))
    rows, problems = verify_against(str(tmp_path / "one"), str(once))
    assert len(rows) == 3
    assert problems == []
