"""Figures of a report: nothing is counted twice, and every weight is somewhere."""

from __future__ import annotations

import math

import pytest

from shardmill.core.digest import Digest
from shardmill.core.manifest import Manifest, ManifestShard, TensorDecision, Totals
from shardmill.core.parts import part_of
from shardmill.core.receipt import WeightRecord
from shardmill.core.recipe import parse_recipe, recipe_to_json, uniform
from shardmill.core.report import Origin, WrittenTensor, build_report, tensor_rows
from shardmill.core.reproduce import run_command
from shardmill.core.statistics import Statistics

EXPERT = "model.layers.{}.mlp.experts.{}.up_proj"


def found(error: float = 0.1, count: int = 8, **more: int) -> Statistics:
    return Statistics(count=count, squared_error=error**2, squared_weight=1.0, nonzero=count, **more)


def a_manifest(weights: dict[str, Statistics], copied: tuple[str, ...] = ()) -> Manifest:
    shard = ManifestShard(
        name="model.safetensors",
        key="k",
        size=4,
        digest=Digest("blake3", "0" * 64),
        tensors=(
            *(TensorDecision(name=f"{m}.weight", action="quantize", reason="r", scheme="W4A16") for m in weights),
            *(TensorDecision(name=name, action="copy", reason="r") for name in copied),
        ),
        weights=tuple(WeightRecord(module, "W4A16", statistics) for module, statistics in weights.items()),
    )
    totals = Totals(
        source_bytes=8, output_bytes=4, quantized_weights=2, quantized_bytes=2, copied_weights=1, copied_bytes=2
    )
    return Manifest(plan="p", recipe=uniform("W4A16"), files=(), warnings=(), totals=totals, shards=(shard,))


def test_parts_add_up_codes_and_scales_to_the_bits_of_a_weight() -> None:
    manifest = a_manifest({"model.layers.0.mlp.up_proj": found(count=64)}, ("model.norm.weight", "lm_head.weight"))
    written = [
        WrittenTensor("model.layers.0.mlp.up_proj.weight_packed", (8, 1), 32),
        WrittenTensor("model.layers.0.mlp.up_proj.weight_scale", (8, 1), 16),
        WrittenTensor("model.layers.0.mlp.up_proj.bias", (16,), 32),
        WrittenTensor("lm_head.weight", (4, 4), 32),
        WrittenTensor("model.norm.weight", (4,), 8),
    ]

    report = build_report(manifest, Origin(), written)

    parts = {part.name: (part.tensors, part.quantized, part.elements, part.nbytes) for part in report.parts}
    assert parts == {"feed-forward": (1, 1, 80, 80), "head": (1, 0, 16, 32), "norm": (1, 0, 4, 8)}
    assert [part.name for part in report.parts] == ["feed-forward", "head", "norm"]
    assert report.parts[0].bits_per_weight == 8.0


def test_without_headers_parts_have_no_sizes() -> None:
    [part] = build_report(a_manifest({"model.layers.0.mlp.up_proj": found()})).parts
    assert (part.nbytes, part.elements, part.bits_per_weight) == (None, None, None)


def test_experts_are_one_module_of_their_layer_and_a_row_of_their_own() -> None:
    weights = {EXPERT.format(layer, expert): found(0.1 * (1 + expert)) for layer in (0, 3) for expert in (0, 1, 7)}
    weights["lm_head"] = found(0.9)

    report = build_report(a_manifest(weights))

    [stack] = report.stacks
    assert (stack.layers, stack.modules, stack.experts) == ((0, 3), ("mlp.experts.*.up_proj",), (0, 1, 7))
    assert stack.cells[0, "mlp.experts.*.up_proj"].count == 24
    assert stack.expert_cells[3, 7].relative_error == pytest.approx(0.8)
    assert stack.worst == {0: pytest.approx(0.8), 3: pytest.approx(0.8)}
    assert stack.totals[3].count == 24
    assert report.worst[0].module == "lm_head"
    assert report.statistics.count == 56


def test_an_error_that_is_no_number_is_the_worst() -> None:
    weights = {"model.layers.0.a": found(0.5), "model.layers.0.b": found(math.nan)}
    report = build_report(a_manifest(weights))
    assert report.worst[0].module == "model.layers.0.b"
    assert report.stacks[0].worst[0] == math.inf


def test_rows_hold_every_weight_and_every_copied_tensor() -> None:
    weights = {EXPERT.format(2, 5): found(clipped=1), "lm_head": found(0.0)}
    rows = list(tensor_rows(build_report(a_manifest(weights, ("model.norm.weight",)))))

    assert [row["name"] for row in rows] == [*weights, "model.norm.weight"]
    assert (rows[0]["layer"], rows[0]["expert"], rows[0]["part"], rows[0]["clipped"]) == (2, 5, "experts", 1)
    assert rows[1]["sqnr_db"] is None  # no error at all: infinite
    assert (rows[2]["count"], rows[2]["action"], rows[2]["reason"]) == (None, "copy", "r")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.0.mlp.shared_expert.up_proj", "shared experts"),
        ("model.layers.0.block_sparse_moe.experts.1.w2", "experts"),
        ("model.layers.0.mlp.gate", "router"),
        ("backbone.layers.0.mixer.in_proj", "state space"),
        ("transformer.h.0.attn.c_proj", "attention"),
    ],
)
def test_parts_are_told_by_name(name: str, part: str) -> None:
    assert part_of(name) == part


@pytest.mark.parametrize(
    ("recipe", "command"),
    [
        ({"scheme": "W4A16", "group_size": 64}, "shardmill run SRC DST --scheme W4A16 --group-size 64"),
        (
            {"scheme": "FP8_DYNAMIC", "ignore": ["re:.*a b$"], "partial_fused": True, "indivisible": "copy"},
            "shardmill run SRC DST --scheme FP8_DYNAMIC --ignore 're:.*a b$' --indivisible copy --partial-fused",
        ),
        (
            {"scheme": "NVFP4A16", "default_ignores": False, "expert_layout": "rows", "allow_nonfinite": True},
            "shardmill run SRC DST --scheme NVFP4A16 --no-default-ignores --expert-layout rows --allow-nonfinite",
        ),
        ({"scheme": "MXFP4A16", "search": "mse"}, "shardmill run SRC DST --scheme MXFP4A16 --search mse"),
        (
            {"scheme": "W4A16", "group_size": 64, "search": {"kind": "mse", "norm": 2.5}},
            "shardmill run SRC DST --scheme W4A16 --group-size 64 --search mse --search-norm 2.5",
        ),
        ({"scheme": "W8A16", "targets": "re:.*mlp"}, "shardmill run SRC DST --recipe recipe.json"),
        ({"groups": [{"scheme": "W8A16"}, {"scheme": "MXFP4"}]}, "shardmill run SRC DST --recipe recipe.json"),
        ({"scheme": {"weights": {"num_bits": 3, "strategy": "channel"}}},
         "shardmill run SRC DST --recipe recipe.json"),
    ],
)  # fmt: skip
def test_the_command_asks_for_the_recipe_of_the_manifest(recipe: dict[str, object], command: str) -> None:
    assert run_command(parse_recipe(recipe_to_json(parse_recipe(recipe))), "SRC", "DST") == command
