"""Codes that a scheme has as well are written again: compressed-tensors reads of them what it was, bit by bit."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

from checkpoints import as_bytes, deal, llama, read, write
from quantized import (
    AWQ_SECTION,
    CASES,
    FP8,
    MODELOPT,
    Layer,
    Maker,
    awq,
    block_fp8,
    config_of,
    encode_all,
    gptq,
    modelopt_as_compressed,
    modelopt_nvfp4,
    small,
)
from shardmill.core.recipe import Recipe, parse_recipe, uniform
from shardmill.stages.pipeline import run
from shardmill.stages.plan import Locations
from shardmill.stages.verify import verify


def convert(source: Path, destination: Path, recipe: Recipe) -> dict[str, Tensor]:
    run(Locations(source=str(source), destination=str(destination)), recipe)
    return read(destination)


def restored(tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Weights as compressed-tensors gives them back, by module."""
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = QuantizationConfig.model_validate(section).config_groups
    assert len(groups) == 1
    scheme = groups["group_00"]
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    found: dict[str, Tensor] = {}
    for module in {name.rpartition(".")[0] for name in tensors if name.endswith("weight_scale")}:
        params = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.rpartition(".")[0] == module}
        found[f"{module}.weight"] = compressor.decompress(params, scheme)["weight"]
    return found


def symmetric(weight: Tensor) -> Layer:
    """GPTQ as most of it is: every zero point in the middle."""
    made = gptq(weight, 4, 32)
    eights = torch.full_like(made.tensors["qzeros"], 0x77777777)
    words = made.tensors["qweight"].long() & 0xFFFFFFFF
    codes = (words[:, None] >> torch.arange(0, 32, 4)[None, :, None] & 15).flatten(0, 1)
    values = (codes - 8).T * made.tensors["scales"].float().T.repeat_interleave(32, 1)
    return Layer({**made.tensors, "qzeros": eights}, values.contiguous())


INT4 = {"scheme": {"weights": {"num_bits": 4, "group_size": 32}}}
INT4_ASYM = {"scheme": {"weights": {"num_bits": 4, "group_size": 32, "symmetric": False}}}
PAIRS: dict[str, tuple[Maker, dict[str, Any], dict[str, Any]]] = {
    "fp8 blocks": (block_fp8, FP8, {"scheme": "FP8_BLOCK"}),
    "fp8 blocks, E8M0": (partial(block_fp8, scale=torch.float8_e8m0fnu), FP8, {"scheme": "FP8_BLOCK"}),
    "AWQ": (awq, AWQ_SECTION, INT4_ASYM),
    "GPTQ": (partial(gptq, bits=4), {"quant_method": "gptq", "bits": 4}, INT4_ASYM),
    "GPTQ, zero points in the middle": (symmetric, {"quant_method": "gptq", "bits": 4}, INT4),
    "CT fp8 channel": (*CASES["CT fp8 channel"], {"scheme": "FP8_DYNAMIC"}),
    "CT int8 channel": (*CASES["CT int8 channel"], {"scheme": "W8A8"}),
    "CT packed int4": (*CASES["CT packed int4"], INT4),
    "CT packed int4 asymmetric": (*CASES["CT packed int4 asymmetric"], INT4_ASYM),
    "CT mxfp8": (*CASES["CT mxfp8"], {"scheme": "MXFP8A16"}),
    "CT mxfp4": (*CASES["CT mxfp4"], {"scheme": "MXFP4A16"}),
    "DeepSeek fp4": (*CASES["DeepSeek fp4"], {"scheme": "MXFP4A16"}),
    "mxfp4 as nvfp4": (*CASES["CT mxfp4"], {"scheme": "NVFP4A16"}),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_codes_that_a_scheme_has_lose_nothing(tmp_path: Path, pair: str) -> None:
    maker, section, recipe = PAIRS[pair]
    stored, plain = encode_all(small(), maker)
    source = write(tmp_path / "source", deal(stored, 3), config_of(section))
    found = restored(convert(source, tmp_path / "out", parse_recipe(recipe)), tmp_path / "out")
    assert len(found) == 3
    for name, values in found.items():
        assert torch.equal(values, plain[name].to(values.dtype)), name
    assert verify(str(tmp_path / "out")) == []


def test_the_codes_of_awq_are_those_that_compressed_tensors_makes_of_them(tmp_path: Path) -> None:
    stored, _ = encode_all(small(), awq)
    source = write(tmp_path / "source", [stored], config_of(AWQ_SECTION))
    found = convert(source, tmp_path / "out", parse_recipe(INT4_ASYM))
    expected = AutoAWQConverter(group_size=32).process(dict(stored))
    for name in [name for name in expected if name.endswith(("_packed", "_zero_point", "_shape"))]:
        assert as_bytes({name: found[name]}) == as_bytes({name: expected[name]})
    scales = [name for name in expected if name.endswith("weight_scale")]
    assert all(torch.equal(found[name], expected[name].float()) for name in scales)


def shared(members: dict[str, Tensor]) -> dict[str, Layer]:
    """ModelOpt's NVFP4 of a fused set, which has one second scale, as its exporter sees to."""
    whole = torch.cat(list(members.values()))
    made = modelopt_nvfp4(whole)
    layers, first = {}, 0
    for module, weight in members.items():
        last = first + len(weight)
        rows = {k: v[first:last] if v.ndim == 2 else v.clone() for k, v in made.tensors.items()}
        layers[module] = Layer(rows, made.values[first:last])
        first = last
    return layers


def fused_modelopt() -> tuple[dict[str, Tensor], dict[str, Layer]]:
    weights = llama(layers=1, hidden=128, width=192)
    parts = [("self_attn", "qkv"), ("mlp", ("gate", "up")), ("mlp", ("down",)), ("self_attn", "o")]
    layers: dict[str, Layer] = {}
    for parent, leaves in parts:
        names = [f"model.layers.0.{parent}.{leaf}_proj" for leaf in leaves]
        layers |= shared({name: weights[f"{name}.weight"] for name in names})
    tensors = {name: t for name, t in weights.items() if name.removesuffix(".weight") not in layers}
    tensors |= {f"{module}.{param}": t for module, layer in layers.items() for param, t in layer.tensors.items()}
    return tensors, layers


def test_modelopt_nvfp4_keeps_its_codes_and_scales(tmp_path: Path) -> None:
    """Its second scale becomes a divisor, which rounds once, exactly as compressed-tensors' converter rounds it."""
    tensors, layers = fused_modelopt()
    source = write(tmp_path / "source", deal(tensors, 4), config_of(MODELOPT))
    found = convert(source, tmp_path / "out", uniform("NVFP4A16"))
    values = restored(found, tmp_path / "out")
    for module, layer in layers.items():
        assert torch.equal(found[f"{module}.weight_packed"], layer.tensors["weight"])
        assert torch.equal(found[f"{module}.weight_scale"].float(), layer.tensors["weight_scale"].float())
        assert torch.equal(values[f"{module}.weight"].float(), modelopt_as_compressed(layer))
    assert verify(str(tmp_path / "out")) == []


def test_a_fused_set_with_several_global_scales_gets_one(tmp_path: Path) -> None:
    """Engines would read half of it wrongly, so its codes cannot stay."""
    stored, _ = encode_all(llama(layers=1, hidden=128, width=192), modelopt_nvfp4)
    source = write(tmp_path / "source", deal(stored, 3), config_of(MODELOPT))
    found = convert(source, tmp_path / "out", uniform("NVFP4A16"))
    scales = {found[f"model.layers.0.self_attn.{leaf}_proj.weight_global_scale"].item() for leaf in "qkv"}
    assert len(scales) == 1
    assert verify(str(tmp_path / "out")) == []


def test_exponents_too_far_apart_for_nvfp4_are_quantized(tmp_path: Path) -> None:
    weights = {"m.down_proj.weight": torch.ones(64, 64) * 2.0**-30, "m.norm.weight": torch.ones(4)}
    weights["m.down_proj.weight"][:, :32] = 4.0
    stored, _ = encode_all(weights, CASES["CT mxfp4"][0])
    source = write(tmp_path / "source", [stored], config_of(CASES["CT mxfp4"][1]))
    found = convert(source, tmp_path / "out", uniform("NVFP4A16"))
    assert torch.equal(
        restored(found, tmp_path / "out")["m.down_proj.weight"][:, :32].float(), torch.full((64, 32), 4.0)
    )
    assert verify(str(tmp_path / "out")) == []


@pytest.mark.parametrize(
    ("maker", "section", "form"),
    [
        (block_fp8, FP8, "float-quantized"),
        (modelopt_nvfp4, MODELOPT, "nvfp4-pack-quantized"),
        (awq, AWQ_SECTION, "pack-quantized"),
    ],
)
def test_what_is_left_alone_is_written_with_the_same_codes(
    tmp_path: Path, maker: Maker, section: dict[str, Any], form: str
) -> None:
    stored, plain = encode_all(llama(layers=2, hidden=128, width=192), maker)
    source = write(tmp_path / "source", deal(stored, 3), config_of(section))
    found = convert(source, tmp_path / "out", uniform("MXFP8A16", ignore=["re:.*layers.1.*"]))
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    group = QuantizationConfig.model_validate(written).config_groups["group_01"]
    assert group.format == form
    compressor = BaseCompressor.get_value_from_registry(form)
    module = "model.layers.1.mlp.down_proj"
    params = {n.rpartition(".")[2]: t for n, t in found.items() if n.rpartition(".")[0] == module}
    read_back = compressor.decompress(params, group)["weight"]
    assert torch.equal(read_back, plain[f"{module}.weight"].to(read_back.dtype))
    assert {p.kind for p in verify(str(tmp_path / "out"))} <= {"fused-scales-differ"}
