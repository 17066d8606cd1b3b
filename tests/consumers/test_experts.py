"""Experts in the formats that tests/zoo leaves out, decoded by another reader into a dense model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest

from checkpoints import read
from consumers.cases import EXPERTS, LARGEST_LOSS, SHARPEST
from zoo.battery import FURTHER_SCHEMES, Zoo, check_cell, dense_logits, own_weights, quantized, relative

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("experts"))


@pytest.mark.parametrize("scheme", FURTHER_SCHEMES)
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_what_another_reader_takes_them_for(zoo: Zoo, name: str, scheme: str) -> None:
    cell = check_cell(zoo, name, scheme)
    assert cell.outcome == "ok"
    assert cell.loss <= LARGEST_LOSS[scheme]


def another_expert(name: str) -> str:
    """Tensors of the first two experts, exchanged."""
    return re.sub(r"\.experts\.([01])\.", lambda found: f".experts.{1 - int(found[1])}.", name)


def another_projection(name: str) -> str:
    """Gate and up of every expert, exchanged."""
    return re.sub(r"(\.experts\.\d+\.)(gate_proj|up_proj|w1|w3)\b", lambda found: found[1] + _PARTNER[found[2]], name)


_PARTNER = {"gate_proj": "up_proj", "up_proj": "gate_proj", "w1": "w3", "w3": "w1"}


@pytest.mark.parametrize("misplaced", [another_expert, another_projection])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_that_are_mixed_up_are_noticed(zoo: Zoo, name: str, misplaced: Callable[[str], str]) -> None:
    check_cell(zoo, name, SHARPEST)
    source, result = zoo.home / name / "source", zoo.home / name / SHARPEST
    after = read(result)
    config = json.loads((result / "config.json").read_text())["quantization_config"]
    wrong = {misplaced(key): tensor for key, tensor in own_weights(after, quantized(after), config).items()}
    loss = relative(dense_logits(zoo, name, wrong), dense_logits(zoo, name, read(source)))
    assert loss > LARGEST_LOSS[SHARPEST]
