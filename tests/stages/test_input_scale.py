"""NVFP4 with quantized activations from end to end: constants, donors of both conventions, and what is refused."""

from __future__ import annotations

import copy
import json
import struct
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationStatus,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.utils import generate_gparam
from torch import Tensor

import checkpoints
from kernels.plain_decoding import nvfp4_activations
from shardmill.api import process_file_microscale_scheme, validate_file
from shardmill.cli import main
from shardmill.core.input_scale import global_scale_of
from shardmill.core.limits import Intake
from shardmill.core.recipe import parse_recipe, uniform
from shardmill.errors import Refused, TransferDamaged
from shardmill.kernels.ct_adapter import check_config
from shardmill.stages import input_scale as module
from shardmill.stages.pipeline import RunOptions, run
from shardmill.stages.plan import Locations, make_plan
from shardmill.stages.reproduce import reproduce
from shardmill.stages.verify import verify, verify_against
from shardmill.storage import memory
from shardmill.storage.source import open_source
from storage.fake_hub import OLD, REPO, run_hub
from storage.servers import run_moto

OPTIONS = RunOptions(device="cpu", workers=1)
EXPERTS = "model.layers.0.mlp.experts"
MOE = {"model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
Q = "model.layers.0.self_attn.q_proj"
PARAM = "input_global_scale"


def convert(source: Path, destination: Path, policy: str | None, **more: Any) -> Path:
    recipe = uniform("NVFP4", input_scale=policy, **more) if policy else uniform("NVFP4A16", **more)
    run(Locations(source=str(source), destination=str(destination)), recipe, OPTIONS)
    return destination


def scales(folder: Path) -> dict[str, float]:
    return {
        name.removesuffix(f".{PARAM}"): float(tensor)
        for name, tensor in checkpoints.read(folder).items()
        if name.endswith(PARAM)
    }


def stacked() -> dict[str, Tensor]:
    return {
        f"{EXPERTS}.gate_up_proj": checkpoints.gaussian(1, 3, 64, 192),
        f"{EXPERTS}.down_proj": checkpoints.gaussian(2, 3, 96, 64),
        "model.layers.0.self_attn.q_proj.weight": checkpoints.gaussian(3, 64, 64),
        "model.norm.weight": checkpoints.gaussian(4, 64),
    }


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return checkpoints.write(tmp_path / "source", checkpoints.deal(checkpoints.llama(), 5))


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    return checkpoints.write(tmp_path / "experts", checkpoints.deal(stacked(), 2), MOE)


def donated(modules: list[str], **changes: Tensor | None) -> dict[str, Tensor]:
    """A scale of its own for every module, as compressed-tensors stores it."""
    found: dict[str, Tensor | None] = {
        f"{name}.{PARAM}": torch.tensor([10.0 + number]) for number, name in enumerate(modules)
    }
    found |= changes
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def modules_of(source: Path, home: Path) -> list[str]:
    return sorted(scales(convert(source, home, "constant:1")))


def problems_of(source: Path, policy: str) -> list[tuple[str, str]]:
    found = make_plan(open_source(str(source)), uniform("NVFP4", input_scale=policy)).problems
    assert all(len(str(problem)) < 300 + len(problem.file) for problem in found)
    return [(problem.kind, problem.tensor) for problem in found]


# ---- constants --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_only_the_scales_of_activations_are_added(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source: Path = request.getfixturevalue(kind)
    result, weights = convert(source, tmp_path / "w4a4", "constant:6"), convert(source, tmp_path / "w4a16", None)
    after, before = (checkpoints.read(folder) for folder in (result, weights))
    added = after.keys() - before.keys()
    assert added == {name.replace("weight_packed", PARAM) for name in after if name.endswith("weight_packed")}
    assert checkpoints.as_bytes({name: after[name] for name in before}) == checkpoints.as_bytes(before)
    assert checkpoints.as_bytes({name: after[name] for name in added}) == checkpoints.as_bytes(
        dict.fromkeys(added, torch.tensor([448.0]))
    )
    assert (verify(str(result)), verify_against(str(result), str(source))[1]) == ([], [])
    plan = make_plan(open_source(str(source)), uniform("NVFP4", input_scale="constant:6"))
    for shard in plan.shards:
        assert (result / shard.name).stat().st_size == shard.sizes().output_bytes


@pytest.mark.parametrize("amax", [0.37, 1.75, 6.0, 1000.0, 2688.0])
def test_a_constant_is_what_the_library_makes_of_such_an_amax(amax: float) -> None:
    theirs = generate_gparam(torch.tensor([-amax]), torch.tensor([amax]))
    assert (theirs.shape, theirs.dtype) == ((1,), torch.float32)
    assert struct.pack("<f", global_scale_of(amax)) == theirs.numpy().tobytes()


def test_the_config_is_the_preset_of_the_library(dense: Path, tmp_path: Path) -> None:
    result = convert(dense, tmp_path / "result", "constant:6")
    section = json.loads((result / "config.json").read_text())["quantization_config"]
    assert check_config(section) == []
    read = QuantizationConfig.model_validate(copy.deepcopy(section))
    (scheme,) = read.config_groups.values()
    theirs = preset_name_to_scheme("NVFP4", ["Linear"])
    assert (scheme.weights, scheme.format) == (theirs.weights, "nvfp4-pack-quantized")
    observer = {"observer": theirs.input_activations.observer}  # for calibration, and not written
    assert scheme.input_activations.model_copy(update=observer) == theirs.input_activations


@pytest.mark.parametrize("largest", [0.5, 6.0, 20.0])
def test_activations_of_the_library_are_those_of_the_formula(dense: Path, tmp_path: Path, largest: float) -> None:
    stored = checkpoints.read(convert(dense, tmp_path / "result", "constant:6"))[f"{Q}.{PARAM}"]
    linear: Any = torch.nn.Linear(128, 1)
    linear.input_global_scale, linear.quantization_status = stored, QuantizationStatus.FROZEN
    values = checkpoints.gaussian(9, 7, 128, dtype=torch.float32, std=1.0)
    values *= largest / values.abs().max()
    args = preset_name_to_scheme("NVFP4", ["Linear"]).input_activations
    theirs = forward_quantize(linear, values, "input", args)
    ours = torch.from_numpy(nvfp4_activations(values.double().numpy(), float(stored)))
    is_same = (theirs.double() - ours).abs() <= 1e-6 * ours.abs()
    assert is_same.float().mean() > 0.995  # a quotient in the middle of two codes may be rounded either way
    assert theirs.abs().max() <= 6.0 * (1 + 2.0**-20)  # larger ones are clipped to what was assumed
    error = float((theirs - values).norm() / values.norm())
    assert error < 0.12 if largest <= 6 else error > 0.12


# ---- donors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["compressed-tensors", "ModelOpt"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_scales_of_a_donor_are_copied_and_fused_sets_take_the_smallest(
    kind: str, shards: int, convention: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source: Path = request.getfixturevalue(kind)
    own = donated(modules_of(source, tmp_path / "first"))
    expected = {name.removesuffix(f".{PARAM}"): float(tensor) for name, tensor in own.items()}
    if convention == "ModelOpt":
        own = {name.replace(PARAM, "input_scale"): 1 / tensor for name, tensor in own.items()}
        own |= {name.replace("input_scale", "weight_scale_2"): torch.tensor(1.0) for name in own}
    donor = checkpoints.write(tmp_path / "donor", checkpoints.deal(own, shards))
    found = scales(convert(source, tmp_path / "result", f"donor:{donor}"))
    sets = [[f"model.layers.{n}.self_attn.{leaf}_proj" for leaf in "qkv"] for n in (0, 1)]
    sets += [[f"model.layers.{n}.mlp.{leaf}_proj" for leaf in ("gate", "up")] for n in (0, 1)]
    sets += [[f"{EXPERTS}.{n}.{leaf}_proj" for leaf in ("gate", "up")] for n in range(3)]
    for members in ([member for member in fused if member in expected] for fused in sets):
        expected |= dict.fromkeys(members, min((expected[member] for member in members), default=0.0))
    assert found == pytest.approx(expected, rel=2.0**-22 if convention == "ModelOpt" else 0)
    assert (verify(str(tmp_path / "result")), verify_against(str(tmp_path / "result"), str(source))[1]) == ([], [])


@pytest.mark.parametrize("place", ["disk", "memory", "s3", "hub"])
def test_a_donor_lies_wherever_a_source_may(
    place: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated = convert(dense, tmp_path / "calibrated", "constant:12")
    with ExitStack() as servers:
        url = move(calibrated, place, servers, monkeypatch)
        result = convert(dense, tmp_path / "result", f"donor:{url}")
    assert set(scales(result).values()) == {224.0}


def move(checkpoint: Path, place: str, servers: ExitStack, patch: pytest.MonkeyPatch) -> str:
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.is_file()}
    if place == "s3":
        server = servers.enter_context(run_moto())
        server.lead(patch)
        server.client.create_bucket(Bucket="donors")
        for name, data in files.items():
            server.client.put_object(Bucket="donors", Key=f"calibrated/{name}", Body=data)
        return "s3://donors/calibrated"
    if place == "hub":
        hub = servers.enter_context(run_hub(patch, checkpoint.parent / "cache"))
        hub.commits[OLD] = files
        return f"hf://{REPO}"
    if place == "memory":
        for name, data in files.items():
            memory.open_memory("donors/calibrated").put(name, data)
        return "memory://donors/calibrated"
    return str(checkpoint)


def test_the_digest_of_the_scales_is_recorded_and_the_place_is_not(dense: Path, tmp_path: Path) -> None:
    own = donated(modules_of(dense, tmp_path / "first"))
    donor = checkpoints.write(tmp_path / "calibrated", [own])
    result = convert(dense, tmp_path / "result", f"donor:{donor}")
    again = convert(dense, tmp_path / "again", f"donor:{result}")
    names = [(folder / "shardmill.json").read_text() for folder in (result, again)]
    assert names[0] == names[1]  # a result is a donor of the same scales
    assert "calibrated" not in names[0]
    policy = json.loads(names[0])["recipe"]["groups"][0]["scheme"]["input_scale"]
    assert (policy["kind"], policy["digest"][:7]) == ("donor", "sha256:")
    other = checkpoints.write(tmp_path / "other", [own | {f"{Q}.{PARAM}": torch.tensor([1.0])}])
    changed = json.loads((convert(dense, tmp_path / "changed", f"donor:{other}") / "shardmill.json").read_text())
    assert changed["recipe"]["groups"][0]["scheme"]["input_scale"]["digest"] != policy["digest"]
    first = {shard["name"]: shard["key"] for shard in json.loads(names[0])["shards"]}
    moved = [shard["name"] for shard in changed["shards"] if shard["key"] != first[shard["name"]]]
    holders = {
        path.name for path in result.glob("*.safetensors") if {Q, Q.replace("q_", "k_"), Q.replace("q_", "v_")}
        & {name.rpartition(".")[0] for name in checkpoints.names(path)}
    }  # fmt: skip
    assert set(moved) == holders  # no other shard is done again


def test_every_tensor_is_made_again_without_the_donor(dense: Path, tmp_path: Path) -> None:
    donor = checkpoints.write(tmp_path / "donor", [donated(modules_of(dense, tmp_path / "first"))])
    result = convert(dense, tmp_path / "result", f"donor:{donor}")
    found, problems = reproduce(str(result), str(dense), f"{Q}.{PARAM}")
    assert (problems, found.outputs[-1]) == ([], f"{Q}.{PARAM}")


def test_other_input_scales_than_those_that_were_taken_are_noticed(dense: Path, tmp_path: Path) -> None:
    donor = checkpoints.write(tmp_path / "donor", [donated(modules_of(dense, tmp_path / "first"))])
    result = convert(dense, tmp_path / "result", f"donor:{donor}")
    name = f"model.layers.1.mlp.down_proj.{PARAM}"
    for path in result.glob("*.safetensors"):
        if name in checkpoints.names(path):
            data = bytearray(path.read_bytes())
            header = 8 + int.from_bytes(data[:8], "little")
            begin, end = json.loads(data[8:header])[name]["data_offsets"]
            data[header + begin : header + end] = struct.pack("<f", 5.0)
            path.chmod(0o644)
            path.write_bytes(data)
    with pytest.raises(Refused, match="not those that were taken of the donor"):
        reproduce(str(result), str(dense), Q)


def test_of_a_donor_only_headers_and_scales_are_read(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = donated(modules_of(dense, tmp_path / "first"))
    names = sorted(own)
    heavy = {f"{names[0]}.codes": torch.zeros(4 << 20, dtype=torch.uint8)} | own
    donor = checkpoints.write(tmp_path / "donor", [heavy])
    ranges: list[tuple[int, int]] = []
    read = module._read_range

    def counted(reader: Any, begin: int, end: int) -> bytearray:
        ranges.append((begin, end))
        return read(reader, begin, end)

    monkeypatch.setattr(module, "_read_range", counted)
    assert problems_of(dense, f"donor:{donor}") == []
    assert sum(end - begin for begin, end in ranges) < 1024
    ranges.clear()
    monkeypatch.setattr(module, "RANGE_BYTES", 8)
    assert problems_of(dense, f"donor:{donor}") == []
    assert max(end - begin for begin, end in ranges) == 8


def test_a_source_that_brings_scales_along_is_its_own_donor(dense: Path, tmp_path: Path) -> None:
    donor = checkpoints.write(tmp_path / "donor", [donated(modules_of(dense, tmp_path / "first"))])
    source = convert(dense, tmp_path / "calibrated", f"donor:{donor}")
    again = convert(source, tmp_path / "again", f"donor:{source}")
    before, after = (checkpoints.as_bytes(checkpoints.read(folder)) for folder in (source, again))
    assert after == before  # codes are kept, and so are the scales
    plain = checkpoints.read(convert(source, tmp_path / "plain", None))
    assert not [name for name in plain if PARAM in name]
    kept = tmp_path / "kept"
    groups = [{"scheme": "NVFP4", "targets": ["re:.*mlp.*"], "input_scale": "constant:6"}]
    run(Locations(source=str(source), destination=str(kept)), parse_recipe({"groups": groups}), OPTIONS)
    found = scales(kept)
    assert {found[name] for name in found if ".mlp." in name} == {448.0}
    assert {name: value for name, value in found.items() if "attn" in name} == {
        name: value for name, value in scales(source).items() if "attn" in name
    }
    assert verify(str(kept)) == []


# ---- refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "kind"),
    [
        (None, "input-scale-missing"),
        (torch.ones(2), "input-scale-shape"),
        (torch.ones(1, dtype=torch.bfloat16), "input-scale-shape"),
        (torch.tensor([0.0]), "input-scale-value"),
        (torch.tensor([-1.0]), "input-scale-value"),
        (torch.tensor([torch.inf]), "input-scale-value"),
        (torch.tensor([torch.nan]), "input-scale-value"),
    ],
)
def test_a_donor_that_cannot_be_used_is_refused(entry: Tensor | None, kind: str, dense: Path, tmp_path: Path) -> None:
    own = donated(modules_of(dense, tmp_path / "first"), **{f"{Q}.{PARAM}": entry})
    donor = checkpoints.write(tmp_path / "donor", [own])
    tensor = f"{Q}.{PARAM}" if kind == "input-scale-shape" else Q
    assert problems_of(dense, f"donor:{donor}") == [(kind, tensor)]
    with pytest.raises(Refused):
        convert(dense, tmp_path / "result", f"donor:{donor}")
    assert not (tmp_path / "result").exists()


def test_all_missing_modules_are_told_at_once(experts: Path, tmp_path: Path) -> None:
    modules = modules_of(experts, tmp_path / "first")
    donor = checkpoints.write(tmp_path / "donor", [donated([m for m in modules if ".experts.2." not in m])])
    (problem,) = make_plan(open_source(str(experts)), uniform("NVFP4", input_scale=f"donor:{donor}")).problems
    assert f"3 of {len(modules)} modules" in problem.message
    assert problem.message.count(".experts.2.") == 3


def test_the_scale_of_fp8_activations_is_no_donor(dense: Path, tmp_path: Path) -> None:
    own = {f"{name}.input_scale": torch.tensor([1.0]) for name in modules_of(dense, tmp_path / "first")}
    donor = checkpoints.write(tmp_path / "donor", [own])
    assert [kind for kind, _ in problems_of(dense, f"donor:{donor}")] == ["input-scale-missing"]


@pytest.mark.parametrize("content", ["nothing", "another file", "damaged"])
def test_what_is_no_donor_is_refused(content: str, dense: Path, tmp_path: Path) -> None:
    donor = tmp_path / "donor"
    if content != "nothing":
        donor.mkdir()
        name = "model.safetensors" if content == "damaged" else "README.md"
        (donor / name).write_bytes(b"\xff" * 16)
    assert problems_of(dense, f"donor:{donor}")


def test_a_recipe_of_a_manifest_needs_a_donor_again(dense: Path) -> None:
    recipe = parse_recipe({"scheme": "NVFP4", "input_scale": {"kind": "donor", "digest": "sha256:00"}})
    (problem,) = make_plan(open_source(str(dense)), recipe).problems
    assert "not where it lies" in problem.message
    assert module.take_input_scales(make_plan(open_source(str(dense)), uniform("W4A16")), Intake())[1] == []


@pytest.mark.parametrize("damage", ["missing", "zero", "unshared"])
def test_a_result_whose_scales_of_activations_are_wrong_is_found_out(damage: str, dense: Path, tmp_path: Path) -> None:
    result = convert(dense, tmp_path / "result", "constant:6")
    tensors = checkpoints.read(result)
    config = json.loads((result / "config.json").read_text())
    name = f"{Q}.{PARAM}"
    value = torch.tensor([0.0 if damage == "zero" else 5.0])
    tensors = {key: t for key, t in tensors.items() if key != name} if damage == "missing" else tensors | {name: value}
    broken = checkpoints.write(tmp_path / "broken", [tensors], config)
    kinds = {problem.kind for problem in verify(str(broken))}
    expected = {"missing": {"params-differ"}, "zero": {"scale-unsound", "fused-scales-differ"}}
    assert kinds == expected.get(damage, {"fused-scales-differ"})


# ---- command line -----------------------------------------------------------------------------------------------


def test_several_schemes_share_one_read_and_only_nvfp4_the_policy(dense: Path, tmp_path: Path) -> None:
    asked = ["run", str(dense), str(tmp_path / "out"), "-q", "--scheme", "NVFP4", "--scheme", "NVFP4A16"]
    assert main(asked) == 2
    assert main([*asked, "--input-scale", "constant:6"]) == 0
    after, before = (checkpoints.read(tmp_path / "out" / name) for name in ("NVFP4", "NVFP4A16"))
    assert len(after) == len(before) + 14
    others = ["run", str(dense), str(tmp_path / "other"), "-q", "--scheme", "W4A16", "--scheme", "NVFP4A16"]
    assert main([*others, "--input-scale", "constant:6"]) == 2
    assert not (tmp_path / "other").exists()


def test_plans_reports_and_cards_tell_of_the_policy(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [str(dense), "--scheme", "NVFP4", "--input-scale", "constant:6"]
    assert main(["plan", *asked]) == 0
    assert "assumed, not measured, to stay within 6" in capsys.readouterr().out
    assert main(["plan", *asked, "--json"]) == 0
    policy = json.loads(capsys.readouterr().out)["recipe"]["groups"][0]["scheme"]["input_scale"]
    assert policy == {"kind": "constant", "amax": 6.0}
    files = ["--html", str(tmp_path / "page.html"), "--card", str(tmp_path / "card.md")]
    assert main(["run", str(dense), str(tmp_path / "result"), *asked[1:], *files]) == 0
    for text in (capsys.readouterr().out, (tmp_path / "page.html").read_text(), (tmp_path / "card.md").read_text()):
        assert "assumed, not measured, to stay within 6" in text


@pytest.mark.parametrize("more", [["--budget", "4.5bpw"], ["--scheme", "W4A16"], ["--dequantize"]])
def test_the_policy_of_nothing_is_refused(dense: Path, more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(dense), *more, "--input-scale", "constant:6"]) == 2
    assert "input" in capsys.readouterr().err


# ---- functions of one shard -------------------------------------------------------------------------------------


def test_functions_of_one_shard_take_a_policy_too(dense: Path, tmp_path: Path) -> None:
    whole = convert(dense, tmp_path / "whole", "constant:6")
    donor = checkpoints.write(tmp_path / "donor", [donated(sorted(scales(whole)))])
    files = {str(path): None for path in sorted(dense.glob("*.safetensors"))}
    ignore = ["model.embed_tokens"]
    for policy in ("constant:6", f"donor:{donor}"):
        target = tmp_path / "one" / "model.safetensors"
        validate_file(files, target, "NVFP4", ignore, "cpu", input_scale=policy)
        process_file_microscale_scheme(files, target, "NVFP4", ignore, "cpu", input_scale=policy)
        known = convert(dense, tmp_path / f"by {policy.partition(':')[0]}", policy)
        assert checkpoints.as_bytes(checkpoints.read(target.parent)) == checkpoints.as_bytes(checkpoints.read(known))
    for function in (validate_file, process_file_microscale_scheme):
        with pytest.raises(Refused, match="constant:V"):
            function(files, tmp_path / "two" / "model.safetensors", "NVFP4", ignore, "cpu")
        with pytest.raises(Refused, match="for 14 of 14 modules"):
            function(files, tmp_path / "two" / "m.safetensors", "NVFP4", ignore, "cpu", input_scale=f"donor:{dense}")


def test_scales_that_arrive_damaged_are_not_used(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(
        Locations(source=str(dense), destination="memory://damaged/donor", store="memory://damaged/store"),
        uniform("NVFP4", input_scale="constant:12"),
        OPTIONS,
    )
    plan, counts = uniform("NVFP4", input_scale="donor:memory://damaged/donor"), [0]
    assert make_plan(open_source(str(dense)), plan).problems == ()
    read = module._read_range

    def damaged(reader: Any, begin: int, end: int) -> bytearray:
        counts[0] += 1
        return read(reader, begin, end) if counts[0] % 2 else bytearray(end - begin)

    monkeypatch.setattr(module, "_read_range", damaged)
    monkeypatch.setattr(memory, "_TRAITS", replace(memory._TRAITS, is_remote=True))
    with pytest.raises(TransferDamaged, match="two reads of one state differ"):
        make_plan(open_source(str(dense)), plan)
