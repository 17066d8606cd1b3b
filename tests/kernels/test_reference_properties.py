"""Laws of the arithmetic, for any weight, checked against slow versions that share no code with it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.oracle import INPUTS, actual, differing_bytes, octets, sample
from shardmill.core.dtypes import scale_dtype_for
from shardmill.core.scheme import PRESETS, ActivationArgs, Scheme, WeightArgs
from shardmill.core.statistics import Extent, Statistics
from shardmill.kernels import reference

FLOATS = ["BF16", "F16", "F32", "F64"]
TOKEN = ActivationArgs()
SCHEMES = {
    **{name: PRESETS[name] for name in ("FP8_DYNAMIC", "W8A8", "NVFP4A16", "MXFP4A16", "MXFP8A16", "FP8_BLOCK")},
    **{
        scheme.label: scheme
        for scheme in (
            Scheme(weights=WeightArgs(num_bits=3, strategy="tensor")),
            Scheme(weights=WeightArgs(num_bits=8, strategy="tensor", symmetric=False), input_activations=TOKEN),
            Scheme(weights=WeightArgs(type="float", strategy="tensor")),
            Scheme(weights=WeightArgs(num_bits=5, strategy="channel", symmetric=False)),
            Scheme(weights=WeightArgs(num_bits=4, strategy="group", group_size=32, symmetric=False)),
            Scheme(weights=WeightArgs(num_bits=2, strategy="group", group_size=16), input_activations=TOKEN),
            Scheme(weights=WeightArgs(num_bits=6, strategy="block", block_structure=(16, 48))),
            Scheme(weights=WeightArgs(num_bits=7, strategy="block", block_structure=(32, 8), symmetric=False)),
            Scheme(weights=WeightArgs(type="float", strategy="block", block_structure=(8, 40))),
        )
    },
}
MARGIN = {"int": 1.0, "e4m3": 16.0, "e2m1": 1.0}


def finite_bits(dtype: torch.dtype, shape: tuple[int, int], seed: int) -> Tensor:
    """Numbers of a dtype, every exponent as likely as any other, up to where a code times its scale may overflow."""
    rng = np.random.default_rng(seed)
    raw = bytearray(rng.bytes(math.prod(shape) * dtype.itemsize))
    drawn = torch.frombuffer(raw, dtype=dtype).reshape(shape)
    return torch.where(drawn.abs() < 2.0**127, drawn, torch.zeros_like(drawn))


@st.composite
def weights(draw: st.DrawFn, scheme: Scheme, sources: tuple[str, ...] = ("BF16", "F16", "F32", "F64")) -> Tensor:
    """Finite weights that the scheme fits: Gaussian ones, mostly zeros, or arbitrary bit patterns; odd shapes."""
    rows, unit = draw(st.integers(1, 75)), scheme.weights.group_size or 1
    shape = (rows, unit * draw(st.integers(1, 4 if unit > 1 else 150)))
    dtype, seed = reference.DTYPES[draw(st.sampled_from(sources))], draw(st.integers(0, 2**32 - 1))
    kind = draw(st.sampled_from(["gaussian", "sparse", "bits"]))
    if kind == "bits":
        return finite_bits(dtype, shape, seed)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    values = values if kind == "gaussian" else values * (values > 1)
    return (values * 10.0 ** draw(st.integers(-6, 1))).to(dtype)


@st.composite
def schemes_and_weights(draw: st.DrawFn, sources: tuple[str, ...] = ("BF16", "F16", "F32", "F64")) -> Any:
    scheme = draw(st.sampled_from(list(SCHEMES.values())))
    return scheme, draw(weights(scheme, sources))


def encode(scheme: Scheme, rows: Tensor, whole: Extent | None = None) -> reference.Encoded:
    name = next(name for name, dtype in reference.DTYPES.items() if dtype == rows.dtype)
    return reference.encode(
        rows,
        scheme.weights,
        format=scheme.format,
        scale_dtype=scale_dtype_for(name),
        whole=whole or reference.measure(rows),
    )


def decoded(scheme: Scheme, weight: Tensor) -> Tensor:
    rows, cols = weight.shape
    return reference.decode(actual(scheme, weight), scheme.weights, format=scheme.format, shape=(rows, cols))


def spread(grid: Tensor, args: WeightArgs, shape: tuple[int, int]) -> Tensor:
    """Repeat one number per tile over its elements."""
    height, width = args.block_structure or (1, args.group_size or shape[1])
    if args.strategy == "tensor":
        return grid.reshape(1, 1).expand(shape)
    return grid.repeat_interleave(height, 0).repeat_interleave(width, 1)[: shape[0], : shape[1]]


def steps(stored: dict[str, Tensor], args: WeightArgs, shape: tuple[int, int]) -> Tensor:
    """What a unit of code is worth, element by element."""
    scale = stored["weight_scale"]
    if args.is_mx:
        return spread(torch.exp2(scale.double() - 127).float(), args, shape)
    scale = scale.float()
    return spread(scale / stored["weight_global_scale"] if args.has_global_scale else scale, args, shape)


def quotients(scheme: Scheme, weight: Tensor) -> Tensor:
    """Weights in units of code, zero points added."""
    rows, cols = weight.shape
    stored = actual(scheme, weight)
    quotient = weight.float() / steps(stored, scheme.weights, (rows, cols))
    zero_point = stored.get("weight_zero_point")
    if zero_point is None:
        return quotient
    if zero_point.dtype == torch.int32:
        zero_point = slowly_unpacked(zero_point.t(), scheme.weights.num_bits, rows).t()
    return quotient + spread(zero_point.float(), scheme.weights, (rows, cols))


def slowly_packed(codes: Tensor, bits: int) -> Tensor:
    """Write each row as one string of binary digits, last code first, and cut it into words from its end."""
    packed = []
    for row in codes.tolist():
        digits = "".join(f"{code + 2 ** (bits - 1):0{bits}b}" for code in reversed(row))
        stream = int(digits, 2)
        packed.append([stream >> 32 * word & 0xFFFFFFFF for word in range(math.ceil(len(digits) / 32))])
    return torch.tensor(np.array(packed, dtype=np.uint32).view(np.int32))


def slowly_unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    rows = []
    for row in packed.tolist():
        stream = sum((word & 0xFFFFFFFF) << 32 * place for place, word in enumerate(row))
        rows.append([(stream >> bits * place) % 2**bits - 2 ** (bits - 1) for place in range(count)])
    return torch.tensor(rows, dtype=torch.int8)


# Row blocks


@given(schemes_and_weights(), st.data())
def test_bytes_do_not_depend_on_row_blocks(drawn: tuple[Scheme, Tensor], data: st.DataObject) -> None:
    scheme, weight = drawn
    height = scheme.weights.block_structure[0] if scheme.weights.block_structure else 1
    cut = math.lcm(32, height) * data.draw(st.integers(1, 2))
    whole = reference.measure(weight)
    blocks = [encode(scheme, block, whole) for block in weight.split(cut)]
    together = {name: torch.cat([block.tensors[name] for block in blocks]) for name in blocks[0].tensors}
    at_once = encode(scheme, weight, whole)
    if scheme.weights.strategy == "tensor":
        together |= {name: tensor[:1] for name, tensor in together.items() if tensor.ndim == 1}
    assert differing_bytes(together, at_once.tensors) == {}

    merged = Statistics()
    for block in blocks:
        merged = merged.merge(block.statistics)
    floats = ("squared_error", "squared_weight")
    assert replace(merged, squared_error=0, squared_weight=0) == replace(
        at_once.statistics, squared_error=0, squared_weight=0
    )
    for name in floats:
        assert getattr(merged, name) == pytest.approx(getattr(at_once.statistics, name), rel=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", SCHEMES)
def test_bytes_do_not_depend_on_the_device(name: str, kind: str, source: str) -> None:
    scheme, weight = SCHEMES[name], sample(kind, reference.DTYPES[source], (70, 768))
    there = weight.to(torch.accelerator.current_accelerator())
    assert reference.measure(there) == reference.measure(weight)
    ours, theirs = encode(scheme, weight), encode(scheme, there)
    assert differing_bytes({name: tensor.cpu() for name, tensor in theirs.tensors.items()}, ours.tensors) == {}
    assert theirs.finite.item()
    assert (theirs.statistics.clipped, theirs.statistics.zeroed) == (ours.statistics.clipped, ours.statistics.zeroed)
    assert theirs.statistics.relative_error == pytest.approx(ours.statistics.relative_error)


@given(schemes_and_weights())
def test_extents_of_row_blocks_merge_to_that_of_the_tensor(drawn: tuple[Scheme, Tensor]) -> None:
    _, weight = drawn
    merged = Extent()
    for block in weight.split(7):
        merged = merged.merge(reference.measure(block))
    assert merged == reference.measure(weight)
    assert merged.amax == weight.float().abs().max().item()
    assert (merged.low, merged.high) == (min(0, weight.float().min().item()), max(0, weight.float().max().item()))


@given(schemes_and_weights())
def test_rows_are_left_alone_and_need_not_be_contiguous(drawn: tuple[Scheme, Tensor]) -> None:
    scheme, weight = drawn
    apart = weight.t().contiguous().t()
    before = octets(weight).clone()
    assert differing_bytes(encode(scheme, apart).tensors, encode(scheme, weight).tensors) == {}
    assert torch.equal(octets(weight), before)


@given(schemes_and_weights())
def test_stored_tensors_are_contiguous_and_have_their_planned_shapes(drawn: tuple[Scheme, Tensor]) -> None:
    scheme, weight = drawn
    args, (rows, cols) = scheme.weights, weight.shape
    encoded = encode(scheme, weight)
    height, width = args.block_structure or (1, args.group_size or cols)
    grid = (1,) if args.strategy == "tensor" else (math.ceil(rows / height), math.ceil(cols / width))
    shapes: dict[str, tuple[int, ...]] = {"weight_scale": grid}
    if scheme.format.startswith("pack-"):
        shapes["weight_packed"] = (rows, math.ceil(cols * args.num_bits / 32))
    elif "fp4-pack" in scheme.format:
        shapes["weight_packed"] = (rows, cols // 2)
    else:
        shapes["weight"] = (rows, cols)
    if not args.symmetric:
        packed = scheme.format == "pack-quantized" and args.strategy in ("group", "channel")
        shapes["weight_zero_point"] = (math.ceil(rows * args.num_bits / 32), grid[-1]) if packed else grid
    assert {name: tuple(tensor.shape) for name, tensor in encoded.tensors.items()} == shapes
    assert all(tensor.is_contiguous() for tensor in encoded.tensors.values())


def test_zero_points_are_packed_only_where_rows_have_their_own() -> None:
    dtypes = {
        name: encode(scheme, torch.ones(32, 64)).tensors["weight_zero_point"].dtype
        for name, scheme in SCHEMES.items()
        if not scheme.weights.symmetric
    }
    assert dtypes == {
        "int8 tensor asymmetric": torch.int8,
        "int5 channel asymmetric": torch.int32,
        "int4 group 32 asymmetric": torch.int32,
        "int7 block 32x8 asymmetric": torch.int8,
    }


@pytest.mark.parametrize("name", ["NVFP4A16", "int3 tensor"])
def test_a_scale_over_all_rows_needs_the_extent_of_the_tensor(name: str) -> None:
    args = SCHEMES[name].weights
    with pytest.raises(ValueError, match=f"strategy `{args.strategy}` needs the extent"):
        reference.encode(torch.ones(2, 16), args, format=SCHEMES[name].format, scale_dtype="F32")


# Scales


@given(schemes_and_weights())
def test_every_scale_is_a_positive_number(drawn: tuple[Scheme, Tensor]) -> None:
    scheme, weight = drawn
    encoded = encode(scheme, weight)
    assert encoded.finite.item()
    stored = encoded.tensors["weight_scale"]
    if stored.dtype == torch.uint8:
        assert stored.max() < 255
    else:
        assert stored.float().isfinite().all()
        assert (stored.float() > 0).all()
    shared = reference.global_scale(reference.measure(weight))
    assert shared.isfinite().all()
    assert (shared > 0).all()


@pytest.mark.parametrize("source", ["BF16", "F32"])
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_a_span_beyond_float32_has_a_finite_scale(strategy: str, source: str) -> None:
    largest = torch.finfo(reference.DTYPES[source]).max
    scheme = Scheme(weights=WeightArgs(num_bits=4, strategy=strategy, symmetric=False))
    weight = torch.tensor([[-largest, largest, largest / 2, 0.0]], dtype=reference.DTYPES[source])
    stored = encode(scheme, weight).tensors
    assert stored["weight_scale"].item() == pytest.approx(2 * largest / 15, rel=2**-8)
    assert slowly_unpacked(stored["weight_packed"], 4, 4).tolist() == [[-8, 7, 4, 0]]


@pytest.mark.parametrize("num_bits", [4, 8])
def test_mx_exponents_of_every_positive_bf16_number(num_bits: int) -> None:
    amax = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    expected = []
    for value in amax.tolist():
        mantissa, exponent = math.frexp(value)  # value = mantissa * 2**exponent, mantissa from 0.5 below 1
        rounded = min(exponent - 1 + (mantissa >= 0.875), 127)
        expected.append(max(0, rounded + 127 - {4: 2, 8: 8}[num_bits]) if value else 0)
    assert reference.mx_exponents(amax, num_bits).tolist() == expected


@pytest.mark.parametrize("name", ["MXFP4", "MXFP8"])
def test_the_largest_mx_groups_stay_finite(name: str) -> None:
    weight = torch.zeros(1, 32)
    weight[0, :3] = torch.tensor([3.4028235e38, -3.0e38, 1.0e38])
    left = decoded(PRESETS[name], weight)
    assert left[0, :3].tolist() == pytest.approx(weight[0, :3].tolist(), rel=0.26)


def test_mx_scales_are_exact_powers_of_two() -> None:
    # groups of one large code, with exponents from the smallest to the largest that can be stored
    exponents = torch.arange(254, dtype=torch.uint8)
    codes = torch.full((254, 32), 0x22, dtype=torch.uint8)[:, :16]  # 1.0
    values = reference.decode(
        {"weight_packed": codes, "weight_scale": exponents[:, None]},
        PRESETS["MXFP4"].weights,
        format="mxfp4-pack-quantized",
        shape=(254, 32),
    )
    assert values[:, 0].tolist() == [math.ldexp(1, exponent - 127) for exponent in range(254)]


# Codes


def brute_force(values: np.ndarray[Any, Any], grid: list[float]) -> list[int]:
    """Index of the nearest grid point for each magnitude; of two equally near ones, the even index."""
    magnitudes = np.minimum(np.abs(values), grid[-1])
    distances = np.abs(magnitudes[:, None] - np.array(grid)[None, :])
    nearest = distances.min(axis=1, keepdims=True) == distances
    return [max(np.flatnonzero(row).tolist(), key=lambda index: index % 2 == 0) for row in nearest]


def every_finite_bf16() -> Tensor:
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return numbers[numbers.isfinite()]


def test_e4m3_codes_of_every_bf16_number_are_nearest() -> None:
    values = every_finite_bf16()
    grid = [math.ldexp(code % 8, -9) for code in range(8)]
    grid += [math.ldexp(8 + code % 8, code // 8 - 10) for code in range(8, 127)]
    assert grid[-1] == 448
    args = WeightArgs(type="float", strategy="tensor")
    stored = reference.encode(
        values[None], args, format="naive-quantized", scale_dtype="F32", whole=Extent(high=448.0)
    ).tensors
    assert stored["weight_scale"].item() == 1
    signs = values.view(torch.int16) < 0
    expected = torch.tensor(brute_force(values.double().numpy(), grid)) + 128 * signs
    assert torch.equal(octets(stored["weight"]).long(), expected)


def test_e2m1_codes_of_every_bf16_number_are_nearest() -> None:
    values = every_finite_bf16()
    expected = torch.tensor(brute_force(values.double().numpy(), [0, 0.5, 1, 1.5, 2, 3, 4, 6])) + 8 * (values < 0)
    assert torch.equal(reference.to_e2m1(values.float()).long(), expected)


def test_e2m1_midpoints_go_to_the_even_code() -> None:
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    above, below = torch.nextafter(midpoints, torch.tensor(9.0)), torch.nextafter(midpoints, torch.tensor(0.0))
    assert reference.to_e2m1(midpoints).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert reference.to_e2m1(above).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert reference.to_e2m1(below).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert reference.to_e2m1(-midpoints).tolist() == [8, 10, 10, 12, 12, 14, 14]


def test_the_sign_of_zero_is_kept_by_e4m3_and_dropped_by_e2m1() -> None:
    weight = torch.tensor([[-0.0, 0.0, 1.0, -1e-9] + [0.0] * 28])
    assert octets(actual(PRESETS["FP8_DYNAMIC"], weight)["weight"])[:4].tolist() == [0x80, 0x00, 0x7E, 0x80]
    nibbles = reference.unpack_nibbles(actual(PRESETS["MXFP4"], weight)["weight_packed"])
    assert nibbles[0, :4].tolist() == [0, 0, 6, 8]


@given(schemes_and_weights())
def test_error_of_an_element_is_at_most_a_rounding(drawn: tuple[Scheme, Tensor]) -> None:
    scheme, weight = drawn
    low, high = reference.clip_bounds(scheme.weights)
    quotient = quotients(scheme, weight)
    step = steps(actual(scheme, weight), scheme.weights, (weight.shape[0], weight.shape[1]))
    error = (weight.double() - decoded(scheme, weight).double()).abs()
    largest = MARGIN["int" if scheme.weights.type == "int" else "e2m1" if scheme.weights.num_bits == 4 else "e4m3"]
    unclipped = (quotient >= low) & (quotient <= high)
    # Quotients and products are rounded to float32, and weights of a float64 source before that.
    allowance = step.double() * (largest + 1e-4) + weight.double().abs() * 2**-22 + 2**-148
    assert (error <= allowance)[unclipped].all()


@given(schemes_and_weights(("BF16", "F32")))
def test_min_and_max_of_ordinary_weights_clip_nothing(drawn: tuple[Scheme, Tensor]) -> None:
    scheme, weight = drawn
    if 1e-3 < weight.float().abs().max() < 1e3 and scheme.weights.strategy != "tensor_group":
        ordinary = torch.where(weight.abs() > 1e-4, weight, torch.zeros_like(weight))
        assert encode(scheme, ordinary).statistics.clipped == 0


# Statistics


@given(schemes_and_weights())
def test_statistics_are_those_of_the_decoded_weight(drawn: tuple[Scheme, Tensor]) -> None:
    scheme, weight = drawn
    found = encode(scheme, weight).statistics
    exact, left = weight.float().double().numpy(), decoded(scheme, weight).double().numpy()
    quotient, (low, high) = quotients(scheme, weight).numpy(), reference.clip_bounds(scheme.weights)
    assert found.count == exact.size
    assert found.nonzero == np.count_nonzero(exact)
    assert found.zeroed == np.count_nonzero((exact != 0) & (left == 0))
    assert found.clipped == np.count_nonzero((quotient < low) | (quotient > high))
    assert found.amax == np.abs(exact).max()
    assert found.max_error == pytest.approx(np.abs(exact - left).max(), rel=1e-6)
    assert found.squared_weight == pytest.approx(math.fsum((exact**2).ravel()), rel=1e-9, abs=0)
    assert found.squared_error == pytest.approx(math.fsum(((exact - left) ** 2).ravel()), rel=1e-6, abs=0)


def test_an_element_is_clipped_where_saturation_costs_more_than_rounding_may() -> None:
    assert reference.clip_bounds(WeightArgs(num_bits=4)) == (-9, 8)
    assert reference.clip_bounds(WeightArgs(type="float")) == (-464, 464)
    assert reference.clip_bounds(PRESETS["MXFP4"].weights) == (-7, 7)


def test_statistics_of_a_known_row() -> None:
    args = WeightArgs(num_bits=4, strategy="tensor")
    rows = torch.tensor([[15.0, -2.0, 0.5, 0.0, 24.0]])
    found = reference.encode(rows, args, format="pack-quantized", scale_dtype="F32", whole=Extent(high=15.0)).statistics
    # scale 2; left: 14, -2, 0, 0, and 24 is clipped to 14
    assert found.squared_error == pytest.approx(1 + 0.25 + 100)
    assert found.squared_weight == pytest.approx(225 + 4 + 0.25 + 576)
    assert (found.count, found.nonzero, found.zeroed, found.clipped) == (5, 4, 1, 1)
    assert (found.max_error, found.amax) == (10, 24)


NOT_DESTROYED = {
    "FP8_DYNAMIC": 0.0267,
    "FP8_BLOCK": 0.0272,
    "W8A8": 0.0084,
    "W8A16": 0.0067,
    "W4A16": 0.114,
    "W4A16_ASYM": 0.103,
    "NVFP4A16": 0.0965,
    "MXFP4A16": 0.114,
    "MXFP8A16": 0.0272,
}


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("std", [1.0, 0.02, 1e-3, 1e-5])
@pytest.mark.parametrize("name", NOT_DESTROYED)
def test_gaussian_weights_are_not_destroyed(name: str, std: float, source: str) -> None:
    weight = (sample("gaussian", torch.float32, (256, 1024)) / 0.02 * std).to(reference.DTYPES[source])
    found = encode(PRESETS[name], weight).statistics
    assert 0.9 * NOT_DESTROYED[name] < found.relative_error < NOT_DESTROYED[name]
    assert found.sqnr_db == pytest.approx(-20 * math.log10(found.relative_error))
    assert found.clipped == 0


# Packing


@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 80), st.integers(0, 2**32 - 1))
def test_packing_is_one_bit_stream_per_row(bits: int, rows: int, cols: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = torch.tensor(rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, cols)), dtype=torch.int8)
    packed = reference.pack_bits(codes, bits)
    assert packed.dtype == torch.int32
    assert torch.equal(packed, slowly_packed(codes, bits))
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(reference.unpack_bits(packed, bits, cols), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_widths_that_divide_a_word_pack_each_word_alone(bits: int) -> None:
    per_word = 32 // bits
    codes = torch.arange(5 * per_word).remainder(2**bits).reshape(1, -1) - 2 ** (bits - 1)
    words = reference.pack_bits(codes.to(torch.int8), bits)
    apart = [reference.pack_bits(part.to(torch.int8), bits) for part in codes.split(per_word, 1)]
    assert torch.equal(words, torch.cat(apart, 1))


@pytest.mark.parametrize("bits", range(2, 9))
def test_repacking_what_was_unpacked_gives_the_same_words(bits: int) -> None:
    words = torch.randint(-(2**31), 2**31, (3, bits * 2), dtype=torch.int32, generator=torch.Generator().manual_seed(8))
    assert torch.equal(reference.pack_bits(reference.unpack_bits(words, bits, 64), bits), words)


@given(schemes_and_weights())
def test_zero_points_survive_their_packing(drawn: tuple[Scheme, Tensor]) -> None:
    _, weight = drawn
    scheme = Scheme(weights=WeightArgs(num_bits=5, strategy="channel", symmetric=False))
    packed = encode(scheme, weight).tensors["weight_zero_point"]
    unpacked = encode(replace(scheme, input_activations=TOKEN), weight).tensors["weight_zero_point"]
    assert torch.equal(slowly_unpacked(packed.t(), 5, len(weight)).t(), unpacked)


@given(st.integers(1, 4), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_4_bit_floats_pack_in_pairs(rows: int, pairs: int, seed: int) -> None:
    codes = torch.tensor(np.random.default_rng(seed).integers(0, 16, (rows, 2 * pairs)), dtype=torch.uint8)
    packed = reference.pack_nibbles(codes)
    magnitudes = torch.tensor(reference.E2M1_VALUES)[codes.long() % 8]
    assert torch.equal(packed, pack_fp4_to_uint8(torch.where(codes >= 8, -magnitudes, magnitudes)))
    assert torch.equal(reference.unpack_nibbles(packed), codes)
    assert torch.equal(reference.to_e2m1(torch.where(codes > 8, -magnitudes, magnitudes)) % 8, codes % 8)


def test_an_odd_number_of_4_bit_floats_cannot_be_packed() -> None:
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        reference.pack_nibbles(torch.zeros((2, 3), dtype=torch.uint8))


# Buffers


@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_bytes_of_any_dtype_survive(dtype: str, offset: int) -> None:
    raw = bytes(range(1, 49)) if dtype != "BOOL" else bytes([0, 1] * 24)
    width = reference.DTYPES[dtype].itemsize
    buffer = memoryview(bytearray(bytes(offset) + raw))[offset:]
    tensor = reference.from_buffer(buffer, dtype, (2, 24 // width))
    assert (tensor.dtype, tensor.shape) == (reference.DTYPES[dtype], (2, 24 // width))
    assert reference.to_bytes(tensor) == raw
    assert reference.to_bytes(tensor.t()) == reference.to_bytes(tensor.t().contiguous())
    assert tensor.data_ptr() % width == 0


@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)])
def test_tensors_without_elements(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = reference.from_buffer(bytearray(), dtype, shape)
    assert tensor.shape == shape
    assert reference.to_bytes(tensor).nbytes == 0


def test_a_scalar_has_no_dimensions() -> None:
    tensor = reference.from_buffer(bytearray.fromhex("0000803f"), "F32", ())
    assert (tensor.shape, tensor.item()) == ((), 1.0)
    assert reference.to_bytes(tensor).hex() == "0000803f"


def test_a_single_element_may_have_any_stride() -> None:
    apart = torch.arange(5, dtype=torch.int32)[None, 3:].t()[:1]
    assert apart.is_contiguous()
    assert reference.to_bytes(torch.ones(1, 5, dtype=torch.int32)[:, :1].t()).hex() == "01000000"
    assert reference.to_bytes(apart).hex() == "03000000"


def test_a_writable_buffer_is_shared_and_a_read_only_one_copied() -> None:
    buffer = bytearray(8)
    reference.from_buffer(buffer, "F32", (2,)).fill_(1.0)
    assert buffer.hex() == "0000803f" * 2
    frozen = bytes(8)
    reference.from_buffer(memoryview(frozen), "F32", (2,)).fill_(1.0)
    assert frozen == bytes(8)
    shared = torch.zeros(2, dtype=torch.int16)
    reference.to_bytes(shared)[0] = 7
    assert shared.tolist() == [7, 0]


# NaN and Inf


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_values_show_wherever_they_are(bad: float, source: str) -> None:
    for row, col in [(0, 0), (3, 17), (34, 31)]:
        weight = sample("gaussian", reference.DTYPES[source], (35, 32)).clone()
        weight[row, col] = bad
        assert not math.isfinite(reference.measure(weight).amax)
        assert not math.isfinite(reference.measure(weight[:0]).merge(reference.measure(weight)).amax)
        assert reference.first_nonfinite(weight) == (1, (row, col))
        for name in ("FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4", "int3 tensor", "int5 channel asymmetric"):
            scheme = SCHEMES.get(name) or PRESETS[name]
            assert not encode(scheme, weight, Extent(low=-1.0, high=1.0)).finite.item()


def test_nonfinite_values_are_counted_and_the_first_is_named() -> None:
    weight = torch.zeros(4, 5)
    weight[1, 3], weight[1, 4], weight[3, 0] = math.nan, math.inf, -math.inf
    assert reference.first_nonfinite(weight) == (3, (1, 3))
    assert reference.first_nonfinite(torch.zeros(4, 5)) is None
    assert reference.first_nonfinite(torch.zeros(0, 5)) is None


def test_float64_values_beyond_float32_are_not_finite() -> None:
    weight = torch.zeros(2, 32, dtype=torch.float64)
    weight[1, 2] = -1e300
    assert reference.measure(weight) == Extent(low=-math.inf)
    assert reference.first_nonfinite(weight) == (1, (1, 2))
    assert not encode(PRESETS["FP8_DYNAMIC"], weight).finite.item()


def test_the_extent_of_nothing_is_zero() -> None:
    assert reference.measure(torch.zeros(0, 5)) == Extent()
    assert reference.measure(torch.full((2, 2), -0.0)) == Extent(low=0.0, high=0.0)
    assert math.copysign(1, reference.measure(torch.full((2, 2), -0.0)).amax) == 1
