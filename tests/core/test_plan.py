from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asked import recipe_of
from shardmill.core.checks import check_plan, divisors
from shardmill.core.plan import Checkpoint, ShardPlan
from shardmill.core.planner import build_plan
from shardmill.core.recipe import parse_recipe, uniform
from shardmill.core.scheme import PRESETS
from strategies import checkpoint_of, llama_table, shard_of, splits

DIGESTS = {f"model-{n:05d}.safetensors": f"blake3:{n:02x}" for n in range(20)}


def kinds(shards: list[dict[str, Any]], scheme: str = "FP8_DYNAMIC", config: Any = None, **recipe: Any) -> set[str]:
    return {
        problem.kind for problem in check_plan(build_plan(checkpoint_of(shards, config), recipe_of(scheme, **recipe)))
    }


@given(splits(llama_table()), st.sampled_from(sorted(PRESETS)))
def test_each_tensor_is_in_exactly_one_output_of_the_same_name(shards: list[dict[str, Any]], scheme: str) -> None:
    plan = build_plan(checkpoint_of(shards), recipe_of(scheme))
    planned = [(shard.name, tensor.spec.name) for shard in plan.shards for tensor in shard.tensors]
    source = [(s.name, t.name) for s in checkpoint_of(shards).shards for t in s.header.tensors]
    assert planned == source
    assert check_plan(plan) == []


@given(splits(llama_table()))
def test_decisions_do_not_depend_on_sharding(shards: list[dict[str, Any]]) -> None:
    def decisions(parts: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
        plan = build_plan(checkpoint_of(parts), uniform("NVFP4A16"))
        return {
            (t.spec.name, t.action, t.reason, frozenset(ref.spec.name for ref in t.fused))
            for shard in plan.shards
            for t in shard.tensors
        }

    assert decisions(shards) == decisions([llama_table()])


@given(splits(llama_table()), st.sampled_from(["FP8_DYNAMIC", "NVFP4A16", "W4A16_ASYM", "W3A16"]))
def test_layout_has_no_holes_and_is_aligned(shards: list[dict[str, Any]], scheme: str) -> None:
    for shard in build_plan(checkpoint_of(shards), recipe_of(scheme)).shards:
        reached = 0
        for placed in shard.layout().placed:
            width = max(1, placed.spec.nbytes // max(1, math.prod(placed.spec.shape)))
            assert placed.begin == reached
            assert placed.begin % width == 0
            reached = placed.end


RECIPES: list[dict[str, Any]] = [
    {"scheme": "FP8_DYNAMIC"},
    {"scheme": "FP8_DYNAMIC", "targets": "Linear"},
    {"scheme": "W8A8"},
    {"scheme": "NVFP4A16"},
    {"scheme": "W4A16"},
    {"scheme": "W4A16", "group_size": 32},
    {"scheme": "FP8_DYNAMIC", "ignore": ["re:.*down_proj"]},
    {"scheme": "FP8_DYNAMIC", "default_ignores": False},
    {"scheme": "NVFP4A16", "partial_fused": True, "ignore": ["re:.*q_proj"]},
]


def test_jobs_on_one_source_have_one_outline_where_they_have_one_shape() -> None:
    source = checkpoint_of([llama_table()])
    jobs = [shard for recipe in RECIPES for shard in build_plan(source, parse_recipe(recipe)).shards]
    assert [(a.outline() == b.outline()) for a in jobs for b in jobs] == [
        a.shape() == b.shape() for a in jobs for b in jobs
    ]
    assert len({job.shape() for job in jobs}) == len(RECIPES) - 1


def test_odd_sizes_come_last_so_that_the_others_stay_aligned() -> None:
    table = {
        "a.weight": ("BF16", (33, 5)),
        "b.weight": ("BF16", (64, 64)),
        "c.bias": ("F32", (1,)),
        "d.bias": ("I64", (2,)),
    }
    layout = build_plan(checkpoint_of([table]), uniform("FP8_DYNAMIC")).shards[0].layout()
    assert [p.spec.name for p in layout.placed] == [
        "b.weight",
        "b.weight_scale",
        "d.bias",
        "a.weight",
        "a.weight_scale",
        "c.bias",
    ]


def test_a_global_scale_makes_partners_in_other_shards_sources() -> None:
    table = llama_table(layers=1)
    parts = [{n: e for n, e in table.items() if "k_proj" not in n}, {n: e for n, e in table.items() if "k_proj" in n}]
    nvfp4 = build_plan(checkpoint_of(parts), uniform("NVFP4A16"))
    assert [len(shard.sources) for shard in nvfp4.shards] == [2, 2]
    assert [len(shard.sources) for shard in build_plan(checkpoint_of(parts), uniform("MXFP4")).shards] == [1, 1]


def keys(
    shards: list[dict[str, Any]], digests: dict[str, str] = DIGESTS, scheme: str = "FP8_DYNAMIC", **more: Any
) -> list[str]:
    return [shard.job_key(digests) for shard in build_plan(checkpoint_of(shards), recipe_of(scheme, **more)).shards]


TABLE = llama_table(layers=3)
PARTS = [{n: e for n, e in TABLE.items() if f"layers.{k}." in n} for k in range(3)]
PARTS.append({n: e for n, e in TABLE.items() if "layers" not in n})


def test_ignoring_one_tensor_changes_the_key_of_its_shard_only() -> None:
    before, after = keys(PARTS), keys(PARTS, ignore=["model.layers.1.mlp.down_proj"])
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True, True]


def test_a_pattern_that_decides_the_same_has_the_same_keys() -> None:
    assert keys(PARTS, ignore=["re:model.layers.1.mlp.down"]) == keys(PARTS, ignore=["model.layers.1.mlp.down_proj"])


def test_activations_and_preset_names_are_in_no_key() -> None:
    assert keys(PARTS, scheme="MXFP4") == keys(PARTS, scheme="MXFP4A16")


@pytest.mark.parametrize("scheme", sorted(set(PRESETS) - {"FP8_DYNAMIC"}))
def test_another_scheme_has_another_key_wherever_something_is_quantized(scheme: str) -> None:
    same = [a == b for a, b in zip(keys(PARTS), keys(PARTS, scheme=scheme), strict=True)]
    assert same == [False, False, False, True]


def test_every_source_digest_counts_partners_included() -> None:
    changed = DIGESTS | {"model-00002.safetensors": "blake3:ff"}
    assert [a == b for a, b in zip(keys(PARTS), keys(PARTS, changed), strict=True)] == [True, False, True, True]
    halves = [
        {n: e for n, e in TABLE.items() if "up_proj" in n},
        {n: e for n, e in TABLE.items() if "up_proj" not in n},
    ]
    assert keys(halves, scheme="NVFP4A16")[0] != keys(halves, changed, scheme="NVFP4A16")[0]


def test_names_of_shards_are_in_no_key() -> None:
    plan = build_plan(checkpoint_of(PARTS), uniform("NVFP4A16"))
    shard = plan.shards[0]
    renamed = ShardPlan(
        number=9, name="x.safetensors", size=shard.size, data_start=8, tensors=shard.tensors, schemes=shard.schemes
    )
    # A fused partner's shard keeps its name here, so compare a scheme without partners.
    assert renamed.job()["tensors"] == shard.job()["tensors"]
    assert "model-00001" not in json.dumps(shard.job())


def test_fused_partners_that_are_treated_differently_are_refused_with_the_way_out() -> None:
    ignore = ["re:.*layers.0.self_attn.k_proj"]
    assert kinds(PARTS, ignore=ignore) == {"fused-set-split"}
    assert kinds(PARTS, ignore=ignore, partial_fused=True) == set()


def test_what_exists_of_a_fused_set_is_fused() -> None:
    table = {n: e for n, e in llama_table(layers=1).items() if "k_proj" not in n}
    plan = build_plan(checkpoint_of([table]), uniform("NVFP4A16"))
    members = {len(t.fused) for t in plan.shards[0].tensors if "q_proj" in t.spec.name}
    assert members == {2}


@pytest.mark.parametrize(
    ("tensor", "entry", "scheme", "kind"),
    [
        ("x.down_proj.weight", ("BF16", (8, 100)), "W4A16", "group-indivisible"),
        ("x.down_proj.weight", ("BF16", (8, 24)), "NVFP4A16", "group-indivisible"),
        ("x.down_proj.weight", ("BF16", (8, 48)), "MXFP4", "group-indivisible"),
        ("x.down_proj.weight", ("F8_E4M3", (8, 128)), "FP8_DYNAMIC", "already-quantized"),
        ("x.down_proj.weight", ("I8", (8, 128)), "W8A8", "already-quantized"),
        ("x.down_proj.weight_scale", ("BF16", (8, 1)), "FP8_DYNAMIC", "name-collision"),
    ],
)
def test_what_cannot_be_quantized_is_found_from_headers(tensor: str, entry: Any, scheme: str, kind: str) -> None:
    table = {"x.down_proj.weight": ("BF16", (128, 128)), tensor: entry}
    assert kinds([table], scheme) >= {kind}


def test_an_indivisible_group_names_tensor_shape_and_sizes_that_work() -> None:
    plan = build_plan(checkpoint_of([{"m.down_proj.weight": ("BF16", (64, 576))}]), uniform("W4A16"))
    text = str(check_plan(plan)[0])
    assert "m.down_proj.weight" in text
    assert "group_size 128 does not divide in_features 576" in text
    assert "288, 192, 144, 96" in text
    assert len(text) <= 300


def test_indivisible_weights_are_copied_where_the_recipe_says_so() -> None:
    table = {"a.down_proj.weight": ("BF16", (64, 576)), "b.down_proj.weight": ("BF16", (64, 256))}
    plan = build_plan(checkpoint_of([table]), uniform("W4A16", indivisible="copy"))
    assert check_plan(plan) == []
    assert [t.action for t in plan.shards[0].tensors] == ["copy", "quantize"]
    assert "a.down_proj" in plan.ignore


@given(st.integers(8, 4096))
def test_divisors_divide(width: int) -> None:
    assert all(width % size == 0 for size in divisors(width))


@pytest.mark.parametrize(
    ("name", "shape", "targets", "expected"),
    [
        ("x.conv.weight", (8, 4, 3), ["Linear"], set()),
        ("x.conv.weight", (8, 4, 3), ["re:.*conv", "Linear"], {"wrong-rank"}),
        ("x.conv.weight", (8, 4, 3), ["x.conv", "Linear"], {"wrong-rank"}),
        ("x.in_norm.weight", (8,), ["re:x.*", "Linear"], set()),
        ("x.in_norm.weight", (8,), ["x.in_norm", "Linear"], {"wrong-rank"}),
        ("x.odd.weight", (), ["Linear"], set()),
        ("x.empty.weight", (0, 8), ["x.empty", "Linear"], set()),
    ],
)
def test_a_wrong_rank_is_an_error_only_where_it_is_asked_for(
    name: str, shape: Any, targets: list[str], expected: set[str]
) -> None:
    table = {"a.q.weight": ("BF16", (8, 8)), name: ("BF16", shape)}
    plan = build_plan(checkpoint_of([table]), parse_recipe({"scheme": "FP8_DYNAMIC", "targets": targets}))
    assert {problem.kind for problem in check_plan(plan)} == expected


def test_index_and_headers_must_agree_and_every_disagreement_is_told() -> None:
    checkpoint = checkpoint_of(PARTS)
    assert checkpoint.index is not None
    moved = dict.fromkeys(checkpoint.index.weight_map, "model-00001.safetensors")
    wrong = Checkpoint(shards=checkpoint.shards, index=type(checkpoint.index)(moved), config_text="{}")
    found = [p for p in build_plan(wrong, uniform("FP8_DYNAMIC")).problems if p.kind == "index-disagrees"]
    assert len(found) == len(TABLE) - len(PARTS[0])


def test_a_tensor_in_two_shards_is_refused() -> None:
    twice = Checkpoint(
        shards=(shard_of("a.safetensors", PARTS[0]), shard_of("b.safetensors", PARTS[0])), index=None, config_text="{}"
    )
    problems = build_plan(twice, uniform("FP8_DYNAMIC")).problems
    assert {problem.kind for problem in problems} == {"duplicate-tensor"}
    assert len(problems) == len(PARTS[0])


def test_a_quantized_source_is_refused_wherever_its_config_says_so() -> None:
    assert kinds([TABLE], config={"quantization_config": {"quant_method": "fp8"}}) == {"already-quantized"}
    assert kinds([TABLE], config={"text_config": {"quantization_config": {"a": 1}}}) == {"already-quantized"}


def test_ignore_names_every_dense_linear_layer_and_the_head_that_is_not_there() -> None:
    table = {n: e for n, e in TABLE.items() if n != "lm_head.weight"}
    plan = build_plan(checkpoint_of([table]), uniform("FP8_DYNAMIC", ignore=["model.layers.0.mlp.down_proj"]))
    assert plan.ignore == ("lm_head", "model.embed_tokens", "model.layers.0.mlp.down_proj")


def test_blocks_that_do_not_tile_are_one_warning() -> None:
    table = {"a.q.weight": ("BF16", (256, 128)), "b.q.weight": ("BF16", (64, 576)), "c.q.weight": ("BF16", (200, 128))}
    plan = build_plan(checkpoint_of([table]), uniform("FP8_BLOCK"))
    assert check_plan(plan) == []
    assert [(w.kind, w.tensor) for w in plan.warnings] == [("partial-blocks", "b.q.weight")]
    assert "nor 1 other" in plan.warnings[0].message
    assert build_plan(checkpoint_of([table]), uniform("FP8_DYNAMIC")).warnings == ()


@pytest.mark.parametrize(("leaf", "is_copied"), [("conv1d", True), ("conv3d", True), ("conv4d", False)])
def test_a_digit_inside_a_word_counts_for_its_role(leaf: str, is_copied: bool) -> None:  # noqa: FBT001 - a parameter
    names = ("conv4d.weight", f"model.layers.10.{leaf}.weight", "a.weight")
    plan = build_plan(checkpoint_of([dict.fromkeys(names, ("BF16", (64, 64)))]), uniform("FP8_DYNAMIC"))
    actions = {tensor.spec.name: tensor.action for tensor in plan.shards[0].tensors}
    assert (actions[f"model.layers.10.{leaf}.weight"] == "copy") is is_copied
    assert actions["conv4d.weight"] == "quantize"
