"""The search for better scales in plain torch: the readable specification, and what runs on accelerators.

Neighbours: `core.search` says what is tried; `kernels.reference` gives the min/max scales to start from and encodes
with the ones chosen; `kernels.compiled_search` chooses the same.

Promise: the choice is a function of the tile alone. Errors are counted as whole numbers, so that no order of a sum
shows. A tile whose best candidate does not leave less error than its min/max scale, by the codes and the values that
would be stored, keeps the latter.

A candidate's error is estimated in units of its step, from `weight * (1 / step)`: a product instead of a quotient,
which may differ by its last bit. Only the best of all is compared with the min/max scale exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from shardmill.core.scheme import Search, WeightArgs
from shardmill.core.search import Moves, code_bounds, moves_of
from shardmill.kernels.reference import Qparams, dequantize, quotients, round_codes, spread

_LEAST_STEP: Final = 2.0**-100
_LARGEST_STEP: Final = 2.0**100
"""Beyond these a tile keeps its min/max scale: reciprocals and powers must not leave the range of their dtype."""
_EXACT_BITS: Final = 36
"""Bits below the power of a tile's largest number to which exact errors are kept."""


@dataclass(frozen=True, slots=True)
class _Tiles:
    """What is searched: tiles, their extremes, and what comes with them."""

    values: Tensor
    """[Rb, br, Cb, bc]."""
    low: Tensor
    high: Tensor
    """float32 [Rb, Cb]."""
    args: WeightArgs
    moves: Moves
    halves: int
    """Twice the norm."""
    count: int
    """Elements of a tile."""
    importance: Tensor | None
    """What errors are multiplied with: float32 [Cb, bc], the largest of a tile from 1 to 2."""

    @property
    def amax(self) -> Tensor:
        """Largest magnitude by tile."""
        return torch.maximum(self.high, -self.low)


def choose(
    values: Tensor,
    extremes: tuple[Tensor, Tensor],
    start: Qparams,
    args: WeightArgs,
    search: Search,
    importance: Tensor | None = None,
) -> Qparams:
    """Choose the scales of tiles, each the min/max scale or a better one.

    Args:
        values: tiles [Rb, br, Cb, bc], ragged edges filled with zeros.
        extremes: lowest and highest value of each tile, zero included; float32 [Rb, Cb].
        start: the min/max scales.
        args: how to quantize.
        search: what counts as better.
        importance: of each column, at least 0; float32 [K].
    """
    size = values.shape[1] * values.shape[3]
    weights = None if importance is None else scaled(importance, values.shape[3])
    tiles = _Tiles(values, *extremes, args, moves_of(args), round(2 * search.norm), size, weights)
    best, found, improved = start, _cost(tiles, start), torch.zeros_like(start.scale, dtype=torch.bool)
    step = start.step.squeeze((1, 3))
    fits = (tiles.amax > 0) & (step >= _LEAST_STEP) & (step <= _LARGEST_STEP)
    position = shift = torch.zeros_like(start.scale, dtype=torch.int32)
    stage, origin = -1, (position, shift)
    for move in tiles.moves.moves:
        if move.stage != stage:
            stage, origin = move.stage, (position, shift)
        here = origin[0] + move.position, origin[1] + move.shift
        candidate, is_stored = _candidate(tiles, start, *here)
        cost = _cost(tiles, candidate)
        better = fits & is_stored & (cost < found)
        best, found = _where(better, candidate, best), torch.where(better, cost, found)
        position, shift = torch.where(better, here[0], position), torch.where(better, here[1], shift)
        improved |= better
    quantum = _quantum(tiles)
    gain = _exact_cost(tiles, best, quantum) + tiles.count * quantum < _exact_cost(tiles, start, quantum)
    return _where(improved & gain, best, start)


def scaled(importance: Tensor, width: int) -> Tensor:
    """Multiply the importance of the columns of each tile with a power of two, so that the largest is from 1 to 2.

    float32 [K] -> [Cb, width]; only what is important within a tile counts, and powers of two round nothing.

    >>> scaled(torch.tensor([3.0, 1.0, 0.0, 0.0]), 2).tolist()
    [[1.5, 0.5], [0.0, 0.0]]
    """
    tiles = torch.nn.functional.pad(importance, (0, -len(importance) % width)).view(-1, width)
    exponents = tiles.amax(1, keepdim=True).view(torch.int32) >> 23
    return tiles * ((254 - exponents).clamp(min=1) << 23).view(torch.float32)


def _where(mask: Tensor, one: Qparams, other: Qparams) -> Qparams:
    """Take the qparams of some tiles from one set, and of the rest from another."""
    scale = torch.where(mask, _as_octets(one.scale), _as_octets(other.scale)).view(other.scale.dtype)
    if one.zero_point is None or other.zero_point is None:
        return replace(other, scale=scale)
    return replace(other, scale=scale, zero_point=torch.where(mask, one.zero_point, other.zero_point))


def _as_octets(scale: Tensor) -> Tensor:
    """Look at E4M3 numbers as bytes, which every device can choose between."""
    return scale.view(torch.uint8) if scale.dtype == torch.float8_e4m3fn else scale


def _candidate(tiles: _Tiles, start: Qparams, position: Tensor, shift: Tensor) -> tuple[Qparams, Tensor]:
    """Qparams at a position, and where such a scale can be stored; elsewhere they are the min/max ones."""
    if tiles.args.scale_dtype is not None:
        codes = _as_octets(start.scale).to(torch.int32) + position
        first, last = code_bounds(tiles.args)
        is_stored = (codes >= first) & (codes <= last)
        scale = codes.clamp(first, last).to(torch.uint8).view(start.scale.dtype)
        return _where(is_stored, replace(start, scale=scale), start), is_stored
    ratio = position.to(torch.float32) * tiles.moves.unit + 1.0
    scale = (start.scale.to(torch.float32) * ratio).to(start.scale.dtype)
    is_stored = (scale > 0) & scale.isfinite()
    scale = torch.where(is_stored, scale, start.scale)
    if start.zero_point is None:
        return replace(start, scale=scale), is_stored
    return replace(start, scale=scale, zero_point=_centred(tiles, scale.to(torch.float32), shift)), is_stored


def _centred(tiles: _Tiles, scale: Tensor, shift: Tensor) -> Tensor:
    """Zero point of a range that ends as far inside the extremes on one side as on the other, and a shift more."""
    first, last = tiles.args.code_range
    beyond = (tiles.high - tiles.low) - scale * (2 * tiles.args.code_max)
    exact = first - (tiles.low + beyond * 0.5) / scale
    return (exact.clamp(first, last).round() + shift).clamp(first, last)


def _cost(tiles: _Tiles, qparams: Qparams) -> Tensor:
    """Estimate the error of each tile: float64 [Rb, Cb]."""
    step = qparams.step
    quotient = tiles.values * (torch.ones_like(step) / step)
    if qparams.offset is not None:
        quotient += qparams.offset
    values = quotient.clone()
    round_codes(values, tiles.args)
    error = _power(quotient.sub_(values).abs_(), tiles.halves)
    if tiles.importance is not None:
        error = error * tiles.importance
    magic = torch.full((), tiles.moves.magic, dtype=torch.float32, device=error.device)
    most = torch.nextafter(magic, torch.zeros_like(magic))
    counts = torch.minimum(error, most).add_(magic).view(torch.int32).sub_(magic.view(torch.int32))
    total = counts.sum((1, 3), dtype=torch.int64).to(torch.float64)
    return total * _power(step.squeeze((1, 3)).to(torch.float64), tiles.halves)


def _power(values: Tensor, halves: int) -> Tensor:
    """Raise to `halves / 2`, with operations that are the same everywhere."""
    found = values
    for _ in range(halves // 2 - 1):
        found = found * values
    return found * torch.sqrt(values) if halves % 2 else found


def _quantum(tiles: _Tiles) -> Tensor:
    """What exact errors are multiples of: `2**-36` of the power of two below the power of the largest number."""
    exponent = (tiles.amax.view(torch.int32) >> 23).to(torch.int64) - 127
    biased = (exponent * tiles.halves >> 1) - _EXACT_BITS + 1023
    return (biased << 52).view(torch.float64)


def _exact_cost(tiles: _Tiles, qparams: Qparams, quantum: Tensor) -> Tensor:
    """Add up the errors of what would be stored: a multiple of the quantum by tile, float64 [Rb, Cb]."""
    values = quotients(tiles.values, qparams)
    round_codes(values, tiles.args)
    error = _power(dequantize(values, qparams).sub_(tiles.values).abs_().to(torch.float64), tiles.halves)
    if tiles.importance is not None:
        error = error * tiles.importance.to(torch.float64)
    magic = spread(quantum * 1.5 * 2.0**52)
    return error.add_(magic).sub_(magic).sum((1, 3))
