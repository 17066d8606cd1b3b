"""Quantization in plain torch: the readable specification, and what runs on accelerators.

Neighbours: `core.scheme` says what is asked for, `core.statistics` holds what is measured, and a faster kernel has to
give the bytes of this one.

Promise: all arithmetic is float32, and a result is rounded once, to the dtype in which it is stored. Codes are computed
from `float32(weight) / float32(stored scale)`. Every operation is a single IEEE one, and every divisor is a tensor on
the device of the dividend, because torch turns a division by a Python number on CUDA into a multiplication by its
reciprocal. So bytes depend neither on the device nor on how a weight is cut into row blocks.

Every operation on a row block is a pass over the memory of the device, which is what its time depends on. So `encode`
makes few, most of them in place: besides the rows and their codes it holds one float32 number an element, and for
4-bit floats an index. Nothing waits for the device before the statistics are asked for, in one transfer.

Symbols: a row block is `[R, K]`. Its scales form a grid `[Rb, Cb]`, one for each tile of `(br, bc)` elements:

    strategy               tile            grid
    tensor                 (R, K)          (1, 1), stored as [1]
    channel                (1, K)          (R, 1)
    group, tensor_group    (1, g)          (R, K / g)
    block                  (br, bc)        (ceil(R / br), ceil(K / bc)), ragged edges filled with zeros
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import gcd, inf, isfinite
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from shardmill.core.scheme import Search, WeightArgs
from shardmill.core.statistics import Extent, Statistics

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""torch dtype by safetensors name; sub-byte dtypes have none that keeps the shape."""

E2M1_VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitude of the 4-bit floats by the low three bits of their code; bit 3 is the sign."""
_E2M1_STEPS: Final = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
"""Midpoints between neighbours, and whether the midpoint itself goes away from zero: to the even code."""
_E2M1_ORDER: Final = (*range(15, 7, -1), *range(8))
"""Codes in the order of their values, from -6 over both zeros to 6."""
_MX_EXPONENT_OFFSET: Final = {4: 2, 8: 8}
"""floor(log2(largest value)) of E2M1 and E4M3."""
_MX_CARRY: Final = 1 << 21
"""Added to float32 bits it carries into the exponent from mantissa 1.75 on."""
_NVFP4_EPS: Final = 0.125
"""Local scale of a group whose own scale underflows, as in compressed-tensors."""
_WORD_BITS: Final = 32
_CONTAINERS: Final = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}
"""Dtypes that hold a number of bits."""
_SUMMED_TOGETHER: Final = 1 << 16
"""Elements whose squares are summed at a time; on a CPU their float64 copies fit its caches."""
_FP4_BITS: Final = 4
_PACKED: Final = "pack-quantized"
_FP4_FORMATS: Final = frozenset({"nvfp4-pack-quantized", "mxfp4-pack-quantized"})


def from_buffer(buffer: bytearray | memoryview, dtype: str, shape: tuple[int, ...], device: str = "cpu") -> Tensor:
    """Read a tensor from little-endian bytes.

    On the CPU it shares memory with `buffer`, except when that is read-only or misaligned: then it is a copy.

    >>> from_buffer(bytearray.fromhex("0000803f"), "F32", (1,)).tolist()
    [1.0]
    """
    if not memoryview(buffer).nbytes:
        return torch.empty(shape, dtype=DTYPES[dtype], device=device)
    octets = torch.frombuffer(bytearray(buffer) if memoryview(buffer).readonly else buffer, dtype=torch.uint8)
    if octets.data_ptr() % DTYPES[dtype].itemsize:
        octets = octets.clone()
    return octets.view(DTYPES[dtype]).reshape(shape).to(device)


def to_bytes(tensor: Tensor) -> memoryview:
    """Return the elements of a tensor as little-endian bytes; shares memory with a contiguous tensor on the CPU.

    >>> to_bytes(torch.tensor([1.0], dtype=torch.bfloat16)).hex()
    '803f'
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # torch calls a single element contiguous whatever its stride, and then refuses to view it as bytes
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().data


def measure(rows: Tensor) -> Extent:
    """Find the extent of a row block [R, K] in its own dtype.

    NaN and Inf show in `amax`; so does a float64 value beyond the range of float32.
    """
    if not rows.numel():
        return Extent()
    low, high = torch.stack(torch.aminmax(rows)).to(torch.float32).tolist()
    return Extent().merge(Extent(low=low, high=high))


def first_nonfinite(rows: Tensor) -> tuple[int, tuple[int, ...]] | None:
    """Count the values that are not finite as float32, and find the index of the first; None when all are."""
    found = ~torch.isfinite(rows if rows.dtype != torch.float64 else rows.to(torch.float32))
    count = int(found.sum())
    if not count:
        return None
    first = found.flatten().to(torch.uint8).argmax()
    return count, tuple(int(index) for index in torch.unravel_index(first, rows.shape))


def global_scale(extent: Extent, device: str | torch.device = "cpu") -> Tensor:
    """Choose the second-level scale of NVFP4 for a tensor or a fused set.

    scale F32 [1] = `2688 * (1 / amax)`, two roundings, as compressed-tensors' `generate_gparam`; 2688 = 448 * 6. An
    amax that is NaN, or so small (below 7.9e-36) that this overflows, gives 1.0.

    >>> global_scale(Extent(high=1.75)).item()
    1536.0001220703125
    """
    amax = _as_float32(extent.amax, torch.device(device)).clamp_(min=torch.finfo(torch.float32).tiny)
    scale = (torch.ones_like(amax) / amax) * 2688.0
    return scale.masked_fill_(~scale.isfinite(), 1.0)


def _as_float32(value: float, device: torch.device) -> Tensor:
    """Round a number to float32 [1] on the device, to which nothing is copied."""
    return torch.full((1,), value, dtype=torch.float64, device=device).to(torch.float32)


def to_e2m1(values: Tensor) -> Tensor:
    """Round float32 values to the nearest 4-bit float, ties to the even code, saturating at 6.

    values -> uint8 codes 0..15 of the same shape. The sign is that of the value, so a small negative one gives 8, and
    negative zero gives 0.

    >>> to_e2m1(torch.tensor([0.25, 0.75, 5.0, 5.1, -0.1, -0.0, -9.0])).tolist()
    [0, 2, 6, 7, 8, 0, 15]
    """
    tables = _e2m1_tables(values.device)
    return torch.index_select(tables.codes, 0, _e2m1_ranks(values, tables)).view(values.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class _E2m1Tables:
    """The 4-bit floats in the order of their values; the position there is their rank, 0..15."""

    bounds: Tensor
    """Largest float32 number of each rank but the last; `[15]`."""
    codes: Tensor
    """uint8 [16]."""
    values: Tensor
    """float32 [16]."""


@cache  # one copy to each device, and not a wait for it in every row block
def _e2m1_tables(device: torch.device) -> _E2m1Tables:
    below, above = [], []
    for midpoint, tie_goes_out in _E2M1_STEPS:
        # the neighbours of the midpoint as float32
        inner, outer = (_next_float32(midpoint, towards) for towards in (0.0, inf))
        above.append(inner if tie_goes_out else midpoint)
        below.append(-midpoint if tie_goes_out else -outer)
    bounds = [*reversed(below), _next_float32(0.0, -inf), *above]
    values = [E2M1_VALUES[code & 7] * (-1 if code & 8 else 1) for code in _E2M1_ORDER]
    return _E2m1Tables(
        bounds=torch.tensor(bounds, dtype=torch.float32, device=device),
        codes=torch.tensor(_E2M1_ORDER, dtype=torch.uint8, device=device),
        values=torch.tensor(values, dtype=torch.float32, device=device),
    )


def _next_float32(value: float, towards: float) -> float:
    return float(torch.nextafter(torch.tensor(value), torch.tensor(towards)))


def _e2m1_ranks(values: Tensor, tables: _E2m1Tables) -> Tensor:
    """Return the ranks of the nearest 4-bit floats: int32, one dimension."""
    return torch.bucketize(values.flatten(), tables.bounds, out_int32=True)


def _code_values(codes: Tensor) -> Tensor:
    """Return what codes stand for, in units of the step: float32, in memory of its own."""
    if codes.dtype != torch.uint8:
        return codes.to(torch.float32)
    table = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], dtype=torch.float32, device=codes.device)
    return table[codes.to(torch.int32)]


def round_codes(quotient: Tensor, args: WeightArgs) -> Tensor:
    """Clamp, then round to the nearest code, ties to even: int8, float8 or the uint8 code of a 4-bit float.

    `quotient` becomes the values of the codes.
    """
    if args.type == "float" and args.num_bits == _FP4_BITS:
        return _round_e2m1(quotient)
    quotient.clamp_(*args.code_range)
    if args.type == "int":
        return quotient.round_().to(torch.int8)
    codes = quotient.to(torch.float8_e4m3fn)
    quotient.copy_(codes)
    return codes


def _round_e2m1(quotient: Tensor) -> Tensor:
    """As `round_codes`; ranks saturate, so nothing is clamped."""
    tables = _e2m1_tables(quotient.device)
    ranks = _e2m1_ranks(quotient, tables)
    torch.index_select(tables.values, 0, ranks, out=quotient.view(-1))
    return torch.index_select(tables.codes, 0, ranks).view(quotient.shape)


def _bit_fields(bits: int) -> tuple[int, int, list[tuple[int, int]]]:
    """Return codes and words after which the layout of a bit stream repeats, and (word, shift) of each such code."""
    period = _WORD_BITS // gcd(_WORD_BITS, bits)
    return period, period * bits // _WORD_BITS, [divmod(code * bits, _WORD_BITS) for code in range(period)]


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes into int32 words: one dense little-endian bit stream per row.

    codes int8 [R, K] -> int32 [R, ceil(K * bits / 32)]. Code i is stored as `code + 2**(bits - 1)` in bits `i * bits`
    to `i * bits + bits - 1` of its row and may straddle two words; unused bits at the end are 0.

    >>> [hex(word) for word in pack_bits(torch.arange(-8, 0, dtype=torch.int8)[None], 4)[0].tolist()]
    ['0x76543210']
    """
    width = -(-codes.shape[1] * bits // _WORD_BITS)
    fields = codes.contiguous().view(torch.uint8) + (1 << (bits - 1))  # modulo 256, so without a sign
    period, _, _ = _bit_fields(bits)
    if fields.shape[1] % period:
        fields = pad(fields, (0, -fields.shape[1] % period))
    size = bits
    while size % 8:
        fields, size = _join_pairs(fields, size), 2 * size
    octets = fields.view(torch.uint8).view(len(codes), -1, fields.element_size())[..., : size // 8]
    return octets.flatten(1).view(torch.int32)[:, :width].contiguous()


def _join_pairs(fields: Tensor, size: int) -> Tensor:
    """Join neighbours, even column low: fields of `size` bits [R, K] -> fields of twice that [R, K / 2]."""
    dtype = _CONTAINERS[max(8, 1 << (2 * size - 1).bit_length())]
    pairs = fields.reshape(len(fields), -1, 2)
    return (pairs[..., 1].to(dtype) << size).bitwise_or_(pairs[..., 0])


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Invert `pack_bits`: int32 [R, words] -> int8 [R, count]."""
    period, words, places = _bit_fields(bits)
    groups = pad(packed, (0, -packed.shape[1] % words)).reshape(len(packed), -1, words)
    codes = torch.empty((*groups.shape[:2], period), dtype=torch.int8, device=packed.device)
    for code, (word, shift) in enumerate(places):
        field = groups[..., word] >> shift
        if shift + bits > _WORD_BITS:
            field = field & ((1 << (_WORD_BITS - shift)) - 1) | groups[..., word + 1] << (_WORD_BITS - shift)
        codes[..., code] = (field & ((1 << bits) - 1)) - (1 << (bits - 1))
    return codes.flatten(1)[:, :count]


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack pairs of 4-bit codes, even column low: uint8 [R, K] -> uint8 [R, K / 2].

    >>> [hex(byte) for byte in pack_nibbles(to_e2m1(torch.tensor([[0.5, -6.0]])))[0].tolist()]
    ['0xf1']
    """
    return _join_pairs(codes, _FP4_BITS)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Invert `pack_nibbles`: uint8 [R, K / 2] -> uint8 [R, K]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Qparams:
    """Quantization parameters of a grid of tiles."""

    scale: Tensor
    """As stored, [Rb, Cb]."""
    zero_point: Tensor | None = None
    """Whole numbers as float32, [Rb, Cb]."""
    global_scale: Tensor | None = None
    """float32 [1]."""

    @property
    def step(self) -> Tensor:
        """What one unit of code is worth: float32, broadcasts over tiles [Rb, br, Cb, bc]."""
        if self.scale.dtype == torch.uint8:
            return spread(_power_of_two(self.scale))
        scale = self.scale.to(torch.float32)
        return spread(scale if self.global_scale is None else scale / self.global_scale)

    @property
    def offset(self) -> Tensor | None:
        """Code of zero, shaped as `step`."""
        return None if self.zero_point is None else spread(self.zero_point)


def spread(grid: Tensor) -> Tensor:
    """Let a grid [Rb, Cb] broadcast over tiles."""
    return grid[:, None, :, None]


def _power_of_two(exponents: Tensor) -> Tensor:
    """Return `2**(exponent - 127)` as float32, exactly; `2**-127` is subnormal, so it has no exponent bits."""
    bits = exponents.to(torch.int32)
    return torch.where(bits == 0, torch.full_like(bits, 1 << 22), bits << 23).view(torch.float32)


def mx_exponents(amax: Tensor, num_bits: int) -> Tensor:
    """Choose the shared exponents of MX groups: `e(amax) - floor(log2(largest value))`.

    amax float32 -> uint8 of the same shape. `e` is the biased exponent of amax, one more from mantissa 1.75 on.
    Saturates at 0, and where `e` would be that of infinity: so every code times its scale is finite.

    >>> mx_exponents(torch.tensor([1.0, 1.74, 1.75, 0.0, 3.4e38]), 4).tolist()
    [125, 125, 126, 0, 252]
    """
    exponent = ((amax.view(torch.int32) + _MX_CARRY) >> 23).clamp(max=254)
    return (exponent - _MX_EXPONENT_OFFSET[num_bits]).clamp(min=0).to(torch.uint8)


def _divided(dividend: Tensor, divisor: float) -> Tensor:
    """Divide by a number as by a tensor on the device of the dividend; see the module's promise."""
    return dividend / dividend.new_full((1,), divisor)


def _or_eps(scale: Tensor, eps: float) -> Tensor:
    """Replace scales that are 0, of groups of zeros or of values too small for the dtype; in place."""
    return scale.masked_fill_(scale == 0, eps)


def _symmetric(amax: Tensor, args: WeightArgs, dtype: torch.dtype) -> Qparams:
    """Compute `scale = amax / code_max`, rounded once."""
    scale = _divided(amax, args.code_max).to(dtype)
    return Qparams(scale=_or_eps(scale, torch.finfo(dtype).eps))


def _asymmetric(low: Tensor, high: Tensor, args: WeightArgs, dtype: torch.dtype) -> Qparams:
    """Compute `scale = (high - low) / (2**bits - 1)` and `zero_point = first - low / scale` from the unrounded scale.

    Where the stored scale underflows, the zero point is 0.
    """
    first, last = args.code_range
    span = high - low
    exact = _divided(span, 2 * args.code_max)
    # high - low may exceed float32 although the scale does not; halves are exact at such magnitudes
    halved = _divided(high * 0.5 - low * 0.5, args.code_max)
    exact = torch.where(span.isinf(), halved, exact)
    scale = exact.to(dtype)
    zero_point = (first - low / exact).clamp(first, last).round_()
    zero_point = torch.where(scale == 0, torch.zeros_like(zero_point), zero_point)
    return Qparams(scale=_or_eps(scale, torch.finfo(dtype).eps), zero_point=zero_point)


def _nvfp4(amax: Tensor, args: WeightArgs, shared: Tensor) -> Qparams:
    """Compute local scales `e4m3(global_scale * (amax / 6))`."""
    local = _divided(amax, args.code_max).mul_(shared).clamp_(max=torch.finfo(torch.float8_e4m3fn).max)
    rounded = local.copy_(local.to(torch.float8_e4m3fn))
    return Qparams(scale=_or_eps(rounded, _NVFP4_EPS).to(torch.float8_e4m3fn), global_scale=shared)


def _choose_qparams(low: Tensor, high: Tensor, args: WeightArgs, scale_dtype: str, whole: Extent | None) -> Qparams:
    if args.strategy == "tensor":
        extent = _given(whole, args)
        low, high = (_as_float32(bound, low.device)[None] for bound in (extent.low, extent.high))
    amax = torch.maximum(high, -low)
    if args.is_mx:
        return Qparams(scale=mx_exponents(amax, args.num_bits))
    if args.has_global_scale:
        return _nvfp4(amax, args, global_scale(_given(whole, args), amax.device))
    if args.symmetric:
        return _symmetric(amax, args, DTYPES[scale_dtype])
    return _asymmetric(low, high, args, DTYPES[scale_dtype])


def _given(whole: Extent | None, args: WeightArgs) -> Extent:
    if whole is None:
        raise ValueError(f"strategy `{args.strategy}` needs the extent of the whole tensor or fused set")
    return whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A quantized row block."""

    tensors: dict[str, Tensor]
    """By param name: `weight` or `weight_packed`, `weight_scale`, and `weight_zero_point` of asymmetric schemes. Each
    is contiguous, on the device of the rows, and has the dtype in which it is stored."""
    statistics: Statistics
    finite: Tensor
    """Whether every weight was finite as float32; bool on the CPU, no dimensions. If not, codes are unspecified."""


def _tile_size(args: WeightArgs, shape: tuple[int, int]) -> tuple[int, int]:
    if args.block_structure is not None:
        return args.block_structure
    if args.group_size is not None and args.group_size > 0:
        return 1, args.group_size
    return (shape[0] if args.strategy == "tensor" else 1), shape[1]


def _to_tiles(matrix: Tensor, args: WeightArgs) -> Tensor:
    """[R, K] -> [Rb, br, Cb, bc], contiguous, ragged edges filled with zeros."""
    rows, cols = matrix.shape
    height, width = _tile_size(args, (rows, cols))
    filled = pad(matrix, (0, -cols % width, 0, -rows % height)) if rows % height or cols % width else matrix
    return filled.contiguous().view(-(-rows // height), height, -1, width)


def _from_tiles(tiles: Tensor, shape: tuple[int, int]) -> Tensor:
    """[Rb, br, Cb, bc] -> [R, K], without what filled the edges."""
    return tiles.flatten(2).flatten(0, 1)[: shape[0], : shape[1]].contiguous()


def _extremes(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return lowest and highest value of each tile, zero included; each float32 [Rb, Cb]."""
    low, high = torch.aminmax(tiles, dim=3)
    if tiles.shape[1] > 1:
        low, high = low.amin(1, keepdim=True), high.amax(1, keepdim=True)
    return low.squeeze(1).to(torch.float32).clamp_(max=0), high.squeeze(1).to(torch.float32).clamp_(min=0)


def encode(
    rows: Tensor,
    args: WeightArgs,
    *,
    format: str,  # noqa: A002 - the glossary's word
    scale_dtype: str,
    whole: Extent | None = None,
    search: Search | None = None,
    importance: Tensor | None = None,
) -> Encoded:
    """Quantize one row block of a weight.

    rows [R, K] -> codes and qparams of these rows. Results of consecutive blocks concatenate along dimension 0 to the
    result of the tensor, if each block starts at a multiple of 32 rows and of the block height; with strategy `tensor`
    every block gives the same scale [1]. `weight_shape` and `weight_global_scale` belong to the tensor and are the
    caller's.

    Args:
        rows: F16, BF16, F32 or F64, as in the source.
        args: how to quantize; groups divide K.
        format: as `Scheme.format`.
        scale_dtype: safetensors name of the dtype of FP8 and INT scales; NVFP4 and MX have one of their own.
        whole: extent of the tensor (strategy `tensor`) or of its fused set (`tensor_group`).
        search: how scales are chosen; None: from the extremes of each tile alone.
        importance: for a search, what errors in each column are multiplied with; float32 [K].

    Raises:
        ValueError: `whole` is missing.
    """
    # every operation widens 16-bit floats as it reads them, so they need no copy
    tiles = _to_tiles(rows.to(torch.float32) if rows.dtype == torch.float64 else rows, args)
    extremes = _extremes(tiles)
    qparams = _choose_qparams(*extremes, args, scale_dtype, whole)
    if search is not None:
        from shardmill.kernels import reference_search  # which is written in terms of this module

        qparams = reference_search.choose(tiles, extremes, qparams, args, search, importance)
    codes, found = _encode_tiles(tiles, qparams, args)
    codes = _from_tiles(codes, (rows.shape[0], rows.shape[1]))
    tensors = _stored_codes(codes, args, format) | _stored_qparams(qparams, args, format)
    statistics = _statistics(rows.numel(), found, tiles, extremes, qparams, args)
    return Encoded(tensors=tensors, statistics=statistics, finite=torch.tensor(isfinite(statistics.amax)))


def _encode_tiles(tiles: Tensor, qparams: Qparams, args: WeightArgs) -> tuple[Tensor, list[Tensor]]:
    """Return codes [Rb, br, Cb, bc] and what `_compare` finds about them."""
    values = quotients(tiles, qparams)
    codes = round_codes(values, args)
    return codes, _compare(tiles, dequantize(values, qparams))


def quotients(tiles: Tensor, qparams: Qparams) -> Tensor:
    """Compute `tile / step + zero_point` as float32."""
    quotient = tiles / qparams.step
    return quotient if qparams.offset is None else quotient.add_(qparams.offset)


def _stored_codes(codes: Tensor, args: WeightArgs, format: str) -> dict[str, Tensor]:  # noqa: A002 - as in encode
    if format in _FP4_FORMATS:
        return {"weight_packed": pack_nibbles(codes)}
    return {"weight_packed": pack_bits(codes, args.num_bits)} if format == _PACKED else {"weight": codes}


def _stored_qparams(qparams: Qparams, args: WeightArgs, format: str) -> dict[str, Tensor]:  # noqa: A002 - as in encode
    stored = {"weight_scale": qparams.scale}
    if qparams.zero_point is not None:
        stored["weight_zero_point"] = qparams.zero_point.to(torch.int8)
    if args.strategy == "tensor":
        stored = {name: tensor.reshape(1) for name, tensor in stored.items()}
    if not args.symmetric and _packs_zero_points(args, format):
        stored["weight_zero_point"] = pack_bits(stored["weight_zero_point"].t(), args.num_bits).t().contiguous()
    return stored


def _packs_zero_points(args: WeightArgs, format: str) -> bool:  # noqa: A002 - as in encode
    return format == _PACKED and args.strategy in ("group", "channel")


def dequantize(values: Tensor, qparams: Qparams) -> Tensor:
    """Compute `(value - zero_point) * step` in place; values of codes, float32 [Rb, br, Cb, bc]."""
    return (values if qparams.offset is None else values.sub_(qparams.offset)).mul_(qparams.step)


def decode(
    tensors: Mapping[str, Tensor],
    args: WeightArgs,
    *,
    format: str,  # noqa: A002 - as in encode
    shape: tuple[int, int],
) -> Tensor:
    """Dequantize the stored tensors of one weight.

    tensors by param name, as `encode` gives them, with `weight_global_scale` F32 [1] for NVFP4 -> float32 of `shape`.
    """
    values = _code_values(_load_codes(tensors, args, format, shape))
    qparams = _load_qparams(tensors, args, format, shape)
    return _from_tiles(dequantize(_to_tiles(values, args), qparams), shape)


def _load_codes(tensors: Mapping[str, Tensor], args: WeightArgs, format: str, shape: tuple[int, int]) -> Tensor:  # noqa: A002
    if format in _FP4_FORMATS:
        return unpack_nibbles(tensors["weight_packed"])
    if format == _PACKED:
        return unpack_bits(tensors["weight_packed"], args.num_bits, shape[1])
    return tensors["weight"]


def _load_qparams(tensors: Mapping[str, Tensor], args: WeightArgs, format: str, shape: tuple[int, int]) -> Qparams:  # noqa: A002
    height, width = _tile_size(args, shape)
    grid = -(-shape[0] // height), -(-shape[1] // width)
    zero_point = tensors.get("weight_zero_point")
    if zero_point is not None and _packs_zero_points(args, format):
        zero_point = unpack_bits(zero_point.t(), args.num_bits, shape[0]).t()
    return Qparams(
        scale=tensors["weight_scale"].reshape(grid),
        zero_point=None if zero_point is None else zero_point.reshape(grid).to(torch.float32),
        global_scale=tensors.get("weight_global_scale"),
    )


def clip_bounds(args: WeightArgs) -> tuple[float, float]:
    """Return the quotients (zero point added) below and above which an element counts as clipped.

    Floats: half a step of the grid beyond the outermost code, where rounding would have gone further. Integers: a whole
    step, because a symmetric scale puts amax half a step beyond the last code on purpose, and storing that scale in 16
    bits moves it a little further.

    >>> clip_bounds(WeightArgs(num_bits=4)), clip_bounds(WeightArgs(type="float"))
    ((-9.0, 8.0), (-464.0, 464.0))
    """
    low, high = args.code_range
    margin = 1.0 if args.type == "int" or args.num_bits == _FP4_BITS else 16.0
    return low - margin, high + margin


def _is_clipped(quotient: Tensor, args: WeightArgs) -> Tensor:
    low, high = clip_bounds(args)
    return (quotient < low) | (quotient > high)


def _compare(tiles: Tensor, dequantized: Tensor) -> list[Tensor]:
    """Find squared error, squared weight, largest error, and how many elements are not zero before and after.

    Both [Rb, br, Cb, bc]; `dequantized` becomes the error. Zeros that fill an edge dequantize to zero.
    """
    nonzero, left = _count_nonzero(tiles), _count_nonzero(dequantized)
    error = dequantized.sub_(tiles)
    low, high = torch.aminmax(error)
    return [sum_of_squares(error), sum_of_squares(tiles), torch.maximum(high, -low), nonzero, left]


def sum_of_squares(values: Tensor) -> Tensor:
    """Sum the squares of float numbers of any shape: float64, no dimensions.

    By norms, since they widen numbers as they read them; a sum in float64 would copy them first.

    >>> sum_of_squares(torch.tensor([[3.0, 4.0]])).item()
    25.0
    """
    parts = values.reshape(-1).split(_SUMMED_TOGETHER)
    norms: tuple[Tensor, ...] = torch._foreach_norm(parts, 2, torch.float64)  # noqa: SLF001 - no other name
    return torch.stack(norms).square_().sum()


def _count_nonzero(values: Tensor) -> Tensor:
    """Count by 0-norms of rows, which need no mask; exact for rows of up to `2**24` elements."""
    rows = values.flatten(2).flatten(0, 1)
    counts: Tensor = torch.linalg.vector_norm(rows, 0, dim=1, dtype=torch.float32)
    return counts.sum(dtype=torch.float64)


def _statistics(
    count: int,
    found: list[Tensor],
    tiles: Tensor,
    extremes: tuple[Tensor, Tensor],
    qparams: Qparams,
    args: WeightArgs,
) -> Statistics:
    """Fetch what `_compare` found, in one transfer.

    Zeros stay zeros, so what is zeroed is the difference of two counts. A quotient grows with its element, so a tile
    has clipped elements only if one of its `extremes` is one: hardly ever, and only then they are counted.
    """
    low, high = extremes
    outermost = torch.stack([quotients(spread(bound), qparams) for bound in extremes])
    numbers = [*found, torch.maximum(high, -low).amax(), _is_clipped(outermost, args).any()]
    fetched = torch.stack([number.to(torch.float64) for number in numbers]).tolist()
    squared_error, squared_weight, max_error, nonzero, left, amax, has_clipped = fetched
    return Statistics(
        count=count,
        squared_error=squared_error,
        squared_weight=squared_weight,
        max_error=max_error,
        amax=amax,
        clipped=int(_count_nonzero(_is_clipped(quotients(tiles, qparams), args).to(torch.bfloat16)))
        if has_clipped
        else 0,
        zeroed=int(nonzero - left),
        nonzero=int(nonzero),
    )
