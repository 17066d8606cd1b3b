from __future__ import annotations

import pytest

from shardmill.core.matching import Matcher, PatternSet
from shardmill.core.planner import build_plan
from shardmill.core.recipe import Recipe, parse_recipe
from shardmill.errors import RecipeInvalid
from strategies import checkpoint_of, llama_table

LINEAR = {
    f"model.layers.{layer}.{leaf}"
    for layer in (0, 1)
    for leaf in (
        *(f"self_attn.{p}_proj" for p in "qkvo"),
        *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
    )
}


def quantized(recipe: Recipe) -> set[str]:
    plan = build_plan(checkpoint_of([llama_table()]), recipe)
    return {t.spec.name.removesuffix(".weight") for shard in plan.shards for t in shard.tensors if t.scheme >= 0}


def recipe(targets: object = None, ignore: object = (), *, default_ignores: bool = True) -> Recipe:
    data = {"scheme": "FP8_DYNAMIC", "ignore": ignore, "default_ignores": default_ignores}
    return parse_recipe(data | ({"targets": targets} if targets else {}))


# The table of the reference's own matching tests, by what must be quantized.
@pytest.mark.parametrize(
    ("targets", "ignore", "expected"),
    [
        (None, [], LINEAR),
        (["Linear"], [], LINEAR),
        ([], [], LINEAR),
        (["Linear"], ["re:.*self_attn.*"], {name for name in LINEAR if "self_attn" not in name}),
        (["Linear"], ["re:.*self_attn.*", "re:.*mlp.*"], set()),
        (["re:.*mlp.(gate|up)_proj"], [], {name for name in LINEAR if "gate" in name or "up" in name}),
        (["re:.*_proj$"], [], LINEAR),
        (["re:.*_proj$"], ["re:.*down_proj"], {name for name in LINEAR if "down" not in name}),
        (["model.layers.0.mlp.down_proj"], [], {"model.layers.0.mlp.down_proj"}),
        (["model.layers.0.mlp"], [], set()),
        (["re:model.layers.1"], [], {name for name in LINEAR if ".1." in name}),
        (["re:layers.1"], [], set()),
    ],
)
def test_targets_and_ignore(targets: object, ignore: object, expected: set[str]) -> None:
    assert quantized(recipe(targets, ignore)) == expected


def test_a_class_name_other_than_linear_is_a_module_name() -> None:
    plan = build_plan(checkpoint_of([llama_table()]), recipe(["LlamaMLP"]))
    kinds = {problem.kind for problem in plan.problems}
    assert kinds == {"pattern-unmatched", "nothing-matched"}


def test_without_default_ignores_everything_but_norms_of_rank_one_is_a_candidate() -> None:
    assert quantized(recipe(default_ignores=False)) == LINEAR | {"lm_head", "model.embed_tokens"}


def test_linear_in_ignore_is_only_a_module_name() -> None:
    assert quantized(recipe(ignore="Linear")) == LINEAR


def test_a_target_that_names_a_module_beats_its_default_role_and_ignore_beats_both() -> None:
    assert "lm_head" in quantized(recipe(["Linear", "lm_head"]))
    assert "lm_head" not in quantized(recipe(["Linear", "lm_head"], "lm_head"))


def test_the_first_group_that_matches_keeps_a_module() -> None:
    groups = [{"scheme": "W8A8", "targets": "re:.*down_proj"}, {"scheme": "FP8_DYNAMIC", "targets": "Linear"}]
    plan = build_plan(checkpoint_of([llama_table()]), parse_recipe({"groups": groups}))
    chosen = {t.spec.name: t.scheme for t in plan.shards[0].tensors}
    assert chosen["model.layers.0.mlp.down_proj.weight"] == 0
    assert chosen["model.layers.0.mlp.up_proj.weight"] == 1


def test_a_bare_string_is_one_pattern_and_not_its_characters() -> None:
    assert recipe(ignore="lm_head").ignore == ("lm_head",)


def test_every_pattern_that_matches_nothing_is_a_problem_but_a_tied_head() -> None:
    table = llama_table()
    del table["lm_head.weight"]
    plan = build_plan(checkpoint_of([table]), recipe(ignore=["lm_head", "lm_heat", "re:.*visual"]))
    assert [problem.message.split("`")[1] for problem in plan.problems] == ["lm_heat", "re:.*visual"]


def test_an_invalid_expression_is_refused_with_the_recipe() -> None:
    with pytest.raises(RecipeInvalid, match="no valid expression"):
        recipe(ignore="re:(")


def test_a_pattern_counts_as_matched_even_where_another_one_wins() -> None:
    patterns = PatternSet(["a.b", "re:a"])
    assert patterns.match("a.b") == "a.b"
    assert patterns.unmatched() == ()


def test_matcher_reports_where_a_pattern_stands() -> None:
    matcher = Matcher.build([["re:x"], ["Linear", "y"]], ["z"])
    assert matcher.target_of("w") is not None
    assert matcher.unmatched() == (("ignore", "z"), ("targets of group 0", "re:x"), ("targets of group 1", "y"))
