"""Which scales are tried for a weight besides the one that its extremes give, as data.

Neighbours: `kernels.reference_search` and `kernels.compiled_search` try them; both read the tables here, so that they
choose the same. Nothing here touches a number of a weight.

A *position* counts from the min/max scale, which is 0, in steps of what can be stored: codes of E4M3 (NVFP4), exponents
(MX), or parts of the scale where it is a BF16 or float32 number. Moves come in stages: those of the first are counted
from the min/max scale, those of a later one from the best that was found before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from shardmill.core.scheme import WeightArgs

NVFP4_WINDOW: Final = (-3, 7)
"""E4M3 codes around that of min/max; eight are an octave. On real weights none beyond -2 or 7 was ever the best, and
a group whose largest element becomes 4 instead of 6 ("four over six") is 4 or 5 codes up.

The global scale stays that of min/max, whose largest group has the last code there is. Half of it would leave room
above: that gains at most 0.4 % of the error of Gaussian weights, and costs where one weight is ten thousand times the
others, since their codes run out below.
"""
MX_WINDOW: Final = {4: (-1, 1), 8: (-1, 0)}
"""Exponents around that of min/max, by bits. E4M3 is its own float: an exponent more can only lose small elements."""


class Ratios(NamedTuple):
    """Scales tried as parts of the min/max scale: `1 + position * 2**-fine_bits`."""

    low: float
    high: float
    coarse_bits: int
    """The first stage takes every `2**-coarse_bits`."""
    fine_bits: int
    """Later stages go both ways from the best, by half as much each time, down to `2**-fine_bits`."""


INT_RATIOS: Final = {
    2: Ratios(0.3125, 1.25, 4, 7),
    3: Ratios(0.5, 1.25, 4, 7),
    4: Ratios(0.75, 1.25, 4, 7),
    5: Ratios(0.75, 1.1875, 5, 8),
    6: Ratios(0.875, 1.125, 6, 9),
    7: Ratios(0.90625, 1.09375, 6, 9),
    8: Ratios(0.9375, 1.0625, 7, 9),
}
"""By bits. Above 1 too: a symmetric scale of `amax / (code_max + 0.5)` clips the largest number by half a step."""
ASYMMETRIC_RATIOS: Final = {4: Ratios(0.8125, 1.25, 4, 7)}
"""Where they differ: on real weights and on heavy tails none of the lower ones was ever the best."""
FLOAT8_RATIOS: Final = Ratios(1.0, 1.875, 3, 6)
"""Within an octave: the grid of a float repeats itself after that."""


class Move(NamedTuple):
    """One candidate."""

    stage: int
    position: int
    shift: int
    """Added to the zero point; 0 for symmetric schemes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """What is tried, and in which numbers its errors are added up."""

    moves: tuple[Move, ...]
    unit: float
    """What a position is of the min/max scale; 0 where positions are codes or exponents."""
    magic: float
    """A power of two. Powers of errors, in units of the step, are rounded to multiples of `magic * 2**-23` and counted
    as whole numbers, so that their sum does not depend on its order; `magic` itself is out of reach."""


def moves_of(args: WeightArgs) -> Moves:
    """Tell what is tried for a scheme.

    >>> [
    ...     move.position
    ...     for move in moves_of(WeightArgs(type="float", strategy="group", group_size=32, scale_dtype="uint8")).moves
    ... ]
    [-1]
    """
    if args.has_global_scale:
        return Moves(moves=_window(*NVFP4_WINDOW), unit=0.0, magic=2.0**7)
    if args.is_mx:
        return Moves(moves=_window(*MX_WINDOW[args.num_bits]), unit=0.0, magic=2.0 ** (7 if args.num_bits == 4 else 13))
    ratios = _ratios_of(args)
    magic = 2.0**15 if args.type == "float" else 2.0 ** (7 if args.num_bits < 5 else 10)
    found = tuple(_refining(ratios, is_shifted=not args.symmetric))
    return Moves(moves=found, unit=2.0**-ratios.fine_bits, magic=magic)


def _ratios_of(args: WeightArgs) -> Ratios:
    if args.type == "float":
        return FLOAT8_RATIOS
    usual = INT_RATIOS[args.num_bits]
    return usual if args.symmetric else ASYMMETRIC_RATIOS.get(args.num_bits, usual)


def _window(low: int, high: int) -> tuple[Move, ...]:
    return tuple(Move(0, position, 0) for position in range(low, high + 1) if position)


def _refining(ratios: Ratios, *, is_shifted: bool) -> Iterator[Move]:
    """Coarse positions, the nearest first, since a good one found early spares the rest of bad ones; then halves.

    Zero points are looked for once, at the best position of the first halving.
    """
    whole = 1 << ratios.fine_bits
    stride = whole >> ratios.coarse_bits
    low, high = round((ratios.low - 1) * whole), round((ratios.high - 1) * whole)
    coarse = sorted(range(low, high + 1, stride), key=lambda position: (abs(position), position))
    yield from (Move(0, position, 0) for position in coarse if position)
    stage = 1
    for halving in range(ratios.fine_bits - ratios.coarse_bits):
        stride //= 2
        yield from (Move(stage, position, 0) for position in (-stride, stride))
        stage += 1
        if is_shifted and not halving:  # in every stage: 2e-4 of the error less, for eight tries more
            yield from (Move(stage, 0, shift) for shift in (-1, 1))
            stage += 1


def code_bounds(args: WeightArgs) -> tuple[int, int]:
    """Least and largest stored scale that a search may choose, where it is a code or an exponent.

    >>> code_bounds(WeightArgs(type="float", strategy="group", group_size=32, scale_dtype="uint8"))
    (1, 246)
    """
    if args.has_global_scale:
        return 1, 126
    return 1, 254 - (2 if args.num_bits == 4 else 8)
