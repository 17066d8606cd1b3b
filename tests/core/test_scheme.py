from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from enum import Enum
from typing import Any

import pytest

from shardmill.core.input_scale import parse_input_scale
from shardmill.core.scheme import (
    PRESETS,
    REFUSED_PRESETS,
    ActivationArgs,
    Scheme,
    WeightArgs,
    parse_activation_args,
    parse_scheme,
    parse_weight_args,
    preset,
    scheme_to_json,
    with_group_size,
)
from shardmill.errors import RecipeInvalid, Refused

FORMATS = {
    "FP8_DYNAMIC": "float-quantized",
    "FP8_BLOCK": "float-quantized",
    "W8A8": "int-quantized",
    "INT8": "int-quantized",
    "W2A16": "pack-quantized",
    "W8A16": "pack-quantized",
    "W4A16_ASYM": "pack-quantized",
    "W4A8": "int-quantized",
    "W4A4": "int-quantized",
    "W4AFP8": "pack-quantized",
    "NVFP4A16": "nvfp4-pack-quantized",
    "MXFP4": "mxfp4-pack-quantized",
    "MXFP4A16": "mxfp4-pack-quantized",
    "MXFP8": "mxfp8-quantized",
    "MXFP8A16": "mxfp8-quantized",
}
WITHOUT_PRESET = {
    "int4 group 32 asymmetric": Scheme(
        weights=WeightArgs(num_bits=4, strategy="group", group_size=32, symmetric=False)
    ),
    "float8 block 64x32": Scheme(weights=WeightArgs(type="float", strategy="block", block_structure=(64, 32))),
    "int3 tensor": Scheme(weights=WeightArgs(num_bits=3, strategy="tensor"), input_activations=ActivationArgs()),
    "float4 tensor_group 16": replace(preset("NVFP4A16"), preset=None),
    "int8 channel": Scheme(weights=WeightArgs(), input_activations=ActivationArgs(strategy="group", group_size=64)),
}


def message_of(caught: pytest.ExceptionInfo[Refused]) -> str:
    return str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
def test_presets_know_their_format(name: str) -> None:
    assert preset(name).format == FORMATS[name]


def test_float_weights_without_activations_are_naive() -> None:
    assert Scheme(weights=WeightArgs(type="float")).format == "naive-quantized"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_found_by_name_in_any_case(name: str) -> None:
    assert preset(name.lower()) == preset(name) == parse_scheme(name)
    assert preset(name).preset == preset(name).label == name


@pytest.mark.parametrize("name", REFUSED_PRESETS)
def test_presets_that_need_data_say_so(name: str) -> None:
    with pytest.raises(RecipeInvalid, match="cannot be used without data"):
        preset(name.lower())


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(RecipeInvalid) as caught:
        preset("W4A17")
    assert "unknown scheme `W4A17`" in message_of(caught)
    assert "FP8_DYNAMIC" in message_of(caught)


@pytest.mark.parametrize(
    ("args", "low", "high", "half"),
    [
        (WeightArgs(num_bits=2), -2, 1, 1.5),
        (WeightArgs(num_bits=8), -128, 127, 127.5),
        (WeightArgs(type="float"), -448, 448, 448),
        (PRESETS["NVFP4A16"].weights, -6, 6, 6),
        (PRESETS["MXFP8"].weights, -448, 448, 448),
    ],
)
def test_range_of_codes(args: WeightArgs, low: float, high: float, half: float) -> None:
    assert args.code_range == (low, high)
    assert args.code_max == half


def test_kinds_of_scales() -> None:
    kinds = {name: (scheme.weights.is_mx, scheme.weights.has_global_scale) for name, scheme in PRESETS.items()}
    assert {name for name, (is_mx, _) in kinds.items() if is_mx} == {"MXFP4", "MXFP4A16", "MXFP8", "MXFP8A16"}
    assert {name for name, (_, has_global_scale) in kinds.items() if has_global_scale} == {"NVFP4A16", "NVFP4"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "token"}, "strategy `token` of weights is not one of"),
        ({"num_bits": 1}, "2 to 8 bits, found 1"),
        ({"num_bits": 9}, "2 to 8 bits, found 9"),
        ({"type": "fixed"}, "must be `int` or `float`"),
        ({"type": "float", "num_bits": 6}, "4 or 8 bits"),
        ({"type": "float", "symmetric": False}, "asymmetric ones have no format"),
        ({"strategy": "group"}, "positive group_size, found None"),
        ({"strategy": "group", "group_size": 0}, "positive group_size, found 0"),
        ({"strategy": "channel", "group_size": 64}, "needs strategy `group`"),
        ({"strategy": "block"}, "block_structure goes with strategy `block`"),
        ({"strategy": "channel", "block_structure": (2, 2)}, "block_structure goes with strategy `block`"),
        ({"strategy": "block", "block_structure": (0, 2)}, "two positive integers"),
        ({"strategy": "block", "block_structure": (2, 2, 2)}, "two positive integers"),
        ({"type": "float", "num_bits": 4}, "4-bit float weights are NVFP4"),
        ({"strategy": "tensor_group", "group_size": 16}, "strategy `tensor_group` is NVFP4"),
        ({"type": "float", "strategy": "tensor_group", "group_size": 16}, "strategy `tensor_group` is NVFP4"),
        ({"scale_dtype": "uint8"}, "scale_dtype `uint8` is MX"),
        ({"scale_dtype": "uint8", "strategy": "group", "group_size": 32}, "scale_dtype `uint8` is MX"),
        ({"scale_dtype": "float8_e4m3fn"}, "scale_dtype `float8_e4m3fn` is NVFP4"),
        ({"scale_dtype": "int16"}, "scale_dtype of weights must be"),
    ],
)
def test_arguments_without_a_meaning_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeInvalid) as caught:
        WeightArgs(**arguments)
    assert message in message_of(caught)


def test_schemes_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        preset("W4A16").weights.num_bits = 8  # type: ignore[misc]


@pytest.mark.parametrize("label", WITHOUT_PRESET)
def test_labels_without_a_preset(label: str) -> None:
    assert WITHOUT_PRESET[label].label == label


@pytest.mark.parametrize("scheme", [*PRESETS.values(), *WITHOUT_PRESET.values()], ids=lambda scheme: scheme.label)
def test_schemes_survive_json(scheme: Scheme) -> None:
    assert parse_scheme(json.loads(json.dumps(scheme_to_json(scheme)))) == scheme


def test_a_scheme_is_a_preset_only_while_it_equals_it() -> None:
    data = scheme_to_json(preset("W4A16"))
    assert parse_scheme(data).preset == "W4A16"
    data["weights"]["group_size"] = 64
    assert parse_scheme(data).preset is None
    assert parse_scheme(scheme_to_json(preset("W4A16")) | {"preset": "W8A16"}).preset is None


@pytest.mark.parametrize(
    ("data", "strategy"),
    [
        ({"group_size": 64}, "group"),
        ({"group_size": -1}, "channel"),
        ({}, "tensor"),
        ({"block_structure": [8, 8]}, "block"),
        ({"strategy": "CHANNEL"}, "channel"),
    ],
)
def test_the_strategy_may_follow_from_the_group_size(data: dict[str, Any], strategy: str) -> None:
    args = parse_weight_args({"num_bits": 4, **data})
    assert args.strategy == strategy
    assert args.group_size == (64 if strategy == "group" else None)


@pytest.mark.parametrize("written", [[128, 64], (128, 64), "128x64"])
def test_block_structures_are_pairs_or_text(written: object) -> None:
    assert parse_weight_args({"block_structure": written}).block_structure == (128, 64)


@pytest.mark.parametrize("written", [7, "128", [1, 2, 3], ["a", "b"]])
def test_other_block_structures_are_refused(written: object) -> None:
    with pytest.raises(RecipeInvalid, match=r"block_structure must be \[rows, cols\]"):
        parse_weight_args({"block_structure": written})


class Kind(Enum):
    FLOAT = "float"


def test_values_of_enumerations_and_dtypes_are_read() -> None:
    data = {"num_bits": 4, "type": Kind.FLOAT, "strategy": "tensor_group", "group_size": 16}
    assert parse_weight_args(data | {"scale_dtype": "torch.float8_e4m3fn"}) == preset("NVFP4A16").weights


@pytest.mark.parametrize("scale_dtype", [None, "torch.bfloat16", "float16", "torch.float32"])
def test_an_ordinary_scale_dtype_follows_the_source(scale_dtype: str | None) -> None:
    assert parse_weight_args({"num_bits": 8, "scale_dtype": scale_dtype}).scale_dtype is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "weights must be a mapping of arguments, found list"),
        ({"bits": 4}, "weights has unknown fields: `bits`"),
        ({"num_bits": "4"}, "num_bits of weights must be an integer"),
        ({"num_bits": True}, "num_bits of weights must be an integer"),
        ({"group_size": 1.5}, "group_size of weights must be an integer"),
        ({"symmetric": "no"}, "symmetric of weights must be true or false"),
        ({"dynamic": True}, "weights cannot be dynamic"),
        ({"actorder": "weight"}, "actorder needs calibration data"),
        ({"observer": "mse"}, "observer `mse` is not available"),
    ],
)
def test_weight_arguments_that_are_refused(data: Any, message: str) -> None:
    with pytest.raises(RecipeInvalid) as caught:
        parse_weight_args(data)
    assert message in message_of(caught)


@pytest.mark.parametrize("observer", ["minmax", "static_minmax", "memoryless_minmax"])
def test_min_max_observers_are_what_is_done_anyway(observer: str) -> None:
    assert parse_weight_args({"observer": observer, "group_size": -1}) == WeightArgs()


def test_activations_are_described_and_never_computed() -> None:
    assert parse_activation_args(None) is None
    assert parse_activation_args({"dynamic": True}) == ActivationArgs(strategy="tensor")
    assert parse_activation_args({"dynamic": True, "type": "FLOAT", "group_size": 128}) == ActivationArgs(
        type="float", strategy="group", group_size=128
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("token", "input_activations must be a mapping of arguments, found str"),
        ({}, "static activations need calibration data"),
        ({"dynamic": False}, "static activations need calibration data"),
        ({"dynamic": "local"}, "`dynamic: local` goes with strategy `tensor_group`"),
        ({"dynamic": True, "colour": 1}, "input_activations has unknown fields"),
        ({"dynamic": True, "group_size": "128"}, "group_size of input_activations must be an integer"),
    ],
)
def test_activation_arguments_that_are_refused(data: Any, message: str) -> None:
    with pytest.raises(RecipeInvalid) as caught:
        parse_activation_args(data)
    assert message in message_of(caught)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (4, "a scheme is a preset name or a mapping, found int"),
        ({"weight": {}}, "scheme has unknown fields: `weight`"),
        ({"input_activations": {"dynamic": True}}, "a scheme needs `weights`"),
        ({"weights": {}, "output_activations": {"dynamic": True}}, "output_activations need calibration data"),
    ],
)
def test_schemes_that_are_refused(data: Any, message: str) -> None:
    with pytest.raises(RecipeInvalid) as caught:
        parse_scheme(data)
    assert message in message_of(caught)


def test_another_group_size_is_no_preset_any_more() -> None:
    changed = with_group_size(preset("W4A16"), 32)
    assert (changed.weights.group_size, changed.preset, changed.label) == (32, None, "int4 group 32")
    assert with_group_size(preset("W4A16"), 128) == preset("W4A16")


@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4"])
def test_group_sizes_that_a_format_fixes_are_not_changed(name: str) -> None:
    with pytest.raises(RecipeInvalid):
        with_group_size(preset(name), 64)


LOCAL = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "scale_dtype": "float8_e4m3fn"}


def test_local_activations_are_those_of_nvfp4() -> None:
    assert parse_activation_args(LOCAL | {"dynamic": "local"}) == preset("NVFP4").input_activations
    assert preset("NVFP4").weights == preset("NVFP4A16").weights
    assert [name for name, scheme in PRESETS.items() if scheme.needs_input_scale] == ["NVFP4"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dynamic": True}, "`dynamic: local` goes with strategy `tensor_group`"),
        ({"dynamic": "local", "strategy": "group"}, "`dynamic: local` goes with strategy `tensor_group`"),
        ({"dynamic": "global"}, "static activations need calibration data"),
        ({"dynamic": 1}, "static activations need calibration data"),
        ({"dynamic": "local", "group_size": 32}, "are NVFP4"),
        ({"dynamic": "local", "scale_dtype": None}, "are NVFP4"),
    ],
)
def test_local_activations_of_another_layout_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeInvalid) as caught:
        parse_activation_args(LOCAL | changes)
    assert message in message_of(caught)


def test_local_activations_go_with_nvfp4_weights_and_input_scales_with_them() -> None:
    local = preset("NVFP4").input_activations
    with pytest.raises(RecipeInvalid, match="go with NVFP4 weights"):
        Scheme(weights=WeightArgs(), input_activations=local)
    with pytest.raises(RecipeInvalid, match="does not go with scheme `FP8_DYNAMIC`"):
        replace(preset("FP8_DYNAMIC"), input_scale=parse_input_scale("constant:1"))
