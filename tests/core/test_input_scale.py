"""Where the global scale of activations comes from: policies, their numbers, and what they are part of."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmill.core.budget import parse_candidates
from shardmill.core.input_scale import (
    InputScale,
    global_scale_of,
    is_sound,
    parse_input_scale,
    reciprocal,
    scales_digest,
    shared_scales,
    to_float32,
    told_policies,
)
from shardmill.core.plan import Plan, made_of
from shardmill.core.planner import build_plan
from shardmill.core.recipe import parse_recipe, recipe_to_json, uniform
from shardmill.core.reproduce import run_command
from shardmill.core.scheme import group_entry
from shardmill.core.summary import render, summarize_plan, summary_document
from shardmill.errors import RecipeInvalid
from strategies import checkpoint_of, llama_table

SOURCE = checkpoint_of([llama_table()])
DONOR = "donor:/models/calibrated"


def plan_of(policy: str, **more: Any) -> Plan:
    return build_plan(SOURCE, uniform("NVFP4", input_scale=policy, **more))


# ---- numbers ----------------------------------------------------------------------------------------------------


def test_a_constant_becomes_the_reach_of_both_dtypes_over_it() -> None:
    assert [parse_input_scale(f"constant:{v}").constant for v in ("1", "6", "2688")] == [2688.0, 448.0, 1.0]
    assert parse_input_scale("constant:1e3").constant == pytest.approx(2.688)
    assert parse_input_scale(DONOR).constant is None


@given(st.floats(min_value=2.0**-100, max_value=2.0**100, width=32))
def test_conventions_are_reciprocals_within_rounding(amax: float) -> None:
    scale = global_scale_of(amax)
    assert to_float32(scale) == scale
    assert scale == pytest.approx(2688 / amax, rel=2.0**-22)
    assert reciprocal(reciprocal(scale)) == pytest.approx(scale, rel=2.0**-22)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, 2.0**-127, 2.0**127])
def test_scales_that_engines_cannot_divide_by_are_unsound(value: float) -> None:
    assert not is_sound(value)


def test_a_fused_set_gets_the_scale_that_covers_its_largest_activation() -> None:
    scales = {f"l.self_attn.{leaf}_proj": value for leaf, value in zip("qkvo", (8.0, 2.0, 4.0, 9.0), strict=True)}
    scales |= {"l.mlp.experts.0.gate_proj": 1.0, "l.mlp.experts.0.up_proj": 3.0, "l.mlp.experts.1.up_proj": 5.0}
    scales |= {"m.q_a_proj": 7.0, "m.kv_a_proj_with_mqa": 6.0}
    assert shared_scales(scales) == scales | {
        **dict.fromkeys((f"l.self_attn.{leaf}_proj" for leaf in "qkv"), 2.0),
        **dict.fromkeys(("l.mlp.experts.0.gate_proj", "l.mlp.experts.0.up_proj"), 1.0),
        **dict.fromkeys(("m.q_a_proj", "m.kv_a_proj_with_mqa"), 6.0),
    }
    assert shared_scales(shared_scales(scales)) == shared_scales(scales)


# ---- policies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        *("", "6", "constant", "constant:", "constant:six", "constant:0", "constant:-1", "constant:nan"),
        *("constant:inf", "constant:1e39", "constant:1e-40", "constant: 6", "constant:1_0", "donor", "donor:", 6),
        *(None, [], {"kind": "constant"}, {"kind": "constant", "amax": True}, {"kind": "donor", "digest": 1}),
        *({"kind": "other"}, {"kind": "constant", "amax": 6, "colour": 1}, {"kind": "constant", "amax": "6"}),
    ],
)
def test_what_is_no_policy_is_refused_with_those_there_are(value: Any) -> None:
    with pytest.raises(RecipeInvalid) as caught:
        parse_input_scale(value)
    (problem,) = caught.value.problems
    assert problem.kind == "input-scale"
    assert "constant:V" in problem.way_out
    assert "donor:LOCATION" in problem.way_out


@pytest.mark.parametrize("policy", ["constant:6", DONOR])
def test_a_policy_survives_json_but_for_the_place_of_a_donor(policy: str) -> None:
    found = replace(parse_input_scale(policy), digest="sha256:00" if policy == DONOR else "")
    assert parse_input_scale(found.to_json()) == found
    assert "calibrated" not in str(found.to_json())


def test_nvfp4_without_a_policy_is_refused_with_both_ways_out() -> None:
    for data in ({"scheme": "NVFP4"}, {"groups": [{"scheme": "W4A16", "targets": ["a"]}, {"scheme": "nvfp4"}]}):
        with pytest.raises(RecipeInvalid) as caught:
            parse_recipe(data)
        assert all(way in str(caught.value) for way in ("constant:V", "donor:LOCATION", "NVFP4A16"))
        assert len(str(caught.value.problems[0])) < 300


@pytest.mark.parametrize(
    "data",
    [
        {"scheme": "W4A16", "input_scale": "constant:6"},
        {"groups": [{"scheme": "NVFP4A16", "input_scale": "constant:6"}]},
        {"groups": [{"scheme": "W4A16"}], "input_scale": "constant:6"},
    ],
)
def test_a_policy_for_nothing_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(RecipeInvalid, match="NVFP4"):
        parse_recipe(data)


def test_groups_have_policies_of_their_own() -> None:
    own = {"scheme": "NVFP4", "targets": ["re:.*mlp"], "input_scale": "constant:100"}
    recipe = parse_recipe({"groups": [own, {"scheme": "NVFP4", "targets": ["re:.*attn"]}, {"scheme": "FP8_DYNAMIC"}],
                           "input_scale": DONOR})  # fmt: skip
    policies = [group.scheme.input_scale for group in recipe.groups]
    assert policies == [InputScale(kind="constant", amax=100.0), InputScale(kind="donor"), None]
    assert parse_recipe(recipe_to_json(recipe)) == recipe
    assert len(told_policies(policies)) == 2


def test_a_budget_does_not_choose_by_what_it_does_not_measure() -> None:
    with pytest.raises(RecipeInvalid, match="only errors of weights are measured"):
        parse_candidates(["NVFP4", "W4A16"])


# ---- plans ------------------------------------------------------------------------------------------------------


def test_what_a_loader_reads_says_nothing_of_a_policy() -> None:
    scheme = uniform("NVFP4", input_scale="constant:6").groups[0].scheme
    assert "input_scale" not in group_entry(scheme)
    assert group_entry(scheme)["input_activations"]["dynamic"] == "local"


def test_every_weight_takes_four_bytes_more_and_a_name() -> None:
    with_scales, without = (
        build_plan(SOURCE, recipe).shards[0]
        for recipe in (uniform("NVFP4", input_scale="constant:6"), uniform("NVFP4A16"))
    )
    names = [placed.spec for placed in with_scales.layout().placed if placed.spec.param == "input_global_scale"]
    assert {(spec.dtype, spec.shape) for spec in names} == {("F32", (1,))}
    assert len(names) == 14
    assert with_scales.sizes().quantized_bytes - without.sizes().quantized_bytes == 4 * len(names)


def test_the_number_is_in_the_key_and_the_place_of_a_donor_is_not() -> None:
    shards = [plan_of(policy).shards[0] for policy in ("constant:6", "constant:7", "donor:/a", "donor:/b")]
    assert len({shard.shape() for shard in shards}) == len({shard.outline() for shard in shards}) == 3
    assert shards[2].shape() == shards[3].shape()
    donated = [replace(shards[2], input_scales=(("m", value),)) for value in (1.0, 2.0, 2.0)]
    for name in (lambda shard: shard.shape(), lambda shard: shard.outline()):
        first, second, third = map(name, donated)
        assert (first != second, second == third) == (True, True)
    digests = [scales_digest({"a": 1.0}), scales_digest({"a": 2.0})]
    recipes = [
        replace(plan.recipe, groups=(replace(group, scheme=replace(group.scheme, input_scale=policy)),))
        for plan in [plan_of(DONOR)]
        for group in plan.recipe.groups
        for policy in [InputScale(kind="donor", digest=digest) for digest in digests]
    ]
    assert len({made_of("state", recipe) for recipe in recipes}) == 2
    assert made_of("state", plan_of(DONOR).recipe) == ""


def test_people_are_told_what_was_assumed() -> None:
    summary = summarize_plan(plan_of("constant:6"))
    (line,) = summary.inputs
    assert all(word in line for word in ("assumed, not measured", "within 6", "448", "proxy"))
    assert line in render(summary)
    assert summary_document(summary)["inputs"] == [line]
    assert summarize_plan(build_plan(SOURCE, uniform("NVFP4A16"))).inputs == ()


def test_the_command_of_a_result_names_the_policy() -> None:
    command = run_command(plan_of("constant:6.5").recipe, "SRC", "DST")
    assert command == "shardmill run SRC DST --scheme NVFP4 --input-scale constant:6.5"
    assert run_command(plan_of(DONOR).recipe, "SRC", "DST").endswith("--input-scale donor:DONOR")
