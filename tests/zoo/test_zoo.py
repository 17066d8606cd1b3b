"""Many architectures, as transformers writes them, with every scheme: see `battery`; a few of them by default."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zoo.battery import (
    REFUSED,
    SCHEMES,
    ZOO,
    Zoo,
    check_cell,
    check_copies,
    check_experts,
    check_global_scales,
    check_heads,
    check_names,
    check_resolution,
    quantized,
)
from zoo.mixed import MODELS as MIXED
from zoo.mixed import check_mixed

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "zoo.md"
FEW = [
    ("qwen3_moe", "NVFP4A16"),
    ("granitemoe", "W4A16"),
    ("gpt_oss", "NVFP4A16"),
    ("gemma3_vision", "FP8_DYNAMIC"),
    ("deepseek_v3_mtp", "NVFP4A16"),
    ("gpt2", "W4A16"),
    ("mistral_consolidated", "FP8_DYNAMIC"),
]
ALL = [(name, scheme) for name in ZOO for scheme in SCHEMES]


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.mark.parametrize(("name", "scheme"), FEW)
def test_a_few_architectures_are_converted_as_others_read_them(zoo: Zoo, name: str, scheme: str) -> None:
    assert (check_cell(zoo, name, scheme).outcome == "ok") == (name not in REFUSED)


def test_the_battery_notices_what_is_wrong(zoo: Zoo) -> None:
    check_cell(zoo, "granitemoe", "W4A16")
    source, model = zoo.source("granitemoe")
    result = source.parent / "W4A16"
    before, after = load_file(source / "model.safetensors"), load_file(result / "model.safetensors")
    config = json.loads((result / "config.json").read_text())["quantization_config"]
    modules = quantized(after)
    check_resolution(config, after, modules)
    with pytest.raises(AssertionError):  # the router is in reach of `Linear`
        check_resolution({**config, "ignore": ["lm_head"]}, after, modules)
    with pytest.raises(AssertionError):  # stacks cut along the other axis
        check_experts("llama4", "W4A16", before, after)
    with pytest.raises(AssertionError):  # a copied tensor that differs
        check_copies(before, after | {"model.norm.weight": after["model.norm.weight"] + 1}, modules)
    with pytest.raises(AssertionError):  # a quantized head
        check_names(ZOO["granitemoe"], model, {**modules, "lm_head": {}})
    with pytest.raises(AssertionError):
        check_heads("granitemoe", model, {"ignore": []})
    scales = {f"m.{leaf}_proj": {"weight_global_scale": torch.tensor([float(n)])} for n, leaf in enumerate("qk")}
    with pytest.raises(AssertionError):
        check_global_scales(scales)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scheme"), [cell for cell in ALL if cell not in FEW])
def test_every_architecture_is_converted_as_others_read_it(zoo: Zoo, name: str, scheme: str) -> None:
    assert (check_cell(zoo, name, scheme).outcome == "ok") == (name not in REFUSED)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "mixtral")) for name in MIXED])
def test_every_module_of_a_mixed_recipe_has_the_intended_scheme(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    schemes = {row.intended for row in check_mixed(Zoo(tmp_path_factory.mktemp("mixed")), name)}
    assert schemes >= {"FP8", "NVFP4", "dense"}


def test_the_document_has_a_row_for_every_cell_and_every_outcome() -> None:
    rows = [tuple(part.strip() for part in line.split("|")[1:4]) for line in DOCUMENT.read_text().splitlines()]
    outcomes = {(name, scheme): outcome for name, scheme, outcome in (row for row in rows if len(row) == 3)}
    assert {cell: outcomes.get(cell, "").partition(":")[0] for cell in ALL} == {
        (name, scheme): "refused" if name in REFUSED else "ok" for name, scheme in ALL
    }


def test_no_fewer_architectures_than_promised() -> None:
    assert len(ZOO) >= 24
