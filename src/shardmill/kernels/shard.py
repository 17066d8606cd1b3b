"""One shard plan, unit by unit and row block by row block, through the arithmetic into a stream of output bytes.

Knows no paths: source bytes come from a `ReadRange`, output bytes go to a `WriteChunk` in exactly the planned order.
Memory is a small multiple of a row block, plus the scales of the weight in hand, plus one expert of a transposed stack.

On the CPU `kernels.cpu` does the work and torch is not imported; `kernels.reference` does it on accelerators, where
numba is missing, and for schemes that the former does not know. Which of them ran shows in no byte.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Final, Protocol

from shardmill.core.dtypes import BITS, scale_dtype_for
from shardmill.core.header import TensorSpec
from shardmill.core.layout import BLOCK_BYTES, OutputSpec, Placed, Unit, rows_per_block
from shardmill.core.plan import ShardPlan, TensorRef
from shardmill.core.receipt import WeightRecord
from shardmill.core.scheme import Scheme
from shardmill.core.statistics import Extent, Statistics
from shardmill.errors import Interrupted, NonFiniteWeight, Problem
from shardmill.kernels import cpu

KERNELS_VARIABLE: Final = "SHARDMILL_KERNELS"
"""Environment variable that forces `cpu` or `reference`, for tests; without it the faster one that fits is taken."""

WriteChunk = Callable[[memoryview], None]
"""Appends bytes to the data section of the output shard."""
ReadRange = Callable[[str, int, memoryview], None]
"""Fills the view with bytes of the named shard, from an offset counted from the start of its file."""


Rows = Any
"""A matrix in memory: an array of raw bits, or a torch tensor on its device. Only the kernels look into it."""


@dataclass(frozen=True, slots=True)
class _Block:
    """A quantized row block as bytes, by param name; the codes last until the next block."""

    tensors: dict[str, memoryview]
    statistics: Statistics
    finite: bool


class _Kernels(Protocol):
    """What encoding a shard asks of the arithmetic."""

    def load(self, view: memoryview, dtype: str, shape: tuple[int, ...]) -> Rows:
        """Read a matrix that may share memory with `view`."""

    def orient(self, stored: Rows, *, transposed: bool) -> Rows:
        """Copy a matrix or its transpose."""

    def every(self, matrix: Rows, rows: slice) -> Rows:
        """Gather rows."""

    def to_bytes(self, rows: Rows) -> memoryview:
        """Return the elements as bytes."""

    def measure(self, rows: Rows, dtype: str) -> Extent:
        """Find the extent of a matrix."""

    def first_nonfinite(self, rows: Rows, dtype: str) -> tuple[int, tuple[int, ...]] | None:
        """Count the values that are not finite, and find the first."""

    def encode(self, rows: Rows, dtype: str, scheme: Scheme, whole: Extent | None) -> _Block:
        """Quantize a row block."""

    def global_scale(self, extent: Extent) -> memoryview:
        """Choose the second-level scale of NVFP4."""


class _Fast:
    """`kernels.cpu` on arrays."""

    def __init__(self) -> None:
        self._workspace = cpu.Workspace()

    def load(self, view: memoryview, dtype: str, shape: tuple[int, ...]) -> Rows:
        return cpu.from_buffer(view, dtype, shape)

    def orient(self, stored: Rows, *, transposed: bool) -> Rows:
        return (stored.T if transposed else stored).copy(order="C")

    def every(self, matrix: Rows, rows: slice) -> Rows:
        return matrix[rows].copy(order="C")

    def to_bytes(self, rows: Rows) -> memoryview:
        return cpu.to_bytes(rows)

    def measure(self, rows: Rows, dtype: str) -> Extent:
        return cpu.measure(rows, dtype)

    def first_nonfinite(self, rows: Rows, dtype: str) -> tuple[int, tuple[int, ...]] | None:
        return cpu.first_nonfinite(rows, dtype)

    def encode(self, rows: Rows, dtype: str, scheme: Scheme, whole: Extent | None) -> _Block:
        found = cpu.encode(
            rows,
            dtype,
            scheme.weights,
            format=scheme.format,
            scale_dtype=scale_dtype_for(dtype),
            whole=whole,
            workspace=self._workspace,
        )
        tensors = {param: cpu.to_bytes(array) for param, array in found.tensors.items()}
        return _Block(tensors, found.statistics, found.finite)

    def global_scale(self, extent: Extent) -> memoryview:
        return cpu.to_bytes(cpu.global_scale(extent))


class _Reference:
    """`kernels.reference` on tensors."""

    def __init__(self, device: str) -> None:
        from shardmill.kernels import reference  # torch takes seconds to import, and the CPU needs none of it

        self._torch = reference
        self._device = device

    def load(self, view: memoryview, dtype: str, shape: tuple[int, ...]) -> Rows:
        return self._torch.from_buffer(view, dtype, shape, self._device)

    def orient(self, stored: Rows, *, transposed: bool) -> Rows:
        return stored.T.contiguous() if transposed else stored.clone()

    def every(self, matrix: Rows, rows: slice) -> Rows:
        return matrix[rows].contiguous()

    def to_bytes(self, rows: Rows) -> memoryview:
        return self._torch.to_bytes(rows)

    def measure(self, rows: Rows, dtype: str) -> Extent:  # noqa: ARG002 - a tensor knows it
        return self._torch.measure(rows)

    def first_nonfinite(self, rows: Rows, dtype: str) -> tuple[int, tuple[int, ...]] | None:  # noqa: ARG002 - as above
        return self._torch.first_nonfinite(rows)

    def encode(self, rows: Rows, dtype: str, scheme: Scheme, whole: Extent | None) -> _Block:
        found = self._torch.encode(
            rows, scheme.weights, format=scheme.format, scale_dtype=scale_dtype_for(dtype), whole=whole
        )
        if not bool(found.finite):
            return _Block({}, found.statistics, finite=False)
        tensors = {param: self._torch.to_bytes(tensor) for param, tensor in found.tensors.items()}
        return _Block(tensors, found.statistics, finite=True)

    def global_scale(self, extent: Extent) -> memoryview:
        return self._torch.to_bytes(self._torch.global_scale(extent))


def needs_torch(shard: ShardPlan, device: str) -> bool:
    """Whether encoding a shard on a device takes the reference kernels.

    Raises:
        ValueError: the environment asks for kernels that do not exist or do not fit.
    """
    forced = os.environ.get(KERNELS_VARIABLE, "")
    if forced not in ("", "cpu", "reference"):
        raise ValueError(f"{KERNELS_VARIABLE} must be `cpu` or `reference`, found {forced!r}")
    if forced == "reference":
        return True
    wanted = {(shard.schemes[tensor.scheme], tensor.spec.dtype) for tensor in shard.tensors if tensor.scheme >= 0}
    fits = device == "cpu" and all(cpu.supports(scheme.weights, scheme.format, dtype) for scheme, dtype in wanted)
    found = fits and cpu.is_available()
    if forced and not found:
        raise ValueError(f"{KERNELS_VARIABLE} is `cpu`, which needs device `cpu` (found `{device}`) and numba")
    return not found


@dataclass(slots=True)
class _Encoder:
    """The state of encoding one shard."""

    shard: ShardPlan
    read: ReadRange
    write: WriteChunk
    kernels: _Kernels
    should_stop: Callable[[], bool]
    buffer: bytearray = field(default_factory=bytearray)
    slab: tuple[int, Rows] | None = None
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

    def rows(self, unit: Unit, first: int, count: int) -> Rows:
        """Rows `first` to `first + count` of a unit in the source dtype, `[count, cols]`."""
        if unit.is_contiguous:
            offset = unit.begin + (unit.first + first) * unit.row_bytes
            return self._tensor(self.shard.name, self.shard.data_start + offset, unit.tensor.dtype, (count, unit.cols))
        matrix = self._slab(unit)
        begin = unit.first + first * unit.step
        return self.kernels.every(matrix, slice(begin, begin + count * unit.step, unit.step))

    def _slab(self, unit: Unit) -> Rows:
        """A whole expert, `[out, in]`."""
        if self.slab is None or self.slab[0] != unit.begin:
            stored = self._tensor(self.shard.name, self.shard.data_start + unit.begin, unit.tensor.dtype, unit.slab)
            self.slab = (unit.begin, self.kernels.orient(stored, transposed=unit.transposed))
        return self.slab[1]

    def _tensor(self, shard: str, offset: int, dtype: str, shape: tuple[int, ...]) -> Rows:
        view = self.view(math.prod(shape) * BITS[dtype] // 8)
        self.read(shard, offset, view)
        return self.kernels.load(view, dtype, shape)

    def blocks(self, unit: Unit, scheme: Scheme) -> Iterator[tuple[int, Rows]]:
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
            found = found.merge(self._measure(rows, ref.shard, spec, first))
        return found

    def _measure(self, rows: Rows, shard: str, spec: TensorSpec, first: int) -> Extent:
        extent = self.kernels.measure(rows, spec.dtype)
        if not math.isfinite(extent.amax):
            raise self.non_finite(rows, shard, spec, first)
        return extent

    def non_finite(self, rows: Rows, shard: str, spec: TensorSpec, first: int) -> NonFiniteWeight:
        """Say where the first NaN or Inf of a row block stands, and how many the block holds."""
        return _non_finite(self.kernels.first_nonfinite(rows, spec.dtype), shard, spec.name, first)

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
            found = found.merge(self._measure(rows, self.shard.name, unit.tensor, first))
        return found

    def _expert_extent(self, unit: Unit) -> Extent:
        """Both halves of one expert's stack share a global scale: engines merge gate and up."""
        row_bytes = unit.tensor.nbytes // unit.tensor.shape[0] // unit.slab[0]
        spec = TensorSpec(unit.module, unit.tensor.dtype, unit.slab, unit.begin, unit.begin + unit.slab[0] * row_bytes)
        return self.extent_of_ref(TensorRef(self.shard.name, self.shard.data_start, spec))


def _non_finite(found: tuple[int, tuple[int, ...]] | None, shard: str, tensor: str, first_row: int) -> NonFiniteWeight:
    count, index = found or (0, ())
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
    kernels: _Kernels = _Reference(device) if needs_torch(shard, device) else _Fast()
    encoder = _Encoder(shard, read, write, kernels, should_stop)
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
        sink(encoder.kernels.to_bytes(encoder.rows(unit, 0, unit.rows)))
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
    parts: dict[str, list[memoryview]] = {spec.param: [] for spec in rest}
    total: Statistics | None = None
    for first, rows in encoder.blocks(unit, scheme):
        encoded = encoder.kernels.encode(rows, unit.tensor.dtype, scheme, whole)
        if not encoded.finite:
            raise encoder.non_finite(rows, encoder.shard.name, unit.tensor, first)
        sink(encoded.tensors.pop(codes.param))
        for param, data in encoded.tensors.items():
            parts[param].append(data)
        total = encoded.statistics if total is None else total.merge(encoded.statistics)
    if total is None:
        raise AssertionError(f"no row block in {unit!r}")
    for spec in rest:
        encoder.held[spec.name] = _finish(encoder.kernels, spec, parts[spec.param], unit, whole)
    return WeightRecord(unit.module, scheme.label, total)


def _finish(
    kernels: _Kernels, spec: OutputSpec, parts: list[memoryview], unit: Unit, whole: Extent | None
) -> memoryview:
    """Put the row blocks of one output together, or make what belongs to the whole tensor."""
    if spec.param == "weight_shape":
        data = memoryview(struct.pack("<2q", unit.rows, unit.cols))
    elif spec.param == "weight_global_scale":
        if whole is None:
            raise AssertionError(f"{spec.name} needs the extent of its fused set")
        data = kernels.global_scale(whole)
    else:
        data = parts[0] if spec.shape == (1,) else memoryview(b"".join(parts))
    if data.nbytes != spec.nbytes:
        raise AssertionError(f"{spec}: computed {data.nbytes} bytes")
    return data
