"""NaN and Inf: refused where a weight is to be quantized, unless a recipe allows them; told where they are copied."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import checkpoints
from shardmill.core.recipe import Recipe, parse_recipe, recipe_to_json, uniform
from shardmill.errors import NonFiniteWeight, ShardFailures
from shardmill.stages.pipeline import RunOptions, RunResult, run
from shardmill.stages.plan import Locations, make_plan
from shardmill.stages.verify import verify, verify_against
from shardmill.storage import source as source_module
from shardmill.storage import store as store_module
from shardmill.storage.local import RangeReader

K = "model.layers.0.self_attn.k_proj.weight"
QKV = [f"model.layers.0.self_attn.{leaf}_proj.weight" for leaf in "qkv"]
ALLOWED = uniform("NVFP4A16", allow_nonfinite=True)


def source_with(tmp_path: Path, tensors: dict[str, Tensor], shards: int = 5) -> Path:
    return checkpoints.write(tmp_path / "source", checkpoints.deal(tensors, shards))


def convert(tmp_path: Path, recipe: Recipe, name: str = "result") -> RunResult:
    places = Locations(source=str(tmp_path / "source"), destination=str(tmp_path / name))
    return run(places, recipe, RunOptions(device="cpu", workers=1))


def hits(result: RunResult) -> int:
    return sum(outcome.is_hit for outcome in result.outcomes)


def bad_llama(name: str = K, value: float = math.nan) -> dict[str, Tensor]:
    tensors = checkpoints.llama()
    tensors[name][1, 3] = value
    tensors[name][2, 0] = value
    return tensors


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_they_are_refused_by_default_and_the_message_says_what_to_do(tmp_path: Path, value: float) -> None:
    source_with(tmp_path, bad_llama(value=value))
    with pytest.raises(ShardFailures) as caught:
        convert(tmp_path, uniform("FP8_DYNAMIC"))
    error = caught.value.failures[0][1]
    assert isinstance(error, NonFiniteWeight)
    assert "2 in its first bad row block, first at index [1, 3]" in str(error)
    assert "--allow-nonfinite" in str(error)
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize("shards", [1, 5])
def test_where_they_are_allowed_the_whole_layer_is_copied(
    tmp_path: Path, shards: int, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = bad_llama()
    source = source_with(tmp_path, tensors, shards)

    result = convert(tmp_path, ALLOWED)

    written = checkpoints.read(tmp_path / "result")
    copied = {name: written[name] for name in QKV}
    assert checkpoints.as_bytes(copied) == checkpoints.as_bytes({name: tensors[name] for name in QKV})
    assert "model.layers.0.self_attn.o_proj.weight_packed" in written
    assert "model.layers.1.self_attn.k_proj.weight_packed" in written
    manifest = json.loads((tmp_path / "result" / "shardmill.json").read_text())
    assert [(w["code"], w["tensor"]) for w in manifest["warnings"]] == [("non-finite", K)]
    assert "2 values are NaN or Inf, the first at index [1, 3]" in manifest["warnings"][0]["message"]
    assert manifest["recipe"]["allow_nonfinite"] is True
    reasons = {t["name"]: t["reason"] for shard in manifest["shards"] for t in shard["tensors"]}
    assert reasons[K] == "2 values are NaN or Inf"
    assert reasons[QKV[0]] == reasons[QKV[2]] == f"copied with `{K}`, which holds NaN or Inf"
    config = json.loads((tmp_path / "result" / "config.json").read_text())
    assert {name.removesuffix(".weight") for name in QKV} <= set(config["quantization_config"]["ignore"])
    assert verify(str(tmp_path / "result")) == []
    assert verify_against(str(tmp_path / "result"), str(source))[1] == []
    assert result.plan.warnings[0].kind == "non-finite"
    assert "values-unknown" not in {problem.kind for problem in result.plan.warnings}
    assert caplog.records == []


def test_the_result_is_that_of_ignoring_the_layer(tmp_path: Path) -> None:
    """So both share their work: a key says what was done to which bytes, and not why."""
    source_with(tmp_path, bad_llama())
    convert(tmp_path, ALLOWED)
    ignored = convert(tmp_path, uniform("NVFP4A16", ignore=[name.removesuffix(".weight") for name in QKV]), "ignored")
    assert hits(ignored) == 5
    for shard in sorted((tmp_path / "result").glob("*.safetensors")):
        assert shard.read_bytes() == (tmp_path / "ignored" / shard.name).read_bytes()


def test_a_finite_source_gives_the_same_with_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_FRESH_NS", 0)
    monkeypatch.setattr(source_module, "_HEADER_GUESS", 8)  # these shards are not longer than what is asked for first
    source_with(tmp_path, checkpoints.llama())
    convert(tmp_path, uniform("NVFP4A16"), "plain")
    read: list[int] = []
    read_into = RangeReader.read_into

    def note(self: RangeReader, offset: int, view: memoryview) -> None:
        read.append(len(view) if self.path.parent.name == "source" and self.path.suffix == ".safetensors" else 0)
        read_into(self, offset, view)

    monkeypatch.setattr(RangeReader, "read_into", note)
    allowed = convert(tmp_path, ALLOWED)
    assert hits(allowed) == 5
    assert max(read) < 8000  # headers alone: weights whose result is in the store were finite
    for shard in sorted((tmp_path / "result").glob("*.safetensors")):
        assert shard.read_bytes() == (tmp_path / "plain" / shard.name).read_bytes()


def test_a_plan_says_that_it_has_not_looked(tmp_path: Path) -> None:
    source_with(tmp_path, bad_llama())
    plan = make_plan(Locations(source=str(tmp_path / "source"), destination="").open_source(), ALLOWED)
    assert [problem.kind for problem in plan.warnings] == ["values-unknown"]


def test_running_again_finds_the_finished_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_FRESH_NS", 0)
    source_with(tmp_path, bad_llama())
    first = convert(tmp_path, ALLOWED)
    assert (hits(convert(tmp_path, ALLOWED)), hits(first)) == (5, 0)
    assert hits(convert(tmp_path, ALLOWED, "elsewhere")) == 5


def test_all_experts_of_a_layer_stay_together(tmp_path: Path) -> None:
    prefix = "model.layers.{}.mlp.experts.{}.{}_proj.weight"
    tensors = {
        prefix.format(layer, expert, leaf): checkpoints.gaussian(9 * layer + expert, 64, 64)
        for layer in range(2)
        for expert in range(3)
        for leaf in ("gate", "up", "down")
    }
    tensors[prefix.format(1, 2, "down")][0, 0] = math.inf
    source_with(tmp_path, tensors, 2)
    convert(tmp_path, ALLOWED)
    written = checkpoints.read(tmp_path / "result")
    assert {name.rpartition(".")[2] for name in written if ".layers.1." in name} == {"weight"}
    assert not [name for name in written if ".layers.0." in name and name.endswith(".weight")]


@pytest.mark.parametrize("bad", ["gate_up_proj", "down_proj"])
def test_fused_expert_stacks_of_a_layer_stay_as_they_are(tmp_path: Path, bad: str) -> None:
    tensors = {
        f"model.layers.{layer}.mlp.experts.{leaf}": checkpoints.gaussian(layer, *shape)
        for layer in range(2)
        for leaf, shape in {"gate_up_proj": (2, 128, 64), "down_proj": (2, 64, 64)}.items()
    }
    tensors[f"model.layers.1.mlp.experts.{bad}"][1, 5, 5] = math.nan
    checkpoints.write(tmp_path / "source", [tensors], checkpoints.LLAMA | {"model_type": "qwen3_moe"})
    convert(tmp_path, parse_recipe(recipe_to_json(ALLOWED) | {"expert_layout": "rows"}))
    written = checkpoints.read(tmp_path / "result")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1." in name}
    assert checkpoints.as_bytes({name: written[name] for name in kept}) == checkpoints.as_bytes(kept)
    assert "model.layers.0.mlp.experts.1.gate_proj.weight_packed" in written
    ignore = json.loads((tmp_path / "result" / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.1.mlp.experts.gate_up_proj" in ignore


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_in_copied_tensors_they_are_a_warning(
    tmp_path: Path, kernels: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDMILL_KERNELS", kernels)
    mask = torch.zeros(3, 1 << 20, dtype=dtype)
    mask[1, 7], mask[2, -1] = -math.inf, math.nan
    fine = torch.full((4,), torch.finfo(dtype).max, dtype=dtype)
    tensors = checkpoints.llama(layers=1) | {"x.mask": mask, "x.fine": fine, "x.count": torch.full((9,), -1)}
    source_with(tmp_path, tensors, 1)
    with caplog.at_level(logging.WARNING):
        for name in ("first", "second"):  # a result from the store tells it again
            convert(tmp_path, uniform("FP8_DYNAMIC"), name)
            manifest = json.loads((tmp_path / name / "shardmill.json").read_text())
            assert [warning for warning in manifest["warnings"] if warning["code"] == "non-finite"] == [
                {
                    "code": "non-finite",
                    "file": "model.safetensors",
                    "tensor": "x.mask",
                    "message": "2 values are NaN or Inf, the first at index [1, 7]; copied as it is",
                }
            ]
    assert [found for record in caplog.records if (found := record.getMessage().count("x.mask"))] == [1, 1]
    written = checkpoints.read(tmp_path / "first")["x.mask"]
    assert checkpoints.as_bytes({"x": written}) == checkpoints.as_bytes({"x": mask})


def test_stacks_of_one_layer_of_experts_stay_together(tmp_path: Path) -> None:
    config = {"model_type": "granitemoe", "hidden_size": 64, "intermediate_size": 32}
    shapes = {"input_linear": (2, 64, 64), "output_linear": (2, 64, 32)}
    tensors = {
        f"model.layers.{n}.block_sparse_moe.{leaf}.weight": checkpoints.gaussian(n, *shape)
        for n in (0, 1)
        for leaf, shape in shapes.items()
    }
    tensors["model.layers.0.block_sparse_moe.output_linear.weight"][1, 2, 3] = math.nan
    checkpoints.write(tmp_path / "source", [tensors], config)
    convert(tmp_path, ALLOWED)
    found = checkpoints.read(tmp_path / "result")
    assert {name for name in found if ".layers.0." in name} == {name for name in tensors if ".layers.0." in name}
    assert "model.layers.1.block_sparse_moe.experts.0.w1.weight_packed" in found
    assert verify(str(tmp_path / "result")) == []
