"""One shard plan, unit by unit and row block by row block, through the arithmetic into a stream of output bytes.

Knows no paths: source bytes come from a `ReadRange`, output bytes go to a `WriteChunk` in exactly the planned order.
Memory is a small multiple of a row block, plus the scales of the weight in hand, plus one expert of a transposed stack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from shardmill.core.dtypes import scale_dtype_for
from shardmill.core.header import TensorSpec
from shardmill.core.layout import BLOCK_BYTES, OutputSpec, Placed, Unit, rows_per_block
from shardmill.core.plan import ShardPlan, TensorRef
from shardmill.core.receipt import WeightRecord
from shardmill.core.scheme import Scheme
from shardmill.core.statistics import Extent, Statistics
from shardmill.errors import Interrupted, NonFiniteWeight, Problem
from shardmill.kernels import reference

WriteChunk = Callable[[memoryview], None]
"""Appends bytes to the data section of the output shard."""
ReadRange = Callable[[str, int, memoryview], None]
"""Fills the view with bytes of the named shard, from an offset counted from the start of its file."""


@dataclass(slots=True)
class _Encoder:
    """The state of encoding one shard."""

    shard: ShardPlan
    read: ReadRange
    write: WriteChunk
    device: str
    should_stop: Callable[[], bool]
    buffer: bytearray = field(default_factory=bytearray)
    slab: tuple[int, Tensor] | None = None
    """The transposed expert read last, by its offset: gate and up share one."""
    extents: dict[str, Extent] = field(default_factory=dict)
    """By name of the first member of a fused set."""
    held: dict[str, memoryview] = field(default_factory=dict)
    """Outputs that are computed and wait for their place."""

    def view(self, length: int) -> memoryview:
        """The reusable read buffer, grown to `length` bytes."""
        if self.should_stop():
            raise Interrupted("stopped on request; finished shards stay in the store, run again to go on")
        if len(self.buffer) < length:
            self.buffer = bytearray(length)
        return memoryview(self.buffer)[:length]

    def rows(self, unit: Unit, first: int, count: int) -> Tensor:
        """Rows `first` to `first + count` of a unit in the source dtype, `[count, cols]`."""
        if unit.is_contiguous:
            offset = unit.begin + (unit.first + first) * unit.row_bytes
            return self._tensor(self.shard.name, self.shard.data_start + offset, unit.tensor.dtype, (count, unit.cols))
        matrix = self._slab(unit)
        begin = unit.first + first * unit.step
        return matrix[begin : begin + count * unit.step : unit.step].contiguous()

    def _slab(self, unit: Unit) -> Tensor:
        """A whole expert, `[out, in]`."""
        if self.slab is None or self.slab[0] != unit.begin:
            stored = self._tensor(self.shard.name, self.shard.data_start + unit.begin, unit.tensor.dtype, unit.slab)
            oriented = stored.T.contiguous() if unit.transposed else stored.clone()
            self.slab = (unit.begin, oriented)
        return self.slab[1]

    def _tensor(self, shard: str, offset: int, dtype: str, shape: tuple[int, ...]) -> Tensor:
        view = self.view(math.prod(shape) * reference.DTYPES[dtype].itemsize)
        self.read(shard, offset, view)
        return reference.from_buffer(view, dtype, shape, self.device)

    def blocks(self, unit: Unit, scheme: Scheme) -> Iterator[tuple[int, Tensor]]:
        """Row blocks of a unit with the number of their first row."""
        step = rows_per_block(unit, scheme.weights)
        for first in range(0, unit.rows, step):
            yield first, self.rows(unit, first, min(step, unit.rows - first))

    def extent_of_ref(self, ref: TensorRef) -> Extent:
        """Smallest and largest value of a whole tensor, wherever it lies."""
        spec = ref.spec
        row_bytes = spec.nbytes // spec.shape[0]
        step = max(1, BLOCK_BYTES // max(1, row_bytes))
        found = Extent()
        for first in range(0, spec.shape[0], step):
            shape = (min(step, spec.shape[0] - first), *spec.shape[1:])
            rows = self._tensor(ref.shard, ref.data_start + spec.begin + first * row_bytes, spec.dtype, shape)
            found = found.merge(self._finite(reference.measure(rows), rows, ref.shard, spec, first))
        return found

    def _finite(self, extent: Extent, rows: Tensor, shard: str, spec: TensorSpec, first: int) -> Extent:
        if not math.isfinite(extent.amax):
            raise non_finite(rows, shard, spec.name, first)
        return extent

    def whole(self, unit: Unit, scheme: Scheme, fused: tuple[TensorRef, ...]) -> Extent | None:
        """What the first pass finds for a scale that spans rows: of the tensor, or of its fused set."""
        if scheme.weights.strategy not in ("tensor", "tensor_group"):
            return None
        if scheme.weights.has_global_scale and fused:
            key = fused[0].spec.name
            if key not in self.extents:
                self.extents[key] = reduce(Extent.merge, (self.extent_of_ref(ref) for ref in fused))
            return self.extents[key]
        if scheme.weights.has_global_scale and len(unit.tensor.shape) == 3:
            key = f"{unit.begin}"
            if key not in self.extents:
                self.extents[key] = self._expert_extent(unit)
            return self.extents[key]
        found = Extent()
        for first, rows in self.blocks(unit, scheme):
            found = found.merge(self._finite(reference.measure(rows), rows, self.shard.name, unit.tensor, first))
        return found

    def _expert_extent(self, unit: Unit) -> Extent:
        """Both halves of one expert's stack share a global scale: engines merge gate and up."""
        row_bytes = unit.tensor.nbytes // unit.tensor.shape[0] // unit.slab[0]
        spec = TensorSpec(unit.module, unit.tensor.dtype, unit.slab, unit.begin, unit.begin + unit.slab[0] * row_bytes)
        return self.extent_of_ref(TensorRef(self.shard.name, self.shard.data_start, spec))


def non_finite(rows: Tensor, shard: str, tensor: str, first_row: int) -> NonFiniteWeight:
    """Say where the first NaN or Inf of a row block stands, and how many the block holds."""
    count, index = reference.first_nonfinite(rows) or (0, ())
    where = [index[0] + first_row, *index[1:]] if index else []
    message = (
        f"NaN or Inf in a weight that is to be quantized: {count} in its first bad row block, first at index {where}"
    )
    problem = Problem(
        file=shard,
        tensor=tensor,
        kind="non-finite",
        message=message,
        way_out="repair the checkpoint or ignore the tensor",
    )
    return NonFiniteWeight([problem])


def encode_shard(
    shard: ShardPlan, read: ReadRange, write: WriteChunk, *, device: str = "cpu", should_stop: Callable[[], bool] = bool
) -> tuple[WeightRecord, ...]:
    """Compute one output shard and hand its data section to `write`, in the planned order and without the header.

    Raises:
        NonFiniteWeight: NaN or Inf in a weight that is to be quantized.
        Interrupted: `should_stop` said so between two row blocks.
    """
    layout = shard.layout()
    encoder = _Encoder(shard, read, write, device, should_stop)
    fused = {tensor.spec.name: tensor.fused for tensor in shard.tensors if tensor.fused}
    waiting = iter(layout.placed)
    current = next(waiting, None)
    records: list[WeightRecord] = []
    for number, unit in enumerate(layout.units):
        streams = current is not None and current.unit == number and current.spec is unit.outputs[0]
        sink = write if streams else _Holder(encoder.held, unit.outputs[0])
        if unit.scheme is None:
            _copy(encoder, unit, sink)
        else:
            records.append(_quantize(encoder, unit, unit.scheme, fused.get(unit.tensor.name, ()), sink))
        if streams:
            current = next(waiting, None)
        current = _flush(encoder, current, waiting)
    if current is not None:
        raise AssertionError(f"output {current.spec.name} was planned and never computed")
    return tuple(records)


def _flush(encoder: _Encoder, current: Placed | None, waiting: Iterator[Placed]) -> Placed | None:
    """Write what waits and is next in order."""
    while current is not None and current.spec.name in encoder.held:
        encoder.write(encoder.held.pop(current.spec.name))
        current = next(waiting, None)
    return current


@dataclass(slots=True)
class _Holder:
    """Collects the chunks of an output whose place comes later; only scalars and odd sizes get here."""

    held: dict[str, memoryview]
    spec: OutputSpec

    def __call__(self, chunk: memoryview) -> None:
        so_far = self.held.get(self.spec.name, memoryview(b""))
        self.held[self.spec.name] = memoryview(bytes(so_far) + bytes(chunk))


def _copy(encoder: _Encoder, unit: Unit, sink: WriteChunk) -> None:
    """Carry values over byte for byte, taking the expert's rows out of a stack where the unit is one."""
    if unit.tensor.shape and unit.outputs[0].shape != unit.tensor.shape:
        if unit.outputs[0].nbytes == 0:
            sink(memoryview(b""))
            return
        sink(reference.to_bytes(encoder.rows(unit, 0, unit.rows)))
        return
    start = encoder.shard.data_start + unit.begin
    sink(memoryview(b""))
    for begin in range(0, unit.tensor.nbytes, BLOCK_BYTES):
        view = encoder.view(min(BLOCK_BYTES, unit.tensor.nbytes - begin))
        encoder.read(encoder.shard.name, start + begin, view)
        sink(view)


def _quantize(
    encoder: _Encoder, unit: Unit, scheme: Scheme, fused: tuple[TensorRef, ...], sink: WriteChunk
) -> WeightRecord:
    """Stream the codes of one weight and hold its scales for the places after them."""
    whole = encoder.whole(unit, scheme, fused)
    codes, *rest = unit.outputs
    parts: dict[str, list[Tensor]] = {spec.param: [] for spec in rest}
    total: Statistics | None = None
    for first, rows in encoder.blocks(unit, scheme):
        encoded = reference.encode(
            rows, scheme.weights, format=scheme.format, scale_dtype=scale_dtype_for(unit.tensor.dtype), whole=whole
        )
        if not bool(encoded.finite):
            raise non_finite(rows, encoder.shard.name, unit.tensor.name, first)
        sink(reference.to_bytes(encoded.tensors[codes.param]))
        for param, tensor in encoded.tensors.items():
            if param != codes.param:
                parts[param].append(tensor)
        total = encoded.statistics if total is None else total.merge(encoded.statistics)
    if total is None:
        raise AssertionError(f"no row block in {unit!r}")
    for spec in rest:
        encoder.held[spec.name] = _finish(spec, parts[spec.param], unit, whole)
    return WeightRecord(unit.module, scheme.label, total)


def _finish(spec: OutputSpec, parts: list[Tensor], unit: Unit, whole: Extent | None) -> memoryview:
    """Put the row blocks of one output together, or make what belongs to the whole tensor."""
    if spec.param == "weight_shape":
        tensor = torch.tensor([unit.rows, unit.cols], dtype=torch.int64)
    elif spec.param == "weight_global_scale":
        if whole is None:
            raise AssertionError(f"{spec.name} needs the extent of its fused set")
        tensor = reference.global_scale(whole)
    else:
        tensor = parts[0] if spec.shape == (1,) else torch.cat(parts)
    data = reference.to_bytes(tensor)
    if data.nbytes != spec.nbytes or tuple(tensor.shape) != spec.shape:
        raise AssertionError(f"{spec}: computed shape {list(tensor.shape)}, {data.nbytes} bytes")
    return data
