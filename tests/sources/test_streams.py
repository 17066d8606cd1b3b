"""How a quantized source is read: which shards, in what pieces, on which device, and what a failure tells."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints import LLAMA, as_bytes, deal, gaussian, llama, read, write
from quantized import AWQ_SECTION, CASES, FP8, Layer, awq, block_fp8, config_of, encode_all, gptq, small
from shardmill.core.recipe import Recipe, dequantizing, uniform
from shardmill.errors import Refused, ShardFailures, ShardmillError
from shardmill.kernels import decoding, lanes
from shardmill.kernels.crew import _crews
from shardmill.stages.pipeline import RunResult, run
from shardmill.stages.plan import Locations, make_plan
from shardmill.stages.verify import verify
from shardmill.storage.source import open_source


def convert(source: Path, destination: Path, recipe: Recipe, store: str = "") -> RunResult:
    return run(Locations(source=str(source), destination=str(destination), store=store), recipe)


QUICK = {
    ("fp8 blocks", "FP8_BLOCK"),
    ("AWQ", "W4A16_ASYM"),
    ("GPTQ int4, with act-order, v2", ""),
    ("GPTQ int3, without act-order, v1", ""),
    ("CT packed int3 asymmetric", "NVFP4A16"),
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Row blocks and panels of a few rows, so that small tensors have many."""
    monkeypatch.setattr(lanes, "CPU_BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr("shardmill.kernels.crew.CPU_BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(decoding, "PANEL_BYTES", 1 << 12)
    _crews.clear()
    yield
    _crews.clear()


BLOCKWISE = [
    pytest.param(case, scheme, marks=[] if (case, scheme) in QUICK else [pytest.mark.slow])
    for case in (
        "fp8 blocks",
        "AWQ",
        "GPTQ int4, with act-order, v2",
        "GPTQ int3, without act-order, v1",
        "CT packed int3 asymmetric",
    )
    for scheme in ("", "NVFP4A16", "W4A16_ASYM", "FP8_BLOCK")
]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("case", "scheme"), BLOCKWISE)
def test_bytes_do_not_depend_on_the_size_of_blocks(tmp_path: Path, case: str, scheme: str) -> None:
    maker, section = CASES[case]
    weights = {f"m.{leaf}_proj.weight": gaussian(n, 224, 384) for n, leaf in enumerate(("q", "down"))}
    stored, plain = encode_all(weights, maker)
    source = write(tmp_path / "source", deal(stored, 2), config_of(section))
    recipe = uniform(scheme) if scheme else dequantizing()
    convert(source, tmp_path / "blocks", recipe)
    found = as_bytes(read(tmp_path / "blocks"))
    if scheme:
        _crews.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("shardmill.kernels.crew.CPU_BLOCK_BYTES", 4 << 20)
            patch.setattr(decoding, "PANEL_BYTES", 16 << 20)
            convert(source, tmp_path / "whole", recipe, store=str(tmp_path / "other"))
        assert found == as_bytes(read(tmp_path / "whole"))
    else:
        assert found == as_bytes({name: tensor.bfloat16() for name, tensor in plain.items()})


@pytest.mark.parametrize("case", ["fp8 blocks", "ModelOpt nvfp4"])
@pytest.mark.parametrize("scheme", ["NVFP4A16", "FP8_BLOCK"])
def test_both_kernels_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, scheme: str
) -> None:
    maker, section = CASES[case]
    source = write(tmp_path / "source", [encode_all(small(), maker)[0]], config_of(section))
    for kernels in ("cpu", "reference"):
        monkeypatch.setenv(lanes.KERNELS_VARIABLE, kernels)
        convert(source, tmp_path / kernels, uniform(scheme), store=str(tmp_path / f"store-{kernels}"))
    assert as_bytes(read(tmp_path / "cpu")) == as_bytes(read(tmp_path / "reference"))


def test_scales_in_a_shard_of_their_own_leave_it_empty(tmp_path: Path) -> None:
    stored, plain = encode_all(small(), block_fp8)
    scales = {name: tensor for name, tensor in stored.items() if name.endswith("_inv")}
    rest = {name: tensor for name, tensor in stored.items() if name not in scales}
    source = write(tmp_path / "source", [scales, rest], config_of(FP8))
    convert(source, tmp_path / "out", dequantizing())
    assert as_bytes(read(tmp_path / "out")) == as_bytes({n: t.bfloat16() for n, t in plain.items()})
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == plain.keys()
    assert verify(str(tmp_path / "out")) == []


def test_a_scale_in_another_shard_is_part_of_the_key(tmp_path: Path) -> None:
    stored, _ = encode_all(small(), block_fp8)
    first = {n: t for n, t in stored.items() if not n.endswith("_inv")}
    second = {n: t for n, t in stored.items() if n.endswith("_inv")} | {"m.norm.weight": gaussian(1, 8)}
    store = str(tmp_path / "store")
    source = write(tmp_path / "source", [first, second], config_of(FP8))
    cold = convert(source, tmp_path / "one", uniform("NVFP4A16"), store)
    warm = convert(source, tmp_path / "two", uniform("NVFP4A16"), store)
    name = "model.layers.0.mlp.down_proj.weight_scale_inv"
    changed = write(tmp_path / "changed", [first, second | {name: second[name] * 2}], config_of(FP8))
    other = convert(changed, tmp_path / "three", uniform("NVFP4A16"), store)
    assert [outcome.is_hit for outcome in cold.outcomes] == [False, False]
    assert [outcome.is_hit for outcome in warm.outcomes] == [True, True]
    assert [outcome.is_hit for outcome in other.outcomes] == [False, False]
    assert cold.outcomes[0].receipt.key != other.outcomes[0].receipt.key


def test_where_shards_are_cut_changes_nothing(tmp_path: Path) -> None:
    stored, _ = encode_all(llama(layers=1, hidden=128, width=160), block_fp8)
    found = []
    for shards in (1, 2, 5, 11):
        source = write(tmp_path / f"source{shards}", deal(stored, shards), config_of(FP8))
        convert(source, tmp_path / f"out{shards}", uniform("NVFP4A16"))
        found.append(as_bytes(read(tmp_path / f"out{shards}")))
    assert all(tensors == found[0] for tensors in found)


def _nan_code(tensors: dict[str, Tensor]) -> None:
    tensors["m.down_proj.weight"].view(torch.uint8)[5, 7] = 0x7F


def _nan_scale(tensors: dict[str, Tensor]) -> None:
    tensors["m.down_proj.weight_scale_inv"][0, 0] = float("nan")


@pytest.mark.parametrize("spoil", [_nan_code, _nan_scale])
@pytest.mark.parametrize("recipe", [uniform("FP8_DYNAMIC"), uniform("FP8_BLOCK"), uniform("NVFP4A16"), dequantizing()])
def test_values_that_are_none_are_told_with_their_place(tmp_path: Path, spoil: Any, recipe: Recipe) -> None:
    stored, _ = encode_all({"m.down_proj.weight": gaussian(1, 64, 128)}, block_fp8)
    spoil(stored)
    source = write(tmp_path / "source", [stored], config_of(FP8))
    with pytest.raises((ShardFailures, Refused)) as caught:
        convert(source, tmp_path / "out", recipe)
    where = "[5, 7]" if spoil is _nan_code else "[0, 0]"
    assert where in str(caught.value) or where in str(caught.value.__cause__)
    assert not (tmp_path / "out").exists()


def test_an_exponent_of_255_is_no_scale(tmp_path: Path) -> None:
    stored, _ = encode_all({"m.down_proj.weight": gaussian(1, 64, 128)}, CASES["CT mxfp4"][0])
    stored["m.down_proj.weight_scale"][3, 1] = 255
    source = write(tmp_path / "source", [stored], config_of(CASES["CT mxfp4"][1]))
    for number, recipe in enumerate((uniform("MXFP4A16"), uniform("NVFP4A16"), dequantizing())):
        with pytest.raises((ShardFailures, Refused), match=r"\[3, 32\]"):
            convert(source, tmp_path / f"out{number}", recipe)


def test_a_stored_shape_that_disagrees_is_refused(tmp_path: Path) -> None:
    maker, section = CASES["CT packed int4"]
    stored, _ = encode_all({"m.down_proj.weight": gaussian(1, 64, 128)}, maker)
    stored["m.down_proj.weight_shape"] = torch.tensor([64, 127])
    source = write(tmp_path / "source", [stored], config_of(section))
    with pytest.raises(ShardmillError, match="expected the shape"):
        convert(source, tmp_path / "out", dequantizing())


def test_group_numbers_beyond_the_groups_are_refused(tmp_path: Path) -> None:
    stored, _ = encode_all({"m.down_proj.weight": gaussian(1, 64, 128)}, partial(gptq, act_order=True))
    stored["m.down_proj.g_idx"][3] = 4
    source = write(tmp_path / "source", [stored], config_of({"quant_method": "gptq", "bits": 4}))
    with pytest.raises(ShardmillError, match="group numbers"):
        convert(source, tmp_path / "out", dequantizing())


@pytest.mark.parametrize("level", ["", "text_config"])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_no_copy_of_the_old_description_is_left(tmp_path: Path, level: str, key: str) -> None:
    stored, _ = encode_all(small(), block_fp8)
    section = {key: FP8}
    config = {**LLAMA, level: {**section, "hidden_size": 192}} if level else {**LLAMA, **section}
    source = write(tmp_path / "source", [stored], config)
    convert(source, tmp_path / "plain", dequantizing())
    convert(source, tmp_path / "out", uniform("FP8_DYNAMIC"))
    assert "weight_block_size" not in (tmp_path / "plain" / "config.json").read_text()
    text = (tmp_path / "out" / "config.json").read_text()
    assert "weight_block_size" not in text
    assert json.loads(text)["quantization_config"]["quant_method"] == "compressed-tensors"


def deepseek() -> dict[str, Tensor]:
    """Two layers of a small DeepSeek-V3: latent attention, one dense and one sparse, and a layer that predicts more."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (64, 128), "lm_head.weight": (64, 128)}
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_a_proj.weight": (96, 128),
            f"{prefix}.self_attn.kv_a_proj_with_mqa.weight": (80, 128),
            f"{prefix}.self_attn.o_proj.weight": (128, 192),
            f"{prefix}.input_layernorm.weight": (128,),
        }
        experts = [f"{prefix}.mlp"] if layer == 0 else [f"{prefix}.mlp.experts.{n}" for n in range(3)]
        for expert in experts:
            shapes |= {f"{expert}.{leaf}_proj.weight": (160, 128) for leaf in ("gate", "up")}
            shapes[f"{expert}.down_proj.weight"] = (128, 160)
        shapes[f"{prefix}.mlp.gate.weight"] = (3, 128)
    shapes["model.layers.2.eh_proj.weight"] = (128, 256)
    return {name: gaussian(seed, *shape) for seed, (name, shape) in enumerate(sorted(shapes.items()))}


def test_deepseek_in_one_pass_is_deepseek_dequantized_and_quantized(tmp_path: Path) -> None:
    def store(weight: Tensor) -> Layer:
        return block_fp8(weight)

    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in deepseek().items():
        is_linear = any(part in name for part in ("_proj", "_with_mqa"))
        layers = encode_all(
            {name.replace("_with_mqa", "_with_mqa_proj"): tensor} if is_linear else {name: tensor}, store
        )
        stored |= {key.replace("_with_mqa_proj", "_with_mqa"): value for key, value in layers[0].items()}
        plain |= {key.replace("_with_mqa_proj", "_with_mqa"): value for key, value in layers[1].items()}
    names = list(stored)
    parts = [{name: stored[name] for name in names[n::5]} for n in range(5)]  # scales are torn from their weights
    config = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 128}
    once = write(tmp_path / "fp8", parts, config | {"quantization_config": FP8})
    twice = write(tmp_path / "float32", deal(plain, 3), config)
    recipe = uniform("NVFP4A16", ignore=["re:.*layers.2.*", "lm_head"])
    result = convert(once, tmp_path / "one", recipe)
    convert(twice, tmp_path / "two", recipe)
    found, expected = as_bytes(read(tmp_path / "one")), as_bytes(read(tmp_path / "two"))
    left = {
        name
        for name in expected
        if (".layers.2." in name and "_proj" in name) or name.endswith("layers.2.self_attn.kv_a_proj_with_mqa.weight")
    }
    assert {n: v for n, v in found.items() if not n.startswith("model.layers.2.")} == {
        n: v for n, v in expected.items() if not n.startswith("model.layers.2.")
    }
    assert left
    for name in left:  # their codes stay, as blocks of compressed-tensors
        assert found[name] == as_bytes(stored)[name]
        assert found[name.removesuffix("weight") + "weight_scale"][2] == as_bytes(stored)[f"{name}_scale_inv"][2]
    assert any(len(shard.sources) > 1 for shard in result.plan.shards)
    assert verify(str(tmp_path / "one")) == []


def test_a_plan_survives_being_sent(tmp_path: Path) -> None:
    source = write(tmp_path / "source", deal(encode_all(small(), awq)[0], 2), config_of(AWQ_SECTION))
    plan = make_plan(open_source(str(source)), uniform("NVFP4A16"))
    again = pickle.loads(pickle.dumps(plan))  # noqa: S301  our own bytes
    assert again == plan
    digests = {shard.name: "blake3:00" for shard in plan.shards}
    assert [s.job_key(digests) for s in again.shards] == [s.job_key(digests) for s in plan.shards]
    assert json.loads(json.dumps(plan.shards[0].job())) == plan.shards[0].job()


def test_codes_are_read_once_although_their_scales_lie_behind_them(tmp_path: Path) -> None:
    weights = {f"m.{n}.down_proj.weight": gaussian(n, 2048, 4096) for n in range(3)}
    stored, _ = encode_all(weights, block_fp8)
    source = write(tmp_path / "source", [stored], config_of(FP8))
    size = (source / "model.safetensors").stat().st_size
    (outcome,) = convert(source, tmp_path / "out", uniform("FP8_DYNAMIC")).outcomes
    assert size <= outcome.bytes_read <= 1.01 * size
