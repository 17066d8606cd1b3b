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


def kinds(table: dict[str, Any], section: dict[str, Any] | None = None) -> set[str]:
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
    ],
)  # fmt: skip
def test_each_defect_has_its_kind(table: dict[str, Any], section: dict[str, Any] | None, kind: str | None) -> None:
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
    assert by_name["m.up_proj.weight_scale_inv"].reason == "read with `m.up_proj.weight`"
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
