"""Pieces of weights that are quantized already: rows that are decoded, then measured, quantized, rounded or kept.

Most read one row block. Codes that are stored transposed come in panels of several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from shardmill.core.encoding import Decode, TensorRef
from shardmill.core.layout import Unit, rows_per_block
from shardmill.core.plan import DECODED
from shardmill.core.scheme import Scheme
from shardmill.core.statistics import Extent
from shardmill.errors import NON_FINITE, NonFiniteWeight, Problem
from shardmill.kernels.decode import Stored, decode_rows, read_rows, to_bf16
from shardmill.kernels.lanes import BlockSize, EncodedBlock, ImportanceOf, Lane, alike
from shardmill.kernels.recode import Traits, recode_rows, statistics

PANEL_BYTES: Final = 16 << 20
"""Codes of a panel of a weight that is stored transposed: the rest of its rows is read as often as there are panels."""
ReadRange = Callable[[str, int, memoryview], None]
SlabBlock = tuple[int, bool, EncodedBlock | memoryview]
"""Unit, whether it is the unit's last, and a row block with memory of its own, or plain bytes where they are copied."""


@dataclass(frozen=True, slots=True)
class Gauge:
    """Rows of a weight that is decoded for the extent of a tensor or fused set."""

    ref: TensorRef
    decode: Decode
    rows: range
    key: str

    @property
    def held_bytes(self) -> int:
        """As `Copy.held_bytes`."""
        return _decoded_bytes(self.decode, self.rows)

    def fetch(self, read: ReadRange, peek: ReadRange) -> Stored:
        """Read what the values are made of; see `decode.read_rows`."""
        return read_rows(self.decode, self.rows, read, peek)

    def work(self, lane: Lane, stored: Stored, block: BlockSize) -> Extent:
        """Find the extent of the rows.

        Raises:
            NonFiniteWeight: it is not finite.
        """
        extent = Extent()
        for rows in split_rows(self.rows, _rows_within(self.decode, block)):
            data, shape = _values(self.decode, stored, rows), (len(rows), self.decode.cols)
            found = lane.measure(data, DECODED, shape)
            if not math.isfinite(found.amax):
                place = lane.first_nonfinite(data, DECODED, shape)
                raise non_finite(place, self.ref.shard, self.ref.spec.name, rows.start, rows.step)
            extent = extent.merge(found)
        return extent


@dataclass(frozen=True, slots=True)
class Decoding:
    """Rows of a weight that is decoded, and quantized or rounded; mostly one row block, a panel has several."""

    shard: str
    unit: int
    is_last: bool
    weight: Unit
    decode: Decode
    rows: range
    """Of the decoded weight."""
    key: str | None
    """Of the extent that the scale needs."""
    recodes: bool
    """Whether its codes may be those of the scheme."""

    @property
    def held_bytes(self) -> int:
        """As `Copy.held_bytes`."""
        return _decoded_bytes(self.decode, self.rows)

    def fetch(self, read: ReadRange, peek: ReadRange) -> Stored:
        """Read what the values are made of; see `decode.read_rows`."""
        return read_rows(self.decode, self.rows, read, peek)

    def work(
        self,
        lane: Lane,
        stored: Stored,
        whole: Extent | None,
        traits: Traits,
        block: BlockSize,
        importance_of: ImportanceOf = alike,
    ) -> tuple[SlabBlock, ...]:
        """Give the row blocks in order.

        Raises:
            NonFiniteWeight: NaN or Inf in it.
        """
        unit, scheme = self.weight, self.weight.scheme
        step = rows_per_block(unit, scheme.weights, block.nbytes) if scheme else _rows_within(self.decode, block)
        parts = list(split_rows(self.rows, step))
        if scheme is None and self.decode.stack is not None:
            return ((self.unit, self.is_last, self._transposed(lane, stored)),)
        blocks: list[SlabBlock] = []
        importance = importance_of(scheme, unit.module) if scheme is not None else None
        for number, rows in enumerate(parts, 1):
            is_last = self.is_last and number == len(parts)
            if scheme is None:
                blocks.append((self.unit, is_last, self._rounded(lane, stored, rows)))
            else:
                found = self._recode(stored, rows, scheme, traits) if self.recodes else None
                found = found or self._encode(lane, stored, rows, scheme, whole, importance)
                kept = found if len(parts) == 1 else keep(found)
                blocks.append((self.unit, is_last, kept))
        return tuple(blocks)

    def _recode(self, stored: Stored, rows: range, scheme: Scheme, traits: Traits) -> EncodedBlock | None:
        again = recode_rows(self.decode, stored, rows, scheme, traits, as_is=self.decode.stays)
        if again is None:
            return None
        measured = statistics(decode_rows(self.decode, stored, rows))
        tensors = {param: _octets(array) for param, array in again.tensors.items()}
        shared = None if again.global_scale is None else _octets(again.global_scale)
        return EncodedBlock(tensors, measured, finite=True, global_scale=shared)

    def _encode(
        self,
        lane: Lane,
        stored: Stored,
        rows: range,
        scheme: Scheme,
        whole: Extent | None,
        importance: memoryview | None,
    ) -> EncodedBlock:
        data, shape = _values(self.decode, stored, rows), (len(rows), self.decode.cols)
        found = lane.encode(data, DECODED, shape, scheme, whole, importance)
        if not found.finite:
            raise self._non_finite(lane, data, rows)
        return found

    def _rounded(self, lane: Lane, stored: Stored, rows: range) -> memoryview:
        values = decode_rows(self.decode, stored, rows)
        bits = to_bf16(values)
        if not bool(((bits & np.uint16(0x7F80)) != 0x7F80).all()):
            raise self._non_finite(lane, _octets(values), rows)
        return _octets(bits)

    def _transposed(self, lane: Lane, stored: Stored) -> memoryview:
        """One expert as models hold it, `[in, out]`."""
        rounded = np.frombuffer(self._rounded(lane, stored, self.rows), np.uint16)
        return _octets(rounded.reshape(len(self.rows), self.decode.cols).T)

    def _non_finite(self, lane: Lane, data: memoryview, rows: range) -> NonFiniteWeight:
        place = lane.first_nonfinite(data, DECODED, (len(rows), self.decode.cols))
        return non_finite(place, self.shard, self.weight.tensor.name, rows.start, rows.step)


def keep(block: EncodedBlock) -> EncodedBlock:
    """The same with memory of its own."""
    return replace(block, tensors={param: memoryview(bytes(view)) for param, view in block.tensors.items()})


def _octets(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _values(decode: Decode, stored: Stored, rows: range) -> memoryview:
    return _octets(decode_rows(decode, stored, rows))


def _decoded_bytes(decode: Decode, rows: range) -> int:
    """Memory for codes, values and results of some rows; of the values of a panel only one block is there at a time."""
    codes = (rows[-1] + 1 - rows.start) * decode.cols * decode.bits // 8
    return codes + (6 if not decode.is_transposed else 3) * len(rows) * decode.cols


def _rows_within(decode: Decode, block: BlockSize) -> int:
    """Rows whose decoded values are about a block; a multiple of what words of zero points hold."""
    return max(32, block.nbytes // (4 * decode.cols) // 32 * 32)


def split_rows(rows: range, step: int) -> Iterator[range]:
    """Cut rows into runs of at most `step`.

    >>> list(split_rows(range(1, 10, 2), 3))
    [range(1, 7, 2), range(7, 11, 2)]
    """
    for first in range(0, len(rows), step):
        yield rows[first : first + step]


def gauges(key: str, ref: TensorRef, decode: Decode, rows: range, block: BlockSize) -> Iterator[Gauge]:
    """Cut the search for an extent into pieces."""
    for part in split_rows(rows, rows_at_once(decode, rows, block)):
        yield Gauge(ref, decode, part, key)


def rows_at_once(decode: Decode, rows: range, block: BlockSize) -> int:
    """Rows that are read at once: a row block, or a panel of what is stored transposed."""
    step = _rows_within(decode, block)
    if decode.is_transposed:
        panel = PANEL_BYTES * 8 // (decode.bits * decode.cols) // step * step
        return min(max(step, panel), -(-len(rows) // step) * step)
    return step


def decoded_extent(
    unit: Unit, decode: Decode, scheme: Scheme, fused: tuple[TensorRef, ...]
) -> tuple[str, range | None]:
    """Name of the extent that a scale which spans rows needs, and the rows to measure; None for whole tensors."""
    if scheme.weights.has_global_scale and fused:
        return fused[0].spec.name, None
    if decode.stack is None:
        return unit.tensor.name, None
    height = decode.rows // decode.experts
    expert = unit.first // height
    if scheme.weights.has_global_scale:  # both halves of one expert: engines merge gate and up
        rows = range(expert * height, (expert + 1) * height)
    else:
        rows = range(unit.first, unit.first + unit.rows * unit.step, unit.step)
    return f"{unit.tensor.name}:{rows}", rows


def non_finite(
    found: tuple[int, tuple[int, ...]] | None, shard: str, tensor: str, first_row: int, step: int = 1
) -> NonFiniteWeight:
    """Say where the first NaN or Inf of a row block stands, and how many the block holds."""
    count, index = found or (0, ())
    where = [index[0] * step + first_row, *index[1:]] if index else []
    message = (
        f"NaN or Inf in a weight that is to be quantized: {count} in its first bad row block, first at index {where}"
    )
    problem = Problem(
        file=shard,
        tensor=tensor,
        kind=NON_FINITE,
        message=message,
        way_out="repair the checkpoint, ignore the tensor, or allow it (--allow-nonfinite)",
    )
    return NonFiniteWeight([problem])
