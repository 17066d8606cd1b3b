from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import shardmill
from asked import asked
from blocks import row_blocks
from shardmill import api, process_file, process_file_microscale_scheme, split_fused_moe_experts, validate_file
from shardmill.core.header import encode_header
from shardmill.core.scheme import PRESETS
from shardmill.errors import (
    CheckpointInvalid,
    NonFiniteWeight,
    RecipeInvalid,
    Refused,
    SourceChanged,
    StorageFailed,
)
from shardmill.kernels import reference

Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.0.self_attn.k_proj.weight"
V = "model.layers.0.self_attn.v_proj.weight"
O_PROJ = "model.layers.0.self_attn.o_proj"
NORM = "model.layers.0.input_layernorm.weight"
EXPERTS = "model.layers.0.mlp.experts"
THREE = (process_file, process_file_microscale_scheme, validate_file)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def store(path: Path, tensors: Mapping[str, Tensor]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return str(path)


def octets(tensor: Tensor) -> bytes:
    return bytes(reference.to_bytes(tensor))


def contents(path: Path) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {name: (tensor.dtype, tensor.shape, octets(tensor)) for name, tensor in load_file(path).items()}


def weights(path: Path, scheme: str, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dequantize what was written for each matrix of `source`."""
    stored, chosen = load_file(path), PRESETS[scheme]
    found = {}
    for name, tensor in source.items():
        module = name.removesuffix("weight")
        own = {
            key.removeprefix(module): value for key, value in stored.items() if key.rpartition(".")[0] + "." == module
        }
        shape = (tensor.shape[0], tensor.shape[1])
        found[name] = reference.decode(own, chosen.weights, format=chosen.format, shape=shape)
    return found


def relative_error(found: Tensor, source: Tensor) -> float:
    return float((found - source.float()).norm() / source.float().norm())


def call(path: Path, save_path: Path, scheme: Any = "FP8_DYNAMIC", ignore: Any = (), **more: Any) -> dict[str, str]:
    """Run the function that goes with the scheme on one whole file."""
    has_global = (PRESETS[scheme] if isinstance(scheme, str) else scheme).weights.strategy == "tensor_group"
    function = process_file_microscale_scheme if has_global else process_file
    return function({str(path): None}, save_path, scheme, ignore, "cpu", **more)[1]


def told(scheme: str) -> dict[str, str]:
    """What a preset needs beside its name."""
    return {name: value for name, value in asked(scheme).items() if name != "scheme"}


def ct_scheme(name: str, **changes: Any) -> Any:
    """A scheme object of compressed-tensors; importing it costs seconds."""
    from compressed_tensors.quantization import preset_name_to_scheme

    return preset_name_to_scheme(name, changes.pop("targets", ["Linear"]))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = {
        Q: random(64, 128, seed=1),
        NORM: random(64, seed=2),
        "model.embed_tokens.weight": random(32, 128, seed=3),
    }
    tensors |= {f"{O_PROJ}.weight": random(48, 256, seed=4), f"{O_PROJ}.bias": random(48, seed=5)}
    return Path(store(tmp_path / "source" / "a.safetensors", tensors))


# ---- the contract -----------------------------------------------------------------------------------------------


def test_the_functions_take_the_same_parameters_in_the_same_order() -> None:
    for function in THREE:
        parameters = inspect.signature(function).parameters

        theirs = [p for p in parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
        assert [p.name for p in theirs] == [
            "inverse_weight_map",
            "save_path",
            "scheme",
            "ignore",
            "device",
            "converter",
        ]
        assert [p.name for p in theirs if p.default is not inspect.Parameter.empty] == ["converter"]
        ours = [p for p in parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
        assert [(p.name, p.default) for p in ours] == ([] if function is process_file else [("input_scale", None)])
    assert next(iter(inspect.signature(split_fused_moe_experts).parameters)) == "tensors"


def test_the_front_door_leads_here() -> None:
    assert shardmill.process_file is api.process_file


def test_every_weight_is_quantized_but_norms_and_the_rest_passes_through(source: Path, tmp_path: Path) -> None:
    total, weight_map = process_file({str(source): None}, tmp_path / "b.safetensors", "FP8_DYNAMIC", [], "cpu")

    stored, before = load_file(tmp_path / "b.safetensors"), load_file(source)
    modules = [Q.removesuffix(".weight"), "model.embed_tokens", O_PROJ]
    quantized = {f"{module}.{param}" for module in modules for param in ("weight", "weight_scale")}
    assert set(stored) == quantized | {NORM, f"{O_PROJ}.bias"}
    assert weight_map == dict.fromkeys(stored, "b.safetensors")
    assert total == sum(tensor.nbytes for tensor in stored.values())
    assert {stored[f"{module}.weight"].dtype for module in modules} == {torch.float8_e4m3fn}
    assert {name: octets(stored[name]) for name in (NORM, f"{O_PROJ}.bias")} == {
        name: octets(before[name]) for name in (NORM, f"{O_PROJ}.bias")
    }


@pytest.mark.parametrize("scheme", sorted(PRESETS))
def test_every_preset_gives_the_bytes_of_the_kernel(scheme: str, tmp_path: Path) -> None:
    weight, chosen = random(96, 256, seed=7), PRESETS[scheme]
    path = store(tmp_path / "a.safetensors", {"m.weight": weight})

    call(Path(path), tmp_path / "b.safetensors", scheme, **told(scheme))

    whole = reference.measure(weight)
    encoded = reference.encode(weight, chosen.weights, format=chosen.format, scale_dtype="BF16", whole=whole)
    stored = load_file(tmp_path / "b.safetensors")
    assert {param: octets(stored[f"m.{param}"]) for param in encoded.tensors} == {
        param: octets(tensor) for param, tensor in encoded.tensors.items()
    }
    extra = {"weight_global_scale"} if chosen.weights.has_global_scale else set()
    extra |= {"weight_shape"} if chosen.format == "pack-quantized" else set()
    extra |= {"input_global_scale"} if chosen.needs_input_scale else set()
    assert {name.removeprefix("m.") for name in stored} == set(encoded.tensors) | extra


def test_a_scheme_object_means_the_same_as_its_name(source: Path, tmp_path: Path) -> None:
    call(source, tmp_path / "name.safetensors", "W4A16_ASYM")
    call(source, tmp_path / "object.safetensors", ct_scheme("W4A16_ASYM"))

    assert contents(tmp_path / "name.safetensors") == contents(tmp_path / "object.safetensors")


def test_no_argument_is_changed(source: Path, tmp_path: Path) -> None:
    scheme, ignore, names = ct_scheme("FP8_BLOCK", targets=[]), ["lm_head"], [Q]
    weight_map: dict[str, list[str] | None] = {str(source): names}
    before = scheme.model_dump_json()

    process_file(weight_map, tmp_path / "b.safetensors", scheme, ignore, "cpu")
    validate_file(weight_map, tmp_path / "b.safetensors", scheme, ignore, "cpu")

    assert scheme.model_dump_json() == before
    assert (ignore, names, weight_map) == (["lm_head"], [Q], {str(source): [Q]})


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_the_device_is_a_name_or_an_object(device: Any, source: Path, tmp_path: Path) -> None:
    total, _ = process_file({str(source): [Q]}, tmp_path / "b.safetensors", "W8A8", [], device)

    assert total == 64 * 128 + 64 * 2


@pytest.mark.parametrize("device", ["abacus", "meta", None])
def test_a_device_that_cannot_compute_is_refused(device: Any, source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeInvalid, match="device"):
        process_file({str(source): None}, tmp_path / "b.safetensors", "W8A8", [], device)


# ---- which tensors are meant ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "ignore", "quantized"),
    [
        ([], [], {"a.q_proj", "a.k_proj", "lm_head"}),
        (["Linear"], [], {"a.q_proj", "a.k_proj", "lm_head"}),
        (["Linear", "a.q_proj"], [], {"a.q_proj", "a.k_proj", "lm_head"}),
        (["Linear"], ["lm_head"], {"a.q_proj", "a.k_proj"}),
        (["Linear"], "lm_head", {"a.q_proj", "a.k_proj"}),
        (["Linear"], ["lm_head.weight"], {"a.q_proj", "a.k_proj", "lm_head"}),
        (["Linear"], ["Linear"], {"a.q_proj", "a.k_proj", "lm_head"}),
        (["Linear"], ["q_proj"], {"a.q_proj", "a.k_proj", "lm_head"}),
        (["Linear"], ["re:q_proj"], {"a.q_proj", "a.k_proj", "lm_head"}),
        (["Linear"], ["re:.*q_"], {"a.k_proj", "lm_head"}),
        (["Linear"], ["re:.*", "lm_head"], set()),
        (["a.q_proj"], [], {"a.q_proj"}),
        (["re:a"], [], {"a.q_proj", "a.k_proj"}),
        (["re:.*proj$", "lm_head"], ["re:.*k_proj"], {"a.q_proj", "lm_head"}),
        (["Embedding"], [], set()),
        (["a.q_norm", "re:.*norm"], [], set()),
    ],
)
def test_targets_and_ignore(targets: list[str], ignore: Any, quantized: set[str], tmp_path: Path) -> None:
    modules = ["a.q_proj", "a.k_proj", "lm_head", "a.q_norm"]
    tensors = {f"{module}.weight": random(32, 64, seed=seed) for seed, module in enumerate(modules)}
    path = store(tmp_path / "a.safetensors", tensors)
    scheme = ct_scheme("W8A8", targets=targets)

    _, weight_map = process_file({path: None}, tmp_path / "b.safetensors", scheme, ignore, "cpu")

    assert {name.removesuffix(".weight_scale") for name in weight_map if name.endswith("_scale")} == quantized
    assert {f"{module}.weight" for module in modules} <= set(weight_map)


def test_ignore_may_be_consumed_only_once(source: Path, tmp_path: Path) -> None:
    patterns = (pattern for pattern in ["re:.*embed_tokens$", O_PROJ])

    weight_map = call(source, tmp_path / "b.safetensors", "W8A8", patterns)

    assert {name for name in weight_map if name.endswith("_scale")} == {Q.replace("weight", "weight_scale")}


def test_embeddings_heads_and_routers_are_not_spared_here(tmp_path: Path) -> None:
    names = ["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.gate.weight"]
    path = store(tmp_path / "a.safetensors", {name: random(32, 64) for name in names})

    assert len(call(Path(path), tmp_path / "b.safetensors", "FP8_DYNAMIC")) == 2 * len(names)


@pytest.mark.parametrize("ignore", [["re:("], [3]])
def test_an_ignore_entry_that_is_no_pattern_is_refused(ignore: Any, source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeInvalid):
        process_file({str(source): None}, tmp_path / "b.safetensors", "W8A8", ignore, "cpu")


# ---- what is read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [None, []])
def test_no_names_mean_all_tensors(names: Any, source: Path, tmp_path: Path) -> None:
    _, weight_map = process_file({str(source): names}, tmp_path / "b.safetensors", "FP8_DYNAMIC", ["re:.*"], "cpu")

    assert set(weight_map) == set(load_file(source))


def test_only_the_named_tensors_are_read_each_once(source: Path, tmp_path: Path) -> None:
    _, weight_map = process_file({str(source): [NORM, Q, NORM]}, tmp_path / "b.safetensors", "W8A8", [], "cpu")

    assert set(weight_map) == {NORM, Q, Q.replace("weight", "weight_scale")}


def test_an_empty_map_gives_an_empty_shard(tmp_path: Path) -> None:
    assert process_file({}, tmp_path / "b.safetensors", "W8A8", [], "cpu") == (0, {})
    assert load_file(tmp_path / "b.safetensors") == {}


def test_a_missing_tensor_is_named(source: Path, tmp_path: Path) -> None:
    for function in (process_file, validate_file):
        with pytest.raises(CheckpointInvalid, match=r"a.safetensors.*absent.weight") as caught:
            function({str(source): ["absent.weight", Q]}, tmp_path / "b.safetensors", "W8A8", [], "cpu")

        assert [problem.kind for problem in caught.value.problems] == ["tensor-missing"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match=r"absent\.safetensors"):
        process_file({str(tmp_path / "absent.safetensors"): None}, tmp_path / "b.safetensors", "W8A8", [], "cpu")


def test_a_name_in_two_files_is_refused(source: Path, tmp_path: Path) -> None:
    other = store(tmp_path / "other" / "a.safetensors", {Q: random(64, 128)})

    with pytest.raises(CheckpointInvalid, match="q_proj") as caught:
        process_file({str(source): None, other: None}, tmp_path / "b.safetensors", "W8A8", [], "cpu")

    assert [problem.kind for problem in caught.value.problems] == ["duplicate-tensor"]


def test_links_to_the_source_are_followed(source: Path, tmp_path: Path) -> None:
    link = tmp_path / "links" / "a.safetensors"
    link.parent.mkdir()
    link.symlink_to(source)

    assert call(link, tmp_path / "b.safetensors") == call(source, tmp_path / "b.safetensors")


MEMBERS = {
    Q: random(64, 128, seed=1),
    K: random(32, 128, seed=2) * 3,
    V: random(32, 128, seed=3) / 3,
    NORM: random(128, seed=4),
    f"{O_PROJ}.weight": random(64, 128, seed=5, dtype=torch.float16),
    "model.layers.0.scalar": torch.tensor(3, dtype=torch.int64),
    "model.layers.0.empty": torch.zeros(0, 4),
    "model.layers.0.odd": torch.arange(7, dtype=torch.uint8),
}


@given(places=st.lists(st.integers(0, 2), min_size=len(MEMBERS), max_size=len(MEMBERS)))
def test_the_result_does_not_depend_on_the_files_that_hold_the_tensors(
    places: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("files")
    files: dict[int, dict[str, Tensor]] = {}
    for place, (name, tensor) in zip(places, MEMBERS.items(), strict=True):
        files.setdefault(place, {})[name] = tensor
    weight_map = {store(folder / f"{place}.safetensors", tensors): list(tensors) for place, tensors in files.items()}
    whole = store(folder / "whole.safetensors", MEMBERS)

    total, _ = process_file_microscale_scheme(weight_map, folder / "cut", "NVFP4A16", [], "cpu")
    expected, _ = process_file_microscale_scheme({whole: None}, folder / "uncut", "NVFP4A16", [], "cpu")

    assert total == expected
    assert contents(folder / "cut") == contents(folder / "uncut")


@pytest.mark.parametrize("scheme", ["W4A16_ASYM", "FP8_BLOCK", "NVFP4A16"])
def test_the_result_does_not_depend_on_row_blocks(scheme: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_oss", **SIZES}))
    tensors = {Q: random(300, 256, seed=1), K: random(300, 256, seed=2), NORM: random(3000, seed=3)}
    tensors |= {f"{EXPERTS}.gate_up_proj": random(2, 128, 512, seed=4)}
    path = Path(store(tmp_path / "a.safetensors", tensors))
    call(path, tmp_path / "whole", scheme)

    with row_blocks(2000):
        call(path, tmp_path / "blocks", scheme)

    assert contents(tmp_path / "blocks") == contents(tmp_path / "whole")


# ---- what is written --------------------------------------------------------------------------------------------


def test_the_shard_says_that_it_is_torchs(source: Path, tmp_path: Path) -> None:
    call(source, tmp_path / "b.safetensors")

    with safe_open(tmp_path / "b.safetensors", framework="pt") as written:
        assert written.metadata() == {"format": "pt"}


@pytest.mark.parametrize("kind", [str, Path])
def test_the_folder_of_the_shard_is_made(kind: Callable[[Path], Any], source: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "er" / "model-00001-of-00002.safetensors"

    _, weight_map = process_file({str(source): None}, kind(target), "W8A8", [], "cpu")

    assert set(weight_map.values()) == {target.name}
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_the_mode_of_the_shard_follows_the_umask(source: Path, tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        call(source, tmp_path / "b.safetensors")
    finally:
        os.umask(previous)

    assert (tmp_path / "b.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_folder_that_cannot_be_made_is_an_error_of_storage(source: Path) -> None:
    with pytest.raises(StorageFailed):
        call(source, source / "below" / "b.safetensors")


def test_a_shard_may_replace_its_own_source(source: Path, tmp_path: Path) -> None:
    call(source, tmp_path / "b.safetensors", "W4A16")

    call(source, source, "W4A16")

    assert contents(source) == contents(tmp_path / "b.safetensors")


def test_a_failure_leaves_what_was_there(source: Path, tmp_path: Path) -> None:
    bad = random(64, 128)
    bad[3, 7] = float("nan")
    path = store(tmp_path / "bad.safetensors", {"good.weight": random(64, 128), "bad.weight": bad})
    target = tmp_path / "out" / "b.safetensors"
    call(source, target)
    before = target.read_bytes()

    with pytest.raises(NonFiniteWeight, match=r"bad.safetensors.*bad.weight.*\[3, 7\]"):
        call(Path(path), target)

    assert target.read_bytes() == before
    assert [path.name for path in target.parent.iterdir()] == [target.name]


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "scheme", "other"),
    [
        (process_file, "NVFP4A16", "process_file_microscale_scheme"),
        (process_file_microscale_scheme, "MXFP4A16", "`process_file`"),
        (process_file_microscale_scheme, "FP8_DYNAMIC", "`process_file`"),
    ],
)
def test_the_wrong_function_for_a_scheme_names_the_right_one(
    function: Any, scheme: str, other: str, source: Path, tmp_path: Path
) -> None:
    for form in (scheme, ct_scheme(scheme)):
        with pytest.raises(RecipeInvalid, match=other):
            function({str(source): None}, tmp_path / "b.safetensors", form, [], "cpu")


@pytest.mark.parametrize("scheme", ["NVFP4", "FP8", "UNQUANTIZED", "W17A1", {"weights": {}}, None])
def test_a_scheme_that_cannot_be_used_is_refused(scheme: Any, source: Path, tmp_path: Path) -> None:
    for function in THREE:
        with pytest.raises(RecipeInvalid):
            function({str(source): None}, tmp_path / "b.safetensors", scheme, [], "cpu")


def test_a_scheme_object_with_static_activations_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeInvalid, match="calibration"):
        process_file({str(source): None}, tmp_path / "b.safetensors", ct_scheme("FP8"), [], "cpu")


UNFIT = {
    "a vector": ("FP8_DYNAMIC", {"ln_1.weight": random(64)}, "ln_1.weight"),
    "a convolution": ("FP8_BLOCK", {"conv1d.weight": random(64, 1, 4)}, "conv1d.weight"),
    "groups": ("W4A16", {"q.weight": random(64, 100)}, "q.weight"),
    "a width below the group size": ("W4A16", {"q.weight": random(64, 64)}, "q.weight"),
    "16 columns": ("NVFP4A16", {"q.weight": random(64, 24)}, "q.weight"),
    "32 columns": ("MXFP8A16", {"q.weight": random(64, 48)}, "q.weight"),
    "experts": ("W4A16", {f"{EXPERTS}.down_proj": random(2, 64, 100)}, f"{EXPERTS}.down_proj"),
    "experts of odd height": ("W8A8", {f"{EXPERTS}.gate_up_proj": random(2, 63, 32)}, f"{EXPERTS}.gate_up_proj"),
    "a stack twice": (
        "W8A8",
        {f"{EXPERTS}.down_proj": random(1, 64, 32), f"{EXPERTS}.down_proj.weight": random(1, 64, 32)},
        f"{EXPERTS}.down_proj.weight",
    ),
    "a stack elsewhere": ("W8A8", {"mlp.gate_up_proj": random(2, 64, 32)}, "mlp.gate_up_proj"),
    "codes": ("W8A8", {"q.weight": random(64, 32).to(torch.float8_e4m3fn)}, "q.weight"),
    "a scale that is there": ("W8A8", {"q.weight": random(64, 32), "q.weight_scale": random(64, 1)}, "q.weight_scale"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_named_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    scheme, tensors, name = UNFIT[case]
    path = store(tmp_path / "a.safetensors", tensors)

    for run in (call, validate):
        with pytest.raises(Refused, match=f"`{name}`") as caught:
            run(Path(path), tmp_path / "out" / "b.safetensors", scheme)

        assert isinstance(caught.value, ValueError)
        assert "a.safetensors" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_may_be_ignored(case: str, tmp_path: Path) -> None:
    scheme, tensors, _ = UNFIT[case]
    path = Path(store(tmp_path / "a.safetensors", tensors))

    validate(path, tmp_path / "b.safetensors", scheme, ["re:.*"])
    call(path, tmp_path / "b.safetensors", scheme, ["re:.*"])

    assert contents(tmp_path / "b.safetensors") == contents(path)


def validate(path: Path, save_path: Path, scheme: Any, ignore: Any = (), **more: Any) -> None:
    validate_file({str(path): None}, save_path, scheme, ignore, "cpu", **more)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    tensors = {"a.weight": random(8, 100), "b.weight": random(8), "c.weight": random(8, 128)}
    path = store(tmp_path / "a.safetensors", tensors)

    with pytest.raises(Refused) as caught:
        validate(Path(path), tmp_path / "b.safetensors", "W4A16")

    assert [(problem.tensor, problem.kind) for problem in caught.value.problems] == [
        ("a.weight", "group-indivisible"),
        ("b.weight", "wrong-rank"),
    ]


def test_blocks_need_not_divide(tmp_path: Path) -> None:
    weight = {"q.weight": random(200, 150)}
    path = Path(store(tmp_path / "a.safetensors", weight))

    validate(path, tmp_path / "b.safetensors", "FP8_BLOCK")
    call(path, tmp_path / "b.safetensors", "FP8_BLOCK")

    assert load_file(tmp_path / "b.safetensors")["q.weight_scale"].shape == (2, 2)
    assert (
        relative_error(weights(tmp_path / "b.safetensors", "FP8_BLOCK", weight)["q.weight"], weight["q.weight"]) < 0.03
    )


def test_validation_reads_headers_only_and_writes_nothing(tmp_path: Path) -> None:
    bad = torch.full((64, 128), float("nan"))
    path = store(tmp_path / "a.safetensors", {"q.weight": bad})

    validate_file({path: None}, tmp_path / "b.safetensors", "W4A16", [], "meta")

    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


# ---- fused sets -------------------------------------------------------------------------------------------------


def test_members_in_two_files_share_their_global_scale_and_are_written_here(tmp_path: Path) -> None:
    sets = {Q: random(64, 64, seed=1), K: random(32, 64, seed=2) * 4, V: random(32, 64, seed=3) / 4}
    mlp = {f"model.layers.0.mlp.{leaf}.weight": random(64, 64, seed=n) * n for n, leaf in enumerate(["down_proj"], 5)}
    first = store(tmp_path / "1.safetensors", {Q: sets[Q], **mlp})
    second = store(tmp_path / "2.safetensors", {K: sets[K], V: sets[V], "elsewhere": random(5)})

    weight_map = {first: None, second: [K, V]}
    total, written = process_file_microscale_scheme(weight_map, tmp_path / "b", "NVFP4A16", [], "cpu")

    stored = load_file(tmp_path / "b")
    scales = {name: stored[name.replace("weight", "weight_global_scale")] for name in (*sets, *mlp)}
    assert {float(scales[name]) for name in sets} == {float(reference.global_scale(reference.measure(sets[K])))}
    assert [float(scales[name]) for name in mlp] == [
        float(reference.global_scale(reference.measure(tensor))) for tensor in mlp.values()
    ]
    assert set(written) == set(stored)
    assert "elsewhere" not in written
    assert total == sum(tensor.nbytes for tensor in stored.values())
    decoded = weights(tmp_path / "b", "NVFP4A16", sets | mlp)
    assert max(relative_error(decoded[name], tensor) for name, tensor in (sets | mlp).items()) < 0.12


def test_an_ignored_or_absent_member_has_no_say(tmp_path: Path) -> None:
    sets = {Q: random(64, 64, seed=1), K: random(32, 64, seed=2) * 100, V: random(32, 64, seed=3)}
    path = Path(store(tmp_path / "a.safetensors", sets))

    call(path, tmp_path / "b", "NVFP4A16", ["re:.*k_proj"])

    stored = load_file(tmp_path / "b")
    both = reference.measure(sets[Q]).merge(reference.measure(sets[V]))
    assert {float(stored[name.replace("weight", "weight_global_scale")]) for name in (Q, V)} == {
        float(reference.global_scale(both))
    }
    assert octets(stored[K]) == octets(sets[K])


# ---- fused expert stacks ----------------------------------------------------------------------------------------

SIZES = {"hidden_size": 128, "moe_intermediate_size": 256}
"""Twice the expert width differs from the hidden size, so the shapes tell the axes."""
COLUMNS = {"model_type": "llama4", "text_config": SIZES}
INTERLEAVED = {"model_type": "gpt_oss", "hidden_size": 128, "intermediate_size": 256}


def experts(layout: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Stacks in a layout, and the matrices of their experts."""
    matrices: dict[str, Tensor] = {}
    up, down = [], []
    for expert in range(2):
        gate, other, last = (
            random(*shape, seed=10 * expert + n) * (1 + n)
            for n, shape in enumerate([(256, 128), (256, 128), (128, 256)])
        )
        named = zip(["gate_proj", "up_proj", "down_proj"], [gate, other, last], strict=True)
        matrices |= {f"{EXPERTS}.{expert}.{half}.weight": matrix for half, matrix in named}
        stacked = torch.stack([gate, other], 1).flatten(0, 1) if layout == "interleaved" else torch.cat([gate, other])
        up.append(stacked if layout == "rows" else stacked.T)
        down.append(last if layout == "rows" else last.T)
    return {f"{EXPERTS}.gate_up_proj": torch.stack(up), f"{EXPERTS}.down_proj": torch.stack(down)}, matrices


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W4A16", "NVFP4A16"])
@pytest.mark.parametrize(
    ("layout", "config"),
    [
        ("rows", None),
        ("rows", {"model_type": "mixtral", "hidden_size": 128, "intermediate_size": 256}),
        ("rows", {"model_type": "unheard_of", **SIZES}),
        ("columns", COLUMNS),
        ("interleaved", INTERLEAVED),
    ],
)
def test_experts_are_split_as_the_config_beside_their_file_tells(
    layout: str, config: dict[str, Any] | None, scheme: str, tmp_path: Path
) -> None:
    stacks, matrices = experts(layout)
    path = Path(store(tmp_path / "a.safetensors", stacks))
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))

    validate(path, tmp_path / "b.safetensors", scheme)
    weight_map = call(path, tmp_path / "b.safetensors", scheme)

    own = store(tmp_path / "own.safetensors", matrices)
    call(Path(own), tmp_path / "expected.safetensors", scheme)
    assert contents(tmp_path / "b.safetensors") == contents(tmp_path / "expected.safetensors")
    assert set(weight_map) == set(load_file(tmp_path / "expected.safetensors"))


def test_gate_and_up_of_an_expert_share_their_global_scale(tmp_path: Path) -> None:
    stacks, matrices = experts("rows")

    call(Path(store(tmp_path / "a.safetensors", stacks)), tmp_path / "b.safetensors", "NVFP4A16")

    stored = load_file(tmp_path / "b.safetensors")
    for expert in range(2):
        names = [f"{EXPERTS}.{expert}.{half}.weight" for half in ("gate_proj", "up_proj")]
        extent = reference.measure(matrices[names[0]]).merge(reference.measure(matrices[names[1]]))
        scales = {float(stored[name.replace("weight", "weight_global_scale")]) for name in names}
        assert scales == {float(reference.global_scale(extent))}


def test_rows_that_are_taken_for_granted_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = Path(store(tmp_path / "a.safetensors", experts("rows")[0]))

    with caplog.at_level(logging.WARNING, "shardmill"):
        call(path, tmp_path / "b.safetensors")

    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert EXPERTS in caplog.text


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "unheard_of", "hidden_size": 128, "moe_intermediate_size": 64},
        {"model_type": "llama4", "hidden_size": 4096, "intermediate_size": 8192},
        {},
    ],
)
def test_a_config_that_does_not_tell_the_layout_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    path = Path(store(tmp_path / "a.safetensors", {f"{EXPERTS}.gate_up_proj": random(2, 128, 128)}))
    (tmp_path / "config.json").write_text(json.dumps(config))

    for run in (call, validate):
        with pytest.raises(Refused, match=r"gate_up_proj.*split_fused_moe_experts") as caught:
            run(path, tmp_path / "b.safetensors", "FP8_DYNAMIC")

        assert [problem.kind for problem in caught.value.problems] == ["expert-layout"]


@pytest.mark.parametrize("text", ["{", '{"a": 1, "a": 2}'])
def test_a_damaged_config_is_refused_where_it_is_needed(text: str, source: Path, tmp_path: Path) -> None:
    path = Path(store(tmp_path / "a.safetensors", experts("rows")[0]))
    for folder in (path.parent, source.parent):
        (folder / "config.json").write_text(text)

    with pytest.raises(CheckpointInvalid, match=r"config\.json"):
        call(path, tmp_path / "b.safetensors")
    assert call(source, tmp_path / "b.safetensors")


def test_an_earlier_quantization_config_is_none_of_our_business(tmp_path: Path) -> None:
    config = {**INTERLEAVED, "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = Path(store(tmp_path / "a.safetensors", experts("interleaved")[0]))

    assert call(path, tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    "ignore", [[f"{EXPERTS}.gate_up_proj"], ["re:.*experts"], [r"re:.*experts\.\d+\.(gate|up)_proj$"]]
)
def test_an_ignored_stack_keeps_its_bytes(ignore: list[str], tmp_path: Path) -> None:
    stacks, _ = experts("rows")
    biases = {f"{EXPERTS}.gate_up_proj_bias": random(2, 512)}
    path = Path(store(tmp_path / "a.safetensors", stacks | biases))

    call(path, tmp_path / "b.safetensors", "W8A8", ignore)

    stored, before = contents(tmp_path / "b.safetensors"), contents(path)
    for name in (f"{EXPERTS}.gate_up_proj", *biases):
        assert stored[name] == before[name]
    assert (f"{EXPERTS}.down_proj" in stored) == (ignore == ["re:.*experts"])


def test_a_stack_that_no_target_means_keeps_its_bytes(tmp_path: Path) -> None:
    path = Path(store(tmp_path / "a.safetensors", {**experts("rows")[0], Q: random(64, 128)}))

    call(path, tmp_path / "b.safetensors", ct_scheme("W8A8", targets=["re:.*q_proj"]))

    stored = contents(tmp_path / "b.safetensors")
    assert {name: stored[name] for name in experts("rows")[0]} == {
        name: entry for name, entry in contents(path).items() if name != Q
    }


def test_experts_of_a_stack_are_treated_alike(tmp_path: Path) -> None:
    path = Path(store(tmp_path / "a.safetensors", experts("rows")[0]))

    with pytest.raises(Refused, match="alike"):
        call(path, tmp_path / "b.safetensors", "W8A8", [r"re:.*experts\.1\.gate_proj"])


@pytest.mark.parametrize("layout", ["rows", "interleaved"])
def test_biases_go_with_their_experts(layout: str, tmp_path: Path) -> None:
    bias = random(2, 512, seed=3)
    path = Path(store(tmp_path / "a.safetensors", experts(layout)[0] | {f"{EXPERTS}.gate_up_proj_bias": bias}))
    if layout == "interleaved":
        (tmp_path / "config.json").write_text(json.dumps(INTERLEAVED))

    call(path, tmp_path / "b.safetensors")

    stored = load_file(tmp_path / "b.safetensors")
    expected = bias[1][1::2] if layout == "interleaved" else bias[1][256:]
    assert torch.equal(stored[f"{EXPERTS}.1.up_proj.bias"], expected)


def test_a_bias_without_its_stack_is_split_too(tmp_path: Path) -> None:
    path = Path(store(tmp_path / "a.safetensors", {f"{EXPERTS}.gate_up_proj_bias": random(2, 512)}))

    assert len(call(path, tmp_path / "b.safetensors")) == 4


def test_parts_of_other_formats_are_no_stacks(tmp_path: Path) -> None:
    tensors = {f"{EXPERTS}.gate_up_proj_blocks": torch.zeros(2, 64, 4, 16, dtype=torch.uint8)}
    tensors |= {f"{EXPERTS}.gate_up_proj_scales": torch.zeros(2, 64, 4, dtype=torch.uint8)}
    path = Path(store(tmp_path / "a.safetensors", tensors))

    call(path, tmp_path / "b.safetensors")

    assert contents(tmp_path / "b.safetensors") == contents(path)


# ---- splitting in memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["", ".weight"])
@pytest.mark.parametrize("layout", ["rows", "columns", "interleaved"])
def test_stacks_are_split_into_views(layout: str, ending: str) -> None:
    stacks, matrices = experts(layout)
    tensors = {f"{name}{ending}": stack for name, stack in stacks.items()} | {NORM: random(64)}

    parts = split_fused_moe_experts(tensors, layout=layout)

    assert set(parts) == set(matrices) | {NORM}
    assert parts[NORM] is tensors[NORM]
    assert all(torch.equal(parts[name], matrix) for name, matrix in matrices.items())
    owners = {stack.untyped_storage().data_ptr() for stack in stacks.values()}
    assert {parts[name].untyped_storage().data_ptr() for name in matrices} == owners


def test_splitting_makes_seven_tensors_of_three() -> None:
    tensors = {
        f"{EXPERTS}.gate_up_proj": random(2, 8, 4),
        f"{EXPERTS}.down_proj": random(2, 4, 4),
        "mlp.gate.weight": random(2, 4),
    }

    parts = split_fused_moe_experts(tensors)

    assert len(parts) == 7
    assert list(tensors) == [f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj", "mlp.gate.weight"]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mlp.down_proj.weight", (8, 4)),
        ("mlp.gate_up_proj.weight", (8, 4)),
        (f"{EXPERTS}.gate_up_proj_bias", (2, 8)),
        (f"{EXPERTS}.gate_up_proj_scales", (2, 8, 4)),
        (f"{EXPERTS}.gate_up_proj", (2, 8, 4, 16)),
        ("conv.weight", (8, 4, 2)),
    ],
)
def test_what_is_no_stack_passes_through(name: str, shape: tuple[int, ...]) -> None:
    tensors = {name: random(*shape)}

    assert split_fused_moe_experts(tensors) == tensors


def test_a_stack_without_parent_is_split() -> None:
    assert list(split_fused_moe_experts({"down_proj": random(1, 4, 4)})) == ["0.down_proj.weight"]


@pytest.mark.parametrize("layout", ["rows", "columns", "interleaved"])
def test_an_odd_number_of_output_features_is_refused(layout: str) -> None:
    shape = (2, 7, 4) if layout == "rows" else (2, 4, 7)

    with pytest.raises(ValueError, match=r"gate_up_proj.*7"):
        split_fused_moe_experts({"experts.gate_up_proj": random(*shape)}, layout=layout)


def test_a_name_with_both_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="gate_up_proj"):
        split_fused_moe_experts({"experts.down_proj.gate_up_proj": random(2, 4, 4)})


def test_an_expert_that_is_there_already_is_refused() -> None:
    tensors = {"experts.down_proj": random(1, 4, 4), "experts.0.down_proj.weight": random(4, 4)}

    with pytest.raises(CheckpointInvalid, match=r"experts\.0\.down_proj\.weight"):
        split_fused_moe_experts(tensors)


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(RecipeInvalid, match="diagonal"):
        split_fused_moe_experts({}, layout="diagonal")


# ---- converters -------------------------------------------------------------------------------------------------


class Recorder:
    """A converter that changes nothing and remembers what it got."""

    def __init__(self, answer: Any = None) -> None:
        self.processed: dict[str, Tensor] = {}
        self.validated: dict[str, Tensor] = {}
        self.answer = answer

    def process(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self.processed = dict(tensors)
        return tensors

    def validate(self, tensors: dict[str, Tensor]) -> object:
        self.validated = dict(tensors)
        return self.answer


class Dequantizer:
    """float8 codes with one scale per tensor to plain bf16."""

    def process(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_scale")}
        for name, scale in scales.items():
            weight = name.removesuffix("_scale")
            tensors[weight] = (tensors[weight].float() * scale).to(torch.bfloat16)
        return tensors

    def validate(self, tensors: dict[str, Tensor]) -> object:
        return self.process(dict(tensors))


def converted(path: Path, save_path: Path, converter: Any, scheme: str = "W8A8", ignore: Any = ()) -> dict[str, str]:
    validate(path, save_path, scheme, ignore, converter=converter)
    return call(path, save_path, scheme, ignore, converter=converter)


@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "W4A16_ASYM", "NVFP4A16"])
def test_a_converter_that_changes_nothing_changes_no_byte(scheme: str, tmp_path: Path) -> None:
    tensors = MEMBERS | experts("rows")[0] | {f"{EXPERTS}.gate_up_proj_bias": random(2, 512)}
    path = Path(store(tmp_path / "a.safetensors", tensors))
    call(path, tmp_path / "without", scheme)

    weight_map = converted(path, tmp_path / "with", Recorder(), scheme)

    assert contents(tmp_path / "with") == contents(tmp_path / "without")
    assert set(weight_map) == set(contents(tmp_path / "with"))


def test_a_converter_gets_experts_in_parts_and_for_validation_without_data(tmp_path: Path) -> None:
    stacks, matrices = experts("rows")
    converter = Recorder()
    path = Path(store(tmp_path / "a.safetensors", stacks | {NORM: random(64)}))

    converted(path, tmp_path / "b.safetensors", converter)

    assert set(converter.processed) == set(matrices) | {NORM}
    assert all(torch.equal(converter.processed[name], matrix) for name, matrix in matrices.items())
    assert {tensor.device.type for tensor in converter.processed.values()} == {"cpu"}
    assert {tensor.device.type for tensor in converter.validated.values()} == {"meta"}
    assert {name: tensor.shape for name, tensor in converter.validated.items()} == {
        name: tensor.shape for name, tensor in converter.processed.items()
    }


def test_a_converter_gets_ignored_experts_whole(tmp_path: Path) -> None:
    converter = Recorder()
    path = Path(store(tmp_path / "a.safetensors", experts("rows")[0]))

    converted(path, tmp_path / "b.safetensors", converter, ignore=["re:.*experts"])

    assert set(converter.processed) == set(experts("rows")[0])
    assert contents(tmp_path / "b.safetensors") == contents(path)


def test_what_a_converter_returns_is_quantized(tmp_path: Path) -> None:
    weight = random(64, 128, seed=1)
    codes = {"q.weight": (weight * 100).to(torch.float8_e4m3fn), "q.weight_scale": torch.tensor(0.01)}
    path = Path(store(tmp_path / "a.safetensors", codes))

    weight_map = converted(path, tmp_path / "b.safetensors", Dequantizer())

    assert set(weight_map) == {"q.weight", "q.weight_scale"}
    decoded = weights(tmp_path / "b.safetensors", "W8A8", {"q.weight": weight})["q.weight"]
    assert relative_error(decoded, weight) < 0.04


def test_experts_that_a_converter_makes_are_split(tmp_path: Path) -> None:
    stack = f"{EXPERTS}.down_proj"
    codes = {stack: random(2, 64, 32).to(torch.float8_e4m3fn), f"{stack}_scale": torch.tensor(0.5)}
    path = Path(store(tmp_path / "a.safetensors", codes))

    weight_map = converted(path, tmp_path / "b.safetensors", Dequantizer())

    assert {name.rpartition(".")[0] for name in weight_map} == {f"{EXPERTS}.{n}.down_proj" for n in range(2)}


def test_a_converter_may_keep_silent_about_what_it_will_make(tmp_path: Path) -> None:
    codes = {"q.weight": random(64, 32).to(torch.float8_e4m3fn), "q.weight_scale": torch.tensor(0.01)}
    path = Path(store(tmp_path / "a.safetensors", codes))

    validate(path, tmp_path / "b.safetensors", "W8A8", converter=Recorder())
    with pytest.raises(Refused, match=r"q.weight"):
        validate(path, tmp_path / "b.safetensors", "W8A8", converter=Recorder(answer=codes))


def test_what_a_converter_makes_is_checked(tmp_path: Path) -> None:
    class Flattener(Recorder):
        def process(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"flat.weight": tensors[Q].flatten()}

    path = Path(store(tmp_path / "a.safetensors", {Q: random(64, 128)}))

    with pytest.raises(Refused, match=r"flat.weight"):
        call(path, tmp_path / "b.safetensors", converter=Flattener())


def test_a_dtype_that_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    class Complexifier(Recorder):
        def process(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(torch.complex128) for name, tensor in tensors.items()}

    path = Path(store(tmp_path / "a.safetensors", {"m.freqs": random(64)}))

    with pytest.raises(CheckpointInvalid, match=r"m.freqs.*complex128|complex128.*m.freqs"):
        call(path, tmp_path / "b.safetensors", converter=Complexifier())


def test_a_dtype_that_torch_lacks_is_carried_over_and_kept_from_converters(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(encode_header([("q.codes", "F4", (2, 4), 0, 4)], []) + bytes(range(4)))

    _, weight_map = process_file({str(path): None}, tmp_path / "b.safetensors", "W8A8", [], "cpu")

    assert set(weight_map) == {"q.codes"}
    assert (tmp_path / "b.safetensors").read_bytes().endswith(bytes(range(4)))
    with pytest.raises(CheckpointInvalid, match=r"q\.codes"):
        call(path, tmp_path / "b.safetensors", converter=Recorder())


def test_an_error_of_a_converter_comes_through(source: Path, tmp_path: Path) -> None:
    class Broken(Recorder):
        def process(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            raise KeyError(min(tensors))

    with pytest.raises(KeyError, match="embed_tokens"):
        call(source, tmp_path / "b.safetensors", converter=Broken())
    assert not (tmp_path / "b.safetensors").exists()


def test_a_source_that_changes_meanwhile_is_noticed(source: Path, tmp_path: Path) -> None:
    class Meddler(Recorder):
        def process(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            os.utime(source, ns=(1, 1))
            return tensors

    with pytest.raises(SourceChanged, match=r"a.safetensors"):
        call(source, tmp_path / "b.safetensors", converter=Meddler())
    assert not (tmp_path / "b.safetensors").exists()


@pytest.fixture(autouse=True)
def _no_stray_files(tmp_path: Path) -> Iterator[None]:
    yield
    assert list(tmp_path.rglob(".*")) == []
