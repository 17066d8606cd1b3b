from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asked import recipe_of
from shardmill.core.recipe import Recipe, parse_recipe, recipe_to_json, uniform
from shardmill.core.scheme import PRESETS, preset
from shardmill.errors import RecipeInvalid


@given(st.sampled_from(sorted(PRESETS)), st.lists(st.sampled_from(["lm_head", "re:.*mlp", "a.b"])), st.booleans())
def test_a_recipe_survives_json(scheme: str, ignore: list[str], default_ignores: bool) -> None:  # noqa: FBT001
    recipe = recipe_of(scheme, ignore=ignore, default_ignores=default_ignores)
    assert parse_recipe(recipe_to_json(recipe)) == recipe


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, "either `scheme` or `groups`"),
        ([], "a recipe is a mapping"),
        ({"scheme": "FP8_DYNAMIC", "groups": []}, "either"),
        ({"groups": []}, "at least one group"),
        ({"groups": "x"}, "must be a list"),
        ({"groups": [{"targets": "x"}]}, "mapping with `scheme`"),
        ({"groups": [{"scheme": "W8A8", "tragets": "x"}]}, "tragets"),
        ({"scheme": "FP8_DYNAMICC"}, "unknown scheme"),
        ({"scheme": "FP8"}, "calibration data; FP8_DYNAMIC"),
        ({"scheme": "nvfp4"}, "NVFP4A16"),
        ({"scheme": "FP8_DYNAMIC", "ingore": "x"}, "ingore"),
        ({"scheme": "FP8_DYNAMIC", "ignore": {"x": 1}}, "must be a pattern"),
        ({"scheme": "FP8_DYNAMIC", "ignore": [1]}, "must be a pattern"),
        ({"scheme": "FP8_DYNAMIC", "ignore": "re:("}, "no valid expression"),
        ({"scheme": "FP8_DYNAMIC", "targets": "re:["}, "no valid expression"),
        ({"scheme": "FP8_DYNAMIC", "group_size": 64}, "does not fit"),
        ({"scheme": "NVFP4A16", "group_size": 32}, "does not fit"),
        ({"scheme": "MXFP4", "group_size": 64}, "MXFP4"),
        ({"scheme": "W4A16", "default_ignores": "no"}, "true or false"),
        ({"scheme": "W4A16", "indivisible": "pad"}, "refuse, copy"),
        ({"scheme": "W4A16", "expert_layout": "guess"}, "interleaved"),
        ({"scheme": {"weights": {"num_bits": 4, "dynamic": True, "group_size": 32}}}, "cannot be dynamic"),
        ({"scheme": {"weights": {"num_bits": 4, "actorder": "weight", "group_size": 32}}}, "actorder"),
        ({"scheme": {"weights": {"num_bits": 4, "observer": "mse", "group_size": 32}}}, "observer"),
        ({"scheme": {"weights": {"num_bits": 9}}}, "2 to 8 bits"),
        ({"scheme": {"weights": {"num_bits": "4"}}}, "must be an integer"),
        ({"scheme": {"weights": {"num_bits": 4, "symmetric": "yes"}}}, "true or false"),
        ({"scheme": {"weights": {"num_bits": 4, "type": "float", "group_size": 32}}}, "NVFP4"),
        ({"scheme": {"weights": {"num_bits": 8, "type": "float", "symmetric": False}}}, "symmetric"),
        ({"scheme": {"weights": {"num_bits": 8, "block_structure": [0, 4]}}}, "positive"),
        ({"scheme": {"weights": {"num_bits": 8, "block_structure": "axb"}}}, "rows, cols"),
        ({"scheme": {"weights": {"num_bits": 8, "block_structure": [32, 64.5]}}}, "rows, cols"),
        ({"scheme": {"weights": {"num_bits": 8, "surprise": 1}}}, "surprise"),
        ({"scheme": {"weights": None}}, "needs `weights`"),
        ({"scheme": {"weights": {}, "input_activations": {"dynamic": False}}}, "calibration data"),
        ({"scheme": {"weights": {}, "output_activations": {"dynamic": True}}}, "output_activations"),
    ],
)
def test_what_cannot_be_is_refused_in_words(data: Any, says: str) -> None:
    with pytest.raises(RecipeInvalid) as caught:
        parse_recipe(data)
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()[0]) <= 300


def test_a_group_pasted_from_a_written_config_is_read() -> None:
    weights = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": 64,
        "symmetric": True,
        "block_structure": None,
    }
    activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "block_structure": None}
    scheme = {"weights": weights, "input_activations": activations, "output_activations": None, "preset": ["x"]}
    assert parse_recipe({"scheme": scheme}).groups[0].scheme.format == "pack-quantized"


def test_a_group_size_that_changes_nothing_keeps_the_preset() -> None:
    assert parse_recipe({"scheme": "W4A16", "group_size": 128}) == uniform("W4A16")


def test_a_changed_preset_is_described_by_its_arguments() -> None:
    recipe: Recipe = parse_recipe({"scheme": "w4a16", "group_size": 64})
    assert recipe.groups[0].scheme.label == "int4 group 64"
    assert recipe.groups[0].scheme != preset("W4A16")
