"""Budgets as values: how they are read, what is chosen for together, and how a choice is written down."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml

from shardmill.core.budget import (
    BYTES,
    DEFAULT_CANDIDATES,
    OVERALL,
    QUANTIZED,
    Budget,
    Measured,
    Solution,
    frame_of,
    items_of,
    measured,
    parse_budget,
    parse_candidates,
    solve,
    together,
)
from shardmill.core.budget_recipe import (
    differences,
    recipe_of,
    render_solution,
    size_line,
    solution_document,
    write_recipe,
)
from shardmill.core.header import ShardHeader, TensorSpec
from shardmill.core.plan import Checkpoint, Plan, SourceShard
from shardmill.core.planner import build_plan
from shardmill.core.receipt import WeightRecord
from shardmill.core.recipe import Group, Recipe, parse_recipe, uniform
from shardmill.core.scheme import PRESETS, Scheme, Search, parse_scheme
from shardmill.core.statistics import Statistics
from shardmill.errors import RecipeInvalid, Refused

Shapes = dict[str, tuple[int, ...]]


def checkpoint(shapes: Shapes, config: str = "{}") -> Checkpoint:
    specs, end = [], 0
    for name, shape in shapes.items():
        size = 2
        for extent in shape:
            size *= extent
        specs.append(TensorSpec(name, "BF16", shape, end, end + size))
        end += size
    shard = SourceShard("model.safetensors", end + 1000, ShardHeader(tuple(specs), (), 1000))
    return Checkpoint(shards=(shard,), index=None, config_text=config)


def plan_of(shapes: Shapes, scheme: Scheme, **options: Any) -> Plan:
    return build_plan(checkpoint(shapes), uniform(scheme, **options))


ERRORS = {3: 1.0, 4: 0.25, 5: 0.06, 6: 0.015, 8: 0.001}


def measure(shapes: Shapes, scheme: Scheme, **options: Any) -> Measured:
    """Errors by bits and by layer: later layers matter more."""
    plan = plan_of(shapes, scheme, **options)
    units = [unit for shard in plan.shards for unit in shard.units() if unit.scheme is not None]
    records = []
    for number, unit in enumerate(units, 1):
        count = unit.rows * unit.cols
        error = ERRORS[scheme.weights.num_bits] * number * count
        records.append(
            WeightRecord(unit.module, scheme.label, Statistics(count=count, squared_error=error, squared_weight=count))
        )
    return measured(plan, scheme, records)


def solved(shapes: Shapes, budget: Budget, *names: str, **options: Any) -> tuple[Solution, Recipe, Plan]:
    schemes = parse_candidates(names or ("W4A16:64", "W8A16:64"))
    rows = [measure(shapes, scheme, **options) for scheme in schemes]
    plan = plan_of(shapes, schemes[0], **options)
    items = items_of(rows)
    changing = {tensor for row in rows for tensor in row.tensors.values()}
    solution = solve(schemes, items, budget, frame_of(plan, changing, 100))
    base = uniform(schemes[0], **options)
    recipe = recipe_of(solution, plan, base)
    return solution, recipe, build_plan(checkpoint(shapes), recipe)


def llama(layers: int = 4) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (32, 128)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{leaf}_proj.weight": (64, 128) for leaf in "qkvo"}
        shapes |= {f"{prefix}.mlp.{leaf}_proj.weight": (128, 128) for leaf in ("gate", "up", "down")}
        shapes |= {f"{prefix}.input_layernorm.weight": (128,), f"{prefix}.mlp.gate.weight": (8, 128)}
    return shapes


def experts(layers: int = 2, count: int = 3) -> Shapes:
    shapes: Shapes = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for expert in range(count):
            shapes |= {f"{prefix}.mlp.experts.{expert}.{leaf}.weight": (64, 64) for leaf in ("w1", "w2", "w3")}
    return shapes | {f"model.layers.{layer}.self_attn.o_proj.weight": (64, 64) for layer in range(layers)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4.5bpw", Budget(4.5, OVERALL)),
        (" 4 bpw-quantized", Budget(4.0, QUANTIZED)),
        ("12GB", Budget(12e9, BYTES)),
        ("0.5 kB", Budget(500.0, BYTES)),
        ("7B", Budget(7.0, BYTES)),
    ],
)
def test_budgets_are_read(text: str, expected: Budget) -> None:
    assert parse_budget(text) == expected


@pytest.mark.parametrize("text", ["", "4.5", "bpw", "-4bpw", "0bpw", "4,5bpw", "12GiB", "1e3B", "٤bpw", "4.5bpw more"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(RecipeInvalid, match="number and a unit"):
        parse_budget(text)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["W4A16"], "two candidates"),
        (["W4A16", "FP8"], "calibration data"),
        (["W4A16", "W4A16:128"], "stands twice"),
        (["W4A16:0", "W8A16"], "group size"),
        (["NVFP4A16:32", "W8A16"], "does not fit"),
    ],
)
def test_candidates_that_cannot_be_taken_are_refused(names: list[str], says: str) -> None:
    with pytest.raises(RecipeInvalid, match=says):
        parse_candidates(names)


def test_a_group_size_is_for_candidates_that_have_a_choice() -> None:
    found = parse_candidates([*DEFAULT_CANDIDATES, "W4A16:32"], 64)
    assert [scheme.weights.group_size for scheme in found] == [16, 64, None, 64, 32]


def test_experts_of_a_layer_are_chosen_for_together() -> None:
    modules = [name.removesuffix(".weight") for name in experts()]
    groups = together(modules)
    assert [len(group) for group in groups] == [9, 9, 1, 1]
    assert {module for group in groups for module in group} == set(modules)


@pytest.mark.parametrize("shapes", [llama(), experts()], ids=["llama", "experts"])
@pytest.mark.parametrize("bits", [4.5, 5.0, 6.5, 7.7])
def test_a_plan_of_the_recipe_does_what_was_chosen(shapes: Shapes, bits: float) -> None:
    solution, recipe, plan = solved(shapes, Budget(bits, QUANTIZED))
    assert not plan.problems
    assert not differences(solution, plan)
    assert solution.quantized_bits_per_weight <= bits
    sizes = plan.shards[0].sizes()
    assert (sizes.quantized_bytes, sizes.quantized_weights) == (solution.quantized_bytes, solution.quantized_elements)
    assert sizes.copied_bytes == solution.frame.fixed_bytes
    assert sizes.quantized_weights + sizes.copied_weights == solution.frame.elements
    assert len(recipe.groups) == 2


def stacks(layers: int = 2) -> Shapes:
    return {
        f"model.layers.{layer}.mlp.experts.{leaf}": shape
        for layer in range(layers)
        for leaf, shape in (("gate_up_proj", (3, 128, 64)), ("down_proj", (3, 64, 64)))
    } | {"model.layers.1.mlp.experts_norm.weight": (64,)}


def test_fused_stacks_are_chosen_for_expert_by_expert_and_named_so() -> None:
    solution, recipe, plan = solved(stacks(), Budget(6.5, QUANTIZED), expert_layout="rows")
    assert not plan.problems
    assert not differences(solution, plan)
    assert [len(item.modules) for item in solution.items] == [9, 9]
    assert {pattern for group in recipe.groups for pattern in group.targets} >= {
        r"re:.*(^|\.)layers\.(0)\.mlp\.experts\.(0|1|2)\.up_proj$"
    }


def test_parts_of_a_weight_that_is_quantized_already_count_with_it() -> None:
    config = '{"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}'
    specs = [
        TensorSpec("a.weight", "F8_E4M3", (64, 64), 0, 4096),
        TensorSpec("a.weight_scale_inv", "F32", (1, 1), 4096, 4100),
        TensorSpec("norm.weight", "BF16", (6,), 4100, 4112),
    ]
    shard = SourceShard("model.safetensors", 5112, ShardHeader(tuple(specs), (), 1000))
    source = Checkpoint(shards=(shard,), index=None, config_text=config)
    plan = build_plan(source, uniform("FP8_DYNAMIC"))
    found = frame_of(plan, {"a.weight"})
    assert not plan.problems
    assert (found.fixed_bytes, found.elements) == (12, 64 * 64 + 6)


def test_what_matters_more_gets_more_bits() -> None:
    solution, _, _ = solved(llama(), Budget(6, QUANTIZED))
    chosen = solution.scheme_of
    assert chosen["model.layers.3.mlp.down_proj"] == 1
    assert chosen["model.layers.0.self_attn.o_proj"] == 0


def test_importance_decides_where_it_is_known() -> None:
    rows = [measure(llama(), scheme) for scheme in parse_candidates(["W4A16:64", "W8A16:64"])]
    weights = {module: 1000.0 if ".layers.0." in module else 1.0 for module in rows[0].sizes}
    [plain, weighed] = [items_of(rows, importance=given) for given in (None, weights)]
    ratio = [new.options[0].cost / old.options[0].cost for old, new in zip(plain, weighed, strict=True)]
    assert {round(value) for value in ratio} == {1, 1000}


def test_differences_are_found() -> None:
    solution, recipe, _ = solved(llama(), Budget(6, QUANTIZED))
    other = replace(recipe, groups=tuple(reversed(recipe.groups)))
    assert set(differences(solution, build_plan(checkpoint(llama()), other))) == set(solution.scheme_of)
    more = replace(recipe, groups=(Group(targets=(*recipe.groups[0].targets, "model.embed_tokens"), scheme=recipe.groups[0].scheme), recipe.groups[1]))  # fmt: skip  # noqa: E501
    assert differences(solution, build_plan(checkpoint(llama()), more)) == ["model.embed_tokens"]


@pytest.mark.parametrize(
    ("budget", "reach"),
    [
        (Budget(3, QUANTIZED), "4.261 bpw-quantized to 8.261 bpw-quantized"),
        (Budget(4, OVERALL), "bpw to "),
        (Budget(10_000, BYTES), "bytes to "),
    ],
)
def test_what_cannot_be_reached_is_told(budget: Budget, reach: str) -> None:
    with pytest.raises(Refused, match="cannot be met") as refusal:
        solved(llama(), budget)
    assert reach in str(refusal.value)


def test_nothing_to_choose_for_is_refused() -> None:
    with pytest.raises(Refused, match="nothing to quantize"):
        solved({"model.norm.weight": (8,)}, Budget(4, QUANTIZED))


def test_a_candidate_that_does_not_fit_a_partner_fits_none() -> None:
    rows = [measure(llama(1), scheme) for scheme in parse_candidates(["W4A16:64", "W8A16:64"])]
    module = "model.layers.0.self_attn.k_proj"
    rows[0] = replace(rows[0], statistics={k: v for k, v in rows[0].statistics.items() if k != module})
    by_first = {item.modules[0]: item.candidates for item in items_of(rows)}
    assert by_first["model.layers.0.self_attn.q_proj"] == (1,)
    assert by_first["model.layers.0.mlp.down_proj"] == (0, 1)
    rows[1] = replace(rows[1], statistics={k: v for k, v in rows[1].statistics.items() if k != module})
    assert "model.layers.0.self_attn.q_proj" not in {item.modules[0] for item in items_of(rows)}


CUSTOM = {"weights": {"num_bits": 5, "type": "int", "strategy": "channel", "symmetric": True}}


@pytest.mark.parametrize("search", [None, Search(), Search(norm=2.5, importance_file="it's here.safetensors")])
@pytest.mark.parametrize("options", [{}, {"ignore": ["it's", "é"], "indivisible": "copy", "allow_nonfinite": True}])
def test_the_file_is_the_recipe(search: Search | None, options: dict[str, Any]) -> None:
    solution, recipe, _ = solved(llama(), Budget(6, QUANTIZED), **options)
    schemes = (parse_scheme(CUSTOM), PRESETS["W8A16"], PRESETS["FP8_DYNAMIC"])
    for scheme in schemes:
        first = replace(recipe.groups[0], scheme=scheme)
        changed = replace(recipe, groups=tuple(replace(g, scheme=replace(g.scheme, search=search)) for g in (first, recipe.groups[1])))  # fmt: skip  # noqa: E501
        text = write_recipe(changed, solution)
        read = parse_recipe(yaml.safe_load(text))
        assert read == changed
        files = [found.importance_file for group in read.groups if (found := group.scheme.search)]
        assert set(files) == ({search.importance_file} if search else set())


def test_people_and_machines_are_told() -> None:
    solution, recipe, _ = solved(llama(), Budget(1e6, BYTES))
    lines = list(render_solution(solution))
    assert lines[0] == "budget 1,000,000 bytes (1.0 MB)"
    assert lines[1] == size_line(solution)
    assert lines[3] == "  int4 group 64: 0 modules, 0 weights, 0 bytes, 0.0% of the error"
    assert lines[4].endswith("100.0% of the error")
    document = solution_document(solution)
    assert sum(row["bytes"] for row in document["layers"]) == solution.quantized_bytes
    assert document["error"] >= document["error_bound"]
    comments = [line for line in write_recipe(recipe, solution).splitlines() if line.lstrip().startswith("#")]
    assert any("4 of k_proj, q_proj, v_proj: " in line for line in comments)


def test_no_error_at_all_is_no_division() -> None:
    solution, _, _ = solved(llama(1), Budget(6, QUANTIZED))
    exact = replace(solution, cost=0.0, bound=0.0)
    assert "summed error 0, at most 0.00%" in "\n".join(render_solution(exact))
