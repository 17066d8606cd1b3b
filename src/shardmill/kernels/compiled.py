"""The loops of `kernels.cpu`, compiled by numba the first time each is called and then kept on disk.

Imported only when a kernel runs, because numba takes a good part of a second. Nothing here knows a scheme:
`kernels.cpu` translates one into the tuples below.

A row block lies in memory as raw bits, uint16 for BF16 and F16 and uint32 for F32, and is read twice: once for the
extremes of a band of tiles, once for its codes. Codes are made `CHUNK` columns of a row at a time in buffers that stay
in the first cache: values as float32, the step of each, codes, errors. Loops are short, without branches, and keep to
operands of one width, so that the compiler makes vectors of them.

Promise: every operation on float32 is the one of `kernels.reference`, in its order and rounded by itself. Only the
float64 sums of squares may be taken in another order; the squares in them are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, TypeVar

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

Raw = npt.NDArray[Any]
"""Bits of the source, one element each: uint16 or uint32, one dimension."""
Floats = npt.NDArray[np.float32]
Octets = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]
_Function = TypeVar("_Function", bound=Callable[..., Any])

CHUNK: Final = 2048
"""Columns in work at a time; a multiple of 32, so that chunks of packed codes start at a word."""

FLOAT8, FLOAT4, INTEGER, SHIFTED = 0, 1, 2, 3
"""Kinds of codes: E4M3, E2M1, integers, integers with zero points."""
TO_BF16, TO_F32, TO_MX, TO_NVFP4 = 0, 1, 2, 3
"""Kinds of stored scales."""

_SIGN: Final = np.uint32(0x80000000)
_MAGNITUDE: Final = np.uint32(0x7FFFFFFF)
_EXPONENT: Final = np.uint32(0x7F800000)
_HALF_MAGNITUDE: Final = np.uint16(0x7FFF)
_HALF_SIGN: Final = np.uint16(0x8000)
_E4M3_MAX: Final = np.uint32(0x43E00000)
"""Bits of 448."""
_E4M3_NORMAL: Final = np.uint32(0x3C800000)
"""Bits of 2**-6; below it codes are 2**-9 apart."""
_E4M3_LIFT: Final = np.uint32((20 << 23) + 56)
"""Turns the bits of `2**e` into those of `2**(e + 20) * (1 + 56 * 2**-23)`; 56 is `-8 * (127 - 6)` modulo 256."""
_E2M1_MAX: Final = np.uint32(0x40C00000)
"""Bits of 6."""
_E2M1_NORMAL: Final = np.uint32(0x3F800000)
"""Bits of 1; below it codes are 0.5 apart."""
_E2M1_LIFT: Final = np.uint32((22 << 23) + 2)
"""As `_E4M3_LIFT`; 2 is `-2 * 127` modulo 256."""
_WHOLE: Final = np.float32(1.5 * 2.0**23)
"""Added to a number below 2**22 it leaves a whole one, rounded to nearest even."""
_WHOLE_BITS: Final = np.uint32(0x4B400000)
_BF16_EPS: Final = np.float32(2.0**-7)
_F32_EPS: Final = np.float32(2.0**-23)
_NVFP4_EPS: Final = np.float32(0.125)


class Tiling(NamedTuple):
    """Shape of a row block and of the tiles that share a scale; those at the edges may be smaller."""

    rows: int
    cols: int
    height: int
    width: int
    is_half: bool
    """Whether 16-bit elements are F16, not BF16."""


class Codec(NamedTuple):
    """How quotients become codes."""

    kind: int
    bits: int
    """Width of a stored code."""
    bias: np.uint32
    """Added to integer codes before they are stored."""
    low: np.float32
    """Smallest code."""
    high: np.float32
    clip_low: np.float32
    """Quotients below count as clipped."""
    clip_high: np.float32
    margin: np.float32
    """What `Marks.furthest` exceeds where something is clipped."""


class Rule(NamedTuple):
    """How the extremes of a tile become its scale."""

    kind: int
    code_max: np.float32
    shared: np.float32
    """Global scale of NVFP4."""
    mx_offset: np.uint32
    """floor(log2(largest value)) of MX codes."""
    is_fixed: bool
    """Whether all tiles take the extremes that follow."""
    low: np.float32
    high: np.float32


class Outputs(NamedTuple):
    """Where results go."""

    codes: Octets
    """Rows one after another."""
    scales: Words
    """Bits of BF16 or float32 scales, by tile."""
    exponents: Octets
    """MX exponents, or E4M3 scales."""
    zero_points: npt.NDArray[np.int8]


class Tiles(NamedTuple):
    """What is known of each tile of a band."""

    top: Words
    """Raw bits of the largest magnitude, or of the largest number where there are zero points."""
    bottom: Words
    """Raw bits of the magnitude of the smallest number; 0 where there are no zero points."""
    high: Floats
    low: Floats
    steps: Floats
    """What one unit of code is worth."""
    offsets: Floats
    """Code of zero."""


class Work(NamedTuple):
    """Buffers of `CHUNK` elements."""

    values: Floats
    steps: Floats
    offsets: Floats
    errors: Floats
    codes: Octets
    scratch: Raw
    """One row."""


class Marks(NamedTuple):
    """What a loop over a chunk noticed."""

    worst: np.uint32
    """Bits of the largest error."""
    furthest: np.float32
    """Largest quotient of a float code; of an integer code how far one lies beyond the outermost code."""
    blank: np.uint32
    """Values that are 0."""
    dead: np.uint32
    """Values that are 0 when dequantized, blank ones included: 0 has a code in every scheme."""


class Found(NamedTuple):
    """Statistics of a row or of a block."""

    squared_error: float
    squared_weight: float
    largest: np.uint32
    """Raw bits of the largest magnitude."""
    worst: np.uint32
    """Bits of the largest error."""
    clipped: int
    zeroed: int
    nonzero: int


_OPTIONS: Final[Mapping[str, Any]] = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    "_nrt": False,  # callers own all memory, so nothing counts references
}


def _compiled(function: _Function) -> _Function:
    """Compile on the first call, without the interpreter's lock, with IEEE arithmetic as it is written."""
    compiled: _Function = numba.njit(**_OPTIONS)(function)
    return compiled


def _spliced(function: _Function) -> _Function:
    """As `_compiled`, but as a part of its caller: every level of calls costs seconds of compilation."""
    compiled: _Function = numba.njit(**_OPTIONS, inline="always")(function)
    return compiled


def _reordered(function: _Function) -> _Function:
    """As `_compiled`, for sums whose terms may be added in any order."""
    compiled: _Function = numba.njit(**_OPTIONS, fastmath={"reassoc", "contract"})(function)
    return compiled


def _generate_fetch(_typing: Any, raw: Any, index: Any) -> Any:
    """Ask for the cache line of `raw[index]` without waiting for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        place = builder.gep(array.data, [arguments[1]])
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, near, data = number(0), number(3), number(1)
        builder.call(prefetch, [builder.bitcast(place, byte), read, near, data])
        return context.get_dummy_value()

    return types.none(raw, index), generate


_fetch: Final[Any] = intrinsic(_generate_fetch)


@_compiled
def _fetch_ahead(raw: Raw) -> None:
    """Bring elements near that will be read soon: between rows too much happens for the processor to foresee it."""
    for j in range(0, raw.size, 64 // raw.itemsize):
        _fetch(raw, j)


@_compiled
def _bits(value: np.float32) -> np.uint32:
    return np.float32(value).view(np.uint32)


@_compiled
def _float(bits: np.uint32) -> np.float32:
    return np.uint32(bits).view(np.float32)


@_compiled
def _widen_half(bits: np.uint32) -> np.float32:
    """Return the value of a finite F16: `2**(e - 15) * 1.m`, or `2**-14 * 0.m` where e is 0."""
    magnitude = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
    normal = np.uint32(magnitude + np.uint32(112 << 23))
    subnormal = _bits(_float(np.uint32(magnitude + np.uint32(113 << 23))) - np.float32(2.0**-14))
    chosen = subnormal if magnitude < np.uint32(1 << 23) else normal
    return _float(np.uint32(chosen | np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))))


@_compiled
def _widen(raw: Raw, is_half: bool, values: Floats) -> None:  # noqa: FBT001 - numba takes positions
    """Convert raw bits to float32."""
    if raw.itemsize == 4:
        for j in range(raw.size):
            values[j] = _float(np.uint32(raw[j]))
    elif is_half:
        for j in range(raw.size):
            values[j] = _widen_half(np.uint32(raw[j]))
    else:
        for j in range(raw.size):
            values[j] = _float(np.uint32(np.uint32(raw[j]) << np.uint32(16)))


@_compiled
def _widen_all(bits: Words, itemsize: int, is_half: bool, values: Floats) -> None:  # noqa: FBT001 - as above
    """Convert raw bits of elements of `itemsize` bytes, held one to a word, to float32."""
    if is_half:
        for j in range(bits.size):
            values[j] = _widen_half(bits[j])
        return
    shift = np.uint32(32 - 8 * itemsize)
    for j in range(bits.size):
        values[j] = _float(np.uint32(bits[j] << shift))


@_compiled
def _largest_magnitude(raw: Raw) -> np.uint32:
    """Largest raw magnitude: bits without the sign order as the numbers do, Inf and NaN above all."""
    if raw.itemsize == 2:
        narrow = np.uint16(0)
        for j in range(raw.size):
            narrow = max(narrow, np.uint16(raw[j] & _HALF_MAGNITUDE))
        return np.uint32(narrow)
    wide = np.uint32(0)
    for j in range(raw.size):
        wide = max(wide, np.uint32(raw[j] & _MAGNITUDE))
    return wide


@_spliced
def _raise_by(row: Raw, width: int, top: Words) -> None:
    """Raise `top` to the largest raw magnitude of each `width` elements; a constant `width` helps the inner loop."""
    tiles = row.reshape(row.size // width, width)
    for tile in range(len(tiles)):
        if row.itemsize == 2:
            narrow = np.uint16(0)
            for j in range(width):
                narrow = max(narrow, np.uint16(tiles[tile, j] & _HALF_MAGNITUDE))
            top[tile] = max(top[tile], np.uint32(narrow))
        else:
            wide = np.uint32(0)
            for j in range(width):
                wide = max(wide, np.uint32(tiles[tile, j] & _MAGNITUDE))
            top[tile] = max(top[tile], wide)


@_compiled
def _halve(row: Raw, out: Raw) -> None:
    """Take the larger raw magnitude of each pair of elements."""
    if row.itemsize == 2:
        for j in range(out.size):
            out[j] = max(np.uint16(row[2 * j] & _HALF_MAGNITUDE), np.uint16(row[2 * j + 1] & _HALF_MAGNITUDE))
    else:
        for j in range(out.size):
            out[j] = max(np.uint32(row[2 * j] & _MAGNITUDE), np.uint32(row[2 * j + 1] & _MAGNITUDE))


@_compiled
def _raise_by_halving(row: Raw, scratch: Raw, top: Words) -> None:
    """As `_raise_by`, for tiles shorter than a few vectors: all of them shrink at once. The width is a power of two."""
    begin, size = 0, row.size // 2
    _halve(row, scratch[:size])
    while size > top.size:
        _halve(scratch[begin : begin + size], scratch[begin + size : begin + size + size // 2])
        begin += size
        size //= 2
    for tile in range(top.size):
        top[tile] = max(top[tile], np.uint32(scratch[begin + tile]))


@_compiled
def _raise_tops(row: Raw, width: int, scratch: Raw, top: Words) -> None:
    """Raise `top` to the largest raw magnitude of each tile of a row; `scratch` is as long as the row."""
    whole = row.size // width * width
    if width in (16, 32) and whole == row.size:
        _raise_by_halving(row, scratch, top)
    elif width == 128:
        _raise_by(row[:whole], 128, top)
    else:
        _raise_by(row[:whole], width, top)
    if whole < row.size:
        top[whole // width] = max(top[whole // width], _largest_magnitude(row[whole:]))


@_compiled
def _extremes(raw: Raw) -> tuple[np.uint32, np.uint32]:
    """Raw bits of the largest number, at least 0, and of the largest magnitude below 0.

    As signed integers the bits of positive numbers order as the numbers do, above those of all negative ones; as
    unsigned integers the bits of negative numbers order as their magnitudes do, above those of all positive ones.
    """
    if raw.itemsize == 2:
        high, low = np.int16(0), _HALF_SIGN
        for j in range(raw.size):
            high = max(high, np.int16(raw[j]))
            low = max(low, np.uint16(raw[j]))
        return np.uint32(high), np.uint32(low & _HALF_MAGNITUDE)
    wide_high, wide_low = np.int32(0), _SIGN
    for j in range(raw.size):
        wide_high = max(wide_high, np.int32(raw[j]))
        wide_low = max(wide_low, np.uint32(raw[j]))
    return np.uint32(wide_high), np.uint32(wide_low & _MAGNITUDE)


@_compiled
def measure(raw: Raw) -> tuple[int, int]:
    """Raw bits of the largest number, at least 0, and of the magnitude of the smallest, at most 0."""
    high, low = _extremes(raw)
    return int(high), int(low)


@_compiled
def _raise_extremes(row: Raw, width: int, top: Words, bottom: Words) -> None:
    """Raise `top` and `bottom` to the extremes of each tile of a row, as `_extremes` gives them."""
    for tile in range(top.size):
        high, low = _extremes(row[tile * width : min((tile + 1) * width, row.size)])
        top[tile] = max(top[tile], high)
        bottom[tile] = max(bottom[tile], low)


@_compiled
def _to_bf16(value: np.float32) -> np.uint32:
    """Round a finite float32 to the nearest BF16, ties to even; the upper half of the result."""
    bits = _bits(value)
    return np.uint32(np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@_compiled
def _to_e4m3(magnitude: np.uint32) -> tuple[np.uint32, np.float32]:
    """Round float32 bits without sign to the nearest E4M3, ties to even: its code and its value. Saturates at 448.

    With `2**e` the power of two below a number, at least `2**-6`, codes are `2**(e - 3)` apart. That is the distance of
    float32 numbers from `2**(e + 20)` on, so adding this and taking it away again rounds. The sum's last bits count the
    steps k, and the code is `8 * (e + 6) + k`: the lift carries what brings `8 * (e + 127)` to that, modulo 256.
    """
    bounded = min(magnitude, _E4M3_MAX)
    exponent = max(np.uint32(bounded & _EXPONENT), _E4M3_NORMAL)
    lift = _float(np.uint32(exponent + _E4M3_LIFT))
    lifted = _float(bounded) + lift
    return np.uint32(_bits(lifted) + (exponent >> np.uint32(20))), lifted - lift


@_compiled
def _to_e2m1(magnitude: np.uint32) -> tuple[np.uint32, np.float32]:
    """Round float32 bits without sign to the nearest E2M1, ties to even: its code and its value. Saturates at 6.

    As `_to_e4m3`: codes are `2**(e - 1)` apart, e at least 0, and a code is `2 * e + k`.
    """
    bounded = min(magnitude, _E2M1_MAX)
    exponent = max(np.uint32(bounded & _EXPONENT), _E2M1_NORMAL)
    lift = _float(np.uint32(exponent + _E2M1_LIFT))
    lifted = _float(bounded) + lift
    return np.uint32(_bits(lifted) + (exponent >> np.uint32(22))), lifted - lift


@_compiled
def _clamp(quotient: np.float32, low: np.float32, high: np.float32) -> np.float32:
    raised = max(low, quotient)
    return min(high, raised)


@_compiled
def _stored_scale(exact: np.float32, kind: int) -> np.float32:
    """Round a scale to the stored dtype."""
    return _float(np.uint32(_to_bf16(exact) << np.uint32(16))) if kind == TO_BF16 else exact


@_compiled
def _choose_plain(amax: Floats, rule: Rule, stored: Words, steps: Floats) -> None:
    """Compute `scale = amax / code_max`, rounded once, and eps instead of 0."""
    eps = _BF16_EPS if rule.kind == TO_BF16 else _F32_EPS
    for tile in range(amax.size):
        scale = _stored_scale(amax[tile] / rule.code_max, rule.kind)
        steps[tile] = scale if scale != np.float32(0) else eps
    _store_scales(steps, rule.kind, stored)


@_compiled
def _store_scales(steps: Floats, kind: int, stored: Words) -> None:
    shift = np.uint32(16 if kind == TO_BF16 else 0)
    for tile in range(steps.size):
        stored[tile] = np.uint32(_bits(steps[tile]) >> shift)


@_compiled
def _choose_shifted(tiles: Tiles, rule: Rule, codec: Codec, stored: Words) -> None:
    """Compute `scale = (high - low) / (2**bits - 1)` and `zero_point = first - low / scale`, scale not yet rounded."""
    eps = _BF16_EPS if rule.kind == TO_BF16 else _F32_EPS
    half = np.float32(0.5)
    for tile in range(tiles.low.size):
        low, high = tiles.low[tile], tiles.high[tile]
        span = high - low
        exact = span / (rule.code_max + rule.code_max)
        if span == np.float32(np.inf):
            exact = (high * half - low * half) / rule.code_max
        scale = _stored_scale(exact, rule.kind)
        zero_point = _clamp(codec.low - low / exact, codec.low, codec.high) + _WHOLE - _WHOLE
        vanishes = scale == np.float32(0)
        tiles.offsets[tile] = np.float32(0) if vanishes else zero_point
        tiles.steps[tile] = eps if vanishes else scale
    _store_scales(tiles.steps, rule.kind, stored)


@_compiled
def _choose_mx(amax: Floats, rule: Rule, stored: Octets, steps: Floats) -> None:
    """Choose shared exponents `e(amax) - mx_offset`, saturating, one more from mantissa 1.75 on."""
    for tile in range(amax.size):
        exponent = min(np.uint32(np.uint32(_bits(amax[tile]) + np.uint32(1 << 21)) >> np.uint32(23)), np.uint32(254))
        shared = np.uint32(max(exponent, rule.mx_offset) - rule.mx_offset)
        stored[tile] = np.uint8(shared)
        bits = np.uint32(1 << 22) if shared == np.uint32(0) else np.uint32(shared << np.uint32(23))
        steps[tile] = _float(bits)


@_compiled
def _choose_nvfp4(amax: Floats, rule: Rule, stored: Octets, steps: Floats) -> None:
    """Compute local scales `e4m3(global_scale * (amax / 6))`, and 0.125 (code 0x20) instead of 0."""
    for tile in range(amax.size):
        code, local = _to_e4m3(_bits(rule.shared * (amax[tile] / rule.code_max)))
        vanishes = local == np.float32(0)
        stored[tile] = np.uint8(np.uint32(0x20) if vanishes else code)
        steps[tile] = (_NVFP4_EPS if vanishes else local) / rule.shared


@_spliced
def _fill_by(per_tile: Floats, width: int, out: Floats) -> None:
    """Repeat each number `width` times; a constant `width` unrolls the inner loop."""
    tiles = out.reshape(out.size // width, width)
    for tile in range(len(tiles)):
        value = per_tile[tile]
        for j in range(width):
            tiles[tile, j] = value


@_compiled
def _spread(per_tile: Floats, begin: int, width: int, out: Floats) -> None:
    """Give each column from `begin` on the number of its tile."""
    if begin % width or out.size % width:
        place, tile = 0, begin // width
        while place < out.size:
            end = min(out.size, (tile + 1) * width - begin)
            out[place:end] = per_tile[tile]
            place, tile = end, tile + 1
        return
    mine = per_tile[begin // width :]
    if width == 16:
        _fill_by(mine, 16, out)
    elif width == 32:
        _fill_by(mine, 32, out)
    else:
        _fill_by(mine, width, out)


@_reordered
def _sum_of_squares(values: Floats) -> float:
    total = 0.0
    for j in range(values.size):
        wide = np.float64(values[j])
        total += wide * wide
    return total


@_compiled
def _round_float8(values: Floats, steps: Floats, codes: Octets, errors: Floats) -> Marks:
    """Make E4M3 codes of `values / steps`, and the errors they leave."""
    worst, furthest, blank, dead = np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0)
    for j in range(values.size):
        value, step = values[j], steps[j]
        bits = _bits(value / step)
        magnitude, sign = np.uint32(bits & _MAGNITUDE), np.uint32(bits & _SIGN)
        code, left = _to_e4m3(magnitude)
        codes[j] = np.uint8(code | (sign >> np.uint32(24)))
        dequantized = _float(np.uint32(_bits(left) | sign)) * step
        errors[j] = value - dequantized
        worst = max(worst, np.uint32(_bits(value - dequantized) & _MAGNITUDE))
        furthest = max(furthest, magnitude)
        blank = np.uint32(blank + np.uint32(value == np.float32(0)))
        dead = np.uint32(dead + np.uint32(dequantized == np.float32(0)))
    return Marks(worst, _float(furthest), blank, dead)


@_compiled
def _round_float4(values: Floats, steps: Floats, codes: Octets, errors: Floats) -> Marks:
    """Make E2M1 codes, the sign in bit 3 that of a quotient below 0; otherwise as `_round_float8`."""
    worst, furthest, blank, dead = np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0)
    for j in range(values.size):
        value, step = values[j], steps[j]
        quotient = value / step
        bits = _bits(quotient)
        magnitude, sign = np.uint32(bits & _MAGNITUDE), np.uint32(bits & _SIGN)
        code, left = _to_e2m1(magnitude)
        codes[j] = np.uint8(code | (np.uint32(8) if quotient < np.float32(0) else np.uint32(0)))
        dequantized = _float(np.uint32(_bits(left) | sign)) * step
        errors[j] = value - dequantized
        worst = max(worst, np.uint32(_bits(value - dequantized) & _MAGNITUDE))
        furthest = max(furthest, magnitude)
        blank = np.uint32(blank + np.uint32(value == np.float32(0)))
        dead = np.uint32(dead + np.uint32(dequantized == np.float32(0)))
    return Marks(worst, _float(furthest), blank, dead)


@_compiled
def _round_integers(values: Floats, steps: Floats, codec: Codec, codes: Octets, errors: Floats) -> Marks:
    """Make integer codes, `codec.bias` added; otherwise as `_round_float8`."""
    worst, furthest, blank, dead = np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0)
    bias = np.uint32(codec.bias - _WHOLE_BITS)
    for j in range(values.size):
        value, step = values[j], steps[j]
        quotient = value / step
        bounded = _clamp(quotient, codec.low, codec.high)
        lifted = bounded + _WHOLE
        codes[j] = np.uint8(np.uint32(_bits(lifted) + bias))
        dequantized = (lifted - _WHOLE) * step
        errors[j] = value - dequantized
        worst = max(worst, np.uint32(_bits(value - dequantized) & _MAGNITUDE))
        furthest = max(furthest, np.uint32(_bits(quotient - bounded) & _MAGNITUDE))
        blank = np.uint32(blank + np.uint32(value == np.float32(0)))
        dead = np.uint32(dead + np.uint32(dequantized == np.float32(0)))
    return Marks(worst, _float(furthest), blank, dead)


@_compiled
def _round_shifted(
    values: Floats, steps: Floats, offsets: Floats, codec: Codec, codes: Octets, errors: Floats
) -> Marks:
    """Make integer codes with zero points; otherwise as `_round_integers`."""
    worst, furthest, blank, dead = np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0)
    bias = np.uint32(codec.bias - _WHOLE_BITS)
    for j in range(values.size):
        value, step, offset = values[j], steps[j], offsets[j]
        quotient = value / step + offset
        bounded = _clamp(quotient, codec.low, codec.high)
        lifted = bounded + _WHOLE
        codes[j] = np.uint8(np.uint32(_bits(lifted) + bias))
        dequantized = (lifted - _WHOLE - offset) * step
        errors[j] = value - dequantized
        worst = max(worst, np.uint32(_bits(value - dequantized) & _MAGNITUDE))
        furthest = max(furthest, np.uint32(_bits(quotient - bounded) & _MAGNITUDE))
        blank = np.uint32(blank + np.uint32(value == np.float32(0)))
        dead = np.uint32(dead + np.uint32(dequantized == np.float32(0)))
    return Marks(worst, _float(furthest), blank, dead)


@_spliced
def _round_chunk(work: Work, count: int, codec: Codec, codes: Octets) -> Marks:
    values, steps, errors = work.values[:count], work.steps[:count], work.errors[:count]
    if codec.kind == FLOAT8:
        return _round_float8(values, steps, codes, errors)
    if codec.kind == FLOAT4:
        return _round_float4(values, steps, codes, errors)
    if codec.kind == INTEGER:
        return _round_integers(values, steps, codec, codes, errors)
    return _round_shifted(values, steps, work.offsets[:count], codec, codes, errors)


@_compiled
def _count_clipped(work: Work, count: int, codec: Codec) -> int:
    """Count quotients beyond the bounds; only for the rare chunk that is known to have some."""
    clipped = 0
    for j in range(count):
        quotient = work.values[j] / work.steps[j]
        if codec.kind == SHIFTED:
            quotient += work.offsets[j]
        clipped += (quotient < codec.clip_low) | (quotient > codec.clip_high)
    return clipped


@_compiled
def _gather_pairs(eight: np.uint64, bits: np.uint64) -> np.uint64:
    """Close the gaps between eight codes of `bits` bits, one in each byte."""
    twos = (eight & np.uint64(0x00FF00FF00FF00FF)) | (((eight >> np.uint64(8)) & np.uint64(0x00FF00FF00FF00FF)) << bits)
    wide = bits + bits
    fours = (twos & np.uint64(0x0000FFFF0000FFFF)) | (((twos >> np.uint64(16)) & np.uint64(0x0000FFFF0000FFFF)) << wide)
    return (fours & np.uint64(0xFFFFFFFF)) | ((fours >> np.uint64(32)) << (wide + wide))


@_compiled
def _pack(codes: Octets, bits: int, out: Octets) -> None:
    """Write codes, one per byte and a multiple of eight of them, as a dense little-endian bit stream."""
    eights = codes.view(np.uint64)
    if bits == 4:
        words = out.view(np.uint32)
        for j in range(eights.size):
            words[j] = np.uint32(_gather_pairs(eights[j], np.uint64(4)))
        return
    if bits == 2:
        shorts = out[: out.size // 2 * 2].view(np.uint16)
        for j in range(min(eights.size, shorts.size)):
            shorts[j] = np.uint16(_gather_pairs(eights[j], np.uint64(2)))
        return
    place = 0
    for j in range(eights.size):
        packed = _gather_pairs(eights[j], np.uint64(bits))
        for _ in range(min(bits, out.size - place)):
            out[place] = np.uint8(packed & np.uint64(255))
            packed >>= np.uint64(8)
            place += 1


@_spliced
def _encode_chunk(work: Work, count: int, codec: Codec, out: Octets) -> Marks:
    """Write the codes of the chunk in hand to the bytes of its row from its first one on."""
    if codec.bits == 8:
        return _round_chunk(work, count, codec, out[:count])
    marks = _round_chunk(work, count, codec, work.codes[:count])
    padded = (count + 7) // 8 * 8
    work.codes[count:padded] = 0
    _pack(work.codes[:padded], codec.bits, out[: padded // 8 * codec.bits])
    return marks


@_spliced
def _choose(tiles: Tiles, rule: Rule, codec: Codec, out: Outputs, first: int) -> None:
    """Choose the scales of one band of tiles and store them from tile `first` on."""
    count = tiles.high.size
    if codec.kind == SHIFTED:
        _choose_shifted(tiles, rule, codec, out.scales[first : first + count])
        for tile in range(count):
            out.zero_points[first + tile] = np.int8(tiles.offsets[tile])
    elif rule.kind == TO_MX:
        _choose_mx(tiles.high, rule, out.exponents[first : first + count], tiles.steps)
    elif rule.kind == TO_NVFP4:
        _choose_nvfp4(tiles.high, rule, out.exponents[first : first + count], tiles.steps)
    else:
        _choose_plain(tiles.high, rule, out.scales[first : first + count], tiles.steps)


@_spliced
def _read_band(raw: Raw, tiling: Tiling, is_shifted: bool, scratch: Raw, tiles: Tiles) -> None:  # noqa: FBT001
    """Find the extremes of one band of tiles, `raw` being its rows."""
    tiles.top[:] = np.uint32(0)
    tiles.bottom[:] = np.uint32(0)
    for begin in range(0, raw.size, tiling.cols):
        row = raw[begin : begin + tiling.cols]
        if is_shifted:
            _raise_extremes(row, tiling.width, tiles.top, tiles.bottom)
        else:
            _raise_tops(row, tiling.width, scratch, tiles.top)


@_compiled
def _largest_of(bits: Words) -> np.uint32:
    largest = np.uint32(0)
    for j in range(bits.size):
        largest = max(largest, bits[j])
    return largest


@_spliced
def _widen_extremes(raw: Raw, tiling: Tiling, rule: Rule, is_shifted: bool, tiles: Tiles) -> None:  # noqa: FBT001
    """Convert the extremes of a band to float32, or take the given ones."""
    if rule.is_fixed:
        tiles.high[:] = rule.high
        tiles.low[:] = rule.low
        return
    _widen_all(tiles.top, raw.itemsize, tiling.is_half, tiles.high)
    if is_shifted:
        _widen_all(tiles.bottom, raw.itemsize, tiling.is_half, tiles.low)
        for tile in range(tiles.low.size):
            tiles.low[tile] = -tiles.low[tile]


@_spliced
def _encode_row(row: Raw, ahead: Raw, tiling: Tiling, codec: Codec, tiles: Tiles, work: Work, out: Octets) -> Found:
    """Encode a row whose tiles have their steps; `ahead` will be read by the next band."""
    error, weight, worst, clipped, zeroed, nonzero = 0.0, 0.0, np.uint32(0), 0, 0, 0
    for begin in range(0, row.size, CHUNK):
        count = min(CHUNK, row.size - begin)
        _fetch_ahead(ahead[begin : begin + count])
        _widen(row[begin : begin + count], tiling.is_half, work.values)
        if begin == 0 or tiling.width < row.size:  # a single tile spreads over the first chunk and stays
            _spread(tiles.steps, begin, tiling.width, work.steps[:count])
            if codec.kind == SHIFTED:
                _spread(tiles.offsets, begin, tiling.width, work.offsets[:count])
        marks = _encode_chunk(work, count, codec, out[begin * codec.bits // 8 :])
        error += _sum_of_squares(work.errors[:count])
        weight += _sum_of_squares(work.values[:count])
        worst = max(worst, marks.worst)
        if marks.furthest > codec.margin:
            clipped += _count_clipped(work, count, codec)
        zeroed += int(marks.dead) - int(marks.blank)
        nonzero += count - int(marks.blank)
    out[-(-row.size * codec.bits // 8) :] = np.uint8(0)
    return Found(error, weight, np.uint32(0), worst, clipped, zeroed, nonzero)


@_spliced
def _merge(one: Found, other: Found) -> Found:
    return Found(
        one.squared_error + other.squared_error,
        one.squared_weight + other.squared_weight,
        max(one.largest, other.largest),
        max(one.worst, other.worst),
        one.clipped + other.clipped,
        one.zeroed + other.zeroed,
        one.nonzero + other.nonzero,
    )


@_compiled
def encode(raw: Raw, tiling: Tiling, codec: Codec, rule: Rule, tiles: Tiles, work: Work, out: Outputs) -> Found:
    """Quantize a row block."""
    count = tiles.top.size
    found = Found(0.0, 0.0, np.uint32(0), np.uint32(0), 0, 0, 0)
    stride = out.codes.size // tiling.rows
    for first in range(0, tiling.rows, tiling.height):
        last = min(first + tiling.height, tiling.rows)
        _read_band(raw[first * tiling.cols : last * tiling.cols], tiling, codec.kind == SHIFTED, work.scratch, tiles)
        _widen_extremes(raw, tiling, rule, codec.kind == SHIFTED, tiles)
        largest = max(_largest_of(tiles.top), _largest_of(tiles.bottom))
        found = _merge(found, Found(0.0, 0.0, largest, np.uint32(0), 0, 0, 0))
        _choose(tiles, rule, codec, out, first // tiling.height * count)
        for row in range(first, last):
            bits = raw[row * tiling.cols : (row + 1) * tiling.cols]
            ahead = raw[(row + tiling.height) * tiling.cols : (row + tiling.height + 1) * tiling.cols]
            codes = out.codes[row * stride : (row + 1) * stride]
            found = _merge(found, _encode_row(bits, ahead, tiling, codec, tiles, work, codes))
    return found


@_compiled
def pack_rows(zero_points: npt.NDArray[np.int8], bits: int, out: Words) -> None:
    """Pack zero points [R, C] along the rows into words [ceil(R * bits / 32), C], which are 0 so far."""
    for row in range(len(zero_points)):
        word, shift = row * bits // 32, np.uint32(row * bits % 32)
        for col in range(zero_points.shape[1]):
            code = np.uint32(zero_points[row, col] + (1 << (bits - 1)))
            out[word, col] |= np.uint32(code << shift)
            if shift + bits > 32:
                out[word + 1, col] |= np.uint32(code >> (np.uint32(32) - shift))


def new_tiles(count: int) -> Tiles:
    """Make room for a band of `count` tiles."""
    (top, bottom), (high, low, steps, offsets) = np.empty((2, count), np.uint32), np.empty((4, count), np.float32)
    return Tiles(top, bottom, high, low, steps, offsets)


def new_work(row: Raw) -> Work:
    """Make room for chunks of rows like `row`."""
    values, steps, offsets, errors = np.empty((4, CHUNK), np.float32)
    return Work(values, steps, offsets, errors, np.empty(CHUNK, np.uint8), np.empty(row.size, row.dtype))
