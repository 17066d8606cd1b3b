"""One tensor is made again from its source, byte for byte, or it is said why it cannot be."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints
from shardmill.core.digest import STAGE_VERSIONS
from shardmill.core.recipe import parse_recipe
from shardmill.errors import CheckpointInvalid, Refused
from shardmill.stages import reproduce as module
from shardmill.stages.pipeline import RunOptions, run
from shardmill.stages.plan import Locations
from shardmill.stages.reproduce import reproduce
from shardmill.stages.result import VerifyWatch
from shardmill.stages.sums import sha256_sums, sum_line

Q = "model.layers.0.self_attn.q_proj"
SCHEMES = ("NVFP4A16", "FP8_DYNAMIC", "W4A16_ASYM", "MXFP4A16")


def convert(source: Path, destination: Path, **recipe: Any) -> Path:
    locations = Locations(source=str(source), destination=str(destination))
    run(locations, parse_recipe(recipe), RunOptions(device="cpu", workers=1))
    return destination


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """q, k and v of a layer lie in several shards, so that they have partners elsewhere."""
    home = tmp_path_factory.mktemp("reproduce")
    checkpoints.write(home / "source", checkpoints.deal(checkpoints.llama(), 7), LICENSE="free")
    for scheme in SCHEMES:
        convert(home / "source", home / scheme, scheme=scheme)
    return home


def writable(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    for path in target.iterdir():
        path.chmod(0o644)
    return target


def again(result: Path, source: Path, tensor: str) -> tuple[tuple[str, ...], list[str]]:
    found, problems = reproduce(str(result), str(source), tensor)
    return found.outputs, [problem.kind for problem in problems]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_tensor_of_a_result_is_made_again(home: Path, scheme: str) -> None:
    names = set(checkpoints.read(home / "source"))
    outputs: set[str] = set()
    for name in names:
        made, kinds = again(home / scheme, home / "source", name)
        outputs |= set(made)
        assert kinds == []
    assert outputs == set(checkpoints.read(home / scheme))


@pytest.mark.parametrize("name", [Q, f"{Q}.weight", f"{Q}.weight_packed", f"{Q}.weight_global_scale"])
def test_a_tensor_is_found_by_any_of_its_names(home: Path, name: str) -> None:
    found, problems = reproduce(str(home / "NVFP4A16"), str(home / "source"), name)
    assert (found.tensor, problems) == (f"{Q}.weight", [])
    assert len(found.read) > 1  # partners of its fused set lie in other shards
    assert found.nbytes == 128 * 64 + 128 * 8 + 4


def test_a_stack_of_experts_is_made_again_as_a_whole(tmp_path: Path) -> None:
    config = {"model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    stack = "model.layers.0.mlp.experts"
    tensors = {
        f"{stack}.gate_up_proj": checkpoints.gaussian(1, 3, 64, 192),
        f"{stack}.down_proj": checkpoints.gaussian(2, 3, 96, 64),
        "model.norm.weight": checkpoints.gaussian(3, 64),
    }
    source = checkpoints.write(tmp_path / "source", [tensors], config=config)
    result = convert(source, tmp_path / "result", scheme="FP8_DYNAMIC")
    found, problems = reproduce(str(result), str(source), f"{stack}.1.up_proj")
    assert problems == []
    assert len(found.outputs) == 12


def test_weights_that_were_copied_for_their_values_are_copied_again(tmp_path: Path) -> None:
    tensors = checkpoints.llama()
    tensors[f"{Q}.weight"][0, 0] = torch.inf
    source = checkpoints.write(tmp_path / "source", checkpoints.deal(tensors, 3))
    result = convert(source, tmp_path / "result", scheme="W4A16", allow_nonfinite=True)
    for name in (Q, "model.layers.1.self_attn.q_proj"):
        assert again(result, source, name)[1] == []
    assert again(result, source, Q) == ((f"{Q}.weight",), [])


def test_other_bytes_are_named_with_the_first_of_them(home: Path, tmp_path: Path) -> None:
    result = writable(home / "NVFP4A16", tmp_path / "result")
    index = json.loads((result / "model.safetensors.index.json").read_text())
    path = result / index["weight_map"][f"{Q}.weight_packed"]
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    begin, _ = json.loads(data[8:header])[f"{Q}.weight_packed"]["data_offsets"]
    data[header + begin + 77] ^= 1
    path.write_bytes(data)

    found, [problem] = reproduce(str(result), str(home / "source"), Q)

    assert (problem.kind, problem.tensor) == ("bytes-differ", f"{Q}.weight_packed")
    assert "from byte 77 on" in problem.message
    assert problem.tensor in found.outputs
    assert again(result, home / "source", "model.layers.1.mlp.up_proj")[1] == []


def test_a_shard_of_another_result_lacks_what_is_made(home: Path, tmp_path: Path) -> None:
    result = writable(home / "NVFP4A16", tmp_path / "result")
    for shard in result.glob("*.safetensors"):
        shutil.copy(home / "MXFP4A16" / shard.name, shard)
    _, kinds = again(result, home / "source", Q)
    assert sorted(kinds) == ["shape-differs", "tensor-missing"]


def test_an_unknown_tensor_is_refused_with_the_closest_name(home: Path) -> None:
    with pytest.raises(CheckpointInvalid, match=r"did you mean `model\.layers\.0\.mlp\.up_proj\.weight`") as raised:
        reproduce(str(home / "FP8_DYNAMIC"), str(home / "source"), "model.layers.0.mlp.up_prj.weight")
    assert raised.value.problems[0].kind == "tensor-unknown"
    with pytest.raises(CheckpointInvalid, match="give the name"):
        reproduce(str(home / "FP8_DYNAMIC"), str(home / "source"), "x")


def test_another_source_is_refused(home: Path, tmp_path: Path) -> None:
    tensors = checkpoints.llama()
    tensors["model.layers.0.self_attn.k_proj.weight"][0, 0] += 1
    other = checkpoints.write(tmp_path / "other", checkpoints.deal(tensors, 7), LICENSE="free")
    with pytest.raises(CheckpointInvalid, match="expected blake3") as raised:
        reproduce(str(home / "NVFP4A16"), str(other), Q)
    assert {problem.kind for problem in raised.value.problems} == {"source-differs"}
    assert again(home / "NVFP4A16", other, "model.layers.1.mlp.up_proj")[1] == []  # its shard is the same


def test_a_version_that_would_do_another_job_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STAGE_VERSIONS, "quantize", 2)
    monkeypatch.setattr(module, "version", lambda _name: "9.9")
    with pytest.raises(Refused, match=r"the version that made it: shardmill 0\.1\.0 made the result, 9") as raised:
        reproduce(str(home / "NVFP4A16"), str(home / "source"), Q)
    assert raised.value.problems[0].kind == "version-differs"


def test_another_version_that_does_the_same_job_is_a_note(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "version", lambda _name: "9.9")
    notes: list[str] = []
    _, problems = reproduce(str(home / "NVFP4A16"), str(home / "source"), Q, VerifyWatch(on_note=notes.append))
    assert (problems, notes) == ([], ["shardmill 0.1.0 made the result, 9.9 is used here"])


def test_a_manifest_that_knows_no_content_of_the_source_is_refused(home: Path, tmp_path: Path) -> None:
    result = writable(home / "FP8_DYNAMIC", tmp_path / "result")
    document = json.loads((result / "shardmill.json").read_text())
    names = list(document["sources"])
    document["sources"] = {names[0]: "etag:abc"}
    (result / "shardmill.json").write_text(json.dumps(document))
    for tensor, message in ((of_the_first_shard(home), "only `etag`"), ("model.norm.weight", "has no digest of it")):
        with pytest.raises(CheckpointInvalid, match=message):
            reproduce(str(result), str(home / "source"), tensor)


def of_the_first_shard(home: Path) -> str:
    """A tensor of the first shard."""
    index: dict[str, str] = json.loads((home / "source" / "model.safetensors.index.json").read_text())["weight_map"]
    return next(name for name, shard in index.items() if shard.startswith("model-00001"))


# ---- SHA-256 ----------------------------------------------------------------------------------------------------


def test_sums_name_every_file_of_the_result_and_sha256sum_reads_them(home: Path, tmp_path: Path) -> None:
    result = home / "FP8_DYNAMIC"
    (tmp_path / "SHA256SUMS").write_text(sha256_sums(str(result)))

    lines = (tmp_path / "SHA256SUMS").read_text().splitlines()
    assert [line.partition("  ")[2] for line in lines] == sorted(path.name for path in result.iterdir())
    assert lines[0].partition("  ")[0] == hashlib.sha256((result / "LICENSE").read_bytes()).hexdigest()
    tool = shutil.which("sha256sum")
    if tool is not None:
        done = subprocess.run([tool, "--check", "--strict", str(tmp_path / "SHA256SUMS")], cwd=result, check=False)
        assert done.returncode == 0


def test_odd_names_are_escaped_as_sha256sum_does(tmp_path: Path) -> None:
    name = "a\\b\nc"
    (tmp_path / name).write_text("x")
    tool = shutil.which("sha256sum")
    if tool is None:
        pytest.skip("no sha256sum here")
    told = subprocess.run([tool, name], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert told == sum_line(hashlib.sha256(b"x").hexdigest(), name)
