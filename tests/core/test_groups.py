"""Groups of the written config, and merging them with those of a source that is quantized in part."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from shardmill.core.groups import Part, merge_sections, source_parts, write_groups, write_section
from shardmill.core.resolve import Resolver, check_resolution
from shardmill.core.scheme import group_entry, preset
from shardmill.errors import CheckpointInvalid, Problem, Refused

EXPERTS = tuple(
    f"model.layers.{n}.mlp.experts.{e}.{leaf}_proj" for n in (0, 1) for e in (0, 1) for leaf in ("gate", "up", "down")
)
ATTENTION = tuple(f"model.layers.{n}.self_attn.{leaf}_proj" for n in (0, 1) for leaf in "qkvo")
SOURCE: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": [r"re:.*\.experts\..*"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "strategy": "group",
                "group_size": 128,
                "symmetric": True,
                "dynamic": False,
                "observer": "minmax",
                "actorder": None,
            },
            "input_activations": None,
        }
    },
    "ignore": ["lm_head", "re:.*self_attn.*"],
    "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False},
}


def part(scheme: str, modules: tuple[str, ...]) -> Part:
    return Part(entry=group_entry(preset(scheme)), modules=modules)


def merge(parts: list[Part], source: dict[str, Any] = SOURCE, **options: Any) -> dict[str, Any]:
    options = {"has_kv_scales": False} | options
    return merge_sections(parts, source, EXPERTS, ["lm_head"], **options)


def test_parts_with_equal_schemes_become_one_group() -> None:
    groups = write_groups([part("W4A16", ("a",)), part("W4A16", ("b",)), part("NVFP4A16", ())])
    assert {name: group["targets"] for name, group in groups.config_groups.items()} == {"group_00": ["Linear"]}
    assert groups.planned == {"a": "group_00", "b": "group_00"}


def test_new_modules_and_kept_ones_keep_their_schemes() -> None:
    section = merge([part("FP8_DYNAMIC", ATTENTION)])
    read = Resolver.read(section)
    weights = {name: group["weights"]["num_bits"] for name, group in section["config_groups"].items()}
    assert {weights[read.compressed_tensors(module) or ""] for module in ATTENTION} == {8}
    assert {weights[read.compressed_tensors(module) or ""] for module in EXPERTS} == {4}
    assert [group["format"] for group in section["config_groups"].values()] == ["float-quantized", "pack-quantized"]
    assert section["format"] == "mixed-precision"
    planned = dict.fromkeys(ATTENTION, "group_00") | dict.fromkeys(EXPERTS, "group_01")
    assert check_resolution(section, planned, ["lm_head"]) == []


def test_what_is_quantized_as_the_source_is_joins_its_group() -> None:
    section = merge([part("W4A16", ATTENTION)])
    assert [group["targets"] for group in section["config_groups"].values()] == [["Linear"]]
    assert section["format"] == "pack-quantized"


def test_patterns_of_the_source_are_never_taken_over() -> None:
    source = copy.deepcopy(SOURCE)
    source["config_groups"]["group_0"]["targets"] = [r"re:(.*)*\.experts\..*"]
    section = merge([part("FP8_DYNAMIC", ATTENTION)], source)
    assert not any("(.*)*" in target for group in section["config_groups"].values() for target in group["targets"])
    assert section["ignore"] == ["lm_head"]


def test_a_scheme_for_the_cache_stays_only_with_its_scales() -> None:
    assert merge([], has_kv_scales=True)["kv_cache_scheme"] == SOURCE["kv_cache_scheme"]
    assert merge([])["kv_cache_scheme"] is None


def test_the_order_of_groups_is_that_of_the_source() -> None:
    source = copy.deepcopy(SOURCE)
    entry = source["config_groups"]["group_0"]
    source["config_groups"] = {
        "b": {**entry, "targets": [r"re:.*down_proj"], "weights": {**entry["weights"], "num_bits": 8}},
        "a": {**entry, "targets": ["re:.*gate_proj", "re:.*up_proj"]},
    }
    assert [p.entry["weights"]["num_bits"] for p in source_parts(source, EXPERTS)] == [8, 4]


@pytest.mark.parametrize(
    "change", [{"transform_config": {"x": 1}}, {"sparsity_config": {"x": 1}}, {"ignore": ["re:.*"]}]
)
def test_what_would_be_lost_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointInvalid):
        merge([], SOURCE | change)


def test_a_module_is_kept_or_quantized_anew() -> None:
    with pytest.raises(CheckpointInvalid, match="kept and quantized anew"):
        merge([part("FP8_DYNAMIC", EXPERTS[:1])])


def test_what_the_check_finds_is_refused() -> None:
    with pytest.raises(Refused, match="nonsense"):
        merge([], check=lambda _section, _planned: [Problem(kind="x", message="nonsense")])


def test_the_ignore_list_is_sorted_and_without_repetition() -> None:
    assert write_section(write_groups([part("W8A8", ("a",))]), ["c", "b", "c"], None)["ignore"] == ["b", "c"]
