"""Experts in MXFP4 as gpt-oss stores them: three-dimensional, gate and up in alternating rows, with biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from checkpoints import as_bytes, deal, gaussian, read, write
from quantized import scheme_of
from shardmill.core.recipe import Recipe, dequantizing, uniform
from shardmill.stages.compare import verify_against
from shardmill.stages.pipeline import run
from shardmill.stages.plan import Locations
from shardmill.stages.verify import verify

EXPERTS, HIDDEN, WIDTH = 3, 64, 96
PREFIX = "model.layers.0.mlp.experts"
CONFIG: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_local_experts": EXPERTS,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
}


def stack(seed: int, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Random blocks, every code among them, and scales around one."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (EXPERTS, rows, cols // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(118, 130, (EXPERTS, rows, cols // 32), dtype=torch.uint8, generator=generator)
    return blocks, scales


def gpt_oss() -> dict[str, Tensor]:
    gate_up, down = stack(1, 2 * WIDTH, HIDDEN), stack(2, HIDDEN, WIDTH)
    return {
        f"{PREFIX}.down_proj_bias": gaussian(3, EXPERTS, HIDDEN),
        f"{PREFIX}.down_proj_blocks": down[0],
        f"{PREFIX}.down_proj_scales": down[1],
        f"{PREFIX}.gate_up_proj_bias": gaussian(4, EXPERTS, 2 * WIDTH),
        f"{PREFIX}.gate_up_proj_blocks": gate_up[0],
        f"{PREFIX}.gate_up_proj_scales": gate_up[1],
        "model.layers.0.mlp.router.weight": gaussian(5, EXPERTS, HIDDEN),
        "model.layers.0.self_attn.q_proj.weight": gaussian(6, HIDDEN, HIDDEN),
        "model.layers.0.self_attn.sinks": gaussian(7, 4),
    }


def dense(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same as transformers dequantizes it: `[E, in, out]`."""
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(("_blocks", "_scales"))}
    for leaf in ("gate_up_proj", "down_proj"):
        name = f"{PREFIX}.{leaf}"
        found[name] = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
    return found


def convert(source: Path, destination: Path, recipe: Recipe) -> dict[str, Tensor]:
    run(Locations(source=str(source), destination=str(destination)), recipe)
    return read(destination)


@pytest.mark.parametrize("shards", [1, 4])
def test_dequantized_experts_are_those_of_transformers(tmp_path: Path, shards: int) -> None:
    tensors = gpt_oss()
    source = write(tmp_path / "source", deal(tensors, shards), CONFIG)
    assert as_bytes(convert(source, tmp_path / "plain", dequantizing())) == as_bytes(dense(tensors))
    assert verify(str(tmp_path / "plain")) == []
    assert verify_against(str(tmp_path / "plain"), str(source))[1] == []


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "MXFP8A16", "FP8_BLOCK", "W8A8"])
def test_one_pass_gives_the_codes_of_the_dense_model(tmp_path: Path, scheme: str) -> None:
    """Every value of MXFP4 is a bf16 number, so the detour rounds nothing; only scales are stored wider without it."""
    tensors = gpt_oss()
    once = convert(write(tmp_path / "source", deal(tensors, 3), CONFIG), tmp_path / "one", uniform(scheme))
    plain = {name: tensor.float() if name.endswith("_proj") else tensor for name, tensor in dense(tensors).items()}
    config = {name: value for name, value in CONFIG.items() if name != "quantization_config"}
    twice = convert(write(tmp_path / "dense", deal(plain, 2), config), tmp_path / "two", uniform(scheme))
    assert as_bytes(once) == as_bytes(twice)
    assert f"{PREFIX}.2.gate_proj.bias" in once
    rows, problems = verify_against(str(tmp_path / "one"), str(tmp_path / "source"))
    assert len(rows) == 3 * EXPERTS + 1
    assert problems == []


def test_experts_that_a_recipe_leaves_alone_become_dense(tmp_path: Path) -> None:
    tensors = gpt_oss()
    source = write(tmp_path / "source", deal(tensors, 2), CONFIG)
    found = convert(source, tmp_path / "out", uniform("FP8_DYNAMIC", ignore="re:.*experts.*"))
    expected = dense(tensors)
    name = f"{PREFIX}.gate_up_proj"
    assert as_bytes({name: found[name]}) == as_bytes({name: expected[name]})
    assert as_bytes({f"{name}_bias": found[f"{name}_bias"]}) == as_bytes({f"{name}_bias": expected[f"{name}_bias"]})


@pytest.mark.parametrize("scheme", ["MXFP4A16", "NVFP4A16"])
def test_codes_of_experts_stay(tmp_path: Path, scheme: str) -> None:
    tensors = gpt_oss()
    source = write(tmp_path / "source", deal(tensors, 3), CONFIG)
    found = convert(source, tmp_path / "out", uniform(scheme, ignore="re:.*q_proj"))
    compressor = BaseCompressor.get_value_from_registry(f"{scheme[:-3].lower()}-pack-quantized")
    gate_up, down = dense(tensors)[f"{PREFIX}.gate_up_proj"], dense(tensors)[f"{PREFIX}.down_proj"]
    for expert in range(EXPERTS):
        expected = {"gate": gate_up[expert].T[0::2], "up": gate_up[expert].T[1::2], "down": down[expert].T}
        for leaf, values in expected.items():
            module = f"{PREFIX}.{expert}.{leaf}_proj"
            params = {n.rpartition(".")[2]: t for n, t in found.items() if n.startswith(f"{module}.weight")}
            assert torch.equal(compressor.decompress(params, scheme_of(scheme))["weight"], values)
    assert verify(str(tmp_path / "out")) == []
