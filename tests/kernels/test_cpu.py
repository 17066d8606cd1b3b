"""Bytes and statistics of the compiled kernels against those of the reference kernels."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import checkpoints
from blocks import row_blocks
from kernels.oracle import INPUTS, SOURCES, sample
from shardmill.core.dtypes import scale_dtype_for
from shardmill.core.plan import ShardPlan
from shardmill.core.recipe import uniform
from shardmill.core.scheme import PRESETS, ActivationArgs, Scheme, WeightArgs
from shardmill.core.statistics import Extent, Statistics
from shardmill.errors import NonFiniteWeight
from shardmill.kernels import cpu, reference
from shardmill.kernels.lanes import KERNELS_VARIABLE, needs_torch
from shardmill.kernels.shard import encode_shard
from shardmill.stages.devices import may_have_accelerator
from shardmill.stages.plan import Locations, make_plan

NAMES = {dtype: name for name, dtype in reference.DTYPES.items()}
FLOATS = [*SOURCES, "F64"]
GRANULARITY: dict[str, dict[str, Any]] = {
    "tensor": {"strategy": "tensor"},
    "channel": {"strategy": "channel"},
    "group": {"strategy": "group", "group_size": 40},
    "block": {"strategy": "block", "block_structure": (32, 48)},
}
SHAPES = {"tensor": (35, 203), "channel": (35, 203), "group": (35, 120), "block": (35, 203)}
# One of each kind of code with each kind of scale.
FAMILIES = ["FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W3A16", "W4A16", "W4A16_ASYM", "NVFP4A16", "MXFP4", "MXFP8"]


def custom_schemes() -> Iterator[Scheme]:
    for strategy, activations in itertools.product(GRANULARITY, (None, ActivationArgs())):
        yield Scheme(weights=WeightArgs(type="float", **GRANULARITY[strategy]), input_activations=activations)
        for bits, symmetric in itertools.product(range(2, 9), (True, False)):
            args = WeightArgs(num_bits=bits, symmetric=symmetric, **GRANULARITY[strategy])
            yield Scheme(weights=args, input_activations=activations)


CUSTOM = {f"{scheme.label} {scheme.format}": scheme for scheme in custom_schemes()}


def bits_of(weight: Tensor) -> cpu.Array:
    return cpu.from_buffer(reference.to_bytes(weight), NAMES[weight.dtype], tuple(weight.shape))


def both(
    scheme: Scheme, weight: Tensor, whole: Extent | None = None, workspace: cpu.Workspace | None = None
) -> tuple[reference.Encoded, cpu.Encoded]:
    name = NAMES[weight.dtype]
    more: dict[str, Any] = {
        "format": scheme.format,
        "scale_dtype": scale_dtype_for(name),
        "whole": whole or reference.measure(weight),
    }
    slow = reference.encode(weight, scheme.weights, **more)
    return slow, cpu.encode(bits_of(weight), name, scheme.weights, workspace=workspace, **more)


def described(
    tensors: dict[str, Any], to_bytes: Callable[[Any], memoryview]
) -> dict[str, tuple[tuple[int, ...], bytes]]:
    return {name: (tuple(tensor.shape), bytes(to_bytes(tensor))) for name, tensor in tensors.items()}


def assert_same(scheme: Scheme, weight: Tensor, whole: Extent | None = None, *, rel: float = 1e-12) -> None:
    slow, fast = both(scheme, weight, whole)
    assert described(fast.tensors, cpu.to_bytes) == described(slow.tensors, reference.to_bytes)
    assert fast.finite == slow.finite.item()
    numbers, expected = asdict(fast.statistics), asdict(slow.statistics)
    for field in ("squared_error", "squared_weight"):
        assert numbers.pop(field) == pytest.approx(expected.pop(field), rel=rel, abs=0)
    assert numbers == expected


def finite(values: Tensor) -> Tensor:
    return torch.where(values.float().isfinite(), values, torch.zeros_like(values))


def every_pattern(source: str) -> Tensor:
    """All finite 16-bit numbers, those of one magnitude together: groups of like size have all sorts of scales."""
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(2, -1).t().reshape(128, 512).contiguous()
    return finite(patterns.view(reference.DTYPES[source]))


# Bytes


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("name", PRESETS)
def test_presets_give_the_bytes_of_the_reference(name: str, source: str) -> None:
    for kind in INPUTS:
        assert_same(PRESETS[name], sample(kind, reference.DTYPES[source]))


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_schemes_give_the_bytes_of_the_reference(name: str) -> None:
    scheme = CUSTOM[name]
    for kind, source in [("gaussian", "BF16"), ("holes", "F16"), ("tiny", "F32"), ("one-sided", "F64")]:
        assert_same(scheme, sample(kind, reference.DTYPES[source], SHAPES[scheme.weights.strategy]))


@pytest.mark.slow
@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", CUSTOM)
def test_every_custom_scheme_gives_the_bytes_of_the_reference(name: str, kind: str, source: str) -> None:
    assert_same(CUSTOM[name], sample(kind, reference.DTYPES[source], SHAPES[CUSTOM[name].weights.strategy]))


@pytest.mark.parametrize("source", ["BF16", "F16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_all_16_bit_patterns(name: str, source: str) -> None:
    weight = every_pattern(source)
    assert_same(PRESETS[name], weight)
    assert_same(PRESETS[name], weight.t().contiguous())  # every row from the smallest to the largest
    assert_same(PRESETS[name], weight, Extent(low=-1.0, high=1.0))


@pytest.mark.parametrize("source", ["BF16", "F16"])
@pytest.mark.parametrize("high", [448.0, 6.0, 1.0, 1e-30, 1e30])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("type", "bits"), [("float", 8), ("int", 8), ("int", 5), ("int", 2)])
def test_all_16_bit_patterns_with_a_given_scale(
    type: str,  # noqa: A002 - as in WeightArgs
    bits: int,
    symmetric: bool,  # noqa: FBT001 - a parameter of the test
    high: float,
    source: str,
) -> None:
    if type == "int" or symmetric:
        args = WeightArgs(type=type, num_bits=bits, strategy="tensor", symmetric=symmetric)
        assert_same(Scheme(weights=args), every_pattern(source), Extent(low=-high / 2, high=high))


@pytest.mark.slow
@pytest.mark.parametrize("source", ["BF16", "F16"])
@pytest.mark.parametrize("name", PRESETS)
def test_all_16_bit_patterns_beside_each_largest_one(name: str, source: str) -> None:
    patterns = every_pattern(source)
    for amax in patterns.flatten()[:: 65536 // 64].abs().tolist():
        assert_same(PRESETS[name], patterns.clamp(-amax, amax))


@pytest.mark.parametrize("name", FAMILIES)
def test_ties_go_to_the_even_code(name: str) -> None:
    # quotients are odd multiples of a fraction of the step, and the neighbours of these
    scheme = PRESETS[name]
    amax = scheme.weights.code_max
    middles = torch.arange(-4096, 4096) * amax / 4096
    for weight in (middles, middles.nextafter(torch.tensor(9e9)), middles.nextafter(torch.tensor(-9e9))):
        rows = weight.reshape(-1, 128).clone()
        rows[:, ::16] = amax
        assert_same(scheme, rows, Extent(low=-amax, high=amax))
        assert_same(scheme, rows.bfloat16(), Extent(low=-amax, high=amax))


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_zeros_of_either_sign(name: str, source: str) -> None:
    dtype = reference.DTYPES[source]
    weight = torch.zeros((35, 256), dtype=dtype)
    assert_same(PRESETS[name], weight)
    assert_same(PRESETS[name], -weight)
    weight[3, 5], weight[4] = torch.finfo(dtype).tiny, -torch.finfo(dtype).smallest_normal
    weight[5, ::3] = -0.0
    assert_same(PRESETS[name], weight)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_largest_and_the_smallest_numbers(name: str) -> None:
    weight = torch.zeros((6, 256))
    weight[0, 0], weight[1, :2], weight[2] = torch.finfo(torch.float32).max, torch.tensor([3.4e38, -3.4e38]), -3.4e38
    weight[3, 0], weight[4, :2], weight[5] = 1e-45, torch.tensor([1e-40, -3e-39]), 2e-42
    for rows in (weight, weight.clamp(-3.3e38, 3.3e38).bfloat16(), weight[3:].clone(), weight[3:].bfloat16()):
        assert_same(PRESETS[name], rows)


@pytest.mark.parametrize("cols", [1, 2, 7, 8, 9, 31, 33, 2047, 2048, 2049, 4096, 4100])
@pytest.mark.parametrize("bits", range(2, 9))
def test_odd_widths(bits: int, cols: int) -> None:
    weight = sample("gaussian", torch.float32, (7, max(cols, 8)))[:, :cols].contiguous()
    for symmetric in (True, False):
        assert_same(Scheme(weights=WeightArgs(num_bits=bits, symmetric=symmetric)), weight)


@pytest.mark.parametrize("shape", [(1, 128), (17, 16), (129, 130), (128, 257), (130, 2200)])
@pytest.mark.parametrize("source", FLOATS)
def test_ragged_blocks(shape: tuple[int, int], source: str) -> None:
    assert_same(
        PRESETS["FP8_BLOCK"],
        sample("gaussian", torch.float32, (130, 2200))
        .to(reference.DTYPES[source])[: shape[0], : shape[1]]
        .contiguous(),
    )


@pytest.mark.parametrize("size", [1, 8, 16, 24, 32, 48, 64, 100, 128, 2048, 2400, 4800])
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_any_size(size: int, symmetric: bool) -> None:  # noqa: FBT001 - a parameter of the test
    args = WeightArgs(num_bits=4, strategy="group", group_size=size, symmetric=symmetric)
    for source in SOURCES:
        assert_same(Scheme(weights=args), sample("heavy tails", SOURCES[source], (33, size * max(1, 2400 // size))))


def patterns(source: str, shape: tuple[int, int], seed: int) -> Tensor:
    """Finite numbers of random bits."""
    dtype = reference.DTYPES[source]
    raw = bytearray(np.random.default_rng(seed).bytes(math.prod(shape) * dtype.itemsize))
    weight = torch.frombuffer(raw, dtype=dtype).reshape(shape)
    # a narrower range of exponents now and then, so that not every number but one is lost
    return finite(weight if seed % 2 else weight.clamp(-8, 8))


@given(
    st.sampled_from([*PRESETS, *CUSTOM]), st.sampled_from(FLOATS), st.integers(1, 70), st.integers(1, 5),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_any_bits_give_the_bytes_of_the_reference(name: str, source: str, rows: int, count: int, seed: int) -> None:
    scheme = PRESETS.get(name) or CUSTOM[name]
    cols = count * (scheme.weights.group_size or 53)
    assert_same(scheme, patterns(source, (rows, cols), seed))


@pytest.mark.slow
@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("name", PRESETS)
def test_millions_of_bits_give_the_bytes_of_the_reference(name: str, source: str) -> None:
    for seed in range(4):
        # torch adds a million squares one after another, which alone costs some 1e-12
        assert_same(PRESETS[name], patterns(source, (512, 2048), seed), rel=1e-11)


def test_a_small_extent_clips() -> None:
    weight = sample("gaussian", torch.float32) * 1e3
    for name in ("FP8_DYNAMIC", "W8A8", "W4A16"):
        args = PRESETS[name].weights
        for symmetric in {True, args.type == "float"}:
            scheme = Scheme(
                weights=WeightArgs(type=args.type, num_bits=args.num_bits, strategy="tensor", symmetric=symmetric)
            )
            slow, fast = both(scheme, weight, Extent(low=-1.0, high=2.0))
            assert fast.statistics.clipped == slow.statistics.clipped > 1000


@pytest.mark.parametrize("name", FAMILIES)
def test_sums_are_exact_but_for_the_rounding_of_additions(name: str) -> None:
    # one value all over: roundings that lean to one side would add up
    scheme, weight = PRESETS[name], torch.full((64, 2048), 0.0196533203125).bfloat16()
    weight[:, ::32] = 0.0703125
    slow, fast = both(scheme, weight)
    values = weight.double().flatten().tolist()
    tensors = dict(slow.tensors)
    if scheme.weights.has_global_scale:
        tensors["weight_global_scale"] = reference.global_scale(reference.measure(weight))
    left = reference.decode(tensors, scheme.weights, format=scheme.format, shape=(64, 2048))
    lost = (weight.float() - left).double().flatten().tolist()
    assert fast.statistics.squared_weight == pytest.approx(math.fsum(v * v for v in values), rel=1e-13, abs=0)
    assert fast.statistics.squared_error == pytest.approx(math.fsum(v * v for v in lost), rel=1e-13, abs=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_row_blocks_give_what_the_whole_gives(name: str) -> None:
    scheme, weight = PRESETS[name], sample("gaussian", torch.bfloat16, (256, 384))
    whole, workspace = reference.measure(weight), cpu.Workspace()
    _, at_once = both(scheme, weight, whole)
    codes, merged = b"", Statistics()
    for rows in (weight[:128], weight[128:]):
        _, part = both(scheme, rows, whole, workspace)
        codes += bytes(cpu.to_bytes(next(iter(part.tensors.values()))))
        merged = merged.merge(part.statistics)
    assert codes == bytes(cpu.to_bytes(next(iter(at_once.tensors.values()))))
    numbers, expected = asdict(merged), asdict(at_once.statistics)
    for field in ("squared_error", "squared_weight"):
        assert numbers.pop(field) == pytest.approx(expected.pop(field), rel=1e-13, abs=0)
    assert numbers == expected


# Extents and numbers that are not finite


@pytest.mark.parametrize("source", FLOATS)
def test_extents_are_those_of_the_reference(source: str) -> None:
    for kind, scale in itertools.product(INPUTS, (1, -1)):
        weight = sample(kind, reference.DTYPES[source]) * scale
        for rows in (weight, weight.abs(), -weight.abs(), weight[:0]):
            assert cpu.measure(bits_of(rows), source) == reference.measure(rows)


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_show_wherever_they_are(bad: float, source: str) -> None:
    for row, col in [(0, 0), (3, 17), (34, 127)]:
        weight = sample("gaussian", reference.DTYPES[source], (35, 128)).clone()
        weight[row, col] = bad
        assert str(cpu.measure(bits_of(weight), source)) == str(reference.measure(weight))
        assert cpu.first_nonfinite(bits_of(weight), source) == reference.first_nonfinite(weight) == (1, (row, col))
        for name in FAMILIES:
            _, fast = both(PRESETS[name], weight, Extent(low=-1.0, high=1.0))
            assert not fast.finite


def test_float64_values_beyond_float32_are_not_finite() -> None:
    weight = torch.zeros(2, 32, dtype=torch.float64)
    weight[1, 2] = -1e300
    assert cpu.measure(bits_of(weight), "F64") == Extent(low=-math.inf)
    assert cpu.first_nonfinite(bits_of(weight), "F64") == (1, (1, 2))
    assert cpu.first_nonfinite(bits_of(weight[:1]), "F64") is None
    assert not both(PRESETS["FP8_DYNAMIC"], weight)[1].finite


@pytest.mark.parametrize("amax", [0.0, 1e-45, 7.8e-36, 7.95e-36, 0.02, 1.75, 3.4028235e38, math.inf, math.nan])
def test_global_scales_are_those_of_the_reference(amax: float) -> None:
    assert cpu.global_scale(Extent(high=amax)).tolist() == reference.global_scale(Extent(high=amax)).tolist()


# Memory


def test_a_workspace_changes_no_byte() -> None:
    workspace = cpu.Workspace()
    for name, cols in itertools.product(["FP8_DYNAMIC", "W3A16", "NVFP4A16"], (4096, 128, 512)):
        slow, fast = both(PRESETS[name], sample("gaussian", torch.bfloat16, (40, cols)), workspace=workspace)
        assert described(fast.tensors, cpu.to_bytes) == described(slow.tensors, reference.to_bytes)


@pytest.mark.parametrize("offset", [0, 1])
def test_misaligned_and_read_only_buffers(offset: int) -> None:
    weight = sample("gaussian", torch.float32, (4, 128))
    buffer = memoryview(bytes(offset) + bytes(reference.to_bytes(weight)))[offset:]
    bits = cpu.from_buffer(buffer, "F32", (4, 128))
    assert bytes(cpu.to_bytes(bits)) == buffer
    assert bytes(cpu.to_bytes(bits.T)) == bytes(reference.to_bytes(weight.t()))
    assert cpu.measure(bits, "F32") == reference.measure(weight)


def test_what_encode_asks_of_its_caller() -> None:
    bits = bits_of(torch.zeros(2, 24))
    with pytest.raises(ValueError, match="needs the extent"):
        cpu.encode(bits, "F32", WeightArgs(strategy="tensor"), format="pack-quantized", scale_dtype="F32")
    with pytest.raises(ValueError, match="group_size 16 does not divide 24 columns"):
        cpu.encode(bits, "F32", PRESETS["NVFP4A16"].weights, format="x", scale_dtype="F32", whole=Extent())


# The choice of kernels


def planned(folder: Path, tensors: dict[str, Tensor], scheme: str, **config: Any) -> tuple[ShardPlan, Path]:
    """The only shard of a small checkpoint, and its file."""
    source = checkpoints.write(folder, [tensors], {**checkpoints.LLAMA, **config})
    locations = Locations(source=str(source), destination=str(folder.with_name("result")))
    return make_plan(locations.open_source(), uniform(scheme)).shards[0], source / "model.safetensors"


def encoded(shard: ShardPlan, file: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """Bytes and records of an output shard."""
    data, written = file.read_bytes(), bytearray()

    def read(_name: str, offset: int, view: memoryview) -> None:
        view[:] = data[offset : offset + len(view)]

    records = encode_shard(shard, read, written.extend)
    return bytes(written), [record.statistics.to_json() for record in records]


def stacked_experts() -> dict[str, Tensor]:
    """A stack whose experts are stored transposed, gate and up row by row in turns."""
    prefix = "model.layers.0.mlp.experts"
    return {
        f"{prefix}.gate_up_proj": checkpoints.gaussian(1, 2, 128, 512),
        f"{prefix}.down_proj": checkpoints.gaussian(2, 2, 256, 128),
        f"{prefix}.gate_up_proj_bias": checkpoints.gaussian(3, 2, 512),
    }


GPT_OSS = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "intermediate_size": 256}


@pytest.mark.parametrize("blocks", [4 << 20, 9000])
@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "W3A16", "W4A16_ASYM", "NVFP4A16", "MXFP4"])
@pytest.mark.parametrize("is_stack", [False, True])
def test_both_kernels_write_the_same_shard(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_stack: bool,  # noqa: FBT001 - a parameter of the test
    scheme: str,
    blocks: int,
) -> None:
    tensors, config = (stacked_experts(), GPT_OSS) if is_stack else (checkpoints.llama(), {})
    shard, file = planned(tmp_path / "source", tensors, scheme, **config)
    found = []
    for kernels in ("cpu", "reference"):
        monkeypatch.setenv(KERNELS_VARIABLE, kernels)
        assert needs_torch(shard, "cpu") == (kernels == "reference")
        with row_blocks(blocks):
            found.append(encoded(shard, file))
    assert found[0] == found[1]
    assert found[0][1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "NVFP4A16"])
def test_both_kernels_refuse_in_the_same_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, bad: float
) -> None:
    weight = checkpoints.gaussian(1, 64, 128)
    weight[40, 7], weight[41, 3] = bad, -bad
    shard, file = planned(tmp_path / "source", {"m.o_proj.weight": weight}, scheme)
    messages = []
    for kernels in ("cpu", "reference"):
        monkeypatch.setenv(KERNELS_VARIABLE, kernels)
        with pytest.raises(NonFiniteWeight) as caught:
            encoded(shard, file)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "2 in its first bad row block, first at index [40, 7]" in messages[0]


def test_the_fast_kernels_are_the_default_on_the_cpu_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard, _ = planned(tmp_path / "source", checkpoints.llama(), "W4A16")
    monkeypatch.delenv(KERNELS_VARIABLE, raising=False)
    assert not needs_torch(shard, "cpu")
    assert needs_torch(shard, "cuda:0")
    monkeypatch.setenv(KERNELS_VARIABLE, "cpu")
    with pytest.raises(ValueError, match=r"which needs device `cpu` \(found `cuda:0`\) and numba"):
        needs_torch(shard, "cuda:0")
    monkeypatch.setenv(KERNELS_VARIABLE, "gpu")
    with pytest.raises(ValueError, match="must be `cpu` or `reference`, found 'gpu'"):
        needs_torch(shard, "cpu")


def test_without_numba_the_reference_does_the_work_after_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shard, file = planned(tmp_path / "source", checkpoints.llama(), "W4A16")
    expected = encoded(shard, file)
    monkeypatch.delenv(KERNELS_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "shardmill.kernels.compiled", None)
    monkeypatch.delattr("shardmill.kernels.compiled")
    cpu._loops.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert encoded(shard, file) == encoded(shard, file) == expected
        assert [record.name for record in caplog.records] == ["shardmill.kernels.cpu"]
        with pytest.raises(ImportError, match="need numba"):
            cpu.measure(bits_of(torch.ones(1)), "F32")
    finally:
        cpu._loops.cache_clear()


def test_code_is_kept_where_it_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, home = tmp_path / "package", tmp_path / "home"
    package.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    assert cpu._cache_folder(package) == ""
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != package and real(path, mode))
    assert cpu._cache_folder(package) == str(home / "shardmill" / "numba")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/impossible")
    assert Path(cpu._cache_folder(package)).is_dir()


def test_a_run_on_the_cpu_imports_no_torch(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "source", [checkpoints.llama()])
    program = f"""
import json, sys
from shardmill.core.recipe import uniform
from shardmill.stages import devices, pipeline
from shardmill.stages.plan import Locations
devices.may_have_accelerator = lambda: False
locations = Locations(source={str(tmp_path / "source")!r}, destination={str(tmp_path / "result")!r})
pipeline.run(locations, uniform("W4A16"))
print(json.dumps([name for name in ("torch", "compressed_tensors", "prefect", "numba") if name in sys.modules]))
"""
    environment = {name: value for name, value in os.environ.items() if name != KERNELS_VARIABLE}
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], check=True, capture_output=True, text=True, env=environment
    )
    assert json.loads(done.stdout.splitlines()[-1]) == ["numba"]


@pytest.mark.parametrize("name", ["nvidia0", "nvidiactl", "dxg", "kfd", "dri/renderD128", "accel/accel0", "accel0"])
def test_a_device_file_makes_an_accelerator_possible(tmp_path: Path, name: str) -> None:
    for ordinary in ("null", "shm/x", "dri/card0", "cpu"):
        (tmp_path / ordinary).parent.mkdir(exist_ok=True)
        (tmp_path / ordinary).touch()
    assert not may_have_accelerator(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert may_have_accelerator(tmp_path)


def test_every_preset_is_supported() -> None:
    for scheme, source in itertools.product([*PRESETS.values(), *CUSTOM.values()], FLOATS):
        assert cpu.supports(scheme.weights, scheme.format, source)
    assert not cpu.supports(WeightArgs(), "int-quantized", "F8_E4M3")
    assert not cpu.supports(WeightArgs(), "another", "BF16")


# What was compiled before


LOADED = """
import sys
import numpy as np
from numba.core.registry import cpu_target
from shardmill.kernels.lanes import CpuLane

block = memoryview(np.arange(4096, dtype=np.uint16).tobytes())
print(CpuLane().measure(block, "BF16", (64, 64)).amax, len(cpu_target.typing_context._functions))
"""


def test_compiled_code_is_loaded_without_what_compiling_needs(tmp_path: Path) -> None:
    def run() -> tuple[str, int]:
        words = [sys.executable, "-c", LOADED]
        done = subprocess.run(
            words, check=True, capture_output=True, text=True, env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        )
        amax, functions = done.stdout.split()
        return amax, int(functions)

    compiled, loaded = run(), run()
    assert compiled[0] == loaded[0]
    assert compiled[1] > 100 > loaded[1]
