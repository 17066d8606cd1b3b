"""Bytes that were worked out by hand or read off compressed-tensors once, and must never move."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.oracle import actual
from shardmill.core.scheme import PRESETS, WeightArgs
from shardmill.core.statistics import Extent
from shardmill.kernels import reference

ROW = torch.tensor([[1, -0.5, 0.3, -0.04, 0.1, 1.75, -0.0, -1e-4] + [0.0] * 120], dtype=torch.bfloat16)


def codes_of(*values: int) -> Tensor:
    return torch.tensor([values], dtype=torch.int8)


def hexadecimal(tensor: Tensor) -> str:
    return reference.to_bytes(tensor).hex(" ").upper()


def words(tensor: Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in tensor.flatten().tolist()]


def test_eight_int4_codes_fill_a_word_from_its_low_end() -> None:
    assert words(reference.pack_bits(codes_of(*range(-8, 0)), 4)) == [0x76543210]
    assert words(reference.pack_bits(codes_of(*range(8)), 4)) == [0xFEDCBA98]


def test_an_int3_code_straddles_two_words() -> None:
    codes = torch.full((1, 32), -4, dtype=torch.int8)  # stored as 0
    codes[0, 10] = 3  # stored as 7, in bits 30 to 32
    assert words(reference.pack_bits(codes, 3)) == [0xC0000000, 0x00000001, 0]


def test_unused_bits_at_the_end_of_a_row_are_zero() -> None:
    assert words(reference.pack_bits(codes_of(7, 7, 7), 4)) == [0xFFF]
    assert words(reference.pack_bits(codes_of(*[15] * 7), 5)) == [0xFFFFFFFF, 0b111]


def test_zero_points_are_packed_along_the_rows() -> None:
    zero_points = codes_of(1, 2, 3, 4, 5, 6, 7, -8, 0).t()
    packed = reference.pack_bits(zero_points.t(), 4).t()
    assert packed.shape == (2, 1)
    assert words(packed) == [0x0FEDCBA9, 0x00000008]


def test_the_even_column_of_4_bit_floats_is_the_low_nibble() -> None:
    codes = reference.to_e2m1(torch.tensor([[0.5, -6.0]]))
    assert hexadecimal(reference.pack_nibbles(codes)) == "F1"


def test_fp8_dynamic() -> None:
    stored = actual(PRESETS["FP8_DYNAMIC"], ROW)
    assert hexadecimal(stored["weight"][0, :8]) == "78 F0 6A D2 5D 7E 80 8D"
    assert stored["weight_scale"].dtype == torch.bfloat16
    assert stored["weight_scale"].tolist() == [[0.00390625]]


def test_w8a8() -> None:
    stored = actual(PRESETS["W8A8"], ROW)
    assert stored["weight"][0, :8].tolist() == [73, -36, 22, -3, 7, 127, 0, 0]
    assert stored["weight_scale"].tolist() == [[0.01373291015625]]


def test_w4a16() -> None:
    stored = actual(PRESETS["W4A16"], ROW)
    assert words(stored["weight_packed"][0, :2]) == [0x88F8896C, 0x88888888]
    assert stored["weight_scale"].tolist() == [[0.2333984375]]
    assert stored["weight_shape"].tolist() == [1, 128]


def test_w4a16_asymmetric() -> None:
    stored = actual(PRESETS["W4A16_ASYM"], ROW)
    assert words(stored["weight_packed"][0, :1]) == [0x33F4350A]
    assert stored["weight_scale"].tolist() == [[0.150390625]]
    assert words(stored["weight_zero_point"]) == [0x00000003]


def test_mxfp4() -> None:
    stored = actual(PRESETS["MXFP4"], ROW)
    assert hexadecimal(stored["weight_packed"][0, :4]) == "A4 81 60 80"
    assert hexadecimal(stored["weight_scale"]) == "7E 00 00 00"


def test_mxfp8() -> None:
    stored = actual(PRESETS["MXFP8"], ROW)
    assert hexadecimal(stored["weight"][0, :8]) == "70 E8 62 CA 55 76 80 87"
    assert hexadecimal(stored["weight_scale"]) == "78 00 00 00"


def test_nvfp4() -> None:
    stored = actual(PRESETS["NVFP4A16"], ROW)
    assert hexadecimal(stored["weight_packed"][0, :4]) == "B5 82 71 80"
    assert hexadecimal(stored["weight_scale"]) == "7E 20 20 20 20 20 20 20"
    assert stored["weight_global_scale"].tolist() == [1536.0001220703125]


def test_global_scale_is_a_reciprocal_times_2688() -> None:
    assert reference.global_scale(Extent(low=-1.75)).item() == 1536.0001220703125
    assert 2688 / 1.75 == 1536.0


def test_a_local_scale_of_nvfp4_is_divided_by_six_before_it_is_multiplied() -> None:
    # Any other order, or a multiplication by 1 / 6, lands beyond the middle between two codes and gives 61.
    rows = torch.zeros((1, 32))
    rows[0, 0], rows[0, 16] = 0.13483355939388275, 0.010232904925942421
    assert hexadecimal(actual(PRESETS["NVFP4A16"], rows)["weight_scale"]) == "7E 60"


@pytest.mark.parametrize(
    ("source", "eps"), [("BF16", 0.0078125), ("F32", 1.1920928955078125e-07), ("F16", 1.1920928955078125e-07)]
)
def test_a_row_of_zeros_has_the_eps_of_the_stored_dtype(source: str, eps: float) -> None:
    rows = torch.zeros((2, 128), dtype=reference.DTYPES[source])
    for name in ("FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W4A16", "W4A16_ASYM"):
        assert actual(PRESETS[name], rows)["weight_scale"].unique().tolist() == [eps]


def test_a_zero_group_of_nvfp4_has_scale_one_eighth_and_global_scale_one() -> None:
    stored = actual(PRESETS["NVFP4A16"], torch.zeros((1, 32)))
    assert hexadecimal(stored["weight_scale"]) == "20 20"
    assert stored["weight_scale"].to(torch.float32).tolist() == [[0.125, 0.125]]
    assert stored["weight_global_scale"].tolist() == [1.0]


def test_a_local_scale_that_underflows_is_that_of_a_zero_group() -> None:
    rows = torch.zeros((1, 32))
    rows[0, 0], rows[0, 16] = 448.0, 1e-7
    stored = actual(PRESETS["NVFP4A16"], rows)
    assert hexadecimal(stored["weight_scale"]) == "7E 20"
    assert stored["weight_packed"][0, 8:].unique().tolist() == [0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_bytes_of_channel_scales_with_zero_points(*, symmetric: bool) -> None:
    args = WeightArgs(num_bits=4, strategy="channel", symmetric=symmetric)
    rows = torch.tensor([[-1.0, 14.0, 0.0], [0.0, 0.0, 0.0], [-15.0, -3.0, 0.0]])
    stored = reference.encode(rows, args, format="pack-quantized", scale_dtype="F32").tensors
    if symmetric:
        assert words(stored["weight_packed"]) == [0x8F7, 0x888, 0x860]
        assert set(stored) == {"weight_packed", "weight_scale"}
    else:
        # zero points -7, 0 and 7, stored as 1, 8 and 15
        assert words(stored["weight_zero_point"]) == [0xF81]
        assert words(stored["weight_packed"]) == [0x1F0, 0x888, 0xFC0]
