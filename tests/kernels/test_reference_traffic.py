"""What `reference.encode` moves and holds in memory: few bytes, counted operation by operation.

An accelerator works through a row block at the speed of its memory, so each pass saved is time saved. What a block
holds there, times the number of lanes, is the device memory that a user needs: `lanes.DEVICE_BLOCK_BYTES` says how
much.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.traffic import Traffic
from shardmill.core.dtypes import scale_dtype_for
from shardmill.core.scheme import PRESETS, WeightArgs
from shardmill.core.statistics import Extent, Statistics
from shardmill.kernels import reference

BYTES_PER_ELEMENT = {
    "FP8_DYNAMIC": 61,
    "FP8_BLOCK": 61,
    "W8A8": 64,
    "W2A16": 71,
    "W3A16": 76,
    "W4A16": 70,
    "W8A16": 67,
    "W4A16_ASYM": 87,
    "NVFP4A16": 82,
    "MXFP4A16": 77,
    "MXFP8A16": 72,
}
"""Bound on what is read and written for a 16-bit source: some fifteen passes over float32 numbers. Scales count too:
one for each 16 or 32 elements is felt."""
F32_READS = 6
"""Passes over the source, each of which reads two bytes more of a float32."""
HELD_BYTES = {name: 9.7 if name in ("NVFP4A16", "MXFP4A16") else 5.9 for name in BYTES_PER_ELEMENT}
"""Bound on what an element holds beside its source: a float32 and a code, an index for 4-bit floats, scales."""
SHAPE = (256, 2048)


def gaussian(source: str, shape: tuple[int, int] = SHAPE) -> Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02
    return weight.to(reference.DTYPES[source])


def encode(name: str, rows: Tensor, source: str, whole: Extent) -> Statistics:
    scheme, scales = PRESETS[name], scale_dtype_for(source)
    found = reference.encode(rows, scheme.weights, format=scheme.format, scale_dtype=scales, whole=whole)
    return found.statistics


def traffic(name: str, rows: Tensor, source: str) -> tuple[Traffic, Statistics]:
    whole = reference.measure(rows)
    encode(name, rows[:128, :128], source, whole)  # tables that stay are made before
    with Traffic() as counted:
        found = encode(name, rows, source, whole)
    return counted, found


@pytest.mark.parametrize("source", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("name", BYTES_PER_ELEMENT)
def test_a_row_block_takes_few_passes_and_little_memory(name: str, source: str) -> None:
    rows = gaussian(source)
    counted, _ = traffic(name, rows, source)
    more = 2 * F32_READS if source == "F32" else 0
    assert counted.moved / rows.numel() < BYTES_PER_ELEMENT[name] + more
    assert counted.peak / rows.numel() < HELD_BYTES[name]


@pytest.mark.parametrize("name", BYTES_PER_ELEMENT)
def test_a_block_of_16_bits_holds_no_more_device_memory_than_lanes_says(name: str) -> None:
    rows = gaussian("BF16")
    counted, _ = traffic(name, rows, "BF16")
    assert (rows.nbytes + counted.peak) / rows.nbytes < (6 if "FP4" in name else 4)


def test_counting_what_is_clipped_is_paid_where_something_is() -> None:
    rows, args = gaussian("F32"), WeightArgs(strategy="tensor")
    largest = float(rows.abs().max())
    moved, clipped = [], []
    for extent in (Extent(high=largest), Extent(high=largest / 2)):
        with Traffic() as counted:
            found = reference.encode(rows, args, format="int-quantized", scale_dtype="F32", whole=extent)
        moved.append(counted.moved)
        clipped.append(found.statistics.clipped)
        assert counted.peak / rows.numel() < HELD_BYTES["NVFP4A16"]
    quotient = rows / torch.tensor(largest / 2 / 127.5)
    assert clipped == [0, int(((quotient < -129) | (quotient > 128)).sum())]
    assert moved[0] < moved[1]


def test_a_ragged_block_is_filled_up_and_a_whole_one_is_not() -> None:
    whole, _ = traffic("FP8_BLOCK", gaussian("BF16"), "BF16")
    ragged, _ = traffic("FP8_BLOCK", gaussian("BF16", (255, 2047)), "BF16")
    assert "aten::constant_pad_nd" in ragged.by_operation
    assert "aten::constant_pad_nd" not in whole.by_operation


@pytest.mark.parametrize("name", BYTES_PER_ELEMENT)
def test_the_host_asks_for_numbers_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, asked, tolist = gaussian("BF16"), [], Tensor.tolist

    def counting(tensor: Tensor) -> object:
        asked.append(tensor.shape)
        return tolist(tensor)

    whole = reference.measure(rows)
    monkeypatch.setattr(Tensor, "tolist", counting)
    with Traffic() as counted:
        encode(name, rows, "BF16", whole)
    assert len(asked) == 1
    assert counted.to_host == 0


def test_squares_are_summed_as_float64() -> None:
    values = torch.randn(3, 70_001, generator=torch.Generator().manual_seed(2))
    exact = math.fsum(value * value for value in values.flatten().tolist())
    assert reference.sum_of_squares(values).item() == pytest.approx(exact, rel=1e-13)
    assert reference.sum_of_squares(values.t()).item() == pytest.approx(exact, rel=1e-13)
    assert reference.sum_of_squares(values[:0]).item() == 0


# The measure itself


def counted_bytes(counted: Traffic) -> tuple[int, int, int]:
    return counted.read, counted.written, counted.peak


def test_operands_count_once_and_views_not_at_all() -> None:
    matrix, row, codes = torch.zeros(8, 16), torch.zeros(1, 16), torch.zeros(8, 16, dtype=torch.int8)
    with Traffic() as counted:
        kept = matrix.view(16, 8).t()
    assert counted_bytes(counted) == (0, 0, 0)
    with Traffic() as counted:
        kept = matrix + row
    assert counted_bytes(counted) == (512 + 64, 512, 512)
    with Traffic() as counted:
        kept = matrix * matrix
    assert counted_bytes(counted) == (512, 512, 512)
    with Traffic() as counted:
        kept.mul_(row.expand(8, 16))
    assert counted_bytes(counted) == (512 + 64, 512, 0)
    with Traffic() as counted:
        kept.copy_(codes)
    assert counted_bytes(counted) == (128, 512, 0)


def test_reductions_in_another_dtype_copy_first() -> None:
    mask, short = torch.zeros(128, dtype=torch.bool), torch.zeros(128, dtype=torch.bfloat16)
    with Traffic() as counted:
        mask.sum()
    assert counted_bytes(counted) == (128 + 1024, 8 + 1024, 8 + 1024)
    with Traffic() as counted:
        short.sum(dtype=torch.float32)
    assert counted_bytes(counted) == (256, 4, 4)


def test_memory_is_held_until_the_last_view_is_gone() -> None:
    with Traffic() as counted:
        first = torch.ones(256)
        view = first[10:]
        del first
        other = torch.ones(256)
        del view
        last = torch.ones(256)
    assert counted.peak == 2 * 1024
    assert len(other) == len(last)


def test_numbers_that_are_asked_for_are_counted() -> None:
    with Traffic() as counted:
        torch.ones(1).item()
    assert counted.to_host == 1
