"""The bytes of whole shards: against the oracle, and independent of sharding, blocks and workers."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import checkpoints
from asked import recipe_of
from blocks import row_blocks
from kernels.oracle import expected
from shardmill.cli import main
from shardmill.core.plan import Plan
from shardmill.core.recipe import Recipe, parse_recipe, uniform, with_search
from shardmill.core.scheme import PRESETS, Search
from shardmill.errors import Interrupted, NonFiniteWeight, Refused, ShardFailures, SourceChanged
from shardmill.kernels.ct_adapter import check_config
from shardmill.stages.devices import DevicePool
from shardmill.stages.importance import importance_of, read_importance
from shardmill.stages.pipeline import RunOptions, RunResult, Watcher, run
from shardmill.stages.plan import Locations, make_plan
from shardmill.stages.quantize import Controls, quantize_shard
from shardmill.storage.source import SourceFolder, open_source
from shardmill.storage.store import Store

CPU = RunOptions(device="cpu", workers=1)


def convert(source: Path, destination: Path, recipe: Recipe, options: RunOptions = CPU) -> RunResult:
    return run(Locations(source=str(source), destination=str(destination)), recipe, options)


def result_of(tmp_path: Path, tensors: dict[str, Tensor], recipe: Recipe, shards: int = 1) -> dict[str, Tensor]:
    source = checkpoints.write(tmp_path / f"src{shards}", checkpoints.deal(tensors, shards))
    convert(source, tmp_path / f"dst{shards}", recipe)
    return checkpoints.read(tmp_path / f"dst{shards}")


@pytest.mark.parametrize("scheme", sorted(PRESETS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_written_shard_holds_the_oracles_bytes(tmp_path: Path, scheme: str, dtype: torch.dtype) -> None:
    weight = checkpoints.gaussian(1, 96, 256, dtype=dtype)
    found = result_of(tmp_path, {"m.o_proj.weight": weight, "m.bias": weight[0].clone()}, recipe_of(scheme))
    wanted = {f"m.o_proj.{name}": tensor for name, tensor in expected(PRESETS[scheme], weight).items()}
    if PRESETS[scheme].needs_input_scale:
        wanted["m.o_proj.input_global_scale"] = torch.tensor([448.0])
    assert checkpoints.as_bytes(found) == checkpoints.as_bytes(wanted | {"m.bias": weight[0].clone()})


@pytest.mark.parametrize("shards", [2, 3, 7])
@pytest.mark.parametrize("scheme", ["NVFP4A16", "W4A16_ASYM", "FP8_BLOCK"])
def test_sharding_does_not_change_a_byte(tmp_path: Path, scheme: str, shards: int) -> None:
    tensors = checkpoints.llama()
    whole, parts = (checkpoints.as_bytes(result_of(tmp_path, tensors, uniform(scheme), n)) for n in (1, shards))
    assert parts == whole


@given(
    st.integers(1, 9), st.sampled_from(["FP8_DYNAMIC", "FP8_BLOCK", "W3A16", "NVFP4A16", "MXFP4"]), st.integers(1, 300)
)
@settings(max_examples=25)
def test_row_blocks_do_not_change_a_byte(
    tmp_path_factory: pytest.TempPathFactory, kib: int, scheme: str, rows: int
) -> None:
    tensors = {"m.o_proj.weight": checkpoints.gaussian(rows, rows, 128)}
    one = checkpoints.as_bytes(result_of(tmp_path_factory.mktemp("one"), tensors, uniform(scheme)))
    with row_blocks(kib << 10):
        many = checkpoints.as_bytes(result_of(tmp_path_factory.mktemp("many"), tensors, uniform(scheme)))
    assert many == one


def test_workers_do_not_change_a_byte(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "src", checkpoints.deal(checkpoints.llama(), 5))
    convert(source, tmp_path / "a" / "dst", uniform("NVFP4A16"))
    convert(source, tmp_path / "b" / "dst", uniform("NVFP4A16"), RunOptions(device="cpu", workers=4))
    for path in (tmp_path / "a" / "dst").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "dst" / path.name).read_bytes()


@pytest.mark.parametrize("largest", "qkv")
def test_members_of_a_fused_set_share_one_global_scale_across_shards(tmp_path: Path, largest: str) -> None:
    tensors = checkpoints.llama(layers=1)
    tensors[f"model.layers.0.self_attn.{largest}_proj.weight"] *= 7
    found = result_of(tmp_path, tensors, uniform("NVFP4A16"), 7)
    prefix = "model.layers.0.self_attn"
    weights = [tensors[f"{prefix}.{leaf}_proj.weight"] for leaf in "qkv"]
    amax = max(w.float().abs().amax().item() for w in weights)
    for leaf, weight in zip("qkv", weights, strict=True):
        wanted = expected(PRESETS["NVFP4A16"], weight, set_amax=amax)
        mine = {name: found[f"{prefix}.{leaf}_proj.{name}"] for name in wanted}
        assert checkpoints.as_bytes(mine) == checkpoints.as_bytes(wanted)


EXPERTS, WIDTH, HIDDEN = 3, 96, 64


def stacks(layout_name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A fused stack, and the true experts in it."""
    true = {
        f"model.layers.0.mlp.experts.{e}.{half}.weight": checkpoints.gaussian(9 * e + n, *shape)
        for e in range(EXPERTS)
        for n, (half, shape) in enumerate(
            {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}.items()
        )
    }

    def stack(halves: list[str]) -> Tensor:
        experts = []
        for e in range(EXPERTS):
            parts = [true[f"model.layers.0.mlp.experts.{e}.{half}.weight"] for half in halves]
            joined = torch.stack(parts, 1).flatten(0, 1) if layout_name == "interleaved" else torch.cat(parts)
            experts.append(joined if layout_name == "rows" else joined.T)
        return torch.stack(experts)

    prefix = "model.layers.0.mlp.experts"
    return {
        f"{prefix}.gate_up_proj": stack(["gate_proj", "up_proj"]),
        f"{prefix}.down_proj": stack(["down_proj"]),
    }, true


@pytest.mark.parametrize(
    ("layout_name", "model"), [("rows", "qwen3_moe"), ("columns", "llama4"), ("interleaved", "gpt_oss")]
)
@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "MXFP4", "NVFP4A16"])
def test_experts_of_every_layout_are_the_true_experts(
    tmp_path: Path, layout_name: str, model: str, scheme: str
) -> None:
    stacked, true = stacks(layout_name)
    config = {"model_type": model, "hidden_size": HIDDEN, "moe_intermediate_size": WIDTH}
    source = checkpoints.write(tmp_path / "src", [stacked], config)
    convert(source, tmp_path / "dst", uniform(scheme))
    wanted: dict[str, Tensor] = {}
    for name, weight in true.items():
        module = name.removesuffix(".weight")
        pair = [true[f"{module.rpartition('.')[0]}.{half}.weight"] for half in ("gate_proj", "up_proj")]
        members = [weight] if "down" in name else pair
        amax = max(w.float().abs().amax().item() for w in members)
        wanted |= {f"{module}.{k}": v for k, v in expected(PRESETS[scheme], weight, set_amax=amax).items()}
    assert checkpoints.as_bytes(checkpoints.read(tmp_path / "dst")) == checkpoints.as_bytes(wanted)


def test_biases_go_with_their_experts(tmp_path: Path) -> None:
    stacked, _ = stacks("interleaved")
    bias = checkpoints.gaussian(5, EXPERTS, 2 * WIDTH)
    stacked["model.layers.0.mlp.experts.gate_up_proj_bias"] = bias
    config = {"model_type": "gpt_oss", "hidden_size": HIDDEN, "moe_intermediate_size": WIDTH}
    convert(checkpoints.write(tmp_path / "src", [stacked], config), tmp_path / "dst", uniform("MXFP4"))
    found = checkpoints.read(tmp_path / "dst")
    for e in range(EXPERTS):
        prefix = f"model.layers.0.mlp.experts.{e}"
        assert torch.equal(found[f"{prefix}.gate_proj.bias"], bias[e][0::2])
        assert torch.equal(found[f"{prefix}.up_proj.bias"], bias[e][1::2])


def test_what_is_not_quantized_is_byte_identical(tmp_path: Path) -> None:
    extra = {
        "x.scalar": torch.tensor(3, dtype=torch.int64),
        "x.empty": torch.empty(0, 4),
        "x.codes": torch.arange(7, dtype=torch.uint8),
        "x.mask": torch.tensor([[float("-inf"), 0.0, float("nan")]]),
        "x.conv.weight": torch.randn(4, 3, 2, 2, 2),
        "x.complex": torch.randn(3, dtype=torch.complex64),
        "x.e8m0": torch.arange(5, dtype=torch.uint8).view(torch.float8_e8m0fnu),
    }
    found = checkpoints.as_bytes(result_of(tmp_path, checkpoints.llama() | extra, uniform("FP8_DYNAMIC"), 3))
    same = {
        k: v for k, v in checkpoints.as_bytes(checkpoints.llama() | extra).items() if "layers" not in k or "norm" in k
    }
    assert {name: found[name] for name in same} == same


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W4A16_ASYM", "NVFP4A16", "MXFP4", "MXFP8"])
def test_a_non_finite_weight_is_refused_and_nothing_is_published(tmp_path: Path, scheme: str, value: float) -> None:
    tensors = checkpoints.llama()
    tensors["model.layers.1.mlp.down_proj.weight"][70, 33] = value
    source = checkpoints.write(tmp_path / "src", checkpoints.deal(tensors, 4))
    with pytest.raises(ShardFailures) as caught:
        convert(source, tmp_path / "dst", uniform(scheme))
    assert caught.value.is_refusal
    assert "model.layers.1.mlp.down_proj.weight" in str(caught.value)
    assert "[70, 33]" in str(caught.value)
    assert caught.value.done == 3
    assert not (tmp_path / "dst").exists()
    assert not list(tmp_path.glob("dst.partial*"))


def test_a_float64_value_beyond_float32_is_refused_too(tmp_path: Path) -> None:
    weight = torch.full((32, 32), 0.5, dtype=torch.float64)
    weight[3, 4] = 1e300
    source = checkpoints.write(tmp_path / "src", [{"m.q.weight": weight}])
    with pytest.raises(ShardFailures) as caught:
        convert(source, tmp_path / "dst", uniform("FP8_DYNAMIC"))
    assert isinstance(caught.value.failures[0][1], NonFiniteWeight)


def test_a_second_run_computes_nothing_and_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardmill.storage.store._FRESH_NS", 0)
    source = checkpoints.write(tmp_path / "src", checkpoints.deal(checkpoints.llama(), 4))
    first = convert(source, tmp_path / "dst", uniform("FP8_DYNAMIC"))
    assert [outcome.is_hit for outcome in first.outcomes] == [False] * 4
    second = convert(source, tmp_path / "dst", uniform("FP8_DYNAMIC"))
    third = convert(source, tmp_path / "copy", uniform("FP8_DYNAMIC"))
    for again in (second, third):
        assert [(outcome.is_hit, outcome.bytes_read) for outcome in again.outcomes] == [(True, 0)] * 4
    assert third.manifest == first.manifest


def test_ignoring_one_tensor_redoes_exactly_its_shard(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "src", checkpoints.deal(checkpoints.llama(), 6))
    convert(source, tmp_path / "a", uniform("FP8_DYNAMIC"))
    again = convert(source, tmp_path / "b", uniform("FP8_DYNAMIC", "model.layers.1.mlp.down_proj"))
    redone = [outcome.shard for outcome in again.outcomes if not outcome.is_hit]
    holder = next(s.name for s in again.plan.shards for t in s.tensors if "layers.1.mlp.down_proj" in t.spec.name)
    assert redone == [holder]


def test_a_destination_with_another_plans_result_is_refused_before_work(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "src", [checkpoints.llama()])
    convert(source, tmp_path / "dst", uniform("FP8_DYNAMIC"))
    with pytest.raises(Refused, match="another plan"):
        convert(source, tmp_path / "dst", uniform("W8A8"))
    assert len(list((tmp_path / ".shardmill" / "blobs").iterdir())) == 1


def test_a_finished_destination_is_known_without_its_store(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "src", [checkpoints.llama()])
    first = convert(source, tmp_path / "dst", uniform("FP8_DYNAMIC"))
    (tmp_path / ".shardmill").rename(tmp_path / "elsewhere")
    again = convert(source, tmp_path / "dst", uniform("FP8_DYNAMIC"))
    assert again.manifest == first.manifest
    assert again.outcomes == ()


def one_shard(tmp_path: Path) -> tuple[Locations, Controls]:
    checkpoints.write(tmp_path / "src", [checkpoints.llama()])
    return Locations(source=str(tmp_path / "src"), destination=str(tmp_path / "dst")), Controls(DevicePool(("cpu",)))


def test_a_source_that_was_replaced_after_planning_is_refused(tmp_path: Path) -> None:
    locations, controls = one_shard(tmp_path)
    source = locations.open_source()
    plan = make_plan(source, uniform("FP8_DYNAMIC"))
    checkpoints.write(tmp_path / "src", [checkpoints.llama(layers=1)])
    store = locations.open_store()
    store.prepare()
    with pytest.raises(SourceChanged):
        quantize_shard(plan.shards[0], source, store, controls)
    assert list(store.entries()) == []


def test_a_partner_that_was_replaced_after_planning_is_refused(tmp_path: Path) -> None:
    weights = {f"m.self_attn.{leaf}_proj.weight": checkpoints.gaussian(n, 32, 32) for n, leaf in enumerate("qk")}
    locations = Locations(source=str(tmp_path / "src"), destination=str(tmp_path / "dst"))
    checkpoints.write(tmp_path / "src", checkpoints.deal(weights, 2))
    source = locations.open_source()
    plan = make_plan(source, uniform("NVFP4A16"))
    longer = {"m.self_attn.k_proj.weight": checkpoints.gaussian(9, 64, 32)}
    checkpoints.write(tmp_path / "src", [checkpoints.deal(weights, 2)[0], longer])
    store = locations.open_store()
    store.prepare()
    with pytest.raises(SourceChanged, match="partner"):
        quantize_shard(plan.shards[0], source, store, Controls(DevicePool(("cpu",))))
    assert list(store.entries()) == []


def test_a_source_that_changes_while_it_is_read_leaves_no_blob(tmp_path: Path) -> None:
    locations, _ = one_shard(tmp_path)
    path = tmp_path / "src" / "model.safetensors"

    def touch(_count: int) -> None:
        os.utime(path, ns=(1, 1))

    source = locations.open_source()
    plan = make_plan(source, uniform("FP8_DYNAMIC"))
    store = locations.open_store()
    store.prepare()
    with pytest.raises(SourceChanged, match="changed while"):
        quantize_shard(plan.shards[0], source, store, Controls(DevicePool(("cpu",)), on_bytes=touch))
    assert [path.name for part in ("blobs", "receipts") for path in (tmp_path / ".shardmill").glob(f"{part}/*")] == []


def test_stopping_keeps_finished_shards_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "src", checkpoints.deal(checkpoints.llama(), 6))
    stop = threading.Event()
    watcher = Watcher(on_shard=lambda _outcome: stop.set())
    with pytest.raises(Interrupted):
        run(
            Locations(source=str(source), destination=str(tmp_path / "dst")),
            uniform("W8A8"),
            CPU,
            watcher=watcher,
            stop=stop,
        )
    store = tmp_path / ".shardmill"
    assert len(list((store / "receipts").iterdir())) >= 1
    assert not list(store.rglob("*.tmp"))
    again = convert(source, tmp_path / "dst", uniform("W8A8"))
    assert any(outcome.is_hit for outcome in again.outcomes)


def test_a_mixed_recipe_is_written_as_it_was_asked_for(tmp_path: Path) -> None:
    recipe = parse_recipe(
        {
            "groups": [
                {"scheme": "FP8_DYNAMIC", "targets": "re:.*self_attn"},
                {"scheme": "W4A16", "group_size": 32, "targets": "re:.*down_proj"},
                {"scheme": "NVFP4A16"},
            ]
        }
    )
    found = result_of(tmp_path, checkpoints.llama(layers=1), recipe, 3)
    params: dict[str, set[str]] = {}
    for name in found:
        module, _, param = name.removeprefix("model.layers.0.").rpartition(".")
        params.setdefault(module, set()).add(param)
    assert params["self_attn.q_proj"] == {"weight", "weight_scale"}
    assert params["mlp.down_proj"] == {"weight_packed", "weight_scale", "weight_shape"}
    assert params["mlp.up_proj"] == {"weight_packed", "weight_scale", "weight_global_scale"}


# How often a source is read

OLD_NS = 1_600_000_000 * 10**9


def prepared(tmp_path: Path, parts: list[dict[str, Tensor]], scheme: str) -> tuple[Plan, SourceFolder, Store]:
    """A plan of old files, whose digests may be remembered, with an empty store."""
    source = checkpoints.write(tmp_path / "src", parts)
    locations = Locations(source=str(source), destination=str(tmp_path / "dst"))
    folder, store = locations.open_source(), locations.open_store()
    store.prepare()
    for path in source.glob("*.safetensors"):
        os.utime(path, ns=(OLD_NS, OLD_NS))
    return make_plan(folder, uniform(scheme)), folder, store


PARTS = {"qkv": ("q", "k", "v"), "gate_up_down": ("gate", "up", "down")}
CONTROLS = Controls(DevicePool(("cpu",)))


def digest_of(path: Path) -> str:
    return f"blake3:{blake3(path.read_bytes()).hexdigest()}"


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "MXFP4"])
def test_a_cold_shard_is_read_once_and_its_digest_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setattr("shardmill.storage.store._FRESH_NS", 0)  # a change time cannot be set back
    plan, source, store = prepared(tmp_path, [checkpoints.llama()], scheme)
    (shard,) = plan.shards
    with row_blocks(9000):
        outcome = quantize_shard(shard, source, store, CONTROLS)
    digest = digest_of(tmp_path / "src" / shard.name)
    assert outcome.bytes_read == shard.size
    assert outcome.sources == ((shard.name, digest),)
    assert outcome.receipt.key == shard.job_key({shard.name: digest})
    assert str(store.known_digest(source.identity(shard.name))) == digest
    again = quantize_shard(shard, source, store, CONTROLS)
    assert (again.is_hit, again.bytes_read) == (True, 0)
    assert again.receipt.to_bytes() == outcome.receipt.to_bytes()


def test_a_young_file_is_not_remembered(tmp_path: Path) -> None:
    plan, source, store = prepared(tmp_path, [checkpoints.llama()], "FP8_DYNAMIC")
    outcome = quantize_shard(plan.shards[0], source, store, CONTROLS)
    assert outcome.sources == ((plan.shards[0].name, digest_of(tmp_path / "src" / plan.shards[0].name)),)
    assert store.known_digest(source.identity(plan.shards[0].name)) is None


@pytest.mark.parametrize("leaf", ["qkv", "gate_up_down", "all"])
def test_a_cold_shard_with_global_scales_is_read_at_most_twice(tmp_path: Path, leaf: str) -> None:
    tensors = checkpoints.llama()
    if leaf != "all":
        tensors = {name: t for name, t in tensors.items() if any(f"{part}_proj" in name for part in PARTS[leaf])}
    plan, source, store = prepared(tmp_path, [tensors], "NVFP4A16")
    (shard,) = plan.shards
    with row_blocks(9000):
        outcome = quantize_shard(shard, source, store, CONTROLS)
    # o_proj stands between k_proj and q_proj, which are measured first: the digest takes it in before its turn.
    between = sum(t.spec.nbytes for t in shard.tensors if "o_proj" in t.spec.name)
    assert shard.size < outcome.bytes_read <= 2 * shard.size + between
    assert outcome.sources == ((shard.name, digest_of(tmp_path / "src" / shard.name)),)


def test_a_digest_is_right_where_the_source_is_not_read_in_its_order(tmp_path: Path) -> None:
    # Tensors of odd sizes are written last, so they are read last too.
    odd = {f"a{n}.bias": torch.arange(n, dtype=torch.uint8) for n in range(20, 27)}
    plan, source, store = prepared(tmp_path, [odd | checkpoints.llama()], "FP8_DYNAMIC")
    (shard,) = plan.shards
    with row_blocks(5000):
        outcome = quantize_shard(shard, source, store, CONTROLS)
    assert outcome.sources == ((shard.name, digest_of(tmp_path / "src" / shard.name)),)
    assert shard.size <= outcome.bytes_read <= shard.size + sum(range(20, 27)) + 64


def test_progress_adds_up_to_the_size_of_the_shard(tmp_path: Path) -> None:
    plan, source, store = prepared(tmp_path, [checkpoints.llama()], "NVFP4A16")
    for _ in range(2):
        told: list[int] = []
        quantize_shard(plan.shards[0], source, store, Controls(DevicePool(("cpu",)), on_bytes=told.append))
        assert sum(told) == plan.shards[0].size


def test_a_copy_of_the_source_is_hashed_found_and_not_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, source, store = prepared(tmp_path, [checkpoints.llama()], "FP8_DYNAMIC")
    first = quantize_shard(plan.shards[0], source, store, CONTROLS)
    shutil.copytree(tmp_path / "src", tmp_path / "copy")
    copied = open_source(str(tmp_path / "copy"))

    def refuse(*_: object, **_more: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("shardmill.kernels.shard.encode_shard", refuse)
    again = quantize_shard(make_plan(copied, uniform("FP8_DYNAMIC")).shards[0], copied, store, CONTROLS)
    assert again.is_hit
    assert again.bytes_read == plan.shards[0].size
    assert again.receipt.to_bytes() == first.receipt.to_bytes()


def test_another_source_of_the_same_shape_is_hashed_first_and_computed(tmp_path: Path) -> None:
    plan, source, store = prepared(tmp_path, [checkpoints.llama()], "FP8_DYNAMIC")
    first = quantize_shard(plan.shards[0], source, store, CONTROLS)
    other = checkpoints.llama()
    other["model.norm.weight"] += 1
    folder = open_source(str(checkpoints.write(tmp_path / "other", [other])))
    (shard,) = make_plan(folder, uniform("FP8_DYNAMIC")).shards
    outcome = quantize_shard(shard, folder, store, CONTROLS)
    assert not outcome.is_hit
    assert outcome.bytes_read > shard.size
    assert outcome.sources == ((shard.name, digest_of(tmp_path / "other" / shard.name)),)
    assert outcome.receipt.key != first.receipt.key


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "NVFP4A16"])
@pytest.mark.parametrize("when", [0, 3, 12])
def test_a_source_truncated_while_it_is_read_leaves_nothing(tmp_path: Path, scheme: str, when: int) -> None:
    plan, source, store = prepared(tmp_path, [checkpoints.llama()], scheme)
    (shard,) = plan.shards
    reads: list[int] = []

    def truncate(count: int) -> None:
        reads.append(count)
        if len(reads) > when:
            os.truncate(tmp_path / "src" / shard.name, shard.size // 2)

    with row_blocks(9000), pytest.raises(SourceChanged):
        quantize_shard(shard, source, store, Controls(DevicePool(("cpu",)), on_bytes=truncate))
    assert len(reads) > when
    assert [
        path.name for part in ("blobs", "receipts", "digests") for path in (tmp_path / ".shardmill").glob(f"{part}/*")
    ] == []
    assert [thread.name for thread in threading.enumerate() if thread.name == "write-behind"] == []
    checkpoints.write(tmp_path / "src", [checkpoints.llama()])
    assert not quantize_shard(shard, source, store, CONTROLS).is_hit


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 8])
def test_one_huge_shard_and_many_small_ones_finish_with_any_number_of_workers(tmp_path: Path, workers: int) -> None:
    huge = {"model.layers.0.self_attn.o_proj.weight": checkpoints.gaussian(1, 4096, 512)}
    small = [{f"model.layers.{n}.self_attn.o_proj.weight": checkpoints.gaussian(n, 32, 64)} for n in range(1, 13)]
    source = checkpoints.write(tmp_path / "src", [*small[:6], huge, *small[6:]])
    with row_blocks(64 << 10):
        found = convert(source, tmp_path / "dst", uniform("FP8_DYNAMIC"), RunOptions(device="cpu", workers=workers))
    assert sorted(outcome.shard for outcome in found.outcomes) == sorted(
        path.name for path in source.glob("*.safetensors")
    )
    weight = next(iter(huge.values()))
    wanted = {f"model.layers.0.self_attn.o_proj.{k}": v for k, v in expected(PRESETS["FP8_DYNAMIC"], weight).items()}
    written = checkpoints.read(tmp_path / "dst")
    assert checkpoints.as_bytes({name: written[name] for name in wanted}) == checkpoints.as_bytes(wanted)
    assert len(written) == 2 * 13


# Scales that are searched

SEARCHED = ["NVFP4A16", "W4A16_ASYM", "FP8_BLOCK", "W8A8"]


@pytest.mark.parametrize("scheme", SEARCHED)
def test_a_search_depends_neither_on_sharding_nor_on_row_blocks(tmp_path: Path, scheme: str) -> None:
    tensors, recipe = checkpoints.llama(layers=1), with_search(uniform(scheme), Search())
    whole = checkpoints.as_bytes(result_of(tmp_path / "whole", tensors, recipe))
    with row_blocks(40 << 10):
        parts = checkpoints.as_bytes(result_of(tmp_path / "parts", tensors, recipe, 7))
    assert parts == whole
    assert whole != checkpoints.as_bytes(result_of(tmp_path / "none", tensors, uniform(scheme)))


def test_a_searched_result_says_so_and_is_verified(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "source", checkpoints.deal(checkpoints.llama(layers=1), 2))
    recipe = with_search(uniform("NVFP4A16"), Search(norm=2.5))
    convert(source, tmp_path / "result", recipe)
    manifest = json.loads((tmp_path / "result" / "shardmill.json").read_text())
    assert {weight["scheme"] for shard in manifest["shards"] for weight in shard["weights"]} == {"NVFP4A16 mse"}
    assert parse_recipe(manifest["recipe"]) == recipe
    config = json.loads((tmp_path / "result" / "config.json").read_text())["quantization_config"]
    assert check_config(config) == []
    assert "search" not in json.dumps(config)
    assert main(["verify", str(tmp_path / "result"), "--against", str(source), "-q"]) == 0


def important(tmp_path: Path, tensors: dict[str, Tensor], name: str = "importance.safetensors") -> Search:
    path = tmp_path / name
    save_file(tensors, path)
    return Search(importance_file=str(path))


def test_importance_counts_in_bytes_and_keys_by_its_content(tmp_path: Path) -> None:
    tensors = checkpoints.llama(layers=1)
    matrices = {name: tensor for name, tensor in tensors.items() if name.endswith("_proj.weight")}
    source = checkpoints.write(tmp_path / "source", checkpoints.deal(tensors, 3))
    folder = open_source(str(source))
    even = {name.removesuffix(".weight"): torch.ones(tensor.shape[1]) for name, tensor in matrices.items()}
    steep = {name: torch.arange(len(entry), dtype=torch.float32) ** 3 for name, entry in even.items()}
    plans, results = [], []
    for number, entries in enumerate((even, steep, steep)):
        recipe = with_search(uniform("W4A16_ASYM"), important(tmp_path, entries, f"{number}.safetensors"))
        plans.append(make_plan(folder, recipe))
        convert(source, tmp_path / f"result{number}", recipe)
        results.append(checkpoints.as_bytes(checkpoints.read(tmp_path / f"result{number}")))
    shapes = [[shard.shape() for shard in plan.shards] for plan in plans]
    assert [plan.problems for plan in plans] == [(), (), ()]
    assert shapes[1] == shapes[2] != shapes[0]
    assert results[1] == results[2] != results[0]
    plain = result_of(tmp_path / "plain", tensors, with_search(uniform("W4A16_ASYM"), Search()))
    assert checkpoints.as_bytes(plain) == results[0]
    manifest = (tmp_path / "result1" / "shardmill.json").read_text()
    assert "1.safetensors" not in manifest
    assert "blake3:" in json.loads(manifest)["recipe"]["groups"][0]["scheme"]["search"]["importance"]


@pytest.mark.parametrize(
    ("entry", "kind"),
    [
        (None, "importance-missing"),
        (torch.ones(255), "importance-shape"),
        (torch.ones(256, dtype=torch.float16), "importance-shape"),
        (torch.full((256,), -1.0), "importance-value"),
        (torch.full((256,), torch.inf), "importance-value"),
        (torch.full((256,), torch.nan), "importance-value"),
    ],
)
def test_importance_that_cannot_be_used_is_a_problem_of_the_plan(
    tmp_path: Path, entry: Tensor | None, kind: str
) -> None:
    weights = {f"m.{leaf}.weight": checkpoints.gaussian(1, 32, 256) for leaf in ("o_proj", "down_proj")}
    source = checkpoints.write(tmp_path / "source", [weights])
    entries = {"m.down_proj.weight": torch.ones(256)} | ({} if entry is None else {"m.o_proj": entry})
    recipe = with_search(uniform("W4A16"), important(tmp_path, entries))
    found = make_plan(open_source(str(source)), recipe).problems
    assert [(problem.kind, problem.tensor) for problem in found] == [(kind, "m.o_proj")]
    with pytest.raises(Refused):
        convert(source, tmp_path / "result", recipe)


def test_importance_that_is_not_there_is_refused(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "source", [{"m.o_proj.weight": checkpoints.gaussian(1, 32, 256)}])
    recipe = with_search(uniform("W4A16"), Search(importance_file=str(tmp_path / "nowhere.safetensors")))
    with pytest.raises(Refused, match="no such file of importance"):
        convert(source, tmp_path / "result", recipe)


def test_importance_that_changes_after_the_plan_is_not_used(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "source", [{"m.o_proj.weight": checkpoints.gaussian(1, 32, 256)}])
    search = important(tmp_path, {"m.o_proj": torch.ones(256)})
    plan = make_plan(open_source(str(source)), with_search(uniform("W4A16"), search))
    read_importance.cache_clear()
    important(tmp_path, {"m.o_proj": torch.full((256,), 2.0)})
    with pytest.raises(SourceChanged, match="importance"):
        importance_of(plan.shards[0].schemes[0], "m.o_proj")
