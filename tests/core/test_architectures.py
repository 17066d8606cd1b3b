"""The rows of architectures, what a recipe changes of them, and the table that a plan has resolved."""

from __future__ import annotations

from typing import Any

import pytest

from shardmill.core.architectures import (
    ARCHITECTURES,
    NO_OVERRIDES,
    Overrides,
    families,
    is_composite,
    loaded_names,
    past_last_layer,
    published_layouts,
    runtime_heads,
    transposed_leaves,
)
from shardmill.core.plan import COPY, QUANTIZE, SPLIT, Plan
from shardmill.core.planner import build_plan
from shardmill.core.recipe import EXPERT_LAYOUTS, parse_recipe, recipe_to_json, uniform
from shardmill.core.roles import ROLES
from shardmill.core.summary import plan_document
from shardmill.core.table import render_table, resolve_table
from shardmill.errors import RecipeInvalid
from strategies import checkpoint_of, llama_table

M = ("BF16", (64, 64))


def plan_of(recipe: Any, table: dict[str, Any], config: dict[str, Any] | None = None, **more: Any) -> Plan:
    return build_plan(checkpoint_of([table], config, **more), parse_recipe(recipe))


def actions(plan: Plan) -> dict[str, str]:
    return {tensor.spec.name: tensor.action for shard in plan.shards for tensor in shard.tensors}


# ---- the rows ---------------------------------------------------------------------------------------------------


def test_every_model_type_stands_in_one_row() -> None:
    types = [model for row in ARCHITECTURES for model in row.model_types]
    assert len(types) == len(set(types))
    assert len({row.family for row in ARCHITECTURES}) == len(ARCHITECTURES)


def test_layouts_are_those_that_a_recipe_knows() -> None:
    assert {layout for row in ARCHITECTURES for layout in row.layouts} <= set(EXPERT_LAYOUTS)


@pytest.mark.parametrize(
    "model",
    [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_5_moe",
        "qwen2_5_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
        "deepseek_v2",
        "deepseek_v3",
        "kimi_k2",
        "kimi_linear",
        "glm4_moe",
        "gpt_oss",
        "mixtral",
        "llama4",
        "gemma3",
        "phi3",
        "granite",
        "granitemoe",
        "granitemoehybrid",
        "olmo2",
        "olmoe",
        "minimax",
        "minimax_m2",
        "nemotron_h",
        "mamba2",
        "whisper",
        "bert",
        "gpt2",
    ],
)
def test_what_people_convert_is_known(model: str) -> None:
    assert families([model])


def test_heads_that_have_no_tensor_are_named() -> None:
    assert runtime_heads(["brand_new"]) == ("lm_head",)
    assert "cls.predictions.decoder" in runtime_heads(["bert"])
    assert runtime_heads(["whisper"], ["my_head", "lm_head"]) == ("lm_head", "proj_out", "my_head")


def test_facts_of_unknown_architectures_are_empty() -> None:
    assert published_layouts(["brand_new"]) == transposed_leaves(["brand_new"]) == frozenset()
    assert loaded_names(["a.block_sparse_moe.gate"], ["brand_new"]) == set()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 2, "num_nextn_predict_layers": 2}, {2, 3}),
        ({"text_config": {"num_hidden_layers": 4, "num_nextn_predict_layers": 1}}, {4}),
        ({"num_hidden_layers": 2}, set()),
        ({"num_hidden_layers": True, "num_nextn_predict_layers": 1}, set()),
        ({"num_hidden_layers": 2, "num_nextn_predict_layers": 10**9}, set()),
    ],
)
def test_layers_past_the_last_follow_from_the_config(config: dict[str, Any], expected: set[int]) -> None:
    assert past_last_layer(config) == expected


def test_composite_models_are_told_by_their_parts() -> None:
    assert is_composite({"vision_config": {"hidden_size": 8}})
    assert not is_composite({"model_type": "llama", "quantization_config": {}})


# ---- what follows for a plan ------------------------------------------------------------------------------------

MTP = {"model_type": "deepseek_v3", "num_hidden_layers": 1, "num_nextn_predict_layers": 1}
TWO_LAYERS = {f"model.layers.{n}.mlp.{leaf}_proj.weight": M for n in (0, 1) for leaf in ("gate", "up")}


def test_layers_for_multi_token_prediction_stay_whole() -> None:
    found = actions(plan_of({"scheme": "FP8_DYNAMIC"}, TWO_LAYERS, MTP))
    assert found["model.layers.0.mlp.gate_proj.weight"] == QUANTIZE
    assert found["model.layers.1.mlp.gate_proj.weight"] == COPY
    named = {"scheme": "FP8_DYNAMIC", "architecture": {"roles_off": "multi-token prediction"}}
    assert set(actions(plan_of(named, TWO_LAYERS, MTP)).values()) == {QUANTIZE}


def test_a_recipe_adds_roles_that_explicit_targets_beat() -> None:
    recipe = {"scheme": "FP8_DYNAMIC", "architecture": {"roles_add": r"re:.*layers\.1\."}}
    plan = plan_of(recipe, TWO_LAYERS)
    assert actions(plan)["model.layers.1.mlp.up_proj.weight"] == COPY
    assert "added by the recipe" in plan.shards[0].tensors[-1].reason
    explicit = {**recipe, "targets": [r"re:.*_proj"]}
    assert set(actions(plan_of(explicit, TWO_LAYERS)).values()) == {QUANTIZE}


def test_a_recipe_adds_and_drops_fused_sets() -> None:
    table = {f"model.layers.0.x.{leaf}.weight": M for leaf in ("a_proj", "b_proj", "gate_proj", "up_proj")}
    recipe = {
        "scheme": "NVFP4A16",
        "architecture": {"fused_add": [["a_proj", "b_proj"]], "fused_off": [["gate_proj", "up_proj"]]},
    }
    shared = {t.spec.name: len(t.fused) for t in plan_of(recipe, table).shards[0].tensors}
    assert sorted(shared.values()) == [0, 0, 2, 2]
    assert shared["model.layers.0.x.a_proj.weight"] == 2


def test_a_set_of_several_schemes_shares_only_within_one() -> None:
    recipe = {
        "groups": [
            {"scheme": "NVFP4A16", "targets": [r"re:.*q_proj"]},
            {"scheme": "FP8_DYNAMIC", "targets": [r"re:.*(k|v)_proj"]},
        ],
        "partial_fused": True,
    }
    plan = plan_of(recipe, llama_table())
    assert plan.problems == ()
    assert {len(tensor.fused) for tensor in plan.shards[0].tensors} == {0}


def test_a_recipe_names_heads_of_its_own() -> None:
    plan = plan_of({"scheme": "FP8_DYNAMIC", "architecture": {"heads": "my_head"}}, llama_table())
    assert "my_head" in plan.ignore


@pytest.mark.parametrize(
    "architecture",
    [
        3,
        {"unheard_of": 1},
        {"roles_off": "no such role"},
        {"roles_add": "re:("},
        {"fused_add": "a"},
        {"fused_add": [["alone"]]},
        {"fused_add": [["a.b", "c"]]},
        {"fused_off": {"a": 1}},
    ],
)
def test_what_cannot_be_overridden_is_refused(architecture: Any) -> None:
    with pytest.raises(RecipeInvalid):
        parse_recipe({"scheme": "FP8_DYNAMIC", "architecture": architecture})


def test_overrides_survive_json_and_say_nothing_when_empty() -> None:
    recipe = parse_recipe(
        {
            "scheme": "NVFP4A16",
            "kv_cache": True,
            "architecture": {"roles_off": ["head"], "fused_add": [["a", "b"]], "heads": ["x"]},
        }
    )
    assert parse_recipe(recipe_to_json(recipe)) == recipe
    assert not recipe.architecture.is_empty
    assert uniform("W8A8").architecture == NO_OVERRIDES == Overrides()
    assert {"architecture", "kv_cache"}.isdisjoint(recipe_to_json(uniform("W8A8")))


def test_conv1d_weights_are_refused_whatever_targets_them() -> None:
    table = {"h.0.attn.c_attn.weight": ("BF16", (64, 192)), "h.0.mlp.fc.weight": M}
    plan = plan_of({"scheme": "FP8_DYNAMIC"}, table, {"model_type": "gpt2"})
    assert [problem.kind for problem in plan.problems] == ["weight-transposed"]
    ignored = {"scheme": "FP8_DYNAMIC", "ignore": r"re:.*c_attn"}
    assert plan_of(ignored, table, {"model_type": "gpt2"}).problems == ()


def test_a_bias_as_long_as_a_row_tells_a_transposed_weight_of_any_architecture() -> None:
    table = {
        "a.weight": ("BF16", (64, 192)),
        "a.bias": ("BF16", (192,)),
        "b.weight": ("BF16", (64, 192)),
        "b.bias": ("BF16", (64,)),
        "c.weight": M,
        "c.bias": ("BF16", (64,)),
        "d.weight": M,
    }
    plan = plan_of({"scheme": "FP8_DYNAMIC"}, table, {"model_type": "brand_new"})
    assert [(problem.kind, problem.tensor) for problem in plan.problems] == [("weight-transposed", "a.weight")]


GRANITE = {"model_type": "granitemoe", "hidden_size": 64, "intermediate_size": 32}
STACKS: dict[str, Any] = {
    "model.layers.0.block_sparse_moe.input_linear.weight": ("BF16", (4, 64, 64)),
    "model.layers.0.block_sparse_moe.output_linear.weight": ("BF16", (4, 64, 32)),
    "model.layers.0.self_attn.o_proj.weight": M,
}


def test_stacks_of_granite_become_experts_as_engines_call_them() -> None:
    plan = plan_of({"scheme": "MXFP4A16"}, STACKS, GRANITE)
    assert plan.problems == ()
    names = {unit.module for unit in plan.shards[0].units()} - {"model.layers.0.self_attn.o_proj"}
    prefix = "model.layers.0.block_sparse_moe.experts"
    assert names == {f"{prefix}.{e}.{leaf}" for e in range(4) for leaf in ("w1", "w2", "w3")}
    dense = plan_of({"scheme": "MXFP4A16", "ignore": r"re:.*experts"}, STACKS, GRANITE)
    assert {f"{prefix}.0.{leaf}_proj" for leaf in ("gate", "up", "down")} <= set(dense.ignore)
    assert actions(dense)["model.layers.0.block_sparse_moe.input_linear.weight"] == COPY


def test_parts_that_loaders_rename_are_ignored_by_expressions() -> None:
    table = {
        "model.layers.0.self_attn.o_proj.weight": M,
        "model.layers.0.mlp.gate.weight": M,
        "visual.blocks.0.fc.weight": M,
        "visual.proj.weight": M,
    }
    config = {"model_type": "qwen2_5_vl", "vision_config": {"hidden_size": 64}}
    section = plan_document(plan_of({"scheme": "FP8_DYNAMIC"}, table, config))
    assert section["problems"] == []
    from shardmill.core.assemble import quantization_config

    ignore = quantization_config(plan_of({"scheme": "FP8_DYNAMIC"}, table, config))["ignore"]
    assert r"re:.*(^|\.)visual(\..*)?$" in ignore
    assert r"re:.*(^|\.)layers\.\d+\.mlp\.gate$" in ignore
    assert "visual.blocks.0.fc" in ignore


def test_params_json_says_the_same_as_config_json() -> None:
    import json

    from shardmill.core.assemble import quantization_config

    text = json.dumps({"dim": 1, "quantization": {"old": 1}, "auto_map": 1})
    plan = plan_of({"scheme": "FP8_DYNAMIC"}, llama_table(), rewritten=(("params.json", text), ("x_config.json", "{}")))
    params = json.loads(dict(plan.rewritten)["params.json"])
    assert params == {"dim": 1, "quantization": quantization_config(plan)}
    assert dict(plan.rewritten)["x_config.json"] == "{}"
    assert any("params.json" in line for line in render_table(resolve_table(plan)))


SCALES = {f"model.layers.{n}.self_attn.{leaf}_scale": ("F32", (1,)) for n in (0, 1) for leaf in "kv"}


@pytest.mark.parametrize(
    ("without", "is_sound"), [((), True), (("model.layers.1.self_attn.v_scale",), False), (tuple(SCALES), False)]
)
def test_a_quantized_cache_needs_both_scales_of_every_layer(without: tuple[str, ...], *, is_sound: bool) -> None:
    from shardmill.core.assemble import quantization_config

    scales = {name: entry for name, entry in SCALES.items() if name not in without}
    plan = plan_of({"scheme": "FP8_DYNAMIC", "kv_cache": True}, llama_table() | scales)
    assert {problem.kind for problem in plan.problems} == (set() if is_sound else {"kv-scales-missing"})
    scheme = quantization_config(plan)["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["strategy"]) == (8, "tensor")
    assert quantization_config(plan_of({"scheme": "FP8_DYNAMIC"}, llama_table() | scales))["kv_cache_scheme"] is None


def test_a_model_without_attention_has_no_cache() -> None:
    plan = plan_of({"scheme": "FP8_DYNAMIC", "kv_cache": True}, {"a.fc.weight": M})
    assert {problem.kind for problem in plan.problems} == {"kv-scales-missing"}


# ---- the resolved table -----------------------------------------------------------------------------------------


def test_a_known_architecture_is_told_with_its_notes() -> None:
    lines = "\n".join(render_table(resolve_table(plan_of({"scheme": "MXFP4A16"}, STACKS, GRANITE))))
    assert "Granite MoE" in lines
    assert "stored by rows" in lines
    assert "experts.N.w1" in lines


def test_an_unknown_architecture_is_told() -> None:
    table = resolve_table(plan_of({"scheme": "FP8_DYNAMIC"}, llama_table(), {}))
    assert not table.is_known
    assert "unknown (no model_type)" in next(render_table(table))


def test_the_table_of_a_plan_is_printed_and_in_json() -> None:
    recipe = {
        "scheme": "FP8_DYNAMIC",
        "architecture": {"roles_off": "head", "roles_add": "re:.*layers.1.mlp.*"},
    }
    plan = plan_of(recipe, llama_table(), MTP)
    lines = "\n".join(render_table(resolve_table(plan)))
    assert "not by this recipe: head" in lines
    assert "layers 1 for multi-token prediction" in lines
    assert "q_proj + k_proj + v_proj" in lines
    document = plan_document(plan)["architecture"]
    assert document["known"]
    assert [role["on"] for role in document["roles"] if role["name"] == "head"] == [False]
    assert document["layers_past_last"] == [1]
    assert document["fused"] == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]


def test_without_default_ignores_no_role_holds() -> None:
    table = resolve_table(plan_of({"scheme": "FP8_DYNAMIC", "default_ignores": False}, llama_table()))
    assert table.roles == ()
    assert table.roles_off == tuple(role.name for role in ROLES)
    assert "nothing by default" in "\n".join(render_table(table))
    bare = resolve_table(plan_of({"scheme": "FP8_DYNAMIC"}, {"a.fc.weight": M}, {"model_type": "llama"}))
    assert "no layers" in "\n".join(render_table(bare))


def test_splits_are_what_the_plan_says() -> None:
    assert SPLIT in actions(plan_of({"scheme": "MXFP4A16"}, STACKS, GRANITE)).values()
