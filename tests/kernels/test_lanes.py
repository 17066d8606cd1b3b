"""Lanes: a device without room, rows out of stacks, and the bytes of an accelerator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import checkpoints
from kernels.oracle import sample
from shardmill.core.plan import ShardPlan
from shardmill.core.recipe import uniform
from shardmill.core.scheme import PRESETS, Scheme, WeightArgs
from shardmill.core.statistics import Extent
from shardmill.errors import DeviceExhausted, NonFiniteWeight
from shardmill.kernels import lanes, reference
from shardmill.kernels.crew import Crew
from shardmill.kernels.lanes import BlockSize, CpuLane, EncodedBlock, TorchLane, gather
from shardmill.kernels.shard import encode_shard
from shardmill.stages.plan import Locations, make_plan

TENSOR = Scheme(weights=WeightArgs(strategy="tensor", symmetric=False))
SCHEMES = {
    **{
        name: PRESETS[name] for name in ("FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W3A16", "W4A16_ASYM", "NVFP4A16", "MXFP8")
    },
    "tensor": TENSOR,
}
BF16_BYTES = 2


def with_room_for(monkeypatch: pytest.MonkeyPatch, rows: int) -> list[int]:
    """Let the device run out of memory above some rows; gives the rows of each block that found room."""
    plain, found = reference.encode, []

    def encode(block: Tensor, *args: Any, **more: Any) -> reference.Encoded:
        if len(block) > rows:
            raise torch.OutOfMemoryError("no room")
        found.append(len(block))
        return plain(block, *args, **more)

    monkeypatch.setattr(reference, "encode", encode)
    return found


def encode(lane: lanes.Lane, weight: Tensor, scheme: Scheme) -> EncodedBlock:
    rows, cols = weight.shape
    whole = reference.measure(weight)
    return lane.encode(memoryview(bytearray(reference.to_bytes(weight))), "BF16", (rows, cols), scheme, whole)


def as_bytes(block: EncodedBlock) -> dict[str, bytes]:
    return {param: bytes(view) for param, view in block.tensors.items()}


@pytest.mark.parametrize("rows", [33, 63, 64, 95, 300, 512])
@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_halves_give_the_bytes_of_the_whole(monkeypatch: pytest.MonkeyPatch, name: str, rows: int) -> None:
    scheme, weight = SCHEMES[name], sample("heavy tails", torch.bfloat16, (rows, 256))
    least = 128 if name == "FP8_BLOCK" else 32
    lane = TorchLane("cpu", BlockSize(4 << 20))
    wanted = encode(lane, weight, scheme)
    pieces = with_room_for(monkeypatch, least)
    found = encode(lane, weight, scheme)
    assert as_bytes(found) == as_bytes(wanted)
    assert list(found.tensors) == list(wanted.tensors)
    assert found.finite
    assert found.statistics.to_json() == wanted.statistics.to_json()
    assert sum(pieces) == rows
    assert all(piece % least == 0 for piece in pieces[:-1])
    assert max(pieces) <= least


def test_a_packed_zero_point_of_halves_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, weight = PRESETS["W4A16_ASYM"], sample("one-sided", torch.bfloat16, (96, 256))
    lane = TorchLane("cpu", BlockSize(4 << 20))
    wanted = as_bytes(encode(lane, weight, scheme))["weight_zero_point"]
    with_room_for(monkeypatch, 32)
    assert as_bytes(encode(lane, weight, scheme))["weight_zero_point"] == wanted
    assert len(wanted) == 96 * 4 // 8 * 2  # 4 bits for each row, two groups


def test_halves_of_a_tensor_with_one_scale_have_one_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = sample("outlier", torch.bfloat16, (300, 64))
    with_room_for(monkeypatch, 32)
    found = encode(TorchLane("cpu", BlockSize(4 << 20)), weight, TENSOR)
    assert {param: len(view) for param, view in found.tensors.items()} == {
        "weight_packed": 300 * 64,
        "weight_scale": 2,
        "weight_zero_point": 1,
    }


@pytest.mark.parametrize(("name", "rows"), [("FP8_DYNAMIC", 32), ("FP8_DYNAMIC", 500), ("FP8_BLOCK", 128)])
def test_no_room_for_the_smallest_block_is_told(monkeypatch: pytest.MonkeyPatch, name: str, rows: int) -> None:
    least = 128 if name == "FP8_BLOCK" else 32
    with_room_for(monkeypatch, least - 1)
    weight = sample("gaussian", torch.bfloat16, (rows, 128))
    with pytest.raises(DeviceExhausted, match=rf"`cpu` has no room for {least} rows of 128 BF16; .*--device cpu"):
        encode(TorchLane("cpu", BlockSize(4 << 20)), weight, SCHEMES[name])


@pytest.mark.parametrize("bad", [0, 40, 95])
def test_a_bad_weight_in_either_half_is_found(monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    weight = sample("gaussian", torch.bfloat16, (96, 128))
    weight[bad, 3] = torch.nan
    with_room_for(monkeypatch, 32)
    assert not encode(TorchLane("cpu", BlockSize(4 << 20)), weight, PRESETS["FP8_DYNAMIC"]).finite


def test_every_lack_of_room_makes_the_blocks_to_come_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    size = BlockSize(32 << 20)
    with_room_for(monkeypatch, 64)
    encode(TorchLane("cpu", size), sample("gaussian", torch.bfloat16, (128, 128)), PRESETS["FP8_DYNAMIC"])
    assert size.nbytes == 16 << 20
    for _ in range(9):
        size.shrink()
    assert size.nbytes == 1 << 20


def planned(folder: Path, tensors: dict[str, Tensor], scheme: Scheme) -> tuple[ShardPlan, bytes]:
    """The only shard of a small checkpoint, and its bytes."""
    source = checkpoints.write(folder, [tensors])
    locations = Locations(source=str(source), destination=str(folder.with_name("result")))
    return make_plan(locations.open_source(), uniform(scheme)).shards[0], (source / "model.safetensors").read_bytes()


def encoded(monkeypatch: pytest.MonkeyPatch, crew: Crew, shard: ShardPlan, data: bytes) -> bytes:
    written = bytearray()

    def read(_name: str, offset: int, view: memoryview) -> None:
        view[:] = data[offset : offset + len(view)]

    monkeypatch.setattr("shardmill.kernels.shard.crew_of", lambda _device, is_torch: crew)  # noqa: ARG005 - by name
    encode_shard(shard, read, written.extend)
    return bytes(written)


@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "FP8_BLOCK", "W4A16_ASYM", "NVFP4A16", "tensor"])
def test_a_shard_on_a_device_that_runs_out_of_memory_has_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(lanes, "_LEAST_BLOCK_BYTES", 1024)
    weights = {f"m.{n}.self_attn.o_proj.weight": checkpoints.gaussian(n, 1000, 128) for n in range(2)}
    shard, data = planned(tmp_path / "source", weights, SCHEMES[name])
    wanted = encoded(monkeypatch, Crew(2, BlockSize(1 << 20), CpuLane), shard, data)
    size = BlockSize(1000 * 128 * BF16_BYTES)
    pieces = with_room_for(monkeypatch, 128)
    assert encoded(monkeypatch, Crew(1, size, lambda: TorchLane("cpu", size)), shard, data) == wanted
    assert sum(pieces) == 2000
    assert size.nbytes < 500 * 128 * BF16_BYTES
    # the second weight is cut small from the start: no block of it is halved down to the least
    assert len(pieces) <= 16 + 1000 // (size.nbytes // 256 // 32 * 32 or 32) + 1


def test_a_bad_weight_on_a_device_that_runs_out_of_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = checkpoints.gaussian(1, 320, 128)
    weight[40, 7] = torch.inf
    shard, data = planned(tmp_path / "source", {"m.o_proj.weight": weight}, PRESETS["FP8_DYNAMIC"])
    size = BlockSize(1 << 20)
    with_room_for(monkeypatch, 64)
    with pytest.raises(NonFiniteWeight, match=r"first at index \[40, 7\]"):
        encoded(monkeypatch, Crew(1, size, lambda: TorchLane("cpu", size)), shard, data)


@pytest.mark.parametrize("room", [1, 3, 32])
@pytest.mark.parametrize("shape", [(40, 96), (5, 2, 96)])
def test_a_block_too_large_to_measure_is_measured_in_parts(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], room: int
) -> None:
    weight = sample("outlier", torch.float32, (40, 96)).flatten()[: np.prod(shape)].reshape(shape)
    block = memoryview(bytearray(reference.to_bytes(weight)))
    lane, plain = TorchLane("cpu", BlockSize(4 << 20)), reference.measure
    wanted = lane.measure(block, "F32", shape)

    def measure(rows: Tensor) -> Extent:
        if len(rows) > room:
            raise torch.OutOfMemoryError("no room")
        return plain(rows)

    monkeypatch.setattr(reference, "measure", measure)
    assert lane.measure(block, "F32", shape) == wanted
    room = 0
    with pytest.raises(DeviceExhausted, match=r"`cpu` has no room for 1 row"):
        lane.measure(block, "F32", shape)


# gather


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from(["U8", "BF16", "F32", "F64"]),
    transposed=st.booleans(),
    misaligned=st.integers(0, 1),
    data=st.data(),
)
def test_gathered_rows_are_those_of_the_matrix(
    shape: tuple[int, int],
    dtype: str,
    transposed: bool,  # noqa: FBT001 - Hypothesis passes it by name
    misaligned: int,
    data: st.DataObject,
) -> None:
    item = np.dtype({"U8": np.uint8, "BF16": np.uint16, "F32": np.uint32, "F64": np.uint64}[dtype])
    matrix = np.frombuffer(np.random.default_rng(1).bytes(shape[0] * shape[1] * item.itemsize), item).reshape(shape)
    count = shape[1] if transposed else shape[0]
    rows = slice(data.draw(st.integers(0, count)), data.draw(st.integers(0, count)), data.draw(st.integers(1, 3)))
    slab = memoryview(bytearray(misaligned) + bytearray(matrix.tobytes()))[misaligned:]
    wanted = np.ascontiguousarray((matrix.T if transposed else matrix)[rows]).tobytes()
    assert bytes(gather(slab, dtype, shape, rows, transposed=transposed)) == wanted


def test_gathered_rows_have_memory_of_their_own() -> None:
    slab = bytearray(b"abcd")
    found = gather(memoryview(slab), "U8", (2, 2), slice(0, 2), transposed=False)
    slab[:] = b"wxyz"
    assert bytes(found) == b"abcd"


# Staging memory


LANES: dict[str, Callable[[], lanes.Lane]] = {"cpu": CpuLane, "torch": lambda: TorchLane("cpu", BlockSize(1 << 20))}


@pytest.mark.parametrize("new_lane", list(LANES.values()), ids=list(LANES))
def test_staging_memory_has_the_length_asked_for_and_large_ones_are_given_back(
    monkeypatch: pytest.MonkeyPatch, new_lane: Callable[[], lanes.Lane]
) -> None:
    monkeypatch.setattr(lanes, "_KEPT_BYTES", 1000)
    lane: Any = new_lane()
    for length in (0, 10, 5, 5000, 300, 1000):
        view = lane.staging(length)
        view[:] = bytes(length)
        assert len(view) == length
        assert not view.readonly
        assert len(lane._staging) <= max(length, 1000)


# An accelerator


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_an_accelerator_gives_the_bytes_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    device = str(accelerator)
    shard, data = planned(tmp_path / "source", checkpoints.llama(), SCHEMES[name])
    wanted = encoded(monkeypatch, Crew(2, BlockSize(1 << 20), CpuLane), shard, data)
    size = BlockSize(9000)
    assert encoded(monkeypatch, Crew(3, size, lambda: TorchLane(device, size)), shard, data) == wanted


@pytest.mark.gpu
def test_an_accelerators_lane_measures_and_finds_as_the_cpus() -> None:
    device = str(torch.accelerator.current_accelerator())
    slow, fast = TorchLane(device, BlockSize(1 << 20)), CpuLane()
    weight = sample("outlier", torch.bfloat16, (40, 96))
    block = memoryview(bytearray(reference.to_bytes(weight)))
    assert slow.measure(block, "BF16", (40, 96)) == fast.measure(block, "BF16", (40, 96))
    assert bytes(slow.global_scale(Extent(high=3.0))) == bytes(fast.global_scale(Extent(high=3.0)))
    weight[7, 9] = torch.nan
    block = memoryview(bytearray(reference.to_bytes(weight)))
    assert slow.first_nonfinite(block, "BF16", (40, 96)) == fast.first_nonfinite(block, "BF16", (40, 96)) == (1, (7, 9))
