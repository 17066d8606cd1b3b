"""Bad input and bad requests: exit code 2, every problem listed at once, nothing written, no traceback."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
from shardmill.cli import main

Damage = Callable[[Path], Any]
Q = "model.layers.0.self_attn.q_proj.weight"


def write_source(root: Path, **changes: torch.Tensor) -> Path:
    tensors = checkpoints.llama() | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return checkpoints.write(root, checkpoints.deal(tensors, 3))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


def shard(source: Path, number: int = 2) -> Path:
    return source / f"model-{number:05d}-of-00003.safetensors"


def edit_header(path: Path, old: bytes, new: bytes) -> None:
    assert len(old) == len(new)
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new, 1))


def edit_index(source: Path, change: Callable[[dict[str, str]], Any]) -> None:
    path = source / "model.safetensors.index.json"
    document = json.loads(path.read_text())
    change(document["weight_map"])
    path.write_text(json.dumps(document))


def replace(source: Path, name: str, tensor: torch.Tensor) -> None:
    """Write one shard anew with another tensor under a name that it has."""
    for path in sorted(source.glob("*.safetensors")):
        found = {key: value.clone() for key, value in load_file(path).items()}
        if name in found:
            save_file(found | {name: tensor}, path, metadata={"format": "pt"})
            return
    raise AssertionError(name)


BAD_SOURCES: list[tuple[str, Damage, list[str], list[str]]] = [
    ("missing shard", lambda s: shard(s).unlink(), [], ["`model-00002-of-00003.safetensors`: file is missing"]),
    (
        "truncated shard",
        lambda s: os.truncate(shard(s), 30_000),
        [],
        ["`model-00002-of-00003.safetensors`: expected", "found 30000", "fetch the file again"],
    ),
    ("truncated header", lambda s: os.truncate(shard(s), 40), [], ["`model-00002-of-00003.safetensors`: header says"]),
    ("empty shard", lambda s: os.truncate(shard(s), 0), [], ["expected a safetensors file, found 0 bytes"]),
    (
        "index places a tensor elsewhere",
        lambda s: edit_index(s, lambda m: m.update({Q: shard(s, 3).name})),
        [],
        [f"tensor `{Q}`", "the index places it in this shard, it is in `model-00001-of-00003.safetensors`"],
    ),
    (
        "index names a tensor that is nowhere",
        lambda s: edit_index(s, lambda m: m.update(ghost=shard(s).name)),
        [],
        ["tensor `ghost`", "no shard that was read has it"],
    ),
    ("index is no JSON", lambda s: (s / "model.safetensors.index.json").write_text("{"), [], ["not valid JSON"]),
    ("index leads out", lambda s: edit_index(s, lambda m: m.update(x="../x.safetensors")), [], ["`../x.safetensors`"]),
    (
        "unknown dtype",
        lambda s: edit_header(shard(s), b'"BF16"', b'"BF17"'),
        [],
        ["`model-00002-of-00003.safetensors` tensor", "unknown dtype `BF17`"],
    ),
    (
        "already quantized dtype",
        lambda s: replace(s, Q, torch.ones(128, 128).to(torch.float8_e4m3fn)),
        [],
        [f"tensor `{Q}`", "expected F16, BF16, F32 or F64, found F8_E4M3", "add it to `ignore`"],
    ),
    (
        "quantized config",
        lambda s: (s / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}'),
        [],
        ["`config.json`: the source has a quantization_config"],
    ),
    ("no config", lambda s: (s / "config.json").unlink(), [], ["`config.json`: file is missing"]),
    (
        "config is no object",
        lambda s: (s / "config.json").write_text("[]"),
        [],
        ["`config.json`: expected a JSON object"],
    ),
    (
        "wrong rank of an explicit target",
        lambda _: None,
        ["--recipe", "norms.json"],
        ["tensor `model.norm.weight`: expected a matrix, found shape [128]"],
    ),
    (
        "indivisible group",
        lambda s: replace(s, Q, torch.ones(128, 96, dtype=torch.bfloat16)),
        ["--scheme", "W4A16"],
        [f"tensor `{Q}`", "group_size 128 does not divide in_features 96 (shape [128, 96])", "(48, 32, 24, 16, 12, 8)"],
    ),
    ("a pattern that matches nothing", lambda _: None, ["--ignore", "model.layers.7"], ["`model.layers.7` in ignore"]),
    ("no tensor matched", lambda _: None, ["--ignore", "re:.*"], ["the recipe quantizes no tensor"]),
    ("an invalid expression", lambda _: None, ["--ignore", "re:("], ["pattern `re:(` is no valid expression"]),
    ("an unknown scheme", lambda _: None, ["--scheme", "W9A9"], ["unknown scheme `W9A9`", "W4A16"]),
    ("a scheme that needs data", lambda _: None, ["--scheme", "FP8"], ["FP8_DYNAMIC needs none"]),
    ("a group size that is fixed", lambda _: None, ["--group-size", "64"], ["group_size 64 does not fit scheme"]),
    ("group size beside a recipe", lambda _: None, ["--recipe", "norms.json", "--group-size", "64"], ["--group-size"]),
    ("a fused set that is torn", lambda _: None, ["--ignore", Q.removesuffix(".weight")], ["engines fuse"]),
    ("a recipe that is missing", lambda _: None, ["--recipe", "none.json"], ["`none.json`: the recipe cannot be read"]),
    ("a recipe that is no JSON", lambda _: None, ["--recipe", "bad.json"], ["`bad.json`: not valid JSON"]),
    ("a recipe that is no YAML", lambda _: None, ["--recipe", "bad.yaml"], ["`bad.yaml`: not valid YAML"]),
    ("a recipe of another kind", lambda _: None, ["--recipe", "bad.toml"], ["expected a file that ends in .json"]),
    ("a recipe with unknown fields", lambda _: None, ["--recipe", "odd.yaml"], ["unknown fields: `shceme`"]),
]


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with recipe files."""
    (tmp_path / "norms.json").write_text('{"scheme": "FP8_DYNAMIC", "targets": ["model.norm", "Linear"]}')
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "bad.toml").write_text("")
    (tmp_path / "odd.yaml").write_text("shceme: W4A16\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(
    ("damage", "arguments", "expected"), [row[1:] for row in BAD_SOURCES], ids=[row[0] for row in BAD_SOURCES]
)
@pytest.mark.usefixtures("recipes")
def test_a_bad_input_is_refused_with_its_reason(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Damage,
    arguments: list[str],
    expected: list[str],
    command: str,
) -> None:
    damage(source)
    before = sorted(tmp_path.iterdir())
    places = [str(source)] if command == "plan" else [str(source), str(tmp_path / "result")]
    assert main([command, *places, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "refused: " in err
    assert "Traceback" not in err
    assert [text for text in expected if text not in err] == []
    assert max(map(len, err.splitlines())) <= 302
    assert sorted(tmp_path.iterdir()) == before


def test_all_problems_are_told_at_once(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / "config.json").unlink()
    shard(source, 3).unlink()
    edit_index(source, lambda m: m.update(ghost=shard(source, 1).name))
    replace(source, Q, torch.ones(128, 128).to(torch.float8_e4m3fn))
    replace(source, "model.layers.0.mlp.down_proj.weight", torch.ones(128, 100))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    arguments = ["run", str(source), str(tmp_path / "taken"), "--scheme", "W4A16", "--ignore", "nowhere", "--json"]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["status"] == "refused"
    assert {problem["kind"] for problem in document["problems"]} == {
        "already-quantized",
        "destination-in-use",
        "file-missing",
        "group-indivisible",
        "index-disagrees",
        "pattern-unmatched",
    }
    assert {p["file"] for p in document["problems"] if p["kind"] == "file-missing"} == {
        "config.json",
        shard(source, 3).name,
    }
    assert all(problem["message"] in err for problem in document["problems"])
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["notes.txt"]
    assert not (tmp_path / ".shardmill").exists()


def test_a_hundred_problems_are_printed_and_all_are_in_the_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {f"model.layers.{n}.mlp.down_proj.weight": checkpoints.gaussian(n, 8, 100) for n in range(130)}
    source = checkpoints.write(tmp_path / "source", [tensors])
    assert main(["plan", str(source), "--scheme", "W4A16", "--json"]) == 2
    out, err = capsys.readouterr()
    assert len(json.loads(out)["problems"]) == 130
    assert sum("group_size 128" in line for line in err.splitlines()) == 100
    assert "… and 30 more" in err


# ---- destinations -----------------------------------------------------------------------------------------------


def link(home: Path) -> None:
    (home / "elsewhere").mkdir()
    (home / "taken").symlink_to(home / "elsewhere")


def fill(path: Path) -> None:
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"other")


BAD_DESTINATIONS: list[tuple[str, str, Damage]] = [
    ("another folder", "taken", lambda h: fill(h / "taken")),
    ("a file", "taken", lambda h: (h / "taken").write_text("x")),
    ("a link", "taken", link),
    ("the source", "source", lambda _: None),
    ("inside the source", "source/result", lambda _: None),
    ("around the source", ".", lambda _: None),
    ("no storage of ours", "gs://bucket/model", lambda _: None),
    ("the Hub", "hf://organization/model", lambda _: None),
    ("a key in the URL", "s3://AKIA:secret@bucket/model", lambda _: None),
]


@pytest.mark.parametrize(
    ("destination", "damage"), [row[1:] for row in BAD_DESTINATIONS], ids=[r[0] for r in BAD_DESTINATIONS]
)
@pytest.mark.parametrize("extra", [[], ["--dry-run"]])
def test_a_bad_destination_is_refused(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    destination: str,
    damage: Damage,
    extra: list[str],
) -> None:
    damage(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    store = str(tmp_path.parent / f"{tmp_path.name}-store")
    assert main(["run", str(source), destination, "--store", store, *extra]) == 2
    assert "refused: " in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_result_of_another_plan_is_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    destination = str(tmp_path / "result")
    assert main(["run", str(source), destination, "--device", "cpu"]) == 0
    before = (tmp_path / "result" / "config.json").read_bytes()
    assert main(["run", str(source), destination, "--device", "cpu", "--scheme", "W8A8"]) == 2
    assert "it holds the result of another plan" in capsys.readouterr().err
    assert (tmp_path / "result" / "config.json").read_bytes() == before


# ---- requests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["plan", "nowhere"], "`nowhere`: expected a folder"),
        (["plan", "gs://bucket/x"], "locations of kind `gs` are not supported"),
        (["plan", "s3://AKIA:secret@bucket/x"], "`s3://…@bucket/x`: expected no user, key or option in the URL"),
        (["run", "source", "hf://organization/model", "--store", "store"], "the Hub is a source only"),
        (["run", "nowhere", "result"], "`nowhere`: expected a folder"),
        (["run", "source", "result", "--search", "mse", "--search-norm", "2.4"], "norm of a search must be one of 1.0"),
        (["plan", "source", "--search-norm", "2.5"], "--search-norm goes with --search mse"),
        (["run", "source", "result", "--device", "cuda:77"], "device `cuda:77` is not on this machine"),
        (["run", "source", "result", "--device", "toaster,cpu"], "device `toaster` is not on this machine"),
        (["verify", "nowhere"], "`nowhere`: expected a folder"),
        (["report", "nowhere"], "`nowhere`: expected a folder"),
        (["report", "source"], "`shardmill.json`: file is missing"),
        (["report", "source", "--html", "nowhere/x.html"], "`nowhere/x.html`: expected a file, found no folder"),
        (["report", "source", "--json", "source"], "`source`: expected a file, found a folder"),
        (["report", "source", "--card", "source/config.json"], "there is a file that shardmill did not write"),
        (["report", "source", "--html", "hf://a/b"], "`hf://a/b`: no file can be written there"),
        (["run", "source", "result", "--html", "nowhere/x.html"], "expected a file, found no folder"),
        (["run", "source", "result", "--card", "source/config.json"], "a file that shardmill did not write"),
        (["verify", "source", "--sha256", "source"], "expected a file, found a folder"),
        (["verify", "source", "--reproduce", "a"], "expected --against SRC"),
        (["verify", "x", "--against", "y", "--reproduce", "a", "--sha256", "z"], "goes without --sha256"),
        (["verify", "source", "--against", "source", "--reproduce", "a"], "`shardmill.json`: file is missing"),
        (["store", "ls"], "expected a store, found none"),
        (["store", "verify", "--store", "source"], "expected a store, found none"),
    ],
)
@pytest.mark.usefixtures("source")
def test_a_request_that_cannot_be_met_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, expected in err, "Traceback" in err) == ("", True, False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["plan"],
        ["run", "source"],
        ["plan", "a", "b"],
        ["plan", "a", "--surprise"],
        ["plan", "a", "--scheme", "W4A16", "--recipe", "x.json"],
        ["plan", "a", "--group-size", "0"],
        ["plan", "a", "--indivisible", "maybe"],
        ["plan", "a", "--sch", "W4A16"],
        ["run", "a", "b", "--workers", "many"],
        ["run", "a", "b", "--verify", "none"],
        ["store"],
        ["store", "gc", "--older-than", "yesterday"],
        ["store", "gc", "--older-than", "-1"],
    ],
)
def test_a_command_line_that_cannot_be_read_is_a_usage_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert "usage: shardmill" in err


# ---- values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "NVFP4A16"])
def test_values_that_are_not_finite_are_named_and_nothing_is_published(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], scheme: str, value: float
) -> None:
    bad = checkpoints.gaussian(1, 128, 128)
    bad[77, 3] = value
    bad[99, 0] = value
    replace(source, Q, bad)
    destination = tmp_path / "result"
    arguments = ["run", str(source), str(destination), "--scheme", scheme, "--device", "cpu", "--workers", "2"]
    assert main([*arguments, "--json"]) == 2
    out, err = capsys.readouterr()
    document = json.loads(out)
    problems = [problem for problem in document["problems"] if problem["tensor"] == Q]
    assert {problem["kind"] for problem in document["problems"]} == {"non-finite"}
    assert "first at index [77, 3]" in problems[0]["message"]
    assert problems[0]["message"] in err
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == [".shardmill", "source"]
    kept = len(list((tmp_path / ".shardmill" / "receipts").iterdir()))
    assert document["message"] == f"{3 - kept} of 3 shards failed; {kept} are finished and kept in the store"
    assert kept == {"FP8_DYNAMIC": 2, "NVFP4A16": 2}[scheme]
