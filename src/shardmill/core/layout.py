"""Exact output layout: names, dtypes, shapes and byte offsets of everything a shard plan will write.

No data is needed for it: all of it follows from the headers and the decisions. The order is fixed here, so that a shard
can be streamed with its header first: tensors in source order, codes before their scales; tensors whose sizes would
break the alignment of what follows come after the others, and scalars come last.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain
from math import lcm
from typing import Final, NamedTuple

from shardmill.core.dtypes import BITS, scale_dtype_for, size_in_bytes
from shardmill.core.encoding import Decode
from shardmill.core.header import (
    ALIGNMENT,
    WRITTEN_METADATA,
    TensorSpec,
    encode_entries,
    encode_header,
    encoded_length,
)
from shardmill.core.input_scale import PARAM as INPUT_SCALE
from shardmill.core.scheme import Scheme, WeightArgs

WORD_BITS: Final = 32
_SCALAR_BYTES: Final = 16


class OutputSpec(NamedTuple):
    """One tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of data; every dtype that is written fills whole bytes."""
        return size_in_bytes(self.dtype, self.shape) or 0

    @property
    def param(self) -> str:
        """What stands after the last dot."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One output weight and where its values lie in the source tensor.

    The slab is a matrix of the source, stored row by row; the unit is rows `first`, `first + step`, ... of the slab or
    of its transpose. A copied tensor is a unit without scheme whose slab is never looked into.
    """

    tensor: TensorSpec
    module: str
    rows: int
    cols: int
    outputs: tuple[OutputSpec, ...]
    scheme: Scheme | None = None
    begin: int
    """First byte of the slab, counted from the start of the source's data section."""
    slab: tuple[int, int]
    first: int = 0
    step: int = 1
    transposed: bool = False
    decode: Decode | None = None
    """What its values are made of where the source holds codes; the slab is what that gives then."""

    @property
    def is_contiguous(self) -> bool:
        """Whether the unit's rows are one byte range of the source."""
        return not self.transposed and self.step == 1

    @property
    def row_bytes(self) -> int:
        """Source bytes of one row of the unit."""
        return self.cols * BITS[self.tensor.dtype] // 8


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)


def row_alignment(args: WeightArgs) -> int:
    """Rows whose multiple a row block must start at: words of packed zero points, and whole scale blocks.

    >>> row_alignment(WeightArgs()), row_alignment(WeightArgs(type="float", strategy="block", block_structure=(48, 1)))
    (32, 96)
    """
    return lcm(WORD_BITS, args.block_structure[0] if args.block_structure else 1)


def rows_per_block(unit: Unit, args: WeightArgs, block_bytes: int) -> int:
    """Rows of one row block: about `block_bytes` of source, a multiple of `row_alignment`."""
    step = row_alignment(args)
    return max(step, block_bytes // max(1, unit.row_bytes) // step * step)


class RowSpan(NamedTuple):
    """A byte range of a source shard whose rows are worked on in whole steps; counted from the start of its file."""

    begin: int
    end: int
    step: int
    """Bytes; a row block begins at a multiple of it."""


def row_spans(units: Iterable[Unit], data_start: int) -> list[RowSpan]:
    """Where the rows of weights lie that are quantized as they are, in the order of the file."""
    spans = []
    for unit in units:
        if unit.scheme is not None and unit.is_contiguous and unit.decode is None:
            begin = data_start + unit.begin + unit.first * unit.row_bytes
            step = row_alignment(unit.scheme.weights) * unit.row_bytes
            spans.append(RowSpan(begin, begin + unit.rows * unit.row_bytes, step))
    return sorted(spans)


def scale_shape(args: WeightArgs, rows: int, cols: int) -> tuple[int, ...]:
    """Shape of `weight_scale` for a `[rows, cols]` weight.

    >>> scale_shape(WeightArgs(type="float", strategy="block", block_structure=(128, 128)), 200, 128)
    (2, 1)
    """
    if args.strategy == "tensor":
        return (1,)
    if args.strategy == "channel":
        return (rows, 1)
    if args.block_structure:
        return (_ceil(rows, args.block_structure[0]), _ceil(cols, args.block_structure[1]))
    return (rows, cols // (args.group_size or 1))


def _scale_dtype(args: WeightArgs, source_dtype: str) -> str:
    return {"uint8": "U8", "float8_e4m3fn": "F8_E4M3"}.get(args.scale_dtype or "") or scale_dtype_for(source_dtype)


def _codes(scheme: Scheme, rows: int, cols: int) -> tuple[str, str, tuple[int, ...]]:
    args = scheme.weights
    if scheme.format == "pack-quantized":
        return "weight_packed", "I32", (rows, _ceil(cols * args.num_bits, WORD_BITS))
    if scheme.format in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        return "weight_packed", "U8", (rows, cols // 2)
    return "weight", "I8" if args.type == "int" else "F8_E4M3", (rows, cols)


GENERATED_PARAMS: Final = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_global_scale",
    "weight_shape",
    INPUT_SCALE,
)
"""Params that replace a weight, beside `weight` itself."""


def quantized_outputs(module: str, scheme: Scheme, rows: int, cols: int, source_dtype: str) -> tuple[OutputSpec, ...]:
    """Tensors that replace a `[rows, cols]` weight, codes first.

    >>> from shardmill.core.scheme import parse_scheme
    >>> [o.param for o in quantized_outputs("m", parse_scheme("W4A16_ASYM"), 64, 128, "BF16")]
    ['weight_packed', 'weight_scale', 'weight_zero_point', 'weight_shape']
    """
    prefix = f"{module}." if module else ""
    return tuple(
        [OutputSpec(prefix + param, dtype, shape) for param, dtype, shape in _params(scheme, rows, cols, source_dtype)]
    )


@lru_cache(maxsize=4096)
def _params(scheme: Scheme, rows: int, cols: int, source_dtype: str) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """Param, dtype and shape of what replaces a weight."""
    args = scheme.weights
    scales = scale_shape(args, rows, cols)
    found = [_codes(scheme, rows, cols), ("weight_scale", _scale_dtype(args, source_dtype), scales)]
    packed = scheme.format == "pack-quantized"
    if not args.symmetric:
        in_words = packed and args.strategy in ("group", "channel")
        shape = (_ceil(rows * args.num_bits, WORD_BITS), *scales[1:]) if in_words else scales
        found.append(("weight_zero_point", "I32" if in_words else "I8", shape))
    if args.has_global_scale:
        found.append(("weight_global_scale", "F32", (1,)))
    if scheme.needs_input_scale:
        found.append((INPUT_SCALE, "F32", (1,)))
    if packed:
        found.append(("weight_shape", "I64", (2,)))
    return tuple(found)


class Placed(NamedTuple):
    """An output tensor at its place in the data section of the output shard."""

    spec: OutputSpec
    begin: int
    end: int
    unit: int
    """Position in the shard's sequence of units."""


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Everything about the bytes of one output shard but the data."""

    units: tuple[Unit, ...]
    """In the order in which they are encoded."""
    placed: tuple[Placed, ...]
    """In the order in which they are written."""

    @property
    def data_bytes(self) -> int:
        """Bytes of the data section."""
        return self.placed[-1].end if self.placed else 0

    def header(self) -> bytes:
        """Length and JSON head of the file."""
        rows = ((p.spec.name, p.spec.dtype, p.spec.shape, p.begin, p.end) for p in self.placed)
        return encode_header(rows, WRITTEN_METADATA)


class Pattern(NamedTuple):
    """The outputs of one weight but for their names: the same for every weight of one kind."""

    sizes: tuple[int, ...]
    """Bytes of each output."""
    widths: tuple[int, ...]
    """Bits of one element of each output."""
    scalars: tuple[bool, ...]
    """Whether an output stands at the end of the shard."""
    body_sizes: tuple[int, ...]
    """Bytes of each output that is no scalar."""
    scalar_sizes: tuple[tuple[int, int], ...]
    """Bits of one element, and bytes, of each scalar."""
    is_ragged: bool
    """Whether what follows would not be aligned."""
    header_bytes: int
    """What its entries take in the header, without names and numbers of offsets."""


@lru_cache(maxsize=4096)
def _pattern(kinds: tuple[tuple[str, tuple[int, ...]], ...]) -> Pattern:
    sizes = tuple(size_in_bytes(dtype, shape) or 0 for dtype, shape in kinds)
    scalars = tuple(size <= _SCALAR_BYTES and size % ALIGNMENT != 0 for size in sizes)
    widths = tuple(BITS[dtype] for dtype, _ in kinds)
    rows = list(zip(widths, sizes, scalars, strict=True))
    entries = [encode_entries([("", dtype, shape, 0, 0)])[""] for dtype, shape in kinds]
    return Pattern(
        sizes=sizes,
        widths=widths,
        scalars=scalars,
        body_sizes=tuple(size for _, size, is_last in rows if not is_last),
        scalar_sizes=tuple((width, size) for width, size, is_last in rows if is_last),
        is_ragged=any(size % ALIGNMENT and not scalar for size, scalar in zip(sizes, scalars, strict=True)),
        header_bytes=sum(len(f",{entry}") - len("00") for entry in entries),
    )


def pattern_of(outputs: Iterable[OutputSpec]) -> Pattern:
    """Describe outputs without their names."""
    return _pattern(tuple([(spec.dtype, spec.shape) for spec in outputs]))


def _order(patterns: Sequence[Pattern]) -> list[int]:
    """Positions of weights in the order in which they are encoded: ragged ones last, the widest of them first."""
    aligned = [n for n, pattern in enumerate(patterns) if not pattern.is_ragged]
    ragged = [n for n, pattern in enumerate(patterns) if pattern.is_ragged]
    return aligned + sorted(ragged, key=lambda n: max(patterns[n].widths, default=0), reverse=True)


def place(units: Sequence[Unit]) -> ShardLayout:
    """Order units and lay their outputs out without holes."""
    patterns = [pattern_of(unit.outputs) for unit in units]
    order = _order(patterns)
    body: list[tuple[OutputSpec, int, int]] = []
    scalars: list[tuple[int, tuple[OutputSpec, int, int]]] = []
    for number, position in enumerate(order):
        sizes, widths, last, *_ = patterns[position]
        for spec, size, width, is_last in zip(units[position].outputs, sizes, widths, last, strict=True):
            if is_last:
                scalars.append((width, (spec, size, number)))
            else:
                body.append((spec, size, number))
    scalars.sort(key=lambda entry: -entry[0])
    return ShardLayout(
        tuple([units[position] for position in order]), tuple(_offsets([*body, *[row for _, row in scalars]]))
    )


def _offsets(entries: Iterable[tuple[OutputSpec, int, int]]) -> Iterator[Placed]:
    begin = 0
    for spec, size, unit in entries:
        end = begin + size
        yield Placed(spec, begin, end, unit)
        begin = end


def shard_bytes(patterns: Sequence[Pattern], names_bytes: int) -> int:
    """Size of the output shard whose weights have these patterns, as `place` would lay it out.

    Args:
        names_bytes: what the names of all outputs take in the header, without quotes; see `text_bytes`.
    """
    ordered = [patterns[position] for position in _order(patterns)]
    sizes = list(chain.from_iterable([pattern.body_sizes for pattern in ordered]))
    scalars = list(chain.from_iterable([pattern.scalar_sizes for pattern in ordered]))
    scalars.sort(key=lambda entry: -entry[0])
    ends = list(accumulate(sizes + [size for _, size in scalars]))
    digits = _digits([0, *ends[:-1]]) + _digits(ends) if ends else 0
    entries = sum([pattern.header_bytes for pattern in ordered])
    return encoded_length(names_bytes + entries + digits, WRITTEN_METADATA) + (ends[-1] if ends else 0)


def _digits(ascending: Sequence[int]) -> int:
    """Decimal digits of all numbers together."""
    found, power = len(ascending), 10
    while ascending[-1] >= power:
        found += len(ascending) - bisect_left(ascending, power)
        power *= 10
    return found
