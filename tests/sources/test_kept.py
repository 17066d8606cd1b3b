"""Weights that a recipe leaves alone: they stay as quantized as they were, and config.json says how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from compressed_tensors.quantization import QuantizationConfig

from checkpoints import as_bytes, deal, llama, read, write
from quantized import CASES, compressed, config_of, ct, encode_all, scheme_of
from shardmill.core.recipe import uniform
from shardmill.stages.pipeline import run
from shardmill.stages.plan import Locations
from shardmill.stages.verify import verify


@pytest.mark.parametrize("case", ["CT fp8 channel", "CT packed int4 asymmetric", "CT nvfp4", "CT mxfp8"])
def test_what_is_left_alone_is_byte_identical_and_has_its_group(tmp_path: Path, case: str) -> None:
    maker, section = CASES[case]
    stored, _ = encode_all(llama(layers=2, hidden=192, width=288), maker)
    source = write(tmp_path / "source", deal(stored, 3), config_of(section))
    run(
        Locations(source=str(source), destination=str(tmp_path / "out")),
        uniform("NVFP4A16", ignore=["re:.*self_attn.*", "re:.*layers.1.*"]),
    )
    found = as_bytes(read(tmp_path / "out"))
    left = {name: value for name, value in as_bytes(stored).items() if "self_attn" in name or "layers.1" in name}
    assert left.items() <= found.items()
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = QuantizationConfig.model_validate(written).config_groups
    assert len(groups) == (1 if case == "CT nvfp4" else 2)  # what is of the recipe's layout is in the recipe's group
    assert groups[max(groups)].weights == QuantizationConfig.model_validate(section).config_groups["group_0"].weights
    found_now = {problem.kind for problem in verify(str(tmp_path / "out"))}
    assert found_now <= {"fused-scales-differ"}  # each layer of the source was made by itself
    assert not found_now or case == "CT nvfp4"


def test_patterns_of_the_source_are_not_written_again(tmp_path: Path) -> None:
    """They come from somebody else; what they mean is written as names."""
    scheme = scheme_of("FP8_DYNAMIC")
    section = ct(scheme, "float-quantized")
    section["config_groups"]["group_0"]["targets"] = [
        r"re:.*(a+)+_proj$",
        r"re:.*layers\.\d+\.(self_attn|mlp)\..*_proj$",
    ]
    section["ignore"] = ["re:(x+x+)+y"]
    stored, _ = encode_all(llama(layers=1), lambda weight: compressed(weight, scheme))
    source = write(tmp_path / "source", [stored], config_of(section))
    run(
        Locations(source=str(source), destination=str(tmp_path / "out")), uniform("NVFP4A16", ignore="re:.*self_attn.*")
    )
    text = (tmp_path / "out" / "config.json").read_text()
    assert "(a+)" not in text
    assert "x+x" not in text
    assert verify(str(tmp_path / "out")) == []
