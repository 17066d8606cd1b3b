"""The search of `kernels.reference_search` as compiled loops: the same choices, by the same arithmetic.

Imported only where scales are searched. Tiles of a few hundred elements are searched `COUNT` at a time, one to a lane,
so that nothing is added up over lanes; wider ones alone, with all lanes on one tile. Whatever is tried, the elements
stay in a buffer of float32 numbers that fits the nearest cache, or the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from shardmill.kernels import vectors
from shardmill.kernels.compiled import (
    FLOAT4,
    FLOAT8,
    SHIFTED,
    TO_BF16,
    TO_MX,
    TO_NVFP4,
    Codec,
    Floats,
    Outputs,
    Rule,
    Tiling,
    compiled,
    lift_float4,
    lift_float8,
    round_integers,
    spliced,
)
from shardmill.kernels.vectors import COUNT, Vector

NARROW: Final = 256
"""Elements of a tile up to which `COUNT` tiles are searched at a time."""
_CHUNK: Final = 64 * COUNT
"""Elements whose errors are counted in 32 bits; each is below `2**23`."""
_MAGNITUDE: Final = np.uint32(0x7FFFFFFF)
_WHOLE: Final = np.float32(1.5 * 2.0**23)
_WHOLE_BITS: Final = np.uint32(0x4B000000)
"""Bits of `2**23`: with a small whole number in the low ones they are those of the sum."""
_LEAST_STEP: Final = np.float32(2.0**-100)
_LARGEST_STEP: Final = np.float32(2.0**100)
_EXACT_BITS: Final = 36


class Hunt(NamedTuple):
    """What is tried, and how errors count: `core.search.Moves` in numbers of the right width."""

    moves: npt.NDArray[np.int32]
    """Stage, position, shift; `[moves, 3]`."""
    unit: np.float32
    magic: np.float32
    most: np.float32
    """Largest number below `magic`."""
    halves: int
    """Twice the norm."""
    first: np.uint32
    """Least code or exponent that a scale may have."""
    span: np.uint32
    """How many more it may have."""


class Bench(NamedTuple):
    """Buffers of a search; `words` and `offsets` hold one number for each lane."""

    values: Floats
    """Elements of `COUNT` tiles, lane by lane, or of one tile, its rows filled up with zeros to whole vectors."""
    words: npt.NDArray[np.uint32]
    """Stored scales: codes, exponents, or float32 bits."""
    offsets: Floats
    """Zero points."""
    importance: Floats
    """What errors in each column of the row block are multiplied with; empty for nothing."""
    weights: Floats
    """The same, as `values`."""


@spliced
def _rounded(kind: int, quotient: Vector, codec: Codec) -> Vector:
    """What the codes of quotients stand for; those of floats have no sign."""
    if kind == FLOAT8:
        left = lift_float8(vectors.bits(quotient))[1]
    elif kind == FLOAT4:
        left = lift_float4(vectors.bits(quotient))[1]
    else:
        left = round_integers(quotient, codec)[1]
    return left


@spliced
def _count_as(
    kind: int,
    is_plain: bool,  # noqa: FBT001 - numba takes positions
    values: Floats,
    weights: Floats,
    inverse: Vector,
    offset: Vector,
    codec: Codec,
    hunt: Hunt,
) -> Vector:
    """Count the errors of lanes in units of their steps: whole float64 numbers."""
    counts, base = vectors.splat(0.0, COUNT), vectors.bits(vectors.splat(hunt.magic, COUNT))
    most = vectors.splat(hunt.most, COUNT)
    for begin in range(0, values.size, _CHUNK):
        chunk = vectors.splat(np.uint32(0), COUNT)
        for j in range(begin, min(begin + _CHUNK, values.size), COUNT):
            quotient = vectors.load(values, j, COUNT) * inverse
            if kind == SHIFTED:
                quotient = quotient + offset
            if kind in (FLOAT8, FLOAT4):
                quotient = vectors.floats(vectors.bits(quotient) & _MAGNITUDE)
            error = quotient - _rounded(kind, quotient, codec)
            if is_plain:
                power = error * error
            else:
                error = vectors.floats(vectors.bits(error) & _MAGNITUDE)
                power = _power(error, hunt.halves)
                if weights.size:
                    power = power * vectors.load(weights, j, COUNT)
            chunk = chunk + (vectors.bits(vectors.smaller(power, most) + hunt.magic) - base)
        counts = counts + vectors.doubles(chunk)
    return counts


@spliced
def _power(values: Vector, halves: int) -> Vector:
    """Raise to `halves / 2`."""
    found = values
    for _ in range(halves // 2 - 1):
        found = found * values
    if halves % 2:
        found = found * vectors.root(values)
    return found


@spliced
def _exact_as(
    kind: int, values: Floats, weights: Floats, step: Vector, offset: Vector, quantum: Vector, codec: Codec, hunt: Hunt
) -> Vector:
    """Add up the errors of what would be stored, each a multiple of the quantum: exact, whatever the order."""
    total, magic = vectors.splat(0.0, COUNT), quantum * (1.5 * 2.0**52)
    for j in range(0, values.size, COUNT):
        sized = vectors.load(values, j, COUNT)
        quotient = sized / step
        if kind == SHIFTED:
            quotient = quotient + offset
        if kind in (FLOAT8, FLOAT4):
            quotient = vectors.floats(vectors.bits(quotient) & _MAGNITUDE)
            sized = vectors.floats(vectors.bits(sized) & _MAGNITUDE)
        left = _rounded(kind, quotient, codec)
        if kind == SHIFTED:
            left = left - offset
        lost = vectors.floats(vectors.bits(sized - left * step) & _MAGNITUDE)
        power = _power(vectors.doubles(lost), hunt.halves)
        if weights.size:
            power = power * vectors.doubles(vectors.load(weights, j, COUNT))
        total = total + ((power + magic) - magic)
    return total


@spliced
def _to_bf16(values: Vector) -> Vector:
    """Round float32 numbers to BF16, ties to even."""
    bits = vectors.bits(values)
    odd = bits >> 16 & np.uint32(1)
    return vectors.floats((bits + odd + np.uint32(0x7FFF)) >> 16 << 16)


@spliced
def _step_of(code: Vector, rule: Rule) -> Vector:
    """Steps of E4M3 codes or of exponents, above 0."""
    if rule.kind == TO_MX:
        return vectors.floats(code << 23)
    small = (vectors.floats(code | _WHOLE_BITS) - np.float32(2.0**23)) * np.float32(2.0**-9)
    usual = vectors.floats((code << 20) + np.uint32(120 << 23))
    return vectors.select(code < np.uint32(8), small, usual) / vectors.splat(rule.shared, COUNT)


@spliced
def _centred(low: Vector, high: Vector, step: Vector, shift: Vector, rule: Rule, codec: Codec) -> Vector:
    """Zero points of ranges that end as far inside the extremes on one side as on the other, and a shift more."""
    first, last = vectors.splat(codec.low, COUNT), vectors.splat(codec.high, COUNT)
    beyond = (high - low) - step * (rule.code_max + rule.code_max)
    exact = first - (low + beyond * np.float32(0.5)) / step
    whole = vectors.smaller(vectors.larger(exact, first), last) + _WHOLE - _WHOLE
    return vectors.smaller(vectors.larger(whole + shift, first), last)


@spliced
def _tried(words: Vector, steps: Vector, rule: Rule, hunt: Hunt, position: Vector) -> tuple[Vector, Vector]:
    """Words and steps of candidates, or those of min/max where there is no such scale, which then never win."""
    if rule.kind in (TO_MX, TO_NVFP4):
        code = words + (vectors.bits(position + _WHOLE) - vectors.bits(vectors.splat(_WHOLE, COUNT)))
        is_stored = code - hunt.first < hunt.span
        word = vectors.select(is_stored, code, words)
        step = vectors.select(is_stored, _step_of(code, rule), steps)
    else:
        step = steps * (position * hunt.unit + np.float32(1))
        if rule.kind == TO_BF16:
            step = _to_bf16(step)
        word = vectors.bits(step)
    return word, step


@spliced
def _over_lanes(numbers: Vector, is_wide: bool) -> Vector:  # noqa: FBT001
    """Add up what belongs to one tile: whole multiples of something, so that the order does not matter."""
    return vectors.splat(vectors.total(numbers), COUNT) if is_wide else numbers


@compiled
def _load_tiles(block: Floats, width: int, first: int, count: int, values: Floats) -> None:
    """Put the elements of `count` tiles side by side; lanes without one hold zeros."""
    if count == COUNT and width % COUNT == 0:
        for j in range(0, width, COUNT):
            vectors.transpose(block, first * width + j, width, values, j * COUNT)
        return
    if count < COUNT:
        values[: width * COUNT] = np.float32(0)
    for lane in range(count):
        begin = (first + lane) * width
        for j in range(width):
            values[j * COUNT + lane] = block[begin + j]


@compiled
def _load_tile(block: Floats, tiling: Tiling, tile: int, values: Floats) -> int:
    """Copy the rows of a tile; returns how many numbers they are with the zeros behind each."""
    across = -(-tiling.cols // tiling.width)
    top, left = tile // across * tiling.height, tile % across * tiling.width
    bottom, right = min(top + tiling.height, tiling.rows), min(left + tiling.width, tiling.cols)
    padded = -(-(right - left) // COUNT) * COUNT
    for row in range(top, bottom):
        place, begin = (row - top) * padded, row * tiling.cols + left
        for j in range(right - left):  # a slice would be copied by way of memory that nobody owns
            values[place + j] = block[begin + j]
        values[place + right - left : place + padded] = np.float32(0)
    return (bottom - top) * padded


@compiled
def _take(rule: Rule, codec: Codec, out: Outputs, first: int, count: int, bench: Bench) -> None:
    """Read the min/max scales of `count` tiles into lanes; the rest of them get that of the last."""
    shift = np.uint32(16 if rule.kind == TO_BF16 else 0)
    for lane in range(COUNT):
        tile = first + min(lane, count - 1)
        if rule.kind in (TO_MX, TO_NVFP4):
            bench.words[lane] = np.uint32(out.exponents[tile])
        else:
            bench.words[lane] = np.uint32(out.scales[tile] << shift)
        bench.offsets[lane] = np.float32(out.zero_points[tile]) if codec.kind == SHIFTED else np.float32(0)


@compiled
def _give(rule: Rule, codec: Codec, out: Outputs, first: int, count: int, bench: Bench) -> None:
    """Store what was chosen for `count` tiles."""
    shift = np.uint32(16 if rule.kind == TO_BF16 else 0)
    for lane in range(count):
        if rule.kind in (TO_MX, TO_NVFP4):
            out.exponents[first + lane] = np.uint8(bench.words[lane])
        else:
            out.scales[first + lane] = np.uint32(bench.words[lane] >> shift)
        if codec.kind == SHIFTED:
            out.zero_points[first + lane] = np.int8(bench.offsets[lane])


@spliced
def _extremes(values: Floats, is_wide: bool) -> tuple[Vector, Vector]:  # noqa: FBT001
    """Lowest and highest value of lanes, zero included."""
    low = high = vectors.splat(np.float32(0), COUNT)
    for j in range(0, values.size, COUNT):
        value = vectors.load(values, j, COUNT)
        low, high = vectors.smaller(value, low), vectors.larger(value, high)
    if is_wide:
        deep = vectors.largest(vectors.splat(np.float32(0), COUNT) - low)
        low = vectors.splat(np.float32(0), COUNT) - vectors.splat(deep, COUNT)
        high = vectors.splat(vectors.largest(high), COUNT)
    return low, high


@spliced
def _settled(found: Vector, step: Vector, initial: Vector, start: Vector, hunt: Hunt, elements: float) -> Vector:
    """Where estimates alone tell that a candidate leaves less error than the min/max scale, or that there is none.

    A count is off by at most half for each element, and by what the reciprocal does. That moves a quotient by less than
    `d = 2**-12`, the distance to the grid by no more, and a sum of squares S of N distances by less than `S / 1024` and
    `1025 * d * d` an element, a tenth of a count: `2 * d * x` is at most `x * x / 1024 + 1024 * d * d`. A sum below the
    count of an error that is out of reach holds none.
    """
    after, before = vectors.doubles(step), vectors.doubles(start)
    after, before = after * after, before * before
    most, least = found * (1 + 2.0**-9) + after * elements, initial * (1 - 2.0**-9) - before * elements
    is_counted = found < after * 2.0**22
    is_better = most < least
    if hunt.unit == np.float32(0):
        is_better = is_better & is_counted
    return is_better | (found == initial)


@spliced
def _quantum(low: Vector, high: Vector, halves: int) -> Vector:
    """What exact errors of a tile are multiples of: `2**-36` of the power of two below its largest power."""
    amax = vectors.larger(high, vectors.splat(np.float32(0), COUNT) - low)
    # whole numbers above 0 throughout: 508 is four times 127, which are halved as often as the norm has halves
    exponent = (vectors.bits(amax) >> 23) * np.uint32(halves) + np.uint32(2 * (1023 - _EXACT_BITS) - 127 * halves)
    return vectors.power_of_two(exponent >> 1)


class _Tile(NamedTuple):
    """What is known of the tiles in the lanes before anything is tried."""

    word: Vector
    step: Vector
    offset: Vector
    low: Vector
    high: Vector


@compiled
def _load_weights(tiling: Tiling, is_wide: bool, first: int, count: int, bench: Bench) -> None:  # noqa: FBT001
    """Fill `bench.weights` with what belongs to `bench.values`."""
    across = -(-tiling.cols // tiling.width)
    if not is_wide:
        bench.weights[:] = np.float32(0)
        for lane in range(count):
            begin = (first + lane) % across * tiling.width
            for j in range(tiling.width):
                bench.weights[j * COUNT + lane] = bench.importance[begin + j]
        return
    left = first % across * tiling.width
    right = min(left + tiling.width, tiling.cols)
    padded = -(-(right - left) // COUNT) * COUNT
    for row in range(tiling.height):
        for j in range(padded):
            bench.weights[row * padded + j] = bench.importance[left + j] if left + j < right else np.float32(0)


@spliced
def _load(block: Floats, tiling: Tiling, is_wide: bool, first: int, count: int, bench: Bench) -> int:  # noqa: FBT001
    """Fill `bench.values`; returns how many of them are in use."""
    if bench.importance.size:
        _load_weights(tiling, is_wide, first, count, bench)
    if is_wide:
        return _load_tile(block, tiling, first, bench.values)
    _load_tiles(block, tiling.width, first, count, bench.values)
    return tiling.width * COUNT


@spliced
def _start(values: Floats, is_wide: bool, rule: Rule, bench: Bench) -> _Tile:  # noqa: FBT001
    word, offset = vectors.load(bench.words, 0, COUNT), vectors.load(bench.offsets, 0, COUNT)
    step = vectors.floats(word)
    if rule.kind in (TO_MX, TO_NVFP4):
        step = _step_of(word, rule)
    low, high = _extremes(values, is_wide)
    return _Tile(word, step, offset, low, high)


@spliced
def _initial(cost: Vector, tile: _Tile) -> Vector:
    """Cost of the min/max scale; of lanes that are not to be changed one that nothing is less than."""
    nothing = vectors.splat(-1.0, COUNT)
    found = vectors.select(tile.step < _LEAST_STEP, nothing, cost)
    found = vectors.select(tile.step > _LARGEST_STEP, nothing, found)
    return vectors.select(tile.high - tile.low == np.float32(0), nothing, found)


@spliced
def _best(
    kind: int,
    is_plain: bool,  # noqa: FBT001
    values: Floats,
    weights: Floats,
    tile: _Tile,
    is_wide: bool,  # noqa: FBT001
    rule: Rule,
    codec: Codec,
    hunt: Hunt,
) -> tuple[Vector, Vector, Vector, Vector, Vector]:
    """Word, step, zero point and cost of the best candidate, and the cost of the min/max scale."""
    no, one = vectors.splat(np.float32(0), COUNT), vectors.splat(np.float32(1), COUNT)
    word, step, offset = tile.word, tile.step, tile.offset
    found = initial = vectors.splat(-1.0, COUNT)
    position, shift, from_position, from_shift = no, no, no, no
    stage = np.int32(-1)
    for number in range(-1, len(hunt.moves)):  # the first round is for the min/max scale itself
        here, aside = no, no
        tried_word, tried_step, tried_offset = tile.word, tile.step, tile.offset
        if number >= 0:
            if hunt.moves[number, 0] != stage:
                stage, from_position, from_shift = hunt.moves[number, 0], position, shift
            here = from_position + np.float32(hunt.moves[number, 1])
            aside = from_shift + np.float32(hunt.moves[number, 2])
            tried_word, tried_step = _tried(tile.word, tile.step, rule, hunt, here)
            if kind == SHIFTED:
                tried_offset = _centred(tile.low, tile.high, tried_step, aside, rule, codec)
        counts = _count_as(kind, is_plain, values, weights, one / tried_step, tried_offset, codec, hunt)
        cost = _over_lanes(counts, is_wide) * _power(vectors.doubles(tried_step), hunt.halves)
        if number < 0:
            found = initial = _initial(cost, tile)
        better = cost < found
        found = vectors.select(better, cost, found)
        word, step = vectors.select(better, tried_word, word), vectors.select(better, tried_step, step)
        offset = vectors.select(better, tried_offset, offset)
        position, shift = vectors.select(better, here, position), vectors.select(better, aside, shift)
    return word, step, offset, found, initial


@spliced
def _gains(
    kind: int,
    values: Floats,
    weights: Floats,
    tile: _Tile,
    chosen: tuple[Vector, Vector],
    is_wide: bool,  # noqa: FBT001
    codec: Codec,
    hunt: Hunt,
    elements: float,
) -> Vector:
    """Where what would be stored leaves less error than the min/max scale does."""
    quantum = _quantum(tile.low, tile.high, hunt.halves)
    after = before = vectors.splat(0.0, COUNT)
    for turn in range(2):  # a loop, so that what is in it is compiled once
        by, plus = chosen if turn == 0 else (tile.step, tile.offset)
        sums = _over_lanes(_exact_as(kind, values, weights, by, plus, quantum, codec, hunt), is_wide)
        after, before = (sums, before) if turn == 0 else (after, sums)
    return after + quantum * elements < before


@cache
def searcher(kind: int, is_plain: bool) -> Callable[..., None]:  # noqa: FBT001 - both become constants
    """Compile the search for one kind of codes; `is_plain` where errors are squared and no more."""

    def search(
        block: Floats,
        tiling: Tiling,
        is_wide: bool,  # noqa: FBT001
        rule: Rule,
        codec: Codec,
        hunt: Hunt,
        bench: Bench,
        out: Outputs,
    ) -> None:
        tiles = -(-tiling.rows // tiling.height) * -(-tiling.cols // tiling.width)
        each, elements = 1 if is_wide else COUNT, np.float64(tiling.height * tiling.width)
        for first in range(0, tiles, each):
            count = min(each, tiles - first)
            values = bench.values[: _load(block, tiling, is_wide, first, count, bench)]
            _take(rule, codec, out, first, count, bench)
            tile = _start(values, is_wide, rule, bench)
            word, step, offset, found, initial = _best(
                kind, is_plain, values, bench.weights, tile, is_wide, rule, codec, hunt
            )
            settled = _settled(found, step, initial, tile.step, hunt, elements)
            if not is_plain or vectors.count(settled) < COUNT:
                gains = _gains(kind, values, bench.weights, tile, (step, offset), is_wide, codec, hunt, elements)
                word, offset = vectors.select(gains, word, tile.word), vectors.select(gains, offset, tile.offset)
            vectors.store(bench.words, 0, word)
            vectors.store(bench.offsets, 0, offset)
            _give(rule, codec, out, first, count, bench)

    return compiled(search)


def new_bench(tiling: Tiling, is_wide: bool, importance: Floats) -> Bench:  # noqa: FBT001
    """Make room for a search."""
    size = tiling.height * (tiling.width + COUNT) if is_wide else COUNT * tiling.width
    values, weights = np.zeros(size, np.float32), np.zeros(size if importance.size else 0, np.float32)
    return Bench(values, np.zeros(COUNT, np.uint32), np.zeros(COUNT, np.float32), importance, weights)
