"""Every source format: what is decoded is what an independent reader gives, and what is quantized follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints import LLAMA, as_bytes, deal, llama, read, write
from quantized import (
    Maker,
    awq,
    block_fp8,
    compressed,
    deepseek_fp4,
    encode_all,
    gptq,
    modelopt_fp8,
    modelopt_nvfp4,
    scheme_of,
)
from shardmill.core.recipe import Recipe, dequantizing, uniform
from shardmill.stages.pipeline import run
from shardmill.stages.plan import Locations

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
MODELOPT = {"quant_method": "modelopt"}


def ct(scheme: Any, form: str) -> dict[str, Any]:
    """The section of config.json that compressed-tensors would write for one group."""
    group = {**scheme.model_dump(mode="json", exclude_none=True), "format": form, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": []}


def ints(bits: int, **fields: Any) -> Any:
    return scheme_of(num_bits=bits, type="int", **({"strategy": "group", "group_size": 32} | fields))


def _ct_case(scheme: Any, form: str) -> tuple[Maker, dict[str, Any]]:
    return partial(compressed, scheme=scheme, form=form), ct(scheme, form)


CASES: dict[str, tuple[Maker, dict[str, Any]]] = {
    "fp8 blocks": (block_fp8, FP8),
    "fp8 blocks, bf16 scales": (partial(block_fp8, scale=torch.bfloat16), FP8),
    "fp8 blocks, E8M0 scales": (partial(block_fp8, scale_param="scale", scale=torch.float8_e8m0fnu), FP8),
    "fp8 blocks of 64x32": (partial(block_fp8, block=(64, 32)), FP8 | {"weight_block_size": [64, 32]}),
    "DeepSeek fp4": (deepseek_fp4, FP8),
    "ModelOpt fp8": (modelopt_fp8, MODELOPT),
    "ModelOpt fp8 per channel": (partial(modelopt_fp8, per="channel"), MODELOPT),
    "ModelOpt nvfp4": (modelopt_nvfp4, MODELOPT),
    "CT fp8 channel": _ct_case(scheme_of("FP8_DYNAMIC"), "float-quantized"),
    "CT fp8 tensor": _ct_case(scheme_of(num_bits=8, type="float", strategy="tensor"), "naive-quantized"),
    "CT fp8 block": _ct_case(scheme_of("FP8_BLOCK"), "float-quantized"),
    "CT int8 channel": _ct_case(scheme_of("W8A8"), "int-quantized"),
    "CT int8 group, asymmetric": _ct_case(ints(8, symmetric=False), "int-quantized"),
    "CT int4 group unpacked": _ct_case(ints(4), "int-quantized"),
    **{f"CT packed int{bits}": _ct_case(ints(bits), "pack-quantized") for bits in (2, 3, 4, 5, 8)},
    "CT packed int4 asymmetric": _ct_case(ints(4, symmetric=False), "pack-quantized"),
    "CT packed int3 asymmetric": _ct_case(ints(3, symmetric=False), "pack-quantized"),
    "CT packed int8 channel": _ct_case(ints(8, strategy="channel", group_size=None), "pack-quantized"),
    "CT nvfp4": _ct_case(scheme_of("NVFP4A16"), "nvfp4-pack-quantized"),
    "CT mxfp4": _ct_case(scheme_of("MXFP4A16"), "mxfp4-pack-quantized"),
    "CT mxfp8": _ct_case(scheme_of("MXFP8A16"), "mxfp8-quantized"),
    "AWQ": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}),
    **{
        f"GPTQ int{bits}, {'with' if order else 'without'} act-order, v{version}": (
            partial(gptq, bits=bits, version=version, act_order=order),
            {
                "quant_method": "gptq",
                "bits": bits,
                "group_size": 32,
                "desc_act": order,
                "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
            },
        )
        for bits in (2, 3, 4, 8)
        for version, order in ((1, False), (2, True))
    },
}
"""Maker and `quantization_config` by name."""
QUICK = frozenset({"fp8 blocks", "ModelOpt nvfp4", "CT packed int4 asymmetric", "AWQ", "GPTQ int4, with act-order, v2"})
"""Cases whose second test is not for the night."""


def small() -> dict[str, Tensor]:
    """One layer with ragged blocks, of which some parts are fused."""
    leaves = ("q_proj", "k_proj", "down_proj", "norm", "embed_tokens")
    weights = llama(layers=1, hidden=192, width=288)
    return {name: tensor for name, tensor in weights.items() if name.split(".")[-2].endswith(leaves)}


def convert(source: Path, destination: Path, recipe: Recipe) -> dict[str, Tensor]:
    run(Locations(source=str(source), destination=str(destination)), recipe)
    return read(destination)


def config_of(section: Mapping[str, Any]) -> dict[str, Any]:
    return {**LLAMA, "quantization_config": dict(section)}


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


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in CASES]
)
def test_one_pass_gives_the_bytes_of_dequantizing_and_then_quantizing(tmp_path: Path, case: str) -> None:
    maker, section = CASES[case]
    stored, plain = encode_all(small(), maker)
    once = write(tmp_path / "stored", deal(stored, 3), config_of(section))
    twice = write(tmp_path / "float32", deal(plain, 3))
    assert as_bytes(convert(once, tmp_path / "one", uniform("NVFP4A16"))) == as_bytes(
        convert(twice, tmp_path / "two", uniform("NVFP4A16"))
    )
