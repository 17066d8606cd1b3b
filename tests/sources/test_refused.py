"""What looks quantized and cannot be told for certain is a problem of the plan, with a kind and a way out."""

from __future__ import annotations

from typing import Any

import pytest

from shardmill.core.checks import check_plan
from shardmill.core.planner import build_plan
from shardmill.core.recipe import dequantizing, uniform
from strategies import checkpoint_of

FP8: dict[str, Any] = {"m.up_proj.weight": ("F8_E4M3", (256, 128)), "m.up_proj.weight_scale_inv": ("F32", (2, 1))}
GPTQ: dict[str, Any] = {
    "m.up_proj.qweight": ("I32", (16, 64)),
    "m.up_proj.qzeros": ("I32", (1, 8)),
    "m.up_proj.scales": ("F16", (1, 64)),
}
PACKED: dict[str, Any] = {
    "m.up_proj.weight_packed": ("I32", (64, 16)),
    "m.up_proj.weight_scale": ("BF16", (64, 1)),
    "m.up_proj.weight_shape": ("I64", (2,)),
}
EXPERTS: dict[str, Any] = {
    "m.experts.down_proj_blocks": ("U8", (2, 64, 3, 16)),
    "m.experts.down_proj_scales": ("U8", (2, 64, 3)),
}

ODD: dict[str, Any] = {
    "m.experts.gate_up_proj_blocks": ("U8", (2, 63, 3, 16)),
    "m.experts.gate_up_proj_scales": ("U8", (2, 63, 3)),
}
NF4: dict[str, Any] = {"m.up_proj.weight": ("U8", (64, 64)), "m.up_proj.absmax": ("F32", (64,))}


def kinds(table: dict[str, Any], section: Any = None) -> set[str]:
    config = {"quantization_config": section} if section else {}
    plan = build_plan(
        checkpoint_of([{"m.q_proj.weight": ("BF16", (64, 128)), **table}], config), uniform("FP8_DYNAMIC")
    )
    assert all(len(str(problem)) <= 300 for problem in check_plan(plan))
    return {problem.kind for problem in check_plan(plan)}


def without(table: dict[str, Any], *params: str) -> dict[str, Any]:
    return {name: entry for name, entry in table.items() if not name.endswith(params)}


@pytest.mark.parametrize(
    ("table", "section", "kind"),
    [
        (FP8, None, None),
        (FP8, {"quant_method": "fp8"}, None),
        (GPTQ, {"quant_method": "gptq", "bits": 4}, None),
        (EXPERTS, {"quant_method": "mxfp4"}, None),
        (without(FP8, ".weight"), None, "weight-missing"),
        (FP8 | {"m.o_proj.weight": ("F8_E4M3", (64, 64))}, None, "scale-missing"),
        (FP8 | {"m.up_proj.weight_scale_inv": ("F32", (3, 1))}, None, "scale-shape"),
        (FP8, {"quant_method": "fp8", "weight_block_size": [64, 64]}, "scale-shape"),
        (FP8, {"quant_method": "fp8", "weight_block_size": "128"}, "scale-shape"),
        (FP8 | {"m.up_proj.weight_scale": ("F32", (1,))}, None, "source-ambiguous"),
        (FP8, {"quant_method": "awq"}, "source-ambiguous"),
        (GPTQ, {"quant_method": "awq"}, "source-ambiguous"),
        (GPTQ, {"quant_method": "gptq", "bits": 8}, "source-ambiguous"),
        (GPTQ, {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "source-unsupported"),
        (without(GPTQ, ".qzeros"), {"quant_method": "gptq"}, "source-ambiguous"),
        (without(GPTQ, ".scales"), {"quant_method": "gptq"}, "scale-missing"),
        (without(GPTQ, ".qweight"), {"quant_method": "gptq"}, "weight-missing"),
        (GPTQ | {"m.up_proj.scales": ("F16", (1, 60))}, None, "codes-shape"),
        (PACKED, None, "source-ambiguous"),
        (without(PACKED, ".weight_scale"), None, "scale-missing"),
        (without(EXPERTS, "_scales"), None, "scale-missing"),
        (without(EXPERTS, "_blocks"), None, "weight-missing"),
        (EXPERTS | {"m.experts.down_proj_scales": ("U8", (2, 64, 4))}, None, "scale-shape"),
        (ODD, None, "expert-layout"),
        ({"m.up_proj.weight": ("U8", (64, 64)), "m.up_proj.weight_scale": ("F32", (64, 4))}, None, "source-unknown"),
        (NF4, {"quant_method": "bitsandbytes"}, "source-unsupported"),
        ({"m.up_proj.W_q": ("U8", (64, 64))}, None, "source-unsupported"),
        ({"m.up_proj.q_weight": ("I32", (64, 64))}, None, "source-unsupported"),
        ({}, {"quant_method": "gguf"}, "source-unsupported"),
        ({}, {"load_in_4bit": True}, "source-unsupported"),
        ({}, {"quant_method": "fp8"}, "already-quantized"),
        ({}, "fp8", "already-quantized"),
        (FP8, "fp8", "already-quantized"),
    ],
)  # fmt: skip
def test_each_defect_has_its_kind(table: dict[str, Any], section: Any, kind: str | None) -> None:
    found = kinds(table, section)
    assert kind in found if kind else found == set()


def test_a_config_that_describes_itself_twice_is_ambiguous() -> None:
    config = {
        "quantization_config": {"quant_method": "fp8"},
        "text_config": {"quantization_config": {"quant_method": "awq"}},
    }
    plan = build_plan(checkpoint_of([FP8], config), uniform("FP8_DYNAMIC"))
    assert "source-ambiguous" in {problem.kind for problem in plan.problems}


def test_there_must_be_something_to_dequantize() -> None:
    plan = build_plan(checkpoint_of([{"m.q_proj.weight": ("BF16", (64, 128))}]), dequantizing())
    assert [problem.kind for problem in plan.problems] == ["nothing-matched"]


def test_a_plan_tells_what_is_read_with_what() -> None:
    plan = build_plan(checkpoint_of([FP8 | {"lm_head.weight": ("BF16", (64, 128))}]), uniform("NVFP4A16"))
    by_name = {tensor.spec.name: tensor for tensor in plan.shards[0].tensors}
    assert by_name["m.up_proj.weight"].reason == "target `Linear`; from fp8 in blocks of 128x128"
    assert by_name["m.up_proj.weight_scale_inv"].reason == "read with its codes"
    assert by_name["m.up_proj.weight_scale_inv"].action == "part"


def ct_section(targets: list[str]) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True}
    group = {"targets": targets, "weights": weights, "format": "pack-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"g": group},
        "ignore": [],
    }


@pytest.mark.parametrize(
    ("targets", "kind"),
    [
        (["Linear"], None),
        (["re:.*up_proj$"], None),
        (["m.up_proj"], None),
        (["re:(a"], "config-invalid"),
        ([r"re:(.*)(.*)(.*)(.*)(.*)(.*)\1\2\3\4\5\6$" * 3], "source-ambiguous"),
        ([f"re:.*{number}x$" for number in range(1001)], "source-ambiguous"),
        (["re:.*other$"], "source-ambiguous"),
    ],
)
def test_patterns_of_the_source_are_matched_in_bounded_time(targets: list[str], kind: str | None) -> None:
    name = "m.up_proj" if kind is None else "m." + "up" * 400 + "_proj"
    table = {f"{name}.{param.rpartition('.')[2]}": entry for param, entry in PACKED.items()}
    found = kinds(table, ct_section(targets))
    assert kind in found if kind else found == set()


def module(**params: tuple[str, tuple[int, ...]]) -> dict[str, Any]:
    return {f"m.up_proj.{param}": entry for param, entry in params.items()}


AWQ = {"qweight": ("I32", (64, 8)), "qzeros": ("I32", (2, 8)), "scales": ("F16", (2, 64))}
NVFP4 = {"weight_packed": ("U8", (64, 32)), "weight_scale": ("F8_E4M3", (64, 4)), "weight_global_scale": ("F32", (1,))}
INT8 = {"weight": ("I8", (64, 64)), "weight_scale": ("F32", (64, 1))}
WORDS = {"weight_packed": ("I32", (64, 8)), "weight_scale": ("F32", (64, 1)), "weight_shape": ("I64", (2,))}


@pytest.mark.parametrize(
    ("params", "section", "kind"),
    [
        (AWQ, {"quant_method": "awq"}, None),
        (AWQ | {"scales": ("F16", (3, 64)), "qzeros": ("I32", (3, 8))}, None, "scale-shape"),
        (AWQ | {"qzeros": ("I32", (2, 7))}, None, "scale-shape"),
        (AWQ, {"quant_method": "awq", "version": "marlin"}, "source-unsupported"),
        (AWQ, {"quant_method": "awq", "bits": 3}, "source-unsupported"),
        (NVFP4, None, None),
        (NVFP4 | {"weight_scale": ("F8_E4M3", (64, 5))}, None, "scale-shape"),
        (NVFP4 | {"weight_global_scale": ("F32", (2,))}, None, "scale-shape"),
        (NVFP4 | {"weight_packed": ("U8", (64, 32, 1))}, None, "codes-shape"),
        (INT8, None, None),
        (INT8 | {"weight_zero_point": ("I8", (64, 2))}, None, "scale-shape"),
        (INT8 | {"weight_g_idx": ("I32", (64,)), "weight_scale": ("F32", (64, 2))}, None, None),
        (INT8 | {"weight_g_idx": ("I32", (63,))}, None, "scale-shape"),
        ({"weight": ("F8_E4M3", (64, 64)), "weight_scale": ("U8", (64, 3))}, None, "scale-shape"),
        (WORDS, ct_section(["Linear"]), None),
        (WORDS | {"weight_zero_point": ("I32", (9, 1))}, ct_section(["Linear"]), "scale-shape"),
        (WORDS | {"weight_g_idx": ("I32", (3,))}, ct_section(["Linear"]), "scale-shape"),
        ({"qweight": ("I32", (16, 64)), "scales": ("F16", (2, 64))}, {"quant_method": "gptq", "bits": 4}, None),
        ({"qweight": ("I32", (16, 64)), "scales": ("F16", (3, 64))}, {"bits": 4}, "scale-shape"),
        ({"qweight": ("I32", (16, 64)), "scales": ("F16", (2, 64))}, {"bits": 3}, "codes-shape"),
        (
            {"qweight": ("I32", (16, 64)), "scales": ("F16", (2, 64)), "qzeros": ("I32", (2, 7))},
            {"bits": 4},
            "scale-shape",
        ),
    ],
)
def test_shapes_must_go_together(params: Any, section: dict[str, Any] | None, kind: str | None) -> None:
    found = kinds(module(**params), section)
    assert kind in found if kind else found == set()


def test_groups_that_do_not_fill_whole_words_are_told_by_the_scale() -> None:
    section = ct_section(["Linear"])
    section["config_groups"]["g"]["weights"] |= {"strategy": "group", "group_size": 20}
    ragged = WORDS | {"weight_scale": ("F32", (64, 3))}
    assert kinds(module(**ragged), section) == set()
    section["config_groups"]["g"]["weights"] |= {"group_size": 32}
    assert kinds(module(**ragged), section) == {"codes-shape"}


@pytest.mark.parametrize("entry", ["x", {"weights": 1, "targets": ["Linear"]}, {}])
def test_groups_that_are_none_are_problems(entry: Any) -> None:
    section = ct_section(["Linear"])
    section["config_groups"] = {"g": entry}
    assert "config-invalid" in kinds(module(**WORDS), section)


def test_an_expert_stack_needs_a_name_of_one() -> None:
    table = {"m.other_blocks": ("U8", (2, 64, 3, 16)), "m.other_scales": ("U8", (2, 64, 3))}
    assert kinds(table) == set()


@pytest.mark.parametrize(
    ("params", "label"),
    [
        ({"weight": ("F8_E4M3", (64, 128)), "weight_scale": ("F32", (64, 1))}, "FP8_DYNAMIC"),
        ({"weight": ("F8_E4M3", (64, 128)), "weight_scale": ("F32", ())}, "float8 tensor"),
        ({"weight": ("F8_E4M3", (64, 128)), "weight_scale": ("U8", (64, 4))}, "MXFP8"),
        ({"weight": ("F8_E4M3", (256, 128)), "weight_scale_inv": ("F32", (2, 1))}, "FP8_BLOCK"),
        ({"weight": ("F8_E4M3", (64, 128)), "weight_scale": ("F32", (64, 2))}, None),
        ({"weight_packed": ("U8", (64, 64)), "weight_scale": ("U8", (64, 4))}, "MXFP4A16"),
        (NVFP4, "NVFP4A16"),
        (AWQ, "int4 group 32 asymmetric"),
        (INT8, None),
    ],
)
def test_what_is_left_alone_is_written_in_the_scheme_of_its_codes(params: Any, label: str | None) -> None:
    table = {"m.q_proj.weight": ("BF16", (64, 128)), **module(**params)}
    plan = build_plan(checkpoint_of([table]), uniform("W8A8", ignore="m.up_proj"))
    assert check_plan(plan) == []
    codes = next(t for t in plan.shards[0].tensors if t.decode is not None)
    assert codes.action == ("quantize" if label else "dequantize")
    assert not label or plan.shards[0].schemes[codes.scheme].label == label
