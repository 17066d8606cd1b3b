"""The loops of `kernels.cpu`, compiled by numba the first time each is called and then kept on disk.

Imported only when a kernel runs, because numba takes a good part of a second. Nothing here knows a scheme:
`kernels.cpu` translates one into the tuples below.

A row block lies in memory as raw bits, uint16 for BF16 and F16 and uint32 for F32, and is read twice: once for the
extremes of a band of tiles, once for its codes. The second time `COUNT` elements at a time become float32, codes and
statistics without leaving the registers: see `kernels.vectors`. The other loops are short, without branches, and keep
to operands of one width, so that the compiler makes vectors of them.

Promise: every operation on float32 is the one of `kernels.reference`, in its order and rounded by itself. Only the
float64 sums of squares may be taken in another order; the squares in them are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, TypeVar

import numba
import numpy as np
import numpy.typing as npt

from shardmill.kernels import vectors
from shardmill.kernels.vectors import COUNT, Vector

Raw = npt.NDArray[Any]
"""Bits of the source, one element each: uint16 or uint32, one dimension."""
Floats = npt.NDArray[np.float32]
Octets = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]
_Function = TypeVar("_Function", bound=Callable[..., Any])

PAIRS: Final = 2 * COUNT
SLACK: Final = 8
"""Bytes that may be overwritten behind the codes of a row."""

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
    is_given: bool
    """Whether the scales stand in `Outputs` already, because `compiled_search` has chosen them."""


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
    """Buffers for one band of tiles and one row."""

    steps: Floats
    """`COUNT` for each tile, all the same; for each column where tiles are no multiple of `COUNT` wide."""
    offsets: Floats
    """As `steps`."""
    pairs: Words
    """Half a row, and as much again as is read in vain."""
    tail: Raw
    """What is left of a row behind the last whole vector, then zeros; `COUNT`."""
    tail_codes: Octets
    ring: Floats
    """Errors and values of a vector and of the next one, in turns."""


class Source(NamedTuple):
    """How a row is read."""

    is_half: bool
    each: int
    """Vectors that share a step."""
    may_clip: bool


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


def compiled(function: _Function) -> _Function:
    """Compile on the first call, without the interpreter's lock, with IEEE arithmetic as it is written."""
    result: _Function = numba.njit(**_OPTIONS)(function)
    _load_as_it_is(getattr(result, "_cache", None))
    return result


def _load_as_it_is(cache: Any) -> None:
    """Load what was compiled before without the registries that only compiling needs, and which it reads by itself.

    numba reads all of them before the first look into its cache, which is most of what a first call costs.
    """
    if hasattr(cache, "_load_overload") and hasattr(cache, "_guard_against_spurious_io_errors"):

        def load(signature: Any, target: Any) -> Any:
            with cache._guard_against_spurious_io_errors():  # noqa: SLF001 - there is no other way
                return cache._load_overload(signature, target)  # noqa: SLF001 - the same

        cache.load_overload = load


def spliced(function: _Function) -> _Function:
    """As `compiled`, but as a part of its caller: every level of calls costs seconds of compilation."""
    result: _Function = numba.njit(**_OPTIONS, inline="always")(function)
    return result


@compiled
def _bits(value: np.float32) -> np.uint32:
    return np.float32(value).view(np.uint32)


@compiled
def _float(bits: np.uint32) -> np.float32:
    return np.uint32(bits).view(np.float32)


@compiled
def _widen_half(bits: np.uint32) -> np.float32:
    """Return the value of a finite F16: `2**(e - 15) * 1.m`, or `2**-14 * 0.m` where e is 0."""
    magnitude = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
    normal = np.uint32(magnitude + np.uint32(112 << 23))
    subnormal = _bits(_float(np.uint32(magnitude + np.uint32(113 << 23))) - np.float32(2.0**-14))
    chosen = subnormal if magnitude < np.uint32(1 << 23) else normal
    return _float(np.uint32(chosen | np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))))


@compiled
def widen(raw: Raw, is_half: bool, values: Floats) -> None:  # noqa: FBT001 - as above
    """Convert elements to float32."""
    if is_half:
        for j in range(raw.size):
            values[j] = _widen_half(np.uint32(raw[j]))
        return
    shift = np.uint32(32 - 8 * raw.itemsize)
    for j in range(raw.size):
        values[j] = _float(np.uint32(np.uint32(raw[j]) << shift))


@compiled
def _widen_all(bits: Words, itemsize: int, is_half: bool, values: Floats) -> None:  # noqa: FBT001 - as above
    """Convert raw bits of elements of `itemsize` bytes, held one to a word, to float32."""
    if is_half:
        for j in range(bits.size):
            values[j] = _widen_half(bits[j])
        return
    shift = np.uint32(32 - 8 * itemsize)
    for j in range(bits.size):
        values[j] = _float(np.uint32(bits[j] << shift))


@compiled
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


@spliced
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


@spliced
def _pair(row: Raw, j: int) -> Vector:
    """The larger raw magnitudes of each pair of `2 * COUNT` elements from `j` on."""
    if row.itemsize == 2:
        both = vectors.twos(vectors.load(row, j, PAIRS) & _HALF_MAGNITUDE)
        return vectors.words(vectors.larger(both & np.uint32(0xFFFF), both >> np.uint32(16)))
    low, high = vectors.load(row, j, COUNT) & _MAGNITUDE, vectors.load(row, j + COUNT, COUNT) & _MAGNITUDE
    return vectors.words(vectors.larger(vectors.evens(low, high), vectors.odds(low, high)))


@compiled
def _raise_by_halving(row: Raw, pairs: Words, top: Words) -> None:
    """As `_raise_by`, for tiles shorter than a few vectors: all of them shrink at once. The width is a power of two."""
    whole = row.size // (2 * COUNT) * (2 * COUNT)
    for j in range(0, whole, 2 * COUNT):
        vectors.store(pairs, j // 2, _pair(row, j))
    for j in range(whole, row.size, 2):
        pairs[j // 2] = _largest_magnitude(row[j : j + 2])
    size = row.size // 2
    while size > top.size:
        size //= 2
        for j in range(0, size, COUNT):
            low, high = vectors.load(pairs, 2 * j, COUNT), vectors.load(pairs, 2 * j + COUNT, COUNT)
            vectors.store(pairs, j, vectors.larger(vectors.evens(low, high), vectors.odds(low, high)))
    for tile in range(top.size):
        top[tile] = max(top[tile], pairs[tile])


@compiled
def _raise_tops(row: Raw, width: int, pairs: Words, top: Words) -> None:
    """Raise `top` to the largest raw magnitude of each tile of a row."""
    whole = row.size // width * width
    if width in (16, 32) and whole == row.size:
        _raise_by_halving(row, pairs, top)
    elif width == 128:
        _raise_by(row[:whole], 128, top)
    else:
        _raise_by(row[:whole], width, top)
    if whole < row.size:
        top[whole // width] = max(top[whole // width], _largest_magnitude(row[whole:]))


@compiled
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


@compiled
def measure(raw: Raw) -> tuple[int, int]:
    """Raw bits of the largest number, at least 0, and of the magnitude of the smallest, at most 0."""
    high, low = _extremes(raw)
    return int(high), int(low)


@compiled
def _raise_extremes(row: Raw, width: int, top: Words, bottom: Words) -> None:
    """Raise `top` and `bottom` to the extremes of each tile of a row, as `_extremes` gives them."""
    for tile in range(top.size):
        high, low = _extremes(row[tile * width : min((tile + 1) * width, row.size)])
        top[tile] = max(top[tile], high)
        bottom[tile] = max(bottom[tile], low)


@compiled
def _to_bf16(value: np.float32) -> np.uint32:
    """Round a finite float32 to the nearest BF16, ties to even; the upper half of the result."""
    bits = _bits(value)
    return np.uint32(np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@compiled
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


@compiled
def _clamp(quotient: np.float32, low: np.float32, high: np.float32) -> np.float32:
    raised = max(low, quotient)
    return min(high, raised)


@compiled
def _stored_scale(exact: np.float32, kind: int) -> np.float32:
    """Round a scale to the stored dtype."""
    return _float(np.uint32(_to_bf16(exact) << np.uint32(16))) if kind == TO_BF16 else exact


@compiled
def _choose_plain(amax: Floats, rule: Rule, stored: Words, steps: Floats) -> None:
    """Compute `scale = amax / code_max`, rounded once, and eps instead of 0."""
    eps = _BF16_EPS if rule.kind == TO_BF16 else _F32_EPS
    for tile in range(amax.size):
        scale = _stored_scale(amax[tile] / rule.code_max, rule.kind)
        steps[tile] = scale if scale != np.float32(0) else eps
    _store_scales(steps, rule.kind, stored)


@compiled
def _store_scales(steps: Floats, kind: int, stored: Words) -> None:
    shift = np.uint32(16 if kind == TO_BF16 else 0)
    for tile in range(steps.size):
        stored[tile] = np.uint32(_bits(steps[tile]) >> shift)


@compiled
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


@compiled
def _choose_mx(amax: Floats, rule: Rule, stored: Octets, steps: Floats) -> None:
    """Choose shared exponents `e(amax) - mx_offset`, saturating, one more from mantissa 1.75 on."""
    for tile in range(amax.size):
        exponent = min(np.uint32(np.uint32(_bits(amax[tile]) + np.uint32(1 << 21)) >> np.uint32(23)), np.uint32(254))
        shared = np.uint32(max(exponent, rule.mx_offset) - rule.mx_offset)
        stored[tile] = np.uint8(shared)
        bits = np.uint32(1 << 22) if shared == np.uint32(0) else np.uint32(shared << np.uint32(23))
        steps[tile] = _float(bits)


@compiled
def _choose_nvfp4(amax: Floats, rule: Rule, stored: Octets, steps: Floats) -> None:
    """Compute local scales `e4m3(global_scale * (amax / 6))`, and 0.125 (code 0x20) instead of 0."""
    for tile in range(amax.size):
        code, local = _to_e4m3(_bits(rule.shared * (amax[tile] / rule.code_max)))
        vanishes = local == np.float32(0)
        stored[tile] = np.uint8(np.uint32(0x20) if vanishes else code)
        steps[tile] = (_NVFP4_EPS if vanishes else local) / rule.shared


def vectors_per_step(width: int, cols: int) -> int:
    """How many vectors share one entry of `Work.steps`."""
    if width >= cols:
        return max(1, -(-cols // COUNT))
    return width // COUNT if width % COUNT == 0 else 1


_vectors_per_step = compiled(vectors_per_step)


@compiled
def _spread(per_tile: Floats, width: int, cols: int, out: Floats) -> None:
    """Give each tile, or each column, its number: see `Work.steps`."""
    if width % COUNT == 0 or width >= cols:
        for tile in range(per_tile.size):
            vectors.store(out, tile * COUNT, vectors.splat(per_tile[tile], COUNT))
        return
    for tile in range(per_tile.size):
        out[tile * width : (tile + 1) * width] = per_tile[tile]
    out[per_tile.size * width :] = per_tile[per_tile.size - 1]


@spliced
def _widen_lanes(raw: Vector, itemsize: int, is_half: bool) -> Vector:  # noqa: FBT001 - numba takes positions
    """Convert raw bits to float32."""
    if itemsize == 4:
        return vectors.floats(vectors.words(raw))
    if not is_half:
        return vectors.floats(vectors.words(raw) << 16)
    wide = vectors.words(raw)
    magnitude = (wide & np.uint32(0x7FFF)) << 13
    normal = magnitude + np.uint32(112 << 23)
    subnormal = vectors.bits(vectors.floats(magnitude + np.uint32(113 << 23)) - np.float32(2.0**-14))
    chosen = vectors.select(magnitude < np.uint32(1 << 23), subnormal, normal)
    return vectors.floats(chosen | (wide & np.uint32(0x8000)) << 16)


@spliced
def _lift_lanes(
    magnitude: Vector, highest: np.uint32, normal: np.uint32, lift: np.uint32, shift: int
) -> tuple[Vector, Vector]:
    """As `_to_e4m3`, for floats whose largest number, smallest normal one and lift have these bits.

    Codes of E2M1 are `2**(e - 1)` apart, e at least 0, and a code is `2 * e + k`; its upper bits are not 0 yet.
    """
    bounded = vectors.smaller(magnitude, vectors.splat(highest, COUNT))
    exponent = vectors.larger(bounded & _EXPONENT, vectors.splat(normal, COUNT))
    lifting = vectors.floats(exponent + lift)
    lifted = vectors.floats(bounded) + lifting
    return vectors.bits(lifted) + (exponent >> shift), lifted - lifting


@spliced
def lift_float8(magnitude: Vector) -> tuple[Vector, Vector]:
    """E4M3 codes of float32 bits without sign, and what they stand for."""
    return _lift_lanes(magnitude, _E4M3_MAX, _E4M3_NORMAL, _E4M3_LIFT, 20)


@spliced
def lift_float4(magnitude: Vector) -> tuple[Vector, Vector]:
    """As `lift_float8`, E2M1; only the low three bits of a code count."""
    return _lift_lanes(magnitude, _E2M1_MAX, _E2M1_NORMAL, _E2M1_LIFT, 22)


@spliced
def _round_float8(value: Vector, magnitude: Vector, step: Vector) -> tuple[Vector, Vector]:
    """E4M3 codes of `value / step`, and the magnitudes of what they stand for."""
    code, left = lift_float8(vectors.bits(magnitude / step))
    return code | vectors.bits(value) >> 24 & np.uint32(128), left


@spliced
def _round_float4(quotient: Vector) -> tuple[Vector, Vector]:
    """As `round_float8`, E2M1; the sign in bit 3 is that of a quotient below 0."""
    code, left = lift_float4(vectors.bits(quotient) & _MAGNITUDE)
    code = code & np.uint32(7)
    return vectors.select(quotient < np.float32(0), code | np.uint32(8), code), left


@spliced
def round_integers(quotient: Vector, codec: Codec) -> tuple[Vector, Vector]:
    """Integer codes with `codec.bias` added, and what they stand for."""
    bounded = vectors.smaller(
        vectors.larger(quotient, vectors.splat(codec.low, COUNT)), vectors.splat(codec.high, COUNT)
    )
    lifted = bounded + _WHOLE
    return vectors.bits(lifted) + np.uint32(codec.bias - _WHOLE_BITS), lifted - _WHOLE


@spliced
def _join(codes: Vector, width: int) -> Vector:
    """Put the `width` low bits of each two lanes side by side."""
    both = vectors.twos(codes)
    return vectors.lows(both | both >> (32 - width))


@spliced
def _store_codes(codes: Vector, width: int, out: Octets, place: int) -> None:
    """Write the `width` low bits of `COUNT` codes as a dense little-endian bit stream, and up to `SLACK` bytes more."""
    if width == 8:
        vectors.store(out, place, vectors.octets(codes))
    elif width == 4:
        vectors.store(out, place, vectors.octets(_join(codes, 4)))
    elif width == 2:
        vectors.store(out, place, vectors.octets(_join(_join(codes, 2), 4)))
    else:
        eight = vectors.twos(_join(_join(codes, width), 2 * width))
        eight = eight & np.uint64(0xFFFFFFFF) | eight >> 32 << 4 * width
        vectors.store(out, place, vectors.lane(eight, 0))
        vectors.store(out, place + width, vectors.lane(eight, 1))


@spliced
def _add_squares(totals: Vector, ring: Floats, slot: int) -> Vector:
    return vectors.add_squares(totals, vectors.load(ring, slot, COUNT))


@spliced
def _encode_as(
    kind: int, raw: Raw, ahead: Raw, source: Source, entry: int, codec: Codec, work: Work, out: Octets
) -> Found:
    """Encode whole vectors of a row; each `source.each` of them share an entry of `work.steps`, the first `entry`.

    Numbers to be squared go through memory and are added one vector later: a processor widens what it reads with
    fewer instructions than what it holds. Errors of floats are taken between magnitudes, since a code keeps the sign.
    """
    errors, weights, width = vectors.splat(0.0, COUNT), vectors.splat(0.0, COUNT), codec.bits
    worst = vectors.splat(np.uint32(0), COUNT)
    nonzero, alive, slot, ring = 0, 0, 0, work.ring
    ring[:] = np.float32(0)
    place, more = entry * COUNT, source.each
    for j in range(0, raw.size, COUNT):
        step, offset = vectors.load(work.steps, place, COUNT), vectors.load(work.offsets, place, COUNT)
        place += COUNT if more == 1 else 0
        more = source.each if more == 1 else more - 1
        vectors.fetch(ahead, j)
        value = _widen_lanes(vectors.load(raw, j, COUNT), raw.itemsize, source.is_half)
        sized = value
        if kind == FLOAT8:
            width, sized = 8, vectors.floats(vectors.bits(value) & _MAGNITUDE)
            code, left = _round_float8(value, sized, step)
        elif kind == FLOAT4:
            width, sized = 4, vectors.floats(vectors.bits(value) & _MAGNITUDE)
            code, left = _round_float4(value / step)
        elif kind == INTEGER:
            code, left = round_integers(value / step, codec)
        else:
            code, left = round_integers(value / step + offset, codec)
            left = left - offset
        _store_codes(code, width, out, j // 8 * width)
        dequantized = left * step
        lost = sized - dequantized
        vectors.store(ring, slot, lost)
        vectors.store(ring, slot + COUNT, sized)
        slot = 2 * COUNT - slot
        errors = _add_squares(errors, ring, slot)
        weights = _add_squares(weights, ring, slot + COUNT)
        worst = vectors.larger(worst, vectors.bits(lost) & _MAGNITUDE)
        nonzero += COUNT - vectors.count(value == np.float32(0))
        alive += COUNT - vectors.count(dequantized == np.float32(0))
    error = vectors.total(_add_squares(errors, ring, 2 * COUNT - slot))
    weight = vectors.total(_add_squares(weights, ring, 3 * COUNT - slot))
    return Found(error, weight, np.uint32(0), vectors.largest(worst), 0, nonzero - alive, nonzero)


@compiled
def _encode_vectors(raw: Raw, ahead: Raw, source: Source, entry: int, codec: Codec, work: Work, out: Octets) -> Found:
    """Give each kind of codes a loop of its own, without branches."""
    if codec.kind == FLOAT8:
        return _encode_as(FLOAT8, raw, ahead, source, entry, codec, work, out)
    if codec.kind == FLOAT4:
        return _encode_as(FLOAT4, raw, ahead, source, entry, codec, work, out)
    if codec.kind == INTEGER:
        return _encode_as(INTEGER, raw, ahead, source, entry, codec, work, out)
    return _encode_as(SHIFTED, raw, ahead, source, entry, codec, work, out)


@compiled
def _count_clipped(raw: Raw, source: Source, entry: int, codec: Codec, work: Work) -> int:
    """Count quotients beyond the bounds; only for the rare band that may have some."""
    clipped = 0
    place, more = entry * COUNT, source.each
    for j in range(0, raw.size, COUNT):
        step, offset = vectors.load(work.steps, place, COUNT), vectors.load(work.offsets, place, COUNT)
        place += COUNT if more == 1 else 0
        more = source.each if more == 1 else more - 1
        quotient = _widen_lanes(vectors.load(raw, j, COUNT), raw.itemsize, source.is_half) / step
        if codec.kind == SHIFTED:
            quotient = quotient + offset
        clipped += vectors.count(quotient < codec.clip_low) + vectors.count(quotient > codec.clip_high)
    return clipped


@compiled
def _may_clip(tiles: Tiles, codec: Codec) -> bool:
    """Whether the extremes of a tile lie beyond the bounds: rounding keeps quotients in order."""
    found = False
    for tile in range(tiles.high.size):
        high, low = tiles.high[tile] / tiles.steps[tile], -tiles.high[tile] / tiles.steps[tile]
        if codec.kind == SHIFTED:
            high, low = high + tiles.offsets[tile], tiles.low[tile] / tiles.steps[tile] + tiles.offsets[tile]
        found |= (high > codec.clip_high) | (low < codec.clip_low)
    return found


@compiled
def _take_given(tiles: Tiles, rule: Rule, codec: Codec, out: Outputs, first: int) -> None:
    """Read the scales of one band of tiles from where they are stored."""
    shift = np.uint32(16 if rule.kind == TO_BF16 else 0)
    for tile in range(tiles.steps.size):
        place = first + tile
        if rule.kind == TO_NVFP4:
            tiles.steps[tile] = _from_e4m3(np.uint32(out.exponents[place])) / rule.shared
        elif rule.kind == TO_MX:
            bits = np.uint32(out.exponents[place]) << np.uint32(23)
            tiles.steps[tile] = _float(np.uint32(1 << 22) if bits == np.uint32(0) else np.uint32(bits))
        else:
            tiles.steps[tile] = _float(np.uint32(out.scales[place] << shift))
        if codec.kind == SHIFTED:
            tiles.offsets[tile] = np.float32(out.zero_points[place])


@compiled
def _from_e4m3(code: np.uint32) -> np.float32:
    """Value of an E4M3 code without sign."""
    if code < np.uint32(8):
        return np.float32(code) * np.float32(2.0**-9)
    return _float(np.uint32(np.uint32(code << np.uint32(20)) + np.uint32(120 << 23)))


@spliced
def _choose(tiles: Tiles, rule: Rule, codec: Codec, out: Outputs, first: int) -> None:
    """Choose the scales of one band of tiles and store them from tile `first` on."""
    count = tiles.high.size
    if rule.is_given:
        _take_given(tiles, rule, codec, out, first)
    elif codec.kind == SHIFTED:
        _choose_shifted(tiles, rule, codec, out.scales[first : first + count])
        for tile in range(count):
            out.zero_points[first + tile] = np.int8(tiles.offsets[tile])
    elif rule.kind == TO_MX:
        _choose_mx(tiles.high, rule, out.exponents[first : first + count], tiles.steps)
    elif rule.kind == TO_NVFP4:
        _choose_nvfp4(tiles.high, rule, out.exponents[first : first + count], tiles.steps)
    else:
        _choose_plain(tiles.high, rule, out.scales[first : first + count], tiles.steps)


@spliced
def _read_band(raw: Raw, tiling: Tiling, is_shifted: bool, pairs: Words, tiles: Tiles) -> None:  # noqa: FBT001
    """Find the extremes of one band of tiles, `raw` being its rows."""
    tiles.top[:] = np.uint32(0)
    tiles.bottom[:] = np.uint32(0)
    for begin in range(0, raw.size, tiling.cols):
        row = raw[begin : begin + tiling.cols]
        if is_shifted:
            _raise_extremes(row, tiling.width, tiles.top, tiles.bottom)
        else:
            _raise_tops(row, tiling.width, pairs, tiles.top)


@compiled
def _largest_of(bits: Words) -> np.uint32:
    largest = np.uint32(0)
    for j in range(bits.size):
        largest = max(largest, bits[j])
    return largest


@compiled
def _widen_extremes(raw: Raw, tiling: Tiling, is_shifted: bool, tiles: Tiles) -> None:  # noqa: FBT001
    """Convert the extremes of a band to float32."""
    _widen_all(tiles.top, raw.itemsize, tiling.is_half, tiles.high)
    if is_shifted:
        _widen_all(tiles.bottom, raw.itemsize, tiling.is_half, tiles.low)
        for tile in range(tiles.low.size):
            tiles.low[tile] = -tiles.low[tile]


@spliced
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


@spliced
def _encode_part(raw: Raw, ahead: Raw, source: Source, entry: int, codec: Codec, work: Work, out: Octets) -> Found:
    found = _encode_vectors(raw, ahead, source, entry, codec, work, out)
    if not source.may_clip:
        return found
    clipped = _count_clipped(raw, source, entry, codec, work)
    return _merge(found, Found(0.0, 0.0, np.uint32(0), np.uint32(0), clipped, 0, 0))


@spliced
def _copy_bits(codes: Octets, size: int, out: Octets) -> None:
    """Copy the first `size` bits, and make the rest of `out` zeros."""
    whole, rest = size // 8, size % 8
    for j in range(whole):
        out[j] = codes[j]
    out[whole:] = np.uint8(0)
    if rest:
        out[whole] = np.uint8(codes[whole] & np.uint8((1 << rest) - 1))


@compiled
def _encode_row(row: Raw, ahead: Raw, source: Source, codec: Codec, work: Work, out: Octets, stride: int) -> Found:
    """Encode a row whose tiles have their steps into `stride` bytes; `ahead` will be read by the next band."""
    whole = row.size // COUNT * COUNT
    found = _encode_part(row[:whole], ahead, source, 0, codec, work, out)
    rest = row.size - whole
    if rest:
        work.tail[rest:] = 0
        for j in range(rest):
            work.tail[j] = row[whole + j]
        entry = whole // (source.each * COUNT)
        found = _merge(found, _encode_part(work.tail, ahead, source, entry, codec, work, work.tail_codes))
    _copy_bits(work.tail_codes, rest * codec.bits, out[whole * codec.bits // 8 : stride])
    return found


@compiled
def encode(raw: Raw, tiling: Tiling, codec: Codec, rule: Rule, tiles: Tiles, work: Work, out: Outputs) -> Found:
    """Quantize a row block."""
    count = tiles.top.size
    found = Found(0.0, 0.0, np.uint32(0), np.uint32(0), 0, 0, 0)
    each = _vectors_per_step(tiling.width, tiling.cols)
    stride = (out.codes.size - SLACK) // tiling.rows
    for first in range(0, tiling.rows, tiling.height):
        last = min(first + tiling.height, tiling.rows)
        _read_band(raw[first * tiling.cols : last * tiling.cols], tiling, codec.kind == SHIFTED, work.pairs, tiles)
        if rule.is_fixed:
            tiles.high[:] = rule.high
            tiles.low[:] = rule.low
        else:
            _widen_extremes(raw, tiling, codec.kind == SHIFTED, tiles)
        largest = max(_largest_of(tiles.top), _largest_of(tiles.bottom))
        found = _merge(found, Found(0.0, 0.0, largest, np.uint32(0), 0, 0, 0))
        _choose(tiles, rule, codec, out, first // tiling.height * count)
        if rule.is_fixed:  # rows may lie beyond the given extremes
            _widen_extremes(raw, tiling, codec.kind == SHIFTED, tiles)
        source = Source(tiling.is_half, each, _may_clip(tiles, codec))
        _spread(tiles.steps, tiling.width, tiling.cols, work.steps)
        if codec.kind == SHIFTED:
            _spread(tiles.offsets, tiling.width, tiling.cols, work.offsets)
        for row in range(first, last):
            bits = raw[row * tiling.cols : (row + 1) * tiling.cols]
            ahead = raw[(row + tiling.height) * tiling.cols : (row + tiling.height + 1) * tiling.cols]
            found = _merge(found, _encode_row(bits, ahead, source, codec, work, out.codes[row * stride :], stride))
    return found


@compiled
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


def new_work(row: Raw, width: int) -> Work:
    """Make room for rows like `row`, of which `width` columns are a tile."""
    entries = -(-row.size // (COUNT * vectors_per_step(width, row.size)))
    steps, offsets = np.empty((2, entries * COUNT), np.float32)
    pairs = np.empty(row.size // 2 + 2 * COUNT, np.uint32)
    return Work(
        steps,
        offsets,
        pairs,
        np.empty(COUNT, row.dtype),
        np.empty(2 * COUNT, np.uint8),
        np.empty(4 * COUNT, np.float32),
    )
