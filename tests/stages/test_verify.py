"""Results are sound when written, and every single defect is found and named afterwards."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import checkpoints
from asked import asked
from shardmill.core.recipe import parse_recipe
from shardmill.core.scheme import PRESETS
from shardmill.errors import CheckpointInvalid, Problem, Refused
from shardmill.kernels.compare import compare, scale_defect, widen_scales
from shardmill.stages.compare import param_range
from shardmill.stages.pipeline import RunOptions, run
from shardmill.stages.plan import Locations
from shardmill.stages.result import read_result
from shardmill.stages.verify import VerifyWatch, serving_warnings, verify, verify_against

Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.0.self_attn.k_proj"
MOE = {"model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}


def convert(source: Path, destination: Path, recipe: Any) -> Path:
    locations = Locations(source=str(source), destination=str(destination))
    run(locations, parse_recipe(recipe), RunOptions(device="cpu", workers=1))
    return destination


def unlink_copy(source: Path, target: Path) -> Path:
    """A copy that may be written, with no hard link to the store."""
    shutil.copytree(source, target)
    for path in target.iterdir():
        path.chmod(0o644)
    return target


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("verify")
    source = checkpoints.write(home / "source", checkpoints.deal(checkpoints.llama(), 3), LICENSE="free")
    (source / "tokenizer.json").write_text("{}")
    for scheme in ("NVFP4A16", "FP8_DYNAMIC", "W4A16_ASYM", "MXFP4A16"):
        convert(home / "source", home / scheme, {"scheme": scheme})
    return home


@pytest.fixture
def result(home: Path, tmp_path: Path) -> Path:
    """A sound NVFP4 result that a test may damage."""
    return unlink_copy(home / "NVFP4A16", tmp_path / "result")


def kinds(problems: list[Problem]) -> set[str]:
    return {problem.kind for problem in problems}


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def place_of(root: Path, tensor: str) -> tuple[Path, int, int]:
    """File of a tensor, and its first and last byte in it."""
    index = json.loads((root / "model.safetensors.index.json").read_text())
    path = root / index["weight_map"][tensor]
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + length])[tensor]["data_offsets"]
    return path, 8 + length + begin, 8 + length + end


def overwrite(root: Path, tensor: str, data: bytes, at: int = 0) -> None:
    path, begin, end = place_of(root, tensor)
    assert begin + at + len(data) <= end
    with path.open("r+b") as file:
        file.seek(begin + at)
        file.write(data)


def forget_manifest(root: Path) -> None:
    (root / "shardmill.json").unlink()


# ---- sound results ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", sorted(PRESETS))
def test_every_preset_passes_alone_and_against_its_source(home: Path, tmp_path: Path, scheme: str) -> None:
    destination = convert(home / "source", tmp_path / "result", asked(scheme))
    rows, problems = verify_against(str(destination), str(home / "source"))
    assert verify(str(destination)) == []
    assert problems == []
    assert len(rows) == 14
    assert not any(row.is_unusual for row in rows)
    assert {row.scheme for row in rows} == {scheme}
    stated = [(row.stated, row.statistics.relative_error) for row in rows]
    assert all(said == pytest.approx(found, rel=0.005) for said, found in stated)


def test_verification_tells_its_progress_and_what_it_leaves_out(home: Path, result: Path) -> None:
    totals: list[int] = []
    counts: list[int] = []
    notes: list[str] = []
    watch = VerifyWatch(on_total=totals.append, on_bytes=counts.append, on_note=notes.append)
    assert verify(str(result), watch) == []
    assert totals == [sum(counts)] == [sum(path.stat().st_size for path in result.glob("*.safetensors"))]
    verify_against(str(result), str(home / "source"), watch)
    assert sum(totals) == sum(counts)
    assert notes == []


def test_results_of_a_mixed_recipe_with_a_single_shard_pass(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "source", [checkpoints.llama()])
    recipe = {
        "groups": [
            {"scheme": "NVFP4A16", "targets": ["re:.*self_attn"]},
            {"scheme": "W4A16_ASYM", "targets": ["Linear"]},
        ],
        "ignore": ["re:.*layers.1.mlp"],
    }
    destination = convert(source, tmp_path / "result", recipe)
    rows, problems = verify_against(str(destination), str(source))
    assert (verify(str(destination)), problems, len(rows)) == ([], [], 11)


@pytest.mark.parametrize("expert_layout", ["interleaved", "columns", "rows"])
@pytest.mark.parametrize("scheme", ["MXFP4A16", "NVFP4A16"])
def test_split_stacks_are_compared_expert_by_expert(tmp_path: Path, scheme: str, expert_layout: str) -> None:
    prefix = "model.layers.0.mlp.experts"
    up, down = ((192, 64), (64, 96)) if expert_layout == "rows" else ((64, 192), (96, 64))
    tensors = {
        f"{prefix}.gate_up_proj": checkpoints.gaussian(1, 3, *up),
        f"{prefix}.gate_up_proj_bias": checkpoints.gaussian(2, 3, 192),
        f"{prefix}.down_proj": checkpoints.gaussian(3, 3, *down),
        f"{prefix}.down_proj_bias": checkpoints.gaussian(4, 3, 64),
        "model.norm.weight": checkpoints.gaussian(5, 64),
    }
    source = checkpoints.write(tmp_path / "source", [tensors], MOE)
    destination = convert(source, tmp_path / "result", {"scheme": scheme, "expert_layout": expert_layout})
    rows, problems = verify_against(str(destination), str(source))
    assert (verify(str(destination)), problems, len(rows)) == ([], [], 9)
    assert not any(row.is_unusual for row in rows)
    damaged = unlink_copy(destination, tmp_path / "damaged")
    single = damaged / "model.safetensors"
    written = checkpoints.read(damaged)
    written[f"{prefix}.1.up_proj.bias"] = written[f"{prefix}.1.gate_proj.bias"].clone()
    save_file(written, single)
    _, problems = verify_against(str(damaged), str(source))
    assert [(p.tensor, p.kind) for p in problems] == [(f"{prefix}.1.up_proj.bias", "copy-differs")]


@pytest.mark.parametrize("scheme", ["W3A16", "W4A16_ASYM", "FP8_BLOCK", "NVFP4A16", "W8A8"])
def test_row_blocks_do_not_change_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    tensors = {"m.o_proj.weight": checkpoints.gaussian(1, 200, 256), "m.norm": checkpoints.gaussian(2, 999)}
    source = checkpoints.write(tmp_path / "source", [tensors])
    destination = convert(source, tmp_path / "result", {"scheme": scheme})
    whole, _ = verify_against(str(destination), str(source))
    monkeypatch.setattr("shardmill.stages.result.BLOCK_BYTES", 100)
    assert verify(str(destination)) == []
    parts, problems = verify_against(str(destination), str(source))
    assert problems == []
    assert parts[0].statistics.relative_error == pytest.approx(whole[0].statistics.relative_error, rel=1e-9)


@pytest.mark.parametrize(
    ("scheme", "param", "dtype", "expected"),
    [
        ("W3A16", "weight_packed", "I32", (64, 96)),
        ("W4A16_ASYM", "weight_zero_point", "I32", (8, 12)),
        ("W4A16_ASYM", "weight_scale", "BF16", (64, 96)),
        ("MXFP4A16", "weight_scale", "U8", (64, 96)),
    ],
)
def test_parts_of_params(home: Path, scheme: str, param: str, dtype: str, expected: tuple[int, int]) -> None:
    base = "W4A16_ASYM" if scheme.startswith("W") else scheme
    group = read_result(str(home / base)).config.groups[0]
    assert param_range(f"m.{param}", dtype, group, 64, 32) == expected


# ---- negative control: global scales that engines would merge wrongly --------------------------------------------


def unshare(home: Path, tmp_path: Path) -> Path:
    """The NVFP4 result of another tool that gives every weight a global scale of its own, as a plain folder."""
    tensors = checkpoints.llama()
    tensors[K] = tensors.pop(f"{K}.weight") * 3
    alone = {f"m.{number}.o_proj.weight": weight for number, weight in enumerate([tensors[K]])}
    source = checkpoints.write(tmp_path / "alone", [alone])
    single = checkpoints.read(convert(source, tmp_path / "single", {"scheme": "NVFP4A16"}))
    result = unlink_copy(home / "NVFP4A16", tmp_path / "unshared")
    forget_manifest(result)
    path, _, _ = place_of(result, f"{K}.weight_packed")
    shard = {name: tensor for name, tensor in checkpoints.read(result).items() if place_of(result, name)[0] == path}
    for param in ("weight_packed", "weight_scale", "weight_global_scale"):
        shard[f"{K}.{param}"] = single[f"m.0.o_proj.{param}"]
    save_file(shard, path, metadata={"format": "pt"})
    return result


def test_unshared_global_scales_of_another_tool_are_refused(home: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    problems = verify(str(unshare(home, tmp_path)), VerifyWatch(on_note=notes.append))
    assert [(p.kind, p.tensor) for p in problems] == [("fused-scales-differ", f"{K}.weight_global_scale")]
    assert "k_proj" in problems[0].message
    assert "q_proj" in problems[0].message
    assert len(notes) == 1
    assert "shardmill.json" in notes[0]


def test_a_changed_global_scale_is_found_in_our_own_result(result: Path) -> None:
    overwrite(result, f"{K}.weight_global_scale", struct.pack("<f", 17.0))
    assert kinds(verify(str(result))) == {"fused-scales-differ", "digest-differs"}


def test_the_same_result_with_shared_scales_passes_without_its_manifest(result: Path) -> None:
    forget_manifest(result)
    assert verify(str(result)) == []


# ---- one defect each --------------------------------------------------------------------------------------------


def shard(root: Path, number: int = 2) -> Path:
    return root / f"model-{number:05d}-of-00003.safetensors"


def truncate(path: Path, size: int) -> None:
    os.truncate(path, size)


def replace_by_folder(root: Path) -> None:
    shard(root).unlink()
    shard(root).mkdir()


def swap(root: Path) -> None:
    shard(root, 2).rename(root / "spare")
    shard(root, 3).rename(shard(root, 2))
    (root / "spare").rename(shard(root, 3))


def header_edit(root: Path, old: bytes, new: bytes) -> None:
    assert len(old) == len(new)
    path = next(path for path in sorted(root.glob("*.safetensors")) if old in path.read_bytes())
    path.write_bytes(path.read_bytes().replace(old, new, 1))


def flip(root: Path, tensor: str) -> None:
    path, begin, _ = place_of(root, tensor)
    data = bytearray(path.read_bytes())
    data[begin] ^= 1
    path.write_bytes(data)


def section(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A change of the quantization_config."""
    return lambda root: edit_json(root / "config.json", lambda config: change(config["quantization_config"]))


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda root: edit_json(root / "shardmill.json", change)


def index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda root: edit_json(root / "model.safetensors.index.json", lambda found: change(found["weight_map"]))


DEFECTS: list[tuple[str, Callable[[Path], Any], str, str]] = [
    ("config missing", lambda r: (r / "config.json").unlink(), "file-missing", "config.json"),
    ("config truncated", lambda r: truncate(r / "config.json", 9), "config-invalid", "config.json"),
    ("config of the source", section(dict.clear), "config-unquantized", "config.json"),
    (
        "other field of config",
        lambda r: edit_json(r / "config.json", lambda c: c.update(vocab_size=7)),
        "config-changed",
        "config.json",
    ),
    ("ignore emptied", section(lambda s: s.update(ignore=[])), "dense-targeted", "model.embed_tokens.weight"),
    ("a module ignored", section(lambda s: s["ignore"].append(Q)), "module-ignored", Q),
    (
        "targets changed",
        section(lambda s: s["config_groups"]["group_00"].update(targets=["re:.*mlp"])),
        "module-unmatched",
        Q,
    ),
    (
        "scheme changed",
        section(lambda s: s["config_groups"]["group_00"]["weights"].update(group_size=32)),
        "config-invalid",
        "config.json",
    ),
    (
        "format changed",
        section(lambda s: s["config_groups"]["group_00"].update(format="mxfp4-pack-quantized")),
        "config-invalid",
        "config.json",
    ),
    ("unknown field", section(lambda s: s.update(surprise=1)), "config-not-read", "config.json"),
    ("index missing", lambda r: (r / "model.safetensors.index.json").unlink(), "index-missing", ""),
    (
        "index truncated",
        lambda r: truncate(r / "model.safetensors.index.json", 99),
        "index-invalid",
        "model.safetensors.index.json",
    ),
    ("index names a ghost", index(lambda m: m.update(ghost=shard(Path()).name)), "index-disagrees", "ghost"),
    ("index misses a tensor", index(lambda m: m.pop(f"{Q}.weight_scale")), "index-disagrees", f"{Q}.weight_scale"),
    (
        "index points elsewhere",
        index(lambda m: m.update({f"{Q}.weight_scale": shard(Path(), 3).name})),
        "index-disagrees",
        f"{Q}.weight_scale",
    ),
    ("manifest truncated", lambda r: truncate(r / "shardmill.json", 99), "manifest-invalid", "shardmill.json"),
    ("manifest schema", manifest(lambda m: m.update(schema=9)), "manifest-invalid", "shardmill.json"),
    ("manifest misses a shard", manifest(lambda m: m["shards"].pop()), "file-unlisted", shard(Path(), 3).name),
    (
        "manifest knows no such tensor",
        manifest(lambda m: m["shards"][0]["tensors"].pop(0)),
        "manifest-disagrees",
        "model.embed_tokens.weight",
    ),
    ("manifest misses a weight", manifest(lambda m: m["shards"][0]["weights"].pop(0)), "manifest-disagrees", ""),
    (
        "manifest with weak digests",
        manifest(lambda m: m["shards"][0].update(digest="md5:00")),
        "manifest-invalid",
        shard(Path(), 1).name,
    ),
    (
        "manifest of another key",
        manifest(lambda m: m["shards"][0].update(key="0" * 64)),
        "config-changed",
        "config.json",
    ),
    (
        "manifest of another size",
        manifest(lambda m: m["shards"][0].update(size=7)),
        "size-differs",
        shard(Path(), 1).name,
    ),
    ("shard missing", lambda r: shard(r).unlink(), "file-missing", shard(Path()).name),
    ("shard is a folder", replace_by_folder, "file-irregular", shard(Path()).name),
    ("shard truncated", lambda r: truncate(shard(r), 9999), "shard-truncated", shard(Path()).name),
    (
        "shard padded",
        lambda r: shard(r).write_bytes(shard(r).read_bytes() + b"\0"),
        "shard-too-long",
        shard(Path()).name,
    ),
    ("shards swapped", swap, "index-disagrees", ""),
    ("a bit of codes", lambda r: flip(r, f"{Q}.weight_packed"), "digest-differs", shard(Path(), 1).name),
    ("a bit of a norm", lambda r: flip(r, "model.norm.weight"), "digest-differs", shard(Path(), 3).name),
    ("a dtype in a header", lambda r: header_edit(r, b'"dtype":"U8"', b'"dtype":"I8"'), "params-differ", ""),
    ("a shape in a header", lambda r: header_edit(r, b"[128,64]", b"[64,128]"), "params-differ", ""),
    ("a name in a header", lambda r: header_edit(r, b"gate_proj", b"gate_prok"), "index-disagrees", ""),
    ("another shard", lambda r: shutil.copy(shard(r), r / "more.safetensors"), "file-unlisted", "more.safetensors"),
    ("a pickle", lambda r: (r / "pytorch_model.bin").write_bytes(b""), "file-unlisted", "pytorch_model.bin"),
    ("tokenizer changed", lambda r: (r / "tokenizer.json").write_text("[]"), "digest-differs", "tokenizer.json"),
    ("tokenizer missing", lambda r: (r / "tokenizer.json").unlink(), "file-missing", "tokenizer.json"),
    ("licence missing", lambda r: (r / "LICENSE").unlink(), "file-missing", "LICENSE"),
]


@pytest.mark.parametrize(("damage", "kind", "name"), [row[1:] for row in DEFECTS], ids=[row[0] for row in DEFECTS])
def test_one_defect_is_found_and_named(result: Path, damage: Callable[[Path], Any], kind: str, name: str) -> None:
    damage(result)
    problems = verify(str(result))
    named = [p for p in problems if p.kind == kind and name in (p.file, p.tensor, "")]
    assert named, problems
    assert all(len(str(problem)) <= 300 for problem in problems)
    assert problems == sorted(problems)


@pytest.mark.parametrize("scheme", ["NVFP4A16", "FP8_DYNAMIC", "W4A16_ASYM", "MXFP4A16"])
@pytest.mark.parametrize("value", ["nan", "inf", "negative", "zero"])
def test_scales_are_finite_and_positive(home: Path, tmp_path: Path, scheme: str, value: str) -> None:
    octets = {
        "NVFP4A16": {"nan": b"\x7f", "inf": b"\xff", "negative": b"\x80", "zero": b"\0"},
        "FP8_DYNAMIC": {"nan": b"\xc0\x7f", "inf": b"\x80\x7f", "negative": b"\x80\xbf", "zero": b"\0\0"},
        "W4A16_ASYM": {"nan": b"\xc0\x7f", "inf": b"\x80\x7f", "negative": b"\x80\xbf", "zero": b"\0\0"},
        "MXFP4A16": dict.fromkeys(["nan", "inf", "negative", "zero"], b"\xff"),
    }[scheme][value]
    damaged = unlink_copy(home / scheme, tmp_path / "damaged")
    forget_manifest(damaged)
    overwrite(damaged, f"{Q}.weight_scale", octets, at=len(octets))
    problems = verify(str(damaged))
    assert [(p.kind, p.tensor) for p in problems] == [("scale-unsound", f"{Q}.weight_scale")]
    assert problems[0].message.startswith("1 of ")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0])
def test_global_scales_are_finite_and_positive(result: Path, value: float) -> None:
    forget_manifest(result)
    name = "model.layers.0.self_attn.o_proj.weight_global_scale"
    overwrite(result, name, struct.pack("<f", value))
    assert [(p.kind, p.tensor) for p in verify(str(result))] == [("scale-unsound", name)]


def test_the_stored_shape_of_packed_integers_must_fit(home: Path, tmp_path: Path) -> None:
    damaged = unlink_copy(home / "W4A16_ASYM", tmp_path / "damaged")
    forget_manifest(damaged)
    overwrite(damaged, f"{Q}.weight_shape", struct.pack("<qq", 128, 256))
    overwrite(damaged, f"{K}.weight_shape", struct.pack("<qq", 0, -1))
    problems = verify(str(damaged))
    assert {(p.kind, p.tensor) for p in problems} == {("params-differ", Q), ("params-differ", K)}


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match="expected a folder"):
        verify(str(tmp_path / "nowhere"))


def test_an_unquantized_checkpoint_is_no_result(home: Path) -> None:
    assert kinds(verify(str(home / "source"))) == {"config-unquantized"}


def test_another_tools_older_config_is_a_note(result: Path) -> None:
    forget_manifest(result)
    section(lambda s: s.update(surprise=1))(result)
    notes: list[str] = []
    assert verify(str(result), VerifyWatch(on_note=notes.append)) == []
    assert any("surprise" in note for note in notes)


def test_files_that_the_manifest_does_not_name_are_told_of(result: Path) -> None:
    for name in ("modeling_evil.py", "LICENSE.more", ".gitattributes"):
        (result / name).write_text("")
    notes: list[str] = []
    assert verify(str(result), VerifyWatch(on_note=notes.append)) == []
    assert notes == ["2 files that the manifest does not name, the first is `LICENSE.more`"]


ODD: list[Any] = [None, True, -1, 0, 2**70, 1.5, 1e308, "x", "", [], {}, "re:(", ["x"], {"a": 1}, "Linear", [[]]]


def mutate(value: Any, random: Random) -> Any:
    """A JSON value in which a few parts are replaced, lost or new."""
    if random.random() < 0.03:
        return random.choice(ODD)
    if isinstance(value, dict):
        kept = {key: mutate(entry, random) for key, entry in value.items() if random.random() > 0.01}
        return kept | ({"stranger": 1} if random.random() < 0.03 else {})
    return [mutate(entry, random) for entry in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["config.json", "shardmill.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("seed", range(15))
def test_mutated_documents_give_problems_and_never_crash(home: Path, result: Path, name: str, seed: int) -> None:
    text = json.dumps(mutate(json.loads((result / name).read_text()), Random(seed)))  # noqa: S311  no secrets
    (result / name).write_text(text)
    problems = verify(str(result)) + verify_against(str(result), str(home / "source"))[1]
    assert all(len(str(problem)) <= 300 and str(problem).isprintable() for problem in problems)


# ---- against the source -----------------------------------------------------------------------------------------


def test_a_flipped_bit_of_a_copied_tensor_is_found(home: Path, result: Path) -> None:
    path, begin, _ = place_of(result, "model.norm.weight")
    overwrite(result, "model.norm.weight", bytes([path.read_bytes()[begin + 7] ^ 1]), at=7)
    _, problems = verify_against(str(result), str(home / "source"))
    assert [(p.kind, p.tensor) for p in problems] == [("copy-differs", "model.norm.weight")]
    assert "byte 7" in problems[0].message


def test_ruined_codes_are_found(home: Path, result: Path) -> None:
    _, begin, end = place_of(result, f"{Q}.weight_packed")
    overwrite(result, f"{Q}.weight_packed", bytes(end - begin))
    rows, problems = verify_against(str(result), str(home / "source"))
    assert {(p.kind, p.tensor) for p in problems} == {("error-too-large", Q), ("statistics-disagree", Q)}
    assert [row.module for row in rows if row.is_unusual] == [Q]


def test_figures_that_the_manifest_makes_up_are_found(home: Path, result: Path) -> None:
    manifest(lambda m: m["shards"][0]["weights"][0].update(squared_error=1e-9))(result)
    module = json.loads((result / "shardmill.json").read_text())["shards"][0]["weights"][0]["module"]
    _, problems = verify_against(str(result), str(home / "source"))
    assert [(p.kind, p.tensor) for p in problems] == [("statistics-disagree", module)]


def test_without_a_manifest_there_is_nothing_to_disagree_with(home: Path, result: Path) -> None:
    forget_manifest(result)
    rows, problems = verify_against(str(result), str(home / "source"))
    assert problems == []
    assert {row.stated for row in rows} == {None}
    assert {row.scheme for row in rows} == {"float4 tensor_group 16"}


def edited_source(tmp_path: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    tensors = checkpoints.llama()
    change(tensors)
    return checkpoints.write(tmp_path / "edited", [tensors])


def test_a_tensor_of_the_source_that_is_missing_is_named(result: Path, tmp_path: Path) -> None:
    source = edited_source(tmp_path, lambda t: t.update({"model.extra.weight": torch.ones(3)}))
    _, problems = verify_against(str(result), str(source))
    assert [(p.kind, p.tensor) for p in problems] == [("tensor-missing", "model.extra.weight")]


def test_a_tensor_that_the_source_does_not_have_is_named(result: Path, tmp_path: Path) -> None:
    source = edited_source(tmp_path, lambda t: [t.pop("model.norm.weight"), t.pop(f"{Q}.weight")])
    rows, problems = verify_against(str(result), str(source))
    assert kinds(problems) == {"tensor-unexpected"}
    assert {p.tensor for p in problems} == {
        "model.norm.weight",
        *(f"{Q}.weight_{p}" for p in ("packed", "scale", "global_scale")),
    }
    assert len(rows) == 13


def test_a_source_of_other_shapes_is_not_the_source(result: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.weight"] = checkpoints.gaussian(1, 256, 128)
        tensors[f"{K}.weight"] = checkpoints.gaussian(1, 64)
        tensors["model.norm.weight"] = checkpoints.gaussian(1, 64)

    _, problems = verify_against(str(result), str(edited_source(tmp_path, change)))
    found = {(p.kind, p.tensor) for p in problems}
    assert ("shape-differs", Q) in found
    assert ("copy-differs", "model.norm.weight") in found
    assert ("tensor-unexpected", f"{K}.weight_packed") in found


def test_another_fine_tune_is_not_the_source(result: Path, tmp_path: Path) -> None:
    source = edited_source(tmp_path, lambda t: t.update({f"{Q}.weight": checkpoints.gaussian(99, 128, 128)}))
    _, problems = verify_against(str(result), str(source))
    assert {(p.kind, p.tensor) for p in problems} == {("error-too-large", Q), ("statistics-disagree", Q)}


def test_a_damaged_source_is_refused(home: Path, result: Path, tmp_path: Path) -> None:
    source = unlink_copy(home / "source", tmp_path / "broken")
    truncate(source / "model-00002-of-00003.safetensors", 5000)
    with pytest.raises(Refused, match="found 5000"):
        verify_against(str(result), str(source))


def test_a_quantized_checkpoint_is_not_the_source(home: Path, result: Path) -> None:
    """Its values are near those of the source, but what the manifest states of their errors is not true of them."""
    rows, problems = verify_against(str(result), str(home / "FP8_DYNAMIC"))
    assert len(rows) == len(verify_against(str(result), str(home / "source"))[0])
    assert {problem.kind for problem in problems} == {"statistics-disagree"}


def test_a_result_that_cannot_be_read_is_not_compared(home: Path, result: Path) -> None:
    shard(result).unlink()
    rows, problems = verify_against(str(result), str(home / "source"))
    assert rows == ()
    assert kinds(problems) == {"file-missing"}


def test_modules_with_foreign_params_are_not_compared(home: Path, result: Path) -> None:
    header_edit(result, b"[128,64]", b"[64,128]")
    rows, problems = verify_against(str(result), str(home / "source"))
    assert "params-differ" in kinds(problems)
    assert len(rows) == 13


def test_nothing_quantized_means_everything_copied(home: Path, tmp_path: Path) -> None:
    plain = unlink_copy(home / "source", tmp_path / "plain")
    config = json.loads((home / "FP8_DYNAMIC" / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config))
    assert verify_against(str(plain), str(home / "source")) == ((), [])
    assert "dense-targeted" in kinds(verify(str(plain)))


def test_an_unknown_expert_layout_is_told(tmp_path: Path) -> None:
    prefix = "model.layers.0.mlp.experts"
    tensors = {
        f"{prefix}.gate_up_proj": checkpoints.gaussian(1, 2, 64, 64),
        f"{prefix}.down_proj": checkpoints.gaussian(2, 2, 32, 64),
    }
    source = checkpoints.write(tmp_path / "source", [tensors], {"model_type": "unheard_of"})
    destination = convert(source, tmp_path / "result", {"scheme": "FP8_DYNAMIC", "expert_layout": "columns"})
    forget_manifest(unlink_copy(destination, tmp_path / "bare"))
    assert verify_against(str(destination), str(source))[1] == []
    assert "expert-layout" in kinds(verify_against(str(tmp_path / "bare"), str(source))[1])


# ---- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "values", "is_sound"),
    [
        ("F32", [1.0, 2.0], True),
        ("F32", [1.0, 0.0], False),
        ("BF16", [1.0, float("inf")], False),
        ("F16", [1.0, -2.0], False),
        ("F8_E4M3", [0.5, float("nan")], False),
        ("F8_E4M3", [0.5, 448.0], True),
    ],
)
def test_scale_defects(dtype: str, values: list[float], *, is_sound: bool) -> None:
    kind = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}[dtype]
    data = bytearray(torch.tensor(values).to(kind).view(torch.uint8).numpy().tobytes())
    assert (scale_defect(data, dtype) is None) == is_sound


def test_no_scales_are_sound() -> None:
    assert scale_defect(bytearray(), "F32") is None


def test_comparing_nothing_gives_no_error() -> None:
    assert compare(torch.empty(0, 4), torch.empty(0, 4)).relative_error == 0.0


def test_widening_keeps_values_and_leaves_others_alone() -> None:
    tensors = {"weight_scale": torch.tensor([0.1], dtype=torch.bfloat16), "weight": torch.ones(1, dtype=torch.int8)}
    wide = widen_scales(tensors)
    assert wide["weight_scale"].dtype == torch.float32
    assert wide["weight_scale"].item() == tensors["weight_scale"].item()
    assert wide["weight"] is tensors["weight"]


# ---- a hundred defects ------------------------------------------------------------------------------------------


Deed = Callable[[Path], Any]
"""What is done to a file."""


def cut(share: float) -> Deed:
    return lambda path: truncate(path, int(path.stat().st_size * share))


def zero_the_tail(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 9 // 10].ljust(len(data), b"\0"))


def empty(path: Path) -> None:
    truncate(path, 0)


def pad(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def rename(path: Path) -> None:
    path.rename(path.with_name(f"x{path.name}"))


def drop(key: str) -> Deed:
    return lambda path: edit_json(path, lambda document: document.pop(key))


DEEDS: dict[str, Deed] = {
    "lost": Path.unlink,
    "emptied": empty,
    "renamed": rename,
    "padded": pad,
    "zeroed at its end": zero_the_tail,
    "cut to its header": cut(0.001),
    "cut short": cut(0.3),
    "cut at its end": cut(0.999),
}
SMALL: dict[str, tuple[str, ...]] = {
    "config.json": ("lost", "emptied", "cut short"),
    "model.safetensors.index.json": ("lost", "emptied", "cut short"),
    "shardmill.json": ("emptied", "cut short"),
    "tokenizer.json": ("lost", "emptied", "renamed"),
    "LICENSE": ("lost", "emptied", "renamed"),
}
"""Without its manifest a result may be that of another tool, which is a note."""


def a_hundred_defects(root: Path) -> list[tuple[str, Deed, str]]:
    """What is done to a result, and the file that must be named; one defect each, in every part of a result."""
    place = json.loads((root / "model.safetensors.index.json").read_text())["weight_map"]
    config = [key for key in json.loads((root / "config.json").read_text()) if key != "quantization_config"]
    manifest_fields = ("schema", "plan", "recipe", "files", "warnings", "totals", "shards")
    shards = [shard(root, number).name for number in (1, 2, 3)]

    def bit_of(tensor: str) -> Deed:
        return lambda found: flip(found, tensor)

    def deed_on(name: str, deed: Deed) -> Deed:
        return lambda found: deed(found / name)

    found = [(f"a bit of {tensor}", bit_of(tensor), place[tensor]) for tensor in sorted(place)]
    found += [(f"{name} {what}", deed_on(name, deed), name) for name in shards for what, deed in DEEDS.items()]
    found += [(f"{n} {what}", deed_on(n, DEEDS[what]), n) for n, deeds in SMALL.items() for what in deeds]
    for name, keys in {"config.json": config, "shardmill.json": manifest_fields}.items():
        found += [(f"{name} without {key}", deed_on(name, drop(key)), name) for key in keys]
    return found


@pytest.mark.slow
def test_a_hundred_outputs_with_one_defect_each_are_told_apart_from_a_sound_one(home: Path, tmp_path: Path) -> None:
    defects = a_hundred_defects(home / "NVFP4A16")
    assert len(defects) >= 100
    missed = []
    for number, (what, damage, name) in enumerate(defects):
        root = unlink_copy(home / "NVFP4A16", tmp_path / str(number))
        damage(root)
        try:
            problems: tuple[Problem, ...] = tuple(verify(str(root)))
        except CheckpointInvalid as error:
            problems = error.problems
        if not any(name in (problem.file, problem.tensor) or name in problem.message for problem in problems):
            missed.append((what, [str(problem) for problem in problems[:3]]))
        shutil.rmtree(root)
    assert missed == []


def test_a_config_that_a_reader_misreads_is_found(home: Path, tmp_path: Path) -> None:
    groups = [{"scheme": "FP8_DYNAMIC", "targets": ["re:.*self_attn"]}, {"scheme": "NVFP4A16", "targets": ["Linear"]}]
    result = unlink_copy(convert(home / "source", tmp_path / "mixed", {"groups": groups}), tmp_path / "copy")
    assert verify(str(result)) == []

    def widen(document: Any) -> None:  # the first match is as before, vLLM asks for the class before merged parts
        document["quantization_config"]["config_groups"]["group_01"]["targets"] = ["Linear"]

    edit_json(result / "config.json", widen)
    assert kinds(verify(str(result))) == {"config-changed", "config-unresolved"}
    (result / "shardmill.json").unlink()
    notes: list[str] = []
    assert verify(str(result), VerifyWatch(on_note=notes.append)) == []
    assert any("read by vLLM" in note for note in notes)


def test_a_result_of_another_tool_is_judged_by_the_rules_of_engines(home: Path, tmp_path: Path) -> None:
    result = unlink_copy(home / "W4A16_ASYM", tmp_path / "foreign")
    (result / "shardmill.json").unlink()
    assert serving_warnings(str(result)) == []
    assert {problem.kind for problem in serving_warnings(str(result), 4)} >= {"serving-group-partition"}
    (result / "config.json").unlink()
    assert serving_warnings(str(result)) == []
