from __future__ import annotations

import pytest

from shardmill.core.checks import check_plan
from shardmill.core.experts import Sizes, choose_layout, parse_stack, read_sizes
from shardmill.core.plan import COPY, SPLIT, Plan
from shardmill.core.planner import build_plan
from shardmill.core.recipe import uniform
from strategies import checkpoint_of

E, I, H = 4, 96, 64  # noqa: E741  the letters of the formulas
ROWS: dict[str, tuple[int, ...]] = {"gate_up_proj": (E, 2 * I, H), "down_proj": (E, H, I)}
COLUMNS: dict[str, tuple[int, ...]] = {"gate_up_proj": (E, H, 2 * I), "down_proj": (E, I, H)}


def sizes(model: str, *, hidden: int = H, width: int = I) -> Sizes:
    return read_sizes({"model_type": model, "hidden_size": hidden, "moe_intermediate_size": width})


@pytest.mark.parametrize(
    ("model", "shapes", "expected"),
    [
        ("qwen3_moe", ROWS, "rows"),
        ("brand_new", ROWS, "rows"),
        ("qwen3_moe", COLUMNS, None),
        ("llama4", COLUMNS, "columns"),
        ("gpt_oss", COLUMNS, "interleaved"),
        ("brand_new", COLUMNS, None),
        ("qwen3_vl_moe", ROWS, "rows"),
        ("qwen3_vl_moe", COLUMNS, "columns"),
        ("qwen3_moe", {"gate_up_proj": (E, 7, 9)}, None),
    ],
)
def test_layout_follows_from_config_and_shapes(
    model: str, shapes: dict[str, tuple[int, ...]], expected: str | None
) -> None:
    assert choose_layout(shapes, sizes(model)) == expected


def test_where_both_axes_fit_only_the_architecture_decides() -> None:
    both = {"gate_up_proj": (E, 128, 128)}
    assert choose_layout(both, sizes("qwen3_moe", hidden=128, width=64)) == "rows"
    assert choose_layout(both, sizes("llama4", hidden=128, width=64)) == "columns"
    assert choose_layout(both, sizes("brand_new", hidden=128, width=64)) is None
    assert choose_layout(both, sizes("qwen3_vl_moe", hidden=128, width=64)) is None


def test_the_down_stack_tells_where_gate_and_up_do_not() -> None:
    shapes = {"gate_up_proj": (E, 128, 128), "down_proj": (E, 64, 128)}
    assert choose_layout(shapes, sizes("qwen3_vl_moe", hidden=128, width=64)) == "columns"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("m.experts.gate_up_proj_blocks", (2, 4, 3, 16)),
        ("m.experts.gate_up_proj_scales", (2, 4, 3)),
        ("m.down_proj.weight", (2, 4, 3)),
        ("m.experts.gate_up_proj", (4, 3)),
        ("m.experts.0.gate_up_proj", (2, 4, 3)),
        ("m.experts.my_down_proj", (2, 4, 3)),
    ],
)
def test_names_that_only_resemble_a_stack_are_none(name: str, shape: tuple[int, ...]) -> None:
    assert parse_stack(name, shape) is None


def stacked_plan(config: dict[str, object], shapes: dict[str, tuple[int, ...]], **options: object) -> Plan:
    table = {f"model.layers.0.mlp.experts.{leaf}": ("BF16", shape) for leaf, shape in shapes.items()}
    table["model.layers.0.self_attn.o_proj.weight"] = ("BF16", (H, H))
    return build_plan(checkpoint_of([table], config), uniform("MXFP4A16", **options))  # type: ignore[arg-type]


CONFIG: dict[str, object] = {"model_type": "qwen3_moe", "hidden_size": H, "moe_intermediate_size": I}


def test_a_split_stack_becomes_two_dimensional_experts() -> None:
    plan = stacked_plan(CONFIG, ROWS)
    names = {unit.module for shard in plan.shards for unit in shard.units() if "experts" in unit.module}
    prefix = "model.layers.0.mlp.experts"
    assert names == {f"{prefix}.{e}.{half}" for e in range(E) for half in ("gate_proj", "up_proj", "down_proj")}
    assert check_plan(plan) == []


def test_an_unknown_layout_is_a_problem_that_names_the_way_out() -> None:
    plan = stacked_plan(CONFIG | {"model_type": "brand_new"}, COLUMNS)
    assert {problem.kind for problem in plan.problems} == {"expert-layout"}
    assert "expert_layout" in plan.problems[0].way_out
    assert stacked_plan(CONFIG | {"model_type": "brand_new"}, COLUMNS, expert_layout="columns").problems == ()


def test_an_ignored_stack_stays_whole_and_is_named_for_engines() -> None:
    plan = stacked_plan(CONFIG, ROWS, ignore=["re:.*experts.*"])
    actions = {t.spec.name: t.action for t in plan.shards[0].tensors}
    assert actions["model.layers.0.mlp.experts.gate_up_proj"] == COPY
    assert "model.layers.0.mlp.experts.0.gate_proj" in plan.ignore


def test_experts_that_are_treated_differently_are_refused() -> None:
    plan = stacked_plan(CONFIG, ROWS, ignore=[r"re:.*experts\.2\..*"])
    assert "experts-differ" in {problem.kind for problem in plan.problems}


def test_biases_of_a_stack_are_split_with_it() -> None:
    shapes = COLUMNS | {"gate_up_proj_bias": (E, 2 * I), "down_proj_bias": (E, H)}
    plan = stacked_plan(CONFIG | {"model_type": "gpt_oss"}, shapes)
    assert {t.action for t in plan.shards[0].tensors if "experts" in t.spec.name} == {SPLIT}
    bias = next(u for u in plan.shards[0].units() if u.outputs[0].name.endswith("experts.1.up_proj.bias"))
    assert (bias.rows, bias.step, bias.first, bias.outputs[0].shape) == (I, 2, 1, (I,))


def test_an_odd_stack_is_refused() -> None:
    plan = stacked_plan(CONFIG, {"gate_up_proj": (E, 33, H)}, expert_layout="rows")
    assert {problem.kind for problem in check_plan(plan)} == {"expert-layout"}
