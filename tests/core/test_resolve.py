"""The three readers of a written config: what each of them finds, and that what is planned is found by all."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmill.core.assemble import quantization_config
from shardmill.core.fused import FusedTable
from shardmill.core.groups import group_keys
from shardmill.core.plan import Plan
from shardmill.core.planner import build_plan
from shardmill.core.recipe import parse_recipe
from shardmill.core.resolve import Layer, Resolver, check_resolution, runtime_layers
from shardmill.core.targets import disjoint_targets
from strategies import checkpoint_of, llama_table


def section(groups: dict[str, list[str]], ignore: list[str] | None = None) -> dict[str, Any]:
    return {"config_groups": {name: {"targets": targets} for name, targets in groups.items()}, "ignore": ignore or []}


def resolver(groups: dict[str, list[str]], ignore: list[str] | None = None) -> Resolver:
    return Resolver.read(section(groups, ignore))


def layer_of(*modules: str) -> Layer:
    return next(iter(runtime_layers(modules)))


# ---- one rule each ----------------------------------------------------------------------------------------------


def test_readers_disagree_on_who_wins_where_two_groups_match() -> None:
    read = resolver({"z": [r"re:.*q_proj$"], "a": ["Linear"]})
    assert read.first_match("m.q_proj") == read.vllm(layer_of("m.q_proj")) == "z"
    read = resolver({"a": ["Linear"], "z": [r"re:.*q_proj$"]})
    assert (read.first_match("m.q_proj"), read.compressed_tensors("m.q_proj"), read.vllm(layer_of("m.q_proj"))) == (
        "a",
        "z",
        "z",
    )


def test_vllm_asks_for_the_class_before_the_parts_of_a_merged_layer() -> None:
    read = resolver({"named": [r"re:.*\.(q|k|v)_proj$"], "rest": ["Linear"]})
    qkv = layer_of("m.q_proj", "m.k_proj", "m.v_proj")
    assert qkv.names == ("m.qkv_proj",)
    assert read.vllm(qkv) == "rest"
    assert resolver({"named": [r"re:.*\.(q|k|v)_proj$"]}).vllm(qkv) == "named"


def test_vllm_refuses_a_merged_layer_of_which_a_part_is_ignored() -> None:
    read = resolver({"g": ["Linear"]}, ["m.k_proj"])
    with pytest.raises(LookupError, match="ignored"):
        read.vllm(layer_of("m.q_proj", "m.k_proj", "m.v_proj"))
    assert read.vllm(layer_of("m.k_proj")) is None


def test_vllm_refuses_what_neither_a_target_nor_ignore_names() -> None:
    with pytest.raises(LookupError, match="no target"):
        resolver({"g": [r"re:.*q_proj$"]}).vllm(layer_of("m.o_proj"))


def test_vllm_asks_for_experts_under_names_of_its_own() -> None:
    w123 = layer_of("m.experts.3.w1", "m.experts.3.w2", "m.experts.3.w3")
    assert w123.names == tuple(f"m.experts.0.{leaf}_proj" for leaf in ("gate", "up", "down"))
    assert resolver({"g": ["Linear"]}).vllm(w123) == "g"
    assert resolver({"g": ["Linear"]}, list(w123.names)).vllm(w123) is None
    with pytest.raises(LookupError, match="no target"):
        resolver({"g": [r"re:.*experts\.\d+\.w[123]$"]}).vllm(w123)
    with pytest.raises(LookupError, match="several"):
        resolver({"g": [r"re:.*(gate|up)_proj$"], "h": [r"re:.*down_proj$"]}).vllm(w123)


def test_the_library_takes_the_exact_name_then_the_alphabet() -> None:
    read = resolver({"a": [r"re:.*proj$"], "b": [r"re:.*o_proj$"], "c": ["m.v_proj"], "d": ["Linear"]})
    assert read.compressed_tensors("m.o_proj") == "b"  # `o` stands before `p`
    assert read.compressed_tensors("m.v_proj") == "c"
    assert read.compressed_tensors("m.fc") == "d"
    assert read.compressed_tensors("m.fc", classes=("Embedding",)) is None


def test_expressions_are_tried_on_the_class_of_a_layer_too() -> None:
    assert resolver({"g": ["re:.*ParallelLinear$"]}).vllm(layer_of("m.fc")) == "g"


def test_a_class_in_ignore_is_ignored_by_the_library() -> None:
    assert resolver({"g": ["Linear"]}, ["Linear"]).compressed_tensors("m.fc") is None


def test_a_target_of_two_groups_belongs_to_the_last() -> None:
    read = resolver({"a": ["m.fc", "m.up"], "b": ["m.fc"]})
    assert (read.compressed_tensors("m.fc"), read.vllm(layer_of("m.fc")), read.compressed_tensors("m.none")) == (
        "b",
        "b",
        None,
    )


def test_ignore_beats_every_target_for_every_reader() -> None:
    read = resolver({"g": ["m.fc", "Linear"]}, [r"re:.*fc$"])
    assert (read.first_match("m.fc"), read.compressed_tensors("m.fc"), read.vllm(layer_of("m.fc"))) == (
        None,
        None,
        None,
    )


def test_transformers_takes_the_first_expression_that_speaks_of_experts() -> None:
    assert resolver({"a": ["Linear"], "b": [r"re:.*experts.*"]}).transformers_experts() == "b"
    assert resolver({"a": [r"re:.*attn.*"], "b": ["Linear"]}).transformers_experts() == "b"
    assert resolver({"a": [r"re:.*attn.*"]}).transformers_experts() == "a"
    assert Resolver.read({}).transformers_experts() is None


def test_layers_are_merged_as_the_table_says() -> None:
    names = [f"m.{leaf}" for leaf in ("a_proj", "b_proj")]
    assert len(list(runtime_layers(names))) == 2
    assert len(list(runtime_layers(names, FusedTable.build(added=[("a_proj", "b_proj")])))) == 2  # it has no name
    merged = [f"m.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")]
    assert len(list(runtime_layers(merged, FusedTable.build(dropped=[("q_proj", "k_proj", "v_proj")])))) == 3


# ---- the check --------------------------------------------------------------------------------------------------


def test_a_config_that_one_reader_misreads_is_told() -> None:
    # the alphabet gives `o_proj` to the second group, order to the first
    found = check_resolution(section({"x": [r"re:.*proj$"], "y": [r"re:.*o_proj$"]}), {"m.o_proj": "x"}, [])
    assert [problem.message.partition(":")[0] for problem in found] == ["read by compressed-tensors"]
    assert found[0].kind == "config-unresolved"


def test_layers_that_vllm_refuses_or_misreads_are_told() -> None:
    merged = {f"m.{leaf}_proj": "a" for leaf in "qkv"}
    refused = check_resolution(section({"a": [r"re:.*_proj$"]}, ["m.fc"]), merged, ["m.fc", "m.other"])
    assert "read by vLLM: as `m.other` it is refused" in " ".join(problem.message for problem in refused)
    misread = check_resolution(section({"a": [r"re:.*\.(q|k|v)_proj$"], "b": ["Linear"]}), merged, [])
    assert ["as `m.qkv_proj`: expected `a`, found `b`" in problem.message for problem in misread] == [True]
    assert "found none" in check_resolution(section({"a": []}, ["m.x"]), {"m.x": "a"}, [])[0].message


def test_members_that_the_plan_treats_differently_are_told_elsewhere() -> None:
    planned = {"m.q_proj": "a", "m.k_proj": "a", "m.v_proj": "b"}
    groups = {"a": [r"re:.*(q|k)_proj$"], "b": [r"re:.*v_proj$"]}
    assert check_resolution(section(groups), planned, []) == []


def test_experts_that_transformers_reads_by_another_group_are_told() -> None:
    groups = {"x": [r"re:.*shared_experts\.up_proj$"], "y": [r"re:.*\.\d+\.(gate|up|down)_proj$"]}
    found = check_resolution(
        section(groups),
        {"m.shared_experts.up_proj": "x", **{f"m.experts.0.{n}_proj": "y" for n in ("gate", "up", "down")}},
        [],
    )
    assert ["transformers" in problem.message for problem in found] == [True]


def plan_of(recipe: Any, tables: list[dict[str, Any]], config: dict[str, Any] | None = None) -> Plan:
    return build_plan(checkpoint_of(tables, config), parse_recipe(recipe))


def test_names_that_differ_in_front_only_get_longer_expressions() -> None:
    table = {
        f"{prefix}.layers.0.self_attn.{leaf}_proj.weight": ("BF16", (64, 64))
        for prefix in ("model.language_model", "model.draft")
        for leaf in "qkv"
    }
    recipe = {
        "groups": [
            {"scheme": "FP8_DYNAMIC", "targets": ["re:.*language_model.*"]},
            {"scheme": "NVFP4A16", "targets": ["re:.*draft.*"]},
        ]
    }
    plan = plan_of(recipe, [table])
    assert plan.problems == ()
    read = Resolver.read(quantization_config(plan))
    names = [f"model.language_model.layers.0.self_attn.{leaf}_proj" for leaf in "qkv"]
    renamed = [name.replace("model.language_model", "language_model.model") for name in names]  # as vLLM does
    assert read.vllm(layer_of(*names)) == read.vllm(layer_of(*renamed)) == "group_00"
    assert read.vllm(layer_of("model.draft.layers.0.self_attn.q_proj")) == "group_01"


def test_what_cannot_be_told_apart_is_a_problem_of_the_plan() -> None:
    recipe = {
        "groups": [{"scheme": "FP8_DYNAMIC", "targets": ["fc"]}, {"scheme": "NVFP4A16", "targets": ["decoder.fc"]}]
    }
    table = dict.fromkeys(("fc.weight", "decoder.fc.weight"), ("BF16", (64, 64)))
    assert {problem.kind for problem in plan_of(recipe, [table]).problems} == {"config-unresolved"}


def test_shared_experts_are_not_taken_for_experts() -> None:
    leaves = ("gate_proj", "up_proj", "down_proj")
    table = {f"model.layers.0.mlp.experts.0.{leaf}.weight": ("BF16", (64, 64)) for leaf in leaves}
    table |= {f"model.layers.0.mlp.shared_experts.{leaf}.weight": ("BF16", (64, 64)) for leaf in leaves}
    recipe = {
        "groups": [
            {"scheme": "FP8_DYNAMIC", "targets": ["re:.*shared_experts"]},
            {"scheme": "NVFP4A16", "targets": ["re:.*"]},
        ]
    }
    plan = plan_of(recipe, [table])
    assert plan.problems == ()
    assert Resolver.read(quantization_config(plan)).transformers_experts() == "group_01"


@pytest.mark.parametrize("names", ["w1 w2 w3", "up_proj down_proj", "gate_proj up_proj down_proj"])
@pytest.mark.parametrize("mixed", [True, False])
def test_experts_of_every_naming_resolve(names: str, *, mixed: bool) -> None:
    leaves = names.split()
    table = {
        f"model.layers.0.moe.experts.{e}.{leaf}.weight": ("BF16", (64, 64)) for e in range(3) for leaf in leaves
    } | {"model.layers.0.self_attn.o_proj.weight": ("BF16", (64, 64))}
    groups = [{"scheme": "FP8_DYNAMIC", "targets": ["re:.*attn"]}, {"scheme": "NVFP4A16", "targets": ["re:.*experts"]}]
    assert plan_of({"groups": groups if mixed else groups[1:]}, [table]).problems == ()
    # and when they stay dense
    dense = plan_of({"groups": groups[:1]}, [table])
    assert dense.problems == ()
    assert "model.layers.0.moe.experts.0.gate_proj" in dense.ignore


MODULES = st.builds(
    "{}.layers.{}.{}".format,
    st.sampled_from(["model", "model.language_model", "draft"]),
    st.integers(0, 3),
    st.sampled_from(["self_attn.q_proj", "self_attn.k_proj", "mlp.experts.0.up_proj", "mlp.experts.12.w1", "mlp.fc"]),
)


@given(st.dictionaries(MODULES, st.integers(0, 2), min_size=1), st.lists(MODULES))
def test_generated_targets_resolve_alike_for_first_match_and_library(
    modules: dict[str, int], others: list[str]
) -> None:
    keys = group_keys(3)
    targets = disjoint_targets(modules, 3)
    dense = [name for name in others if name not in modules]
    written = section({keys[n]: names for n, names in enumerate(targets) if names}, dense)
    quantized = {module: keys[group] for module, group in modules.items()}
    assert check_resolution(written, quantized, dense, runs_merged=False) == []


def test_every_preset_and_a_mixed_recipe_resolve_for_a_llama() -> None:
    recipe = {
        "groups": [
            {"scheme": "FP8_DYNAMIC", "targets": ["re:.*layers.0.self_attn"]},
            {"scheme": "NVFP4A16", "targets": ["Linear"]},
        ]
    }
    assert plan_of(recipe, [llama_table()]).problems == ()
    assert plan_of({"scheme": "W4A16"}, [llama_table()]).problems == ()
