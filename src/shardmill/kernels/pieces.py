"""The work on one shard as pieces that threads can do side by side: what each reads, and what is made of it.

The order of the pieces is the order of the output. Pieces that only measure come right before the first one that needs
what they find, so that the page cache still holds what is read a second time.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from shardmill.core.dtypes import BITS
from shardmill.core.encoding import Decode, TensorRef
from shardmill.core.header import TensorSpec
from shardmill.core.layout import Unit, row_alignment, rows_per_block
from shardmill.core.plan import ShardPlan
from shardmill.core.recode import can_recode
from shardmill.core.scheme import Scheme
from shardmill.core.statistics import Extent
from shardmill.kernels.decoding import (
    Decoding,
    Gauge,
    SlabBlock,
    decoded_extent,
    gauges,
    keep,
    non_finite,
    rows_at_once,
    split_rows,
)
from shardmill.kernels.lanes import BlockSize, EncodedBlock, ImportanceOf, Lane, alike, gather

COPY_BYTES: Final = 4 << 20
"""Bytes that are carried over at a time."""


@dataclass(frozen=True, slots=True)
class Span:
    """A byte range of a source shard, counted from the start of its file."""

    shard: str
    begin: int
    length: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes that are carried over."""

    span: Span
    unit: int
    is_last: bool

    @property
    def held_bytes(self) -> int:
        """Memory that the piece holds until it is written."""
        return self.span.length


@dataclass(frozen=True, slots=True)
class Twice:
    """Not work, but a word ahead: these ranges come twice now, first to be measured, then to be encoded."""

    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Copies:
    """Bytes of several small units that are carried over: a shard may have a hundred thousand of them."""

    span: Span
    parts: tuple[tuple[int, int, int], ...]
    """Unit, and begin and end of its bytes within the span."""

    @property
    def held_bytes(self) -> int:
        """As `Copy.held_bytes`."""
        return self.span.length


@dataclass(frozen=True, slots=True)
class Measure:
    """Rows that are read for the extent of a tensor or fused set."""

    span: Span
    key: str
    spec: TensorSpec
    first: int
    """Number of the first row in the tensor."""
    shape: tuple[int, ...]

    @property
    def held_bytes(self) -> int:
        """As `Copy.held_bytes`."""
        return self.span.length

    def work(self, lane: Lane, data: memoryview) -> Extent:
        """Find the extent of the rows.

        Raises:
            NonFiniteWeight: it is not finite.
        """
        return _measure(lane, data, self.shape, self.span.shard, self.spec, self.first)


@dataclass(frozen=True, slots=True)
class Encode:
    """A row block of a weight whose rows are one byte range."""

    span: Span
    unit: int
    is_last: bool
    weight: Unit
    scheme: Scheme
    first: int
    count: int
    key: str | None
    """Of the extent that the scale needs."""

    @property
    def held_bytes(self) -> int:
        """As `Copy.held_bytes`; codes are no wider than half of what they are made of, or as wide as one byte."""
        return 2 * self.span.length

    def work(
        self, lane: Lane, data: memoryview, whole: Extent | None, importance_of: ImportanceOf = alike
    ) -> EncodedBlock:
        """Quantize the row block.

        Raises:
            NonFiniteWeight: NaN or Inf in it.
        """
        spec, shape = self.weight.tensor, (self.count, self.weight.cols)
        importance = importance_of(self.scheme, self.weight.module)
        found = lane.encode(data, spec.dtype, shape, self.scheme, whole, importance)
        if not found.finite:
            raise non_finite(lane.first_nonfinite(data, spec.dtype, shape), self.span.shard, spec.name, self.first)
        return found


@dataclass(frozen=True, slots=True)
class Slab:
    """A whole expert of a stack whose rows do not lie one after another; gate and up share one."""

    span: Span
    units: tuple[tuple[int, Unit], ...]
    shares_extent: bool
    """Whether its units share a global scale."""

    @property
    def held_bytes(self) -> int:
        """As `Copy.held_bytes`."""
        return 2 * self.span.length

    def work(
        self, lane: Lane, data: memoryview, block: BlockSize, importance_of: ImportanceOf = alike
    ) -> tuple[Extent, tuple[SlabBlock, ...]]:
        """Give the extent of the slab, if its units share one, and their blocks in order.

        Raises:
            NonFiniteWeight: NaN or Inf in it.
        """
        extent = Extent()
        if self.shares_extent:
            first = self.units[0][1]
            spec = first.tensor._replace(name=first.module, shape=first.slab)
            extent = _measure(lane, data, first.slab, self.span.shard, spec, 0)
        blocks: list[SlabBlock] = []
        for number, unit in self.units:
            if unit.scheme is None:
                blocks.append((number, True, gather_rows(data, unit, 0, unit.rows)))
            else:
                importance = importance_of(unit.scheme, unit.module)
                blocks += self._encode(lane, data, block, number, unit, unit.scheme, extent, importance)
        return extent, tuple(blocks)

    def _encode(
        self,
        lane: Lane,
        data: memoryview,
        block: BlockSize,
        number: int,
        unit: Unit,
        scheme: Scheme,
        whole: Extent,
        importance: memoryview | None,
    ) -> Iterator[SlabBlock]:
        if scheme.weights.strategy == "tensor":
            every = gather_rows(data, unit, 0, unit.rows)
            whole = _measure(lane, every, (unit.rows, unit.cols), self.span.shard, unit.tensor, 0)
        step = rows_per_block(unit, scheme.weights, block.nbytes)
        for first in range(0, unit.rows, step):
            count = min(step, unit.rows - first)
            rows, shape = gather_rows(data, unit, first, count), (count, unit.cols)
            found = lane.encode(rows, unit.tensor.dtype, shape, scheme, whole, importance)
            if not found.finite:
                place = lane.first_nonfinite(rows, unit.tensor.dtype, shape)
                raise non_finite(place, self.span.shard, unit.tensor.name, first)
            yield number, first + count == unit.rows, keep(found)


Piece = Copy | Copies | Measure | Encode | Slab | Gauge | Decoding


def gather_rows(slab: memoryview, unit: Unit, first: int, count: int) -> memoryview:
    """Copy rows `first` to `first + count` of a unit out of its slab."""
    begin = unit.first + first * unit.step
    rows = slice(begin, begin + count * unit.step, unit.step)
    return gather(slab, unit.tensor.dtype, unit.slab, rows, transposed=unit.transposed)


def cut(
    shard: ShardPlan, units: Sequence[Unit], block: BlockSize, seams: Sequence[int] = ()
) -> Iterator[Piece | Twice]:
    """Cut the work on a shard into pieces, in the order of its units; `block` may shrink meanwhile.

    Args:
        seams: offsets in the file that row blocks keep to one side of, where whole steps of rows end there.
    """
    fused = {tensor.spec.name: tensor.fused for tensor in shard.tensors if tensor.fused}
    measured: set[str] = set()
    copies: list[tuple[int, Unit]] = []
    for (begin, is_slab), group in groupby(enumerate(units), lambda entry: (entry[1].begin, _is_slab(entry[1]))):
        if is_slab:
            yield from _copies(shard, copies)
            copies.clear()
            yield _slab(shard, begin, tuple(group))
            continue
        for number, unit in group:
            if unit.decode is not None:
                yield from _copies(shard, copies)
                copies.clear()
                partners = fused.get(unit.tensor.name, ())
                yield from _decoding(shard, number, unit, unit.decode, partners, measured, block, seams)
                continue
            if unit.scheme is None:
                copies.append((number, unit))
                continue
            yield from _copies(shard, copies)
            copies.clear()
            key = None
            if unit.scheme.weights.needs_extent:
                key, refs = _extent_of(shard, unit, unit.scheme, fused.get(unit.tensor.name, ()))
                yield from _measured(shard, key, refs, measured, block, seams)
            yield from _encodes(shard, number, unit, unit.scheme, key, block, seams)
    yield from _copies(shard, copies)


def _measured(
    shard: ShardPlan, key: str, refs: Sequence[TensorRef], measured: set[str], block: BlockSize, seams: Sequence[int]
) -> Iterator[Measure | Gauge | Twice]:
    """Pieces that find an extent, the first time that it is asked for."""
    if key in measured:
        return
    measured.add(key)
    yield Twice(tuple(_span_of(ref) for ref in refs if ref.shard == shard.name))
    for ref in refs:
        if ref.decode is None:
            yield from _measures(key, ref, block, seams if ref.shard == shard.name else ())
        else:
            yield from gauges(key, ref, ref.decode, range(ref.decode.rows), block)


def _decoding(
    shard: ShardPlan,
    number: int,
    unit: Unit,
    decode: Decode,
    fused: tuple[TensorRef, ...],
    measured: set[str],
    block: BlockSize,
    seams: Sequence[int],
) -> Iterator[Decoding | Gauge | Measure | Twice]:
    """Pieces of one weight that is decoded."""
    rows = range(unit.first, unit.first + unit.rows * unit.step, unit.step)
    key = None
    scheme = unit.scheme
    recodes = scheme is not None and all(
        partner is not None and can_recode(partner, scheme) for partner in [decode, *[ref.decode for ref in fused]]
    )
    if scheme is not None and not decode.stays and scheme.weights.needs_extent:
        key, wanted = decoded_extent(unit, decode, scheme, fused)
        own = TensorRef(shard.name, shard.data_start, decode.parts[0][1].spec, decode)
        if wanted is None:
            yield from _measured(shard, key, fused or (own,), measured, block, seams)
        elif key not in measured:
            measured.add(key)
            yield from gauges(key, own, decode, wanted, block)
    step = rows_at_once(decode, rows, block)
    if unit.scheme is not None:
        step = max(step, rows_per_block(unit, unit.scheme.weights, block.nbytes))
    elif decode.stack is not None:
        step = decode.rows // decode.experts
    for part in split_rows(rows, step):
        yield Decoding(shard.name, number, part[-1] == rows[-1], unit, decode, part, key, recodes)


def _is_slab(unit: Unit) -> bool:
    return not unit.is_contiguous and unit.decode is None


def _slab(shard: ShardPlan, begin: int, units: tuple[tuple[int, Unit], ...]) -> Slab:
    first = units[0][1]
    length = math.prod(first.slab) * BITS[first.tensor.dtype] // 8
    shares = first.scheme is not None and first.scheme.weights.has_global_scale
    return Slab(Span(shard.name, shard.data_start + begin, length), units, shares)


def _copies(shard: ShardPlan, units: Sequence[tuple[int, Unit]]) -> Iterator[Copy | Copies]:
    """Copy units that follow each other; small ones whose bytes do so too are read at once."""
    parts: list[tuple[int, int, int]] = []
    first = end = 0
    for number, unit in units:
        length = unit.outputs[0].nbytes
        begin = shard.data_start + unit.begin + unit.first * unit.row_bytes
        if parts and length and (begin != end or end + length - first > COPY_BYTES):
            yield Copies(Span(shard.name, first, end - first), tuple(parts))
            parts = []
        if length > COPY_BYTES:
            yield from _copy(shard, number, begin, length)
            continue
        if not parts:
            first = end = begin
        parts.append((number, end - first, end - first + length))
        end += length
    if parts:
        yield Copies(Span(shard.name, first, end - first), tuple(parts))


def _copy(shard: ShardPlan, number: int, start: int, length: int) -> Iterator[Copy]:
    for done in range(0, length, COPY_BYTES):
        size = min(COPY_BYTES, length - done)
        yield Copy(Span(shard.name, start + done, size), number, is_last=done + size == length)


def _extent_of(
    shard: ShardPlan, unit: Unit, scheme: Scheme, fused: tuple[TensorRef, ...]
) -> tuple[str, tuple[TensorRef, ...]]:
    """What a scale that spans rows is the extent of: name, and the tensors to measure."""
    is_shared = scheme.weights.has_global_scale
    if is_shared and fused:
        return fused[0].spec.name, fused
    spec, row_bytes = unit.tensor, unit.row_bytes
    if is_shared and len(spec.shape) == 3:  # both halves of one expert: engines merge gate and up
        name, begin, shape = unit.module, unit.begin, unit.slab
    else:
        name, begin, shape = spec.name, unit.begin + unit.first * row_bytes, (unit.rows, unit.cols)
    whole = spec._replace(name=name, shape=shape, begin=begin, end=begin + shape[0] * row_bytes)
    return f"{begin}:{whole.end}", (TensorRef(shard.name, shard.data_start, whole),)


def _span_of(ref: TensorRef) -> Span:
    return Span(ref.shard, ref.data_start + ref.spec.begin, ref.spec.nbytes)


def _rows_before(seams: Sequence[int], begin: int, row_bytes: int, rows: int, most: int, step: int = 1) -> int:
    """Rows of the next piece, which begins at an offset: at most `most` of the `rows` that follow, whole steps of them.

    Up to a seam that comes before them all they are shared out evenly, so that no small piece is left.

    >>> [_rows_before([100], begin, 10, rows, 4) for begin, rows in ((0, 20), (100, 10), (5, 20))]
    [4, 4, 4]
    >>> [_rows_before([0, 50, 70], begin, 10, 9, 4) for begin in (0, 30, 50)]
    [3, 2, 2]
    """
    at = bisect_right(seams, begin)
    if at < len(seams) and row_bytes:
        before, rest = divmod(seams[at] - begin, row_bytes)
        if not rest and not before % step and before < rows:
            share = -(-before // -(-before // most))
            return min(before, -(-share // step) * step)
    return min(most, rows)


def _measures(key: str, ref: TensorRef, block: BlockSize, seams: Sequence[int]) -> Iterator[Measure]:
    spec = ref.spec
    row_bytes = spec.nbytes // spec.shape[0]
    most = max(1, block.nbytes // max(1, row_bytes))
    first = 0
    while first < spec.shape[0]:
        begin = ref.data_start + spec.begin + first * row_bytes
        count = _rows_before(seams, begin, row_bytes, spec.shape[0] - first, most)
        yield Measure(Span(ref.shard, begin, count * row_bytes), key, spec, first, (count, *spec.shape[1:]))
        first += count


def _encodes(
    shard: ShardPlan,
    number: int,
    unit: Unit,
    scheme: Scheme,
    key: str | None,
    block: BlockSize,
    seams: Sequence[int],
) -> Iterator[Encode]:
    first, step = 0, row_alignment(scheme.weights)
    while first < unit.rows:
        begin = shard.data_start + unit.begin + (unit.first + first) * unit.row_bytes
        most = rows_per_block(unit, scheme.weights, block.nbytes)
        count = _rows_before(seams, begin, unit.row_bytes, unit.rows - first, most, step)
        span = Span(shard.name, begin, count * unit.row_bytes)
        yield Encode(span, number, first + count == unit.rows, unit, scheme, first, count, key)
        first += count


def _measure(lane: Lane, data: memoryview, shape: tuple[int, ...], shard: str, spec: TensorSpec, first: int) -> Extent:
    extent = lane.measure(data, spec.dtype, shape)
    if not math.isfinite(extent.amax):
        raise non_finite(lane.first_nonfinite(data, spec.dtype, shape), shard, spec.name, first)
    return extent
