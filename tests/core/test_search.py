"""What a search may try, and where a request for one is told."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from shardmill.core.plan import Plan
from shardmill.core.planner import build_plan
from shardmill.core.recipe import parse_recipe, recipe_to_json, uniform, with_search
from shardmill.core.scheme import NORMS, PRESETS, Search, WeightArgs, parse_scheme, parse_search, preset
from shardmill.core.search import INT_RATIOS, moves_of
from shardmill.errors import RecipeInvalid
from strategies import checkpoint_of

INTEGERS = [WeightArgs(num_bits=bits, symmetric=symmetric) for bits in INT_RATIOS for symmetric in (True, False)]


@pytest.mark.parametrize("args", [*INTEGERS, PRESETS["FP8_DYNAMIC"].weights], ids=repr)
def test_no_error_of_a_tried_scale_is_out_of_reach(args: WeightArgs) -> None:
    found = moves_of(args)
    steps = [1 + move.position * found.unit for move in found.moves if move.stage == 0]
    refined = sum(abs(move.position) for move in found.moves if move.stage and move.position > 0) * found.unit
    smallest = min(steps) - refined
    shift = sum(max(abs(m.shift) for m in found.moves if m.stage == s) for s in {m.stage for m in found.moves})
    top = args.code_range[1]
    span = 2 * args.code_max if not args.symmetric else args.code_max
    beyond = (span / smallest - span) / (1 if args.symmetric else 2) + (args.code_max - top if args.symmetric else 0)
    assert (beyond + shift + 1) ** 2 < found.magic


@pytest.mark.parametrize("args", [*INTEGERS, *(scheme.weights for scheme in PRESETS.values())], ids=repr)
def test_moves_come_in_stages_and_never_stand_still(args: WeightArgs) -> None:
    moves = moves_of(args).moves
    assert [move.stage for move in moves] == sorted(move.stage for move in moves)
    assert len(set(moves)) == len(moves)
    assert all(move.position or move.shift for move in moves)
    assert all(move.shift == 0 for move in moves if args.symmetric)


@pytest.mark.parametrize("search", ["none", "mse", {"kind": "mse", "norm": 3}, {"kind": "mse", "norm": 1.5}])
def test_a_search_survives_json(search: Any) -> None:
    recipe = parse_recipe({"scheme": "NVFP4A16", "search": search})
    assert parse_recipe(recipe_to_json(recipe)) == recipe
    assert recipe.groups[0].scheme.search == parse_search(search)


def test_a_group_may_choose_for_itself() -> None:
    groups = [{"targets": "a", "scheme": "W4A16", "search": "none"}, {"targets": "b", "scheme": "W4A16"}]
    found = parse_recipe({"groups": groups, "search": "mse"})
    assert [group.scheme.search for group in found.groups] == [None, Search()]


@pytest.mark.parametrize(
    ("search", "says"),
    [
        ("best", "none, mse"),
        (3, "none, mse"),
        ({"norm": 2}, "none, mse"),
        ({"kind": "mse", "steps": 3}, "steps"),
        ({"kind": "mse", "norm": 2.4}, "1.0, 1.5, 2.0"),
        ({"kind": "mse", "norm": True}, "number"),
        ({"kind": "mse", "norm": "2"}, "number"),
        ({"kind": "mse", "norm": math.nan}, "1.0, 1.5"),
    ],
)
def test_a_search_that_does_not_exist_is_refused(search: Any, says: str) -> None:
    with pytest.raises(RecipeInvalid, match=says):
        parse_recipe({"scheme": "W4A16", "search": search})


def test_one_scale_for_a_whole_weight_cannot_be_searched() -> None:
    scheme = parse_scheme({"weights": {"num_bits": 8, "strategy": "tensor"}})
    with pytest.raises(RecipeInvalid, match="strategy `tensor`"):
        with_search(uniform(scheme), Search())


def test_the_label_tells_the_search() -> None:
    assert replace(preset("W4A16"), search=Search()).label == "W4A16 mse"


def plan(search: Search | None) -> Plan:
    table = {"m.o_proj.weight": ("BF16", (32, 128))}
    return build_plan(checkpoint_of([table]), with_search(uniform("W4A16"), search))


def test_a_search_is_part_of_the_key_and_none_is_not() -> None:
    searches = [None, *(Search(norm=norm) for norm in NORMS)]
    keys = {plan(search).shards[0].shape() for search in searches}
    assert len(keys) == len(searches)
    assert "search" not in str(plan(None).shards[0].job())
    assert plan(Search()).shards[0].job()["tensors"][0][4]["search"] == {"kind": "mse", "norm": 2.0}
    assert plan(Search()).shards[0].outline() != plan(None).shards[0].outline()
