from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

from kernels.oracle import actual, compressor, sample
from shardmill.core.scheme import PRESETS, REFUSED_PRESETS, ActivationArgs, Scheme, WeightArgs, scheme_to_json
from shardmill.errors import RecipeInvalid
from shardmill.kernels import reference
from shardmill.kernels.ct_adapter import check_config, decompress, scheme_from_ct, scheme_to_ct

LINEAR = ["Linear"]
CUSTOM = [
    Scheme(weights=WeightArgs(num_bits=3, strategy="group", group_size=48, symmetric=False)),
    Scheme(weights=WeightArgs(num_bits=5, strategy="tensor"), input_activations=ActivationArgs(num_bits=8)),
    Scheme(weights=WeightArgs(strategy="block", block_structure=(32, 64))),
    Scheme(weights=WeightArgs(type="float", strategy="group", group_size=64)),
    Scheme(weights=WeightArgs(type="float", strategy="tensor"), input_activations=ActivationArgs(type="float")),
]


def config_of(scheme: Scheme, **changes: Any) -> dict[str, Any]:
    """A `quantization_config` as it stands in config.json."""
    group = {"targets": LINEAR, "output_activations": None, "format": scheme.format, **scheme_to_json(scheme)}
    group.pop("preset", None)
    return {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "quantization_status": "compressed",
        "config_groups": {"group_00": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "transform_config": {},
        "version": "0.19.0",
        **changes,
    }


def test_every_preset_of_the_library_is_accepted_or_refused_with_a_reason() -> None:
    assert PRESETS.keys() | REFUSED_PRESETS.keys() == PRESET_SCHEMES.keys()
    assert not PRESETS.keys() & REFUSED_PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_those_of_the_library(name: str) -> None:
    theirs = preset_name_to_scheme(name, LINEAR)
    assert scheme_to_ct(PRESETS[name], LINEAR) == theirs
    assert scheme_from_ct(theirs) == replace(PRESETS[name], preset=None)
    assert scheme_from_ct(name) == scheme_from_ct(name.lower()) == PRESETS[name]


@pytest.mark.parametrize("scheme", CUSTOM, ids=lambda scheme: scheme.label)
def test_custom_schemes_survive_both_ways(scheme: Scheme) -> None:
    assert scheme_from_ct(scheme_to_ct(scheme, LINEAR)) == scheme


@pytest.mark.parametrize("name", [*REFUSED_PRESETS, "W9A16"])
def test_names_that_cannot_be_used_are_refused(name: str) -> None:
    with pytest.raises(RecipeInvalid):
        scheme_from_ct(name)


STATIC = QuantizationArgs(num_bits=8, type="float")
WEIGHTS = QuantizationArgs(num_bits=8, strategy="channel")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": WEIGHTS, "input_activations": STATIC}, "static activations need calibration data"),
        ({"weights": WEIGHTS, "output_activations": STATIC}, "output_activations need calibration data"),
        ({"input_activations": QuantizationArgs(dynamic=True)}, "a scheme needs `weights`"),
        ({"weights": QuantizationArgs(num_bits=16)}, "2 to 8 bits"),
        ({"weights": QuantizationArgs(num_bits=4, type="float", group_size=16)}, "4-bit float weights"),
        ({"weights": QuantizationArgs(observer="mse")}, "observer `mse`"),
        ({"weights": QuantizationArgs(observer_kwargs={"maxshrink": 0.2})}, "observer_kwargs of weights"),
        ({"weights": QuantizationArgs(symmetric=False, zp_dtype=torch.int32)}, "zp_dtype of weights"),
        ({"weights": QuantizationArgs(group_size=32, actorder="weight")}, "actorder"),
        ({"weights": QuantizationArgs(dynamic=True)}, "cannot be dynamic"),
        ({"weights": WEIGHTS, "format": "int-quantized"}, "format `int-quantized` does not fit"),
    ],
)
def test_schemes_that_cannot_be_used_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeInvalid, match=message):
        scheme_from_ct(QuantizationScheme(targets=LINEAR, **arguments))


def test_every_reason_is_named_at_once() -> None:
    args = QuantizationArgs(observer_kwargs={"maxshrink": 0.2})
    with pytest.raises(RecipeInvalid) as caught:
        scheme_from_ct(QuantizationScheme(targets=LINEAR, weights=args, format="dense"))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("name", ["W4A16_ASYM", "FP8_BLOCK", "MXFP4"])
def test_objects_of_the_library_are_not_changed(name: str) -> None:
    scheme = preset_name_to_scheme(name, ["re:.*proj"])
    before = scheme.model_dump()
    scheme_from_ct(scheme)
    assert scheme.model_dump() == before
    targets = ["Linear"]
    scheme_to_ct(PRESETS[name], targets).targets.append("other")
    assert targets == ["Linear"]


@pytest.mark.parametrize("scheme", [*PRESETS.values(), *CUSTOM], ids=lambda scheme: scheme.label)
def test_configs_are_read_as_they_are_written(scheme: Scheme) -> None:
    config = config_of(scheme)
    before = copy.deepcopy(config)
    assert check_config(config) == []
    assert config == before


def test_what_is_read_otherwise_is_named() -> None:
    group = config_of(PRESETS["W4A16"])["config_groups"]["group_00"]
    weights = group["weights"] | {"symmetric": 1, "block_structure": "2x4", "strategy": "block"}
    del weights["group_size"]
    config = config_of(PRESETS["W4A16"], provenance="me", config_groups={"group_00": group | {"weights": weights}})
    assert check_config(config) == [
        "config_groups.group_00.weights.block_structure: written as '2x4', read as [2, 4]",
        "config_groups.group_00.weights.symmetric: written as 1, read as True",
        "provenance: unknown to compressed-tensors",
    ]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"num_bits": 4, "colour": "blue"}, "Extra inputs are not permitted"),
        ({"num_bits": 4, "group_size": 8, "strategy": "channel"}, "group_size requires strategy"),
        ({"num_bits": 4, "strategy": "diagonal"}, "not a valid QuantizationStrategy"),
    ],
)
def test_configs_that_cannot_be_read_give_sentences(weights: dict[str, Any], message: str) -> None:
    found = check_config({"config_groups": {"group_00": {"targets": LINEAR, "weights": weights}}})
    assert found
    assert any(message in sentence for sentence in found)


def test_unknown_presets_and_shapes_of_configs_give_sentences() -> None:
    assert "cannot read it" in check_config({"config_groups": {"W99A99": LINEAR}})[0]
    assert check_config({})[0].startswith("config_groups")


@pytest.mark.parametrize("scheme", [*PRESETS.values(), *CUSTOM], ids=lambda scheme: scheme.label)
def test_one_module_is_decompressed_by_the_library(scheme: Scheme) -> None:
    weight = sample("gaussian", torch.bfloat16, (40, 384))
    group = config_of(scheme)["config_groups"]["group_00"]
    before, stored = copy.deepcopy(group), actual(scheme, weight)
    names = list(stored)
    theirs = decompress(stored, group)
    ours = reference.decode(stored, scheme.weights, format=scheme.format, shape=(40, 384))
    assert torch.equal(ours.to(theirs.dtype), theirs)
    assert (group, list(stored)) == (before, names)


def test_a_group_without_format_is_decompressed_in_the_inferred_one() -> None:
    scheme = PRESETS["W8A8"]
    group = config_of(scheme)["config_groups"]["group_00"] | {"format": None}
    stored = actual(scheme, sample("gaussian", torch.float32))
    ct_scheme = scheme_to_ct(scheme, LINEAR)
    assert torch.equal(decompress(stored, group), compressor(scheme).decompress(stored, ct_scheme)["weight"])
