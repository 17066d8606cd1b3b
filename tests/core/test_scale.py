"""Short cuts that planning takes through large checkpoints: each gives what the long way gives, and saves its work."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asked import recipe_of
from shardmill.core import folding
from shardmill.core.checks import check_plan, check_shard, source_names
from shardmill.core.digest import digest_json
from shardmill.core.folding import fold_names
from shardmill.core.index import _parse_any, _parse_plain
from shardmill.core.layout import GENERATED_PARAMS, quantized_outputs
from shardmill.core.matching import Matcher, PatternSet, sees_digits, templates
from shardmill.core.plan import Plan, ShardPlan
from shardmill.core.planner import _Planner, build_plan
from shardmill.core.recipe import Recipe, parse_recipe, uniform
from shardmill.core.scheme import PRESETS
from strategies import checkpoint_of, llama_table, splits

LEAVES = ["q_proj", "k_proj", "w1", "w2", "w3", "gate_proj", "up_proj", "gate", "norm1", "conv1d", "lm_head"]
MODULES = st.builds(
    ".".join, st.lists(st.sampled_from(["0", "1", "12", "٣", "mlp", "visual"]), max_size=2).map(lambda x: ["m", *x])
)
WEIGHTS = st.builds(
    "{}.{}.{}".format, MODULES, st.sampled_from(LEAVES), st.sampled_from(["weight", "weight", "weight", "bias"])
)
STACKS = st.builds(
    "m.{}.mlp.experts.{}".format,
    st.integers(0, 1),
    st.sampled_from(["gate_up_proj", "down_proj", "down_proj.weight", "down_proj_bias"]),
)
ODD = st.sampled_from(
    ["weight", ".weight", "q_proj.weight", "m.0.w1.weight_scale", "weight_packed", 'é".weight', "q.\n"]
)
SHAPES = st.sampled_from([(64, 64), (64, 64), (64, 32), (33, 20), (64,), (2, 64, 64), (2, 64), (0, 8), ()])
PATTERNS = st.sampled_from(
    [
        "Linear",
        "lm_head",
        "m.0.w1",
        "re:.*w1$",
        r"re:.*\.[0-9]+\..*proj",
        r"re:.*\.\d+\.w",
        r"re:m\.[01]\.",
        "re:.*gate$",
        r"re:m\.(?P<n>\d+)\.(?P=n)",
        r"re:.*\N{DIGIT TWO}",
        "re:.*norm",
        r"re:.*\.\d{2}\.",
    ]
)


@st.composite
def plans(draw: st.DrawFn, names: st.SearchStrategy[str] = WEIGHTS | STACKS | ODD) -> Callable[[], Plan]:
    """A checkpoint and a recipe, to be planned as often as one likes."""
    chosen = draw(st.lists(names, min_size=1, max_size=12, unique=True))
    table = {name: (draw(st.sampled_from(["BF16", "BF16", "F32", "F8_E4M3", "I64"])), draw(SHAPES)) for name in chosen}
    schemes = st.sampled_from(["FP8_DYNAMIC", "NVFP4A16", "W4A16_ASYM", "FP8_BLOCK", "MXFP4A16"])
    groups = [
        {"targets": draw(st.lists(PATTERNS, min_size=1, max_size=2)), "scheme": draw(schemes)}
        for _ in range(draw(st.integers(1, 2)))
    ]
    fields = {"indivisible": draw(st.sampled_from(["copy", "refuse"])), "partial_fused": draw(st.booleans())}
    recipe = parse_recipe({"groups": groups, "ignore": draw(st.lists(PATTERNS, max_size=2)), **fields})
    checkpoint = checkpoint_of(draw(splits(table, most=3)), {"model_type": "mixtral"})
    return lambda: build_plan(checkpoint, recipe)


@given(plans())
@settings(max_examples=400)
def test_deciding_by_kind_is_deciding_each_tensor(make: Callable[[], Plan]) -> None:
    with patch.object(Matcher, "digit_hits", lambda _self: lambda module: (module,)):
        one_by_one = make()
    assert make() == one_by_one


def layers_asked(layers: int, recipe: Recipe) -> int:
    with patch.object(_Planner, "_resolve", autospec=True, side_effect=_Planner._resolve) as resolve:
        build_plan(checkpoint_of([llama_table(layers)]), recipe)
    return int(resolve.call_count)


def test_patterns_are_asked_as_often_for_nine_layers_as_for_three() -> None:
    recipe = uniform("NVFP4A16", ignore=["re:.*o_proj", r"re:.*\.[0-9]+\.nothing"])
    assert layers_asked(9, recipe) == layers_asked(3, recipe) > 0


def test_a_pattern_that_sees_digits_parts_only_what_it_matches() -> None:
    recipe = uniform("FP8_DYNAMIC", ignore=["model.layers.3.mlp.up_proj"], partial_fused=True)
    assert layers_asked(9, recipe) == layers_asked(5, recipe) == 1 + layers_asked(5, uniform("FP8_DYNAMIC"))


@given(PATTERNS.filter(lambda p: not sees_digits(p)), st.text("m.0w19_x", max_size=8), st.randoms())
def test_what_sees_no_digits_treats_a_template_alike(pattern: str, module: str, random: Any) -> None:
    other = re.sub("[0-9]", lambda _: str(random.randrange(10)), module)
    patterns = PatternSet([pattern])
    assert templates([module]) == templates([other])
    assert patterns.match(module) == (pattern if patterns.match(other) else None)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"re:\[0-9]", True),
        (r"re:[[0-9]", False),
        (r"re:[a0-9]", True),
        (r"re:\x31", True),
        (r"re:(a)\1", True),
        ("model.layers.0", True),
    ],
)
def test_digits_are_seen_wherever_they_may_matter(pattern: str, *, expected: bool) -> None:
    assert sees_digits(pattern) is expected


@given(plans())
@settings(max_examples=400)
def test_sizes_and_keys_are_those_of_the_layout(make: Callable[[], Plan]) -> None:
    plan = make()
    for shard in plan.shards:
        if not check_plan(plan):
            assert_sizes(shard)
            digests = {name: f"blake3:{n}" for n, name in enumerate(shard.sources)}
            for _ in range(2):
                assert shard.job_key(digests) == digest_json(shard.job() | {"sources": list(digests.values())})
                assert shard.shape() == digest_json(shard.job())


def assert_sizes(shard: ShardPlan) -> None:
    layout, found = shard.layout(), shard.sizes()
    assert found.output_bytes == len(layout.header()) + layout.data_bytes
    for scheme, size in ((True, found.quantized_bytes), (False, found.copied_bytes)):
        units = [unit for unit in layout.units if (unit.scheme is not None) == scheme]
        assert size == sum(spec.nbytes for unit in units for spec in unit.outputs)


@given(splits(llama_table()), st.sampled_from(sorted(PRESETS)))
def test_sizes_and_keys_of_a_sound_plan(shards: list[dict[str, Any]], scheme: str) -> None:
    for shard in build_plan(checkpoint_of(shards), recipe_of(scheme)).shards:
        assert_sizes(shard)
        digests = dict.fromkeys(shard.sources, "blake3:00")
        assert shard.job_key(digests) == digest_json(shard.job() | {"sources": list(digests.values())})


def test_a_key_is_remembered_for_its_digests_only() -> None:
    shard = build_plan(checkpoint_of([llama_table()]), uniform("FP8_DYNAMIC")).shards[0]
    one, other = ({shard.name: digest} for digest in ("blake3:01", "blake3:02"))
    with patch.object(ShardPlan, "_tensors_text", autospec=True, side_effect=ShardPlan._tensors_text) as described:
        assert shard.job_key(one) == shard.job_key(one) != shard.job_key(other)
    assert described.call_count == 2


@given(plans())
@settings(max_examples=300)
def test_only_names_that_could_be_generated_are_compared(make: Callable[[], Plan]) -> None:
    plan = make()
    names = frozenset(tensor.spec.name for shard in plan.shards for tensor in shard.tensors)
    assert source_names(plan) <= names
    for shard in plan.shards:
        assert check_shard(shard, source_names(plan)) == check_shard(shard, names)


BIG = ("BF16", (64, 64))


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({".weight": BIG, "weight": BIG}, {"weight"}),
        ({"m.weight": BIG, "m.weight_scale": BIG}, {"m.weight_scale"}),
        (
            {"m.experts.down_proj": ("BF16", (2, 64, 64)), "m.experts.1.down_proj.weight": BIG},
            {"m.experts.1.down_proj.weight"},
        ),
    ],
)
def test_generated_names_that_the_source_has_are_found(table: dict[str, Any], expected: set[str]) -> None:
    plan = build_plan(checkpoint_of([table], {"model_type": "mixtral"}), uniform("FP8_DYNAMIC"))
    found = {problem.tensor for problem in check_plan(plan) if problem.kind == "name-collision"}
    assert found == expected


@pytest.mark.parametrize("length", range(1, 9))
def test_a_module_without_a_name_has_the_sizes_of_its_layout(length: int) -> None:
    table = {f"{'m' * length}.weight": BIG, ".weight": BIG, "bias": ("BF16", (3,))}
    assert_sizes(build_plan(checkpoint_of([table]), uniform("FP8_DYNAMIC")).shards[0])


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_generated_param_is_known(name: str) -> None:
    outputs = quantized_outputs("m", PRESETS[name], 128, 128, "BF16")
    assert {spec.param for spec in outputs} <= {"weight", *GENERATED_PARAMS}


FOLDABLE = st.lists(
    st.sampled_from(["m", "layers", "q_proj", "k_proj", "0", "1", "2", "10", "00", "", "٣", "\n"]),
    min_size=1,
    max_size=5,
).map(".".join)


@given(st.lists(FOLDABLE, max_size=20))
@settings(max_examples=500)
def test_folding_layer_by_layer_is_folding_whole_names(names: list[str]) -> None:
    with patch.object(folding, "_by_first_number", lambda found: ({}, list(found))):
        whole = fold_names(names)
    assert fold_names(names) == whole


def test_what_is_below_a_layer_is_taken_apart_once() -> None:
    def parts(layers: int) -> int:
        with patch.object(folding, "_is_plain_number", side_effect=folding._is_plain_number) as asked:
            fold_names(f"m.{layer}.{expert}.{leaf}" for layer in range(layers) for expert in range(4) for leaf in "ab")
        return int(asked.call_count)

    assert parts(30) - parts(20) < 20


PIECES = ['"', ",", "{", "}", "[", "]", ":", " ", "\\", "\\u0061", "\n", "null", '"weight_map"', "é", "\t", "../"]


@given(
    st.dictionaries(st.text('ab.0é"\t', max_size=3), st.sampled_from(["a.safetensors", "b/c.safetensors", "x"])),
    st.sampled_from([{}, {"metadata": {"total_size": 3}}, {"metadata": "weight_map"}, {"x": {"weight_map": {}}}]),
    st.sampled_from([None, 2]),
    st.data(),
)
@settings(max_examples=1000)
def test_a_plain_index_says_what_the_json_parser_finds(
    weight_map: dict[str, str], more: dict[str, Any], indent: int | None, data: st.DataObject
) -> None:
    document = data.draw(st.sampled_from([{"weight_map": weight_map, **more}, {**more, "weight_map": weight_map}]))
    text = json.dumps(document, indent=indent, ensure_ascii=False)
    for _ in range(data.draw(st.integers(0, 2))):
        begin = data.draw(st.integers(0, len(text)))
        length, piece = data.draw(st.integers(0, 3)), data.draw(st.sampled_from(["", *PIECES]))
        text = text[:begin] + piece + text[begin + length :]
    plain = _parse_plain(text.encode())
    if plain is not None:
        assert plain == _parse_any(text.encode(), "")


@pytest.mark.parametrize("indent", [None, 2])
def test_a_common_index_is_plain(indent: int | None) -> None:
    weight_map = {"a.0": "x.safetensors", "b": "y.safetensors", "c": "x.safetensors"}
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}, indent=indent)
    assert _parse_plain(text.encode()) == weight_map


@pytest.mark.parametrize(
    "text",
    [
        '{"weight_map": {}}',
        '{"weight_map": {"a": "x.bin"}}',
        '{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}',
        '{"weight_map": {"a": "x.safetensors",}}',
        '{"weight_map": {"a": "x.safetensors" "b": "x.safetensors"}}',
        '{"weight_map": {"a", "x.safetensors"}}',
        '{"weight_map": {"a": "x.safetensors", "b"}}',
        '{"weight_map": {1 "a": "x.safetensors"}}',
        '{"weight_map": {"a": "x.safetensors"}, "weight_map": {}}',
        '{"x": {"weight_map": {"a": "x.safetensors"}}}',
        '{"x": NaN, "weight_map": {"a": "x.safetensors"}}',
        '[{"weight_map": {"a": "x.safetensors"}}]',
        '{"weight_map": {"a\\u0062": "x.safetensors"}}',
        '{"weight_map": {"a\n": "x.safetensors"}}',
    ],
)
def test_any_other_index_is_left_to_the_json_parser(text: str) -> None:
    assert _parse_plain(text.encode()) is None
    assert _parse_plain(b"\xff" + text.encode()) is None
