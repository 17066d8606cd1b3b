"""Checks of a finished checkpoint by names and shapes: planned outputs pass, everything else is named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from asked import asked
from manifests import manifest_of
from shardmill.core import assemble
from shardmill.core.header import ShardHeader, TensorSpec
from shardmill.core.index import CheckpointIndex
from shardmill.core.manifest import parse_manifest
from shardmill.core.plan import Plan, SourceShard
from shardmill.core.planner import build_plan
from shardmill.core.recipe import parse_recipe
from shardmill.core.scheme import PRESETS
from shardmill.core.written import (
    Located,
    WrittenConfig,
    check_dense,
    check_global_scales,
    check_index,
    check_manifest,
    check_modules,
    code_shape,
    parse_written_config,
    quantized_modules,
    unsafe_names,
)
from shardmill.errors import Problem
from strategies import checkpoint_of, llama_table

Tensors = dict[str, Located]


def plan_of(recipe: Any, shards: int = 2) -> Plan:
    entries = list(llama_table().items())
    return build_plan(checkpoint_of([dict(entries[n::shards]) for n in range(shards)]), parse_recipe(recipe))


def written(plan: Plan) -> tuple[dict[str, Any], Tensors, dict[str, tuple[int, int]], list[SourceShard]]:
    """What a run of the plan would leave: config, tensors, values of `weight_shape`, shards."""
    config = json.loads(assemble.encode_document(assemble.config_document(plan)))
    tensors: Tensors = {}
    stored: dict[str, tuple[int, int]] = {}
    shards = []
    for shard in plan.shards:
        layout = shard.layout()
        specs = tuple(TensorSpec(p.spec.name, p.spec.dtype, p.spec.shape, p.begin, p.end) for p in layout.placed)
        shards.append(SourceShard(shard.name, layout.data_bytes, ShardHeader(specs, (), 0)))
        tensors |= {spec.name: Located(shard.name, 0, spec) for spec in specs}
        stored |= {f"{u.module}.weight_shape": (u.rows, u.cols) for u in layout.units if u.scheme is not None}
    return config, tensors, stored, shards


def change(tensors: Tensors, name: str, **fields: Any) -> Tensors:
    return tensors | {name: replace(tensors[name], spec=tensors[name].spec._replace(**fields))}


def kinds(problems: list[Problem]) -> set[str]:
    return {problem.kind for problem in problems}


# ---- configs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", sorted(PRESETS))
def test_what_is_planned_passes(scheme: str) -> None:
    config, tensors, stored, _ = written(plan_of(asked(scheme)))
    found = parse_written_config(config)
    modules = quantized_modules(tensors)
    assert found.problems == ()
    assert len(modules) == 14
    assert check_modules(found, modules, stored) == []
    assert check_dense(found, tensors, modules, is_strict=True) == []


def test_groups_of_a_mixed_recipe_own_their_modules() -> None:
    recipe = {
        "groups": [
            {"scheme": "NVFP4A16", "targets": ["re:.*self_attn"]},
            {"scheme": "W4A16_ASYM", "targets": ["Linear"]},
        ]
    }
    config, tensors, stored, _ = written(plan_of(recipe))
    found = parse_written_config(config)
    assert check_modules(found, quantized_modules(tensors), stored) == []
    owners = {
        module.rpartition(".")[2]: group.format
        for module in quantized_modules(tensors)
        if (group := found.group_of(module))
    }
    assert (owners["q_proj"], owners["down_proj"]) == ("nvfp4-pack-quantized", "pack-quantized")


FOREIGN = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "strategy": "group",
                "group_size": 128,
                "symmetric": True,
                "dynamic": False,
                "actorder": "weight",
                "observer": "mse",
                "observer_kwargs": {},
                "block_structure": None,
            },
            "input_activations": None,
        }
    },
    "ignore": ["lm_head", "re:.*gate$"],
}


def test_configs_of_other_tools_are_read() -> None:
    found = parse_written_config({"quantization_config": FOREIGN})
    group = found.groups[0]
    assert found.problems == ()
    assert (group.format, group.extras) == ("pack-quantized", frozenset({"weight_g_idx"}))
    assert group.entry["weights"]["num_bits"] == 4
    assert group.entry["format"] == "pack-quantized"
    assert found.group_of("model.layers.0.mlp.up_proj") == group


@pytest.mark.parametrize(
    ("written_format", "activations"),
    [("pack-quantized", True), ("int-quantized", True), ("int-quantized", False), ("naive-quantized", True)],
)
def test_tools_differ_in_the_format_of_integers(written_format: str, *, activations: bool) -> None:
    section = copy.deepcopy(FOREIGN)
    group = section["config_groups"]["group_0"]  # type: ignore[index]
    group["format"] = written_format
    group["input_activations"] = {"dynamic": True, "num_bits": 8} if activations else None
    assert parse_written_config({"quantization_config": section}).problems == ()


def test_static_activations_bring_params_along() -> None:
    section = copy.deepcopy(FOREIGN)
    section["config_groups"]["group_0"]["input_activations"] = {"dynamic": False}  # type: ignore[index]
    extras = parse_written_config({"quantization_config": section}).groups[0].extras
    assert extras == {"weight_g_idx", "input_scale", "input_zero_point", "input_global_scale"}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("quant_method", "fp8", "found none"),
        ("config_groups", {}, "found none"),
        ("config_groups", [], "found none"),
        ("config_groups", {"g": 7}, "needs targets and weights"),
        ("config_groups", {"g": {"targets": ["Linear"], "weights": None}}, "needs targets and weights"),
        ("config_groups", {"g": {"targets": [], "weights": {}}}, "needs targets and weights"),
        ("config_groups", {"g": {"targets": [7], "weights": {}}}, "needs targets and weights"),
        ("config_groups", {"g": {"targets": ["Linear"], "weights": {"num_bits": 99}}}, "bits"),
        ("config_groups", {"g": {"targets": ["Linear"], "weights": {"num_bits": "4"}}}, "integer"),
        ("config_groups", {"g": {"targets": ["re:("], "weights": {"num_bits": 4}}}, "no valid expression"),
        ("format", "float-quantized", "does not fit 4-bit int"),
        ("format", "marlin-24", "does not fit"),
        ("ignore", "lm_head", "list of strings"),
        ("ignore", ["re:("], "no valid expression"),
    ],
)
def test_configs_that_cannot_be_read_are_problems(field: str, value: Any, message: str) -> None:
    problems = parse_written_config({"quantization_config": FOREIGN | {field: value}}).problems
    assert len(problems) == 1
    assert message in problems[0].message
    assert problems[0].file == "config.json"


def test_an_mx_weight_needs_an_mx_format() -> None:
    config, _, _, _ = written(plan_of({"scheme": "MXFP8"}))
    config["quantization_config"]["config_groups"]["group_00"]["format"] = "float-quantized"
    assert kinds(list(parse_written_config(config).problems)) == {"config-invalid"}


# ---- params -----------------------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"


def drop(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def add(name: str, dtype: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: Located("s", 0, TensorSpec(name, dtype, shape, 0, 0))}


def turn(name: str, **fields: Any) -> Callable[[Tensors], Tensors]:
    return lambda tensors: change(tensors, name, **fields)


@pytest.mark.parametrize(
    ("scheme", "damage", "message"),
    [
        ("W4A16_ASYM", drop(f"{Q}.weight_scale"), "`weight_scale` is missing"),
        ("W4A16_ASYM", drop(f"{Q}.weight_zero_point"), "`weight_zero_point` is missing"),
        ("W4A16_ASYM", drop(f"{Q}.weight_packed"), "expected codes of a matrix"),
        ("W4A16_ASYM", drop(f"{Q}.weight_shape"), "what tells its shape"),
        ("W4A16_ASYM", turn(f"{Q}.weight_scale", shape=(256, 1)), "expected BF16 [256, 2], found BF16 [256, 1]"),
        ("W4A16_ASYM", turn(f"{Q}.weight_scale", dtype="F64"), "found F64"),
        ("W4A16", add(f"{Q}.weight_zero_point", "I32", 32, 2), "has no place"),
        ("W4A16", add(f"{Q}.weight_g_idx", "I32", 256), "has no place"),
        ("W4A16", add(f"{Q}.weight", "BF16", 256, 256), "has no place"),
        ("NVFP4A16", drop(f"{Q}.weight_global_scale"), "`weight_global_scale` is missing"),
        ("NVFP4A16", turn(f"{Q}.weight_scale", dtype="BF16"), "expected F8_E4M3"),
        ("NVFP4A16", turn(f"{Q}.weight_packed", shape=(128, 128)), "expected F8_E4M3 [128, 16]"),
        ("NVFP4A16", turn(f"{Q}.weight_packed", shape=(256, 3)), "does not divide 6 columns"),
        ("NVFP4A16", turn(f"{Q}.weight_packed", shape=(256,)), "expected codes of a matrix"),
        ("MXFP4A16", turn(f"{Q}.weight_scale", dtype="F8_E8M0"), "expected U8"),
        ("FP8_DYNAMIC", add(f"{Q}.input_scale", "F32", 1), "has no place"),
        ("FP8_DYNAMIC", drop(f"{Q}.weight"), "expected codes of a matrix"),
        ("FP8_DYNAMIC", turn(f"{Q}.weight", dtype="BF16"), "expected F8_E4M3 [256, 256], found BF16"),
        ("W8A8", turn(f"{Q}.weight", dtype="F8_E4M3"), "expected I8"),
    ],
)
def test_params_that_differ_from_their_format_are_named(
    scheme: str, damage: Callable[[Tensors], Tensors], message: str
) -> None:
    config, tensors, stored, _ = written(plan_of({"scheme": scheme}))
    problems = check_modules(parse_written_config(config), quantized_modules(damage(tensors)), stored)
    assert {(p.tensor, p.kind) for p in problems} == {(Q, "params-differ")}
    assert any(message in p.message for p in problems)


@pytest.mark.parametrize("dtype", ["F16", "F32", "BF16"])
@pytest.mark.parametrize("shape", [(256, 1)])
def test_scales_have_the_dtype_of_any_source(dtype: str, shape: tuple[int, ...]) -> None:
    config, tensors, stored, _ = written(plan_of({"scheme": "FP8_DYNAMIC"}))
    tensors = change(tensors, f"{Q}.weight_scale", dtype=dtype, shape=shape)
    assert check_modules(parse_written_config(config), quantized_modules(tensors), stored) == []


def test_scalars_may_have_no_dimension() -> None:
    config, tensors, stored, _ = written(plan_of({"scheme": "NVFP4A16"}))
    tensors = change(tensors, f"{Q}.weight_global_scale", shape=())
    assert check_modules(parse_written_config(config), quantized_modules(tensors), stored) == []


def test_a_bias_is_nobodys_business() -> None:
    config, tensors, stored, _ = written(plan_of({"scheme": "NVFP4A16"}))
    tensors = add(f"{Q}.bias", "BF16", 256)(tensors)
    assert check_modules(parse_written_config(config), quantized_modules(tensors), stored) == []


def test_a_module_needs_a_group_and_must_not_be_ignored() -> None:
    config, tensors, stored, _ = written(plan_of({"scheme": "FP8_DYNAMIC"}))
    section = config["quantization_config"]
    section["ignore"].append(Q)
    section["config_groups"]["group_00"]["targets"] = ["re:.*self_attn"]
    problems = check_modules(parse_written_config(config), quantized_modules(tensors), stored)
    assert kinds(problems) == {"module-ignored", "module-unmatched"}
    assert [p.tensor for p in problems if p.kind == "module-ignored"] == [Q]
    assert sum(p.kind == "module-unmatched" for p in problems) == 6


def test_the_shape_of_packed_integers_is_the_stored_one() -> None:
    spec = TensorSpec("m.weight_packed", "I32", (2, 5), 0, 40)
    params = {"weight_packed": Located("s", 0, spec)}
    assert code_shape(params, {}) is None
    shape = {"weight_shape": Located("s", 0, TensorSpec("m.weight_shape", "I64", (2,), 0, 16))}
    assert code_shape(params | shape, {"m.weight_shape": (2, 36)}) == (2, 36)
    assert code_shape(params | shape, {}) is None


# ---- what stays dense -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ignore", "targets", "is_strict", "expected"),
    [
        (["lm_head", "model.embed_tokens"], ["Linear"], True, set()),
        (["lm_head"], ["Linear"], True, {"model.embed_tokens.weight"}),
        (["lm_head"], ["Linear"], False, set()),
        (["model.embed_tokens"], ["re:.*"], True, {"lm_head.weight"}),
        ([], ["re:.*_proj$"], True, set()),
        ([], ["re:.*_proj$", "lm_head"], False, {"lm_head.weight"}),
    ],
)
def test_dense_matrices_must_be_out_of_reach(
    ignore: list[str], targets: list[str], expected: set[str], *, is_strict: bool
) -> None:
    config, tensors, _, _ = written(plan_of({"scheme": "FP8_DYNAMIC"}))
    config["quantization_config"]["ignore"] = ignore
    config["quantization_config"]["config_groups"]["group_00"]["targets"] = targets
    problems = check_dense(parse_written_config(config), tensors, quantized_modules(tensors), is_strict=is_strict)
    assert {p.tensor for p in problems} == expected
    assert kinds(problems) <= {"dense-targeted"}


def test_a_forgotten_linear_is_found_in_results_of_other_tools_too() -> None:
    config, tensors, _, _ = written(plan_of({"scheme": "FP8_DYNAMIC"}))
    tensors = add("model.layers.9.mlp.up_proj.weight", "BF16", 8, 8)(tensors)
    problems = check_dense(parse_written_config(config), tensors, quantized_modules(tensors), is_strict=False)
    assert [p.tensor for p in problems] == ["model.layers.9.mlp.up_proj.weight"]


# ---- fused sets -------------------------------------------------------------------------------------------------


def nvfp4() -> tuple[WrittenConfig, dict[str, dict[str, Located]], dict[str, float]]:
    config, tensors, _, _ = written(plan_of({"scheme": "NVFP4A16"}))
    modules = quantized_modules(tensors)
    return parse_written_config(config), modules, dict.fromkeys(modules, 69.0)


def test_one_global_scale_per_fused_set_is_sound() -> None:
    _, modules, values = nvfp4()
    values["model.layers.0.self_attn.o_proj"] = 656.0
    values["model.layers.1.mlp.down_proj"] = 1.5
    assert check_global_scales(modules, values) == []


@pytest.mark.parametrize("member", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"])
def test_unshared_global_scales_are_refused(member: str) -> None:
    _, modules, values = nvfp4()
    values[f"model.layers.1.{member}"] = 656.0
    problems = check_global_scales(modules, values)
    assert kinds(problems) == {"fused-scales-differ"}
    assert len(problems) == 1
    assert f"{member.rpartition('.')[2]} 656" in problems[0].message


def test_modules_without_a_value_are_passed_over() -> None:
    _, modules, values = nvfp4()
    del values["model.layers.0.self_attn.q_proj"]
    assert check_global_scales(modules, values) == []


# ---- index and manifest -----------------------------------------------------------------------------------------


def index_of(shards: list[SourceShard], **changes: str | None) -> CheckpointIndex:
    named: dict[str, str | None] = {spec.name: shard.name for shard in shards for spec in shard.header.tensors}
    return CheckpointIndex({name: shard for name, shard in (named | changes).items() if shard is not None})


def test_index_and_headers_agree_both_ways() -> None:
    *_, shards = written(plan_of({"scheme": "FP8_DYNAMIC"}))
    assert check_index(index_of(shards), shards) == []
    assert check_index(None, shards) == []
    changed = index_of(shards, **{"ghost": shards[0].name, f"{Q}.weight": None, "model.norm.weight": "elsewhere"})
    problems = check_index(changed, shards)
    assert {p.tensor: p.message.partition(",")[2] for p in problems} == {
        "ghost": " no shard has it",
        "model.norm.weight": f" it stands in `{shards[1].name}`",
        f"{Q}.weight": f" it stands in `{shards[1].name}`",
    }


def test_a_shard_that_was_not_read_is_no_disagreement() -> None:
    *_, shards = written(plan_of({"scheme": "FP8_DYNAMIC"}))
    assert check_index(index_of(shards), shards[:1]) == []


def test_a_tensor_stands_in_one_shard_only() -> None:
    *_, shards = written(plan_of({"scheme": "FP8_DYNAMIC"}))
    twice = replace(shards[1], header=shards[0].header)
    assert kinds(check_index(None, [shards[0], twice])) == {"duplicate-tensor"}


def test_manifest_and_shards_account_for_each_other() -> None:
    plan = plan_of({"scheme": "W4A16"})
    *_, shards = written(plan)
    manifest = parse_manifest(manifest_of(plan))
    assert check_manifest(manifest, shards, is_complete=True) == []
    assert [(p.file, p.kind) for p in check_manifest(manifest, shards[:1], is_complete=True)] == [
        (shards[1].name, "shard-missing")
    ]
    assert check_manifest(manifest, shards[:1], is_complete=False) == []
    stranger = replace(shards[0], name="stranger.safetensors")
    assert [p.file for p in check_manifest(manifest, [*shards, stranger], is_complete=True)] == ["stranger.safetensors"]


def test_tensors_that_came_or_went_are_named() -> None:
    plan = plan_of({"scheme": "W4A16"})
    *_, shards = written(plan)
    manifest = parse_manifest(manifest_of(plan))
    specs = {spec.name: spec for spec in shards[1].header.tensors}
    del specs["model.norm.weight"]
    del specs[f"{Q}.weight_packed"]
    extra = TensorSpec("planted", "U8", (1,), 0, 1)
    damaged = replace(shards[1], header=ShardHeader((*specs.values(), extra), (), 0))
    problems = check_manifest(manifest, [shards[0], damaged], is_complete=True)
    assert {p.tensor: p.message for p in problems} == {
        "model.norm.weight": "the manifest says that it was copied, the shard does not have it",
        Q: "the manifest says that it was quantized, the shard does not have it",
        "planted": "the manifest does not account for it",
    }


def test_parts_of_a_split_stack_are_accounted_for() -> None:
    prefix = "model.layers.0.mlp.experts"
    table = {
        f"{prefix}.gate_up_proj": ("BF16", (2, 256, 64)),
        f"{prefix}.gate_up_proj_bias": ("BF16", (2, 256)),
        f"{prefix}.down_proj": ("BF16", (2, 64, 128)),
    }
    config: Mapping[str, Any] = {"model_type": "qwen3_moe", "hidden_size": 64, "moe_intermediate_size": 128}
    plan = build_plan(checkpoint_of([table], config), parse_recipe({"scheme": "FP8_DYNAMIC"}))
    written_config, tensors, stored, shards = written(plan)
    assert check_manifest(parse_manifest(manifest_of(plan)), shards, is_complete=True) == []
    found = parse_written_config(written_config)
    assert check_modules(found, quantized_modules(tensors), stored) == []


def test_names_that_would_be_patterns_are_unsafe() -> None:
    assert unsafe_names(["Linear", "re:x", "", "model.x"]) == {"Linear", "re:x", ""}
