"""How dequantizing is asked for: recipe, command line, form; and that every way and every place gives equal bytes."""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from checkpoints import as_bytes, deal, gaussian, read, write
from quantized import CASES, FP8, block_fp8, config_of, encode_all, small
from shardmill.cli import main
from shardmill.core.recipe import dequantizing, parse_recipe, recipe_to_json, uniform
from shardmill.errors import RecipeInvalid
from shardmill.flows.parameters import QuantizeRequest
from shardmill.stages.pipeline import run
from shardmill.stages.plan import Locations
from shardmill.storage.location import open_folder

PLACES = {"source": "/models/m", "destination": "/models/out"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", deal(encode_all(small(), block_fp8)[0], 2), config_of(FP8))


def test_a_recipe_that_dequantizes_survives_json() -> None:
    assert parse_recipe({"dequantize": True}) == dequantizing()
    assert parse_recipe(recipe_to_json(dequantizing())) == dequantizing()
    assert "dequantize" not in recipe_to_json(uniform("W4A16"))


@pytest.mark.parametrize(
    "more",
    [
        {"scheme": "W4A16"},
        {"ignore": "lm_head"},
        {"groups": [{"scheme": "W4A16"}]},
        {"group_size": 64},
        {"dequantize": "yes"},
    ],
)
def test_dequantizing_goes_with_nothing_else(more: dict[str, Any]) -> None:
    with pytest.raises(RecipeInvalid):
        parse_recipe({"dequantize": True} | more)


def test_the_command_writes_what_the_loop_writes(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(source), "--dequantize"]) == 0
    assert "fp8 in blocks of 128x128 becomes BF16" in capsys.readouterr().out
    assert main(["run", str(source), str(tmp_path / "one"), "--dequantize", "-q"]) == 0
    assert main(["verify", str(tmp_path / "one"), "--against", str(source), "-q"]) == 0
    assert main(["report", str(tmp_path / "one"), "-q"]) == 0
    run(Locations(source=str(source), destination=str(tmp_path / "two")), dequantizing())
    assert as_bytes(read(tmp_path / "one")) == as_bytes(read(tmp_path / "two"))


@pytest.mark.parametrize(
    "option", [["--scheme", "W4A16"], ["--recipe", "r.json"], ["--group-size", "64"], ["--ignore", "a"]]
)
def test_the_option_goes_with_nothing_else(source: Path, option: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        sys.exit(main(["plan", str(source), "--dequantize", *option, "-q"]))
    assert caught.value.code == 2


def test_a_plan_for_machines_names_parts_and_outputs(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(source), "--scheme", "NVFP4A16", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for shard in document["shards"] for row in shard["tensors"]}
    name = "model.layers.0.mlp.down_proj.weight"
    assert rows[f"{name}_scale_inv"]["action"] == "part"
    assert rows[f"{name}_scale_inv"]["outputs"] == []
    assert [output["dtype"] for output in rows[name]["outputs"]] == ["U8", "F8_E4M3", "F32"]


def test_the_form_asks_for_it_alone() -> None:
    request = QuantizeRequest.model_validate(PLACES | {"dequantize": True})
    assert request.to_recipe() == dequantizing()
    assert request.scheme_label == "BF16"
    for more in ({"scheme": "W4A16"}, {"ignore": ["lm_head"]}, {"recipe": {"scheme": "W4A16"}}):
        with pytest.raises(ValidationError):
            QuantizeRequest.model_validate(PLACES | {"dequantize": True} | more)


@pytest.mark.parametrize("case", ["fp8 blocks", "AWQ", "CT packed int4 asymmetric"])
def test_bytes_do_not_depend_on_the_place(tmp_path: Path, case: str) -> None:
    maker, section = CASES[case]
    source = write(tmp_path / "source", deal(encode_all(small(), maker)[0], 3), config_of(section))
    base = f"memory://{secrets.token_hex(6)}"
    folder = open_folder(f"{base}/in")
    for path in source.iterdir():
        folder.put(path.name, path.read_bytes())
    run(Locations(source=str(source), destination=str(tmp_path / "disk")), uniform("NVFP4A16"))
    run(Locations(source=f"{base}/in", destination=f"{base}/out"), uniform("NVFP4A16"))
    out = open_folder(f"{base}/out")
    for path in sorted((tmp_path / "disk").glob("*.safetensors")):
        assert out.read(path.name, 1 << 30) == path.read_bytes()


def test_non_finite_values_beside_quantized_weights_take_their_partners_with_them(tmp_path: Path) -> None:
    """A fused layer is not half quantized: what was FP8 becomes BF16 with the weight that is copied."""
    stored, plain = encode_all(
        {"m.k_proj.weight": gaussian(1, 64, 128), "m.o_proj.weight": gaussian(2, 64, 64)}, block_fp8
    )
    stored["m.q_proj.weight"] = gaussian(3, 64, 128)
    stored["m.q_proj.weight"][1, 2] = float("nan")
    source = write(tmp_path / "source", [stored], config_of(FP8))
    run(Locations(source=str(source), destination=str(tmp_path / "out")), uniform("FP8_DYNAMIC", allow_nonfinite=True))
    found = read(tmp_path / "out")
    assert torch.equal(found["m.k_proj.weight"], plain["m.k_proj.weight"].bfloat16())
    assert torch.equal(found["m.q_proj.weight"].view(torch.int16), stored["m.q_proj.weight"].view(torch.int16))
    assert "m.o_proj.weight_scale" in found
