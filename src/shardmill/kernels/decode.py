"""Values of weights that are quantized already: any rows of one, from what is stored of them to float32.

`core.encoding.Decode` says what is read and how codes are stored; everything here is plain NumPy on the host, so that
the values, and all that is made of them, are the same whatever computes later. Nothing is read but the rows asked for,
and what scales them; codes that are stored transposed are read in panels, and what surrounds a panel is passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shardmill.core.dtypes import BITS
from shardmill.core.encoding import (
    AWQ,
    CODES,
    E2M1,
    E4M3,
    GLOBAL_SCALE,
    GPTQ,
    INT8,
    ORDER,
    SCALE,
    SHAPE,
    ZERO_POINT,
    Decode,
    TensorRef,
)
from shardmill.errors import CheckpointInvalid, refuse, show

ReadRange = Callable[[str, int, memoryview], None]
Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

CHUNK_BYTES: Final = 4 << 20
"""Bytes that are read at a time of a tensor of which only some columns are wanted."""
_AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column within a word that the n-th four bits hold, low bits first."""
_WORD: Final = 32
_E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True)
class Stored:
    """What is stored of some rows of a weight."""

    rows: range
    """Of the weight, in steps of one, those in between included."""
    arrays: dict[str, Array]
    """By role, read-only; only as much of each as the rows need, and all of what is not divided by rows."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sum(array.nbytes for array in self.arrays.values())


def read_rows(decode: Decode, rows: range, read: ReadRange, peek: ReadRange | None = None) -> Stored:
    """Read what the values of some rows are made of.

    Args:
        peek: reads all that is no code; it may lie anywhere.

    Raises:
        CheckpointInvalid: the stored shape of the weight is another one.
    """
    whole = range(rows.start, rows[-1] + 1)
    arrays: dict[str, Array] = {}
    for role, ref in decode.parts:
        take = read if role == CODES or peek is None else peek
        if role == SHAPE:
            _check_shape(decode, ref, _read_all(ref, take))
        elif role in (GLOBAL_SCALE, ORDER):
            arrays[role] = _read_all(ref, take)
        elif decode.is_transposed:
            arrays[role] = _read_columns(ref, _columns(decode, role, ref, whole), take)
        else:
            arrays[role] = _read_rows(ref, _stored_rows(decode, role, ref, whole), take)
    return Stored(whole, arrays)


def _check_shape(decode: Decode, ref: TensorRef, found: Array) -> None:
    if found.reshape(-1).tolist() != [decode.rows, decode.cols]:
        message = f"expected the shape {[decode.rows, decode.cols]} of the codes, found {found.reshape(-1).tolist()}"
        raise refuse("codes-shape", message[:200], file=ref.shard, tensor=ref.spec.name)


def _stored_rows(decode: Decode, role: str, ref: TensorRef, rows: range) -> range:
    """Rows of a stored tensor that belong to rows of the weight."""
    if role == CODES:
        return rows
    shape = ref.spec.shape
    height = decode.rows // decode.tile[0] + bool(decode.rows % decode.tile[0])
    if role == ZERO_POINT and ref.spec.dtype == "I32":
        return range(rows.start * decode.bits // _WORD, -(-rows.stop * decode.bits // _WORD))
    if height == 1 and (not shape or shape[0] == 1):
        return range(1)
    return range(rows.start // decode.tile[0], (rows.stop - 1) // decode.tile[0] + 1)


def _columns(decode: Decode, role: str, ref: TensorRef, rows: range) -> range:
    """Columns of a tensor that is stored transposed; whole words of packed values."""
    if role == SCALE or (role == CODES and decode.codes == GPTQ):
        return rows
    begin = rows.start // _WORD * _WORD * decode.bits // _WORD
    return range(begin, min(-(-rows.stop * decode.bits // _WORD), ref.spec.shape[1]))


def _dtype(ref: TensorRef) -> np.dtype[Any]:
    return np.dtype(f"<u{max(1, BITS[ref.spec.dtype] // 8)}")


def _read_all(ref: TensorRef, read: ReadRange) -> Array:
    return _read_span(ref, 0, ref.spec.nbytes, read)


def _read_span(ref: TensorRef, begin: int, length: int, read: ReadRange) -> Array:
    data = np.empty(length, np.uint8)
    if length:
        read(ref.shard, ref.data_start + ref.spec.begin + begin, data.data)
    return data.view(_dtype(ref))


def _read_rows(ref: TensorRef, rows: range, read: ReadRange) -> Array:
    """Rows of a stored tensor of which the last dimension is at least bytes; `[rows, what a row holds]`.

    Rows of an expert stack are those of all experts.
    """
    count = _count_rows(ref)
    row_bytes = ref.spec.nbytes // count
    found = _read_span(ref, rows.start * row_bytes, len(rows) * row_bytes, read)
    return found.reshape(len(rows), -1)


def _count_rows(ref: TensorRef) -> int:
    """Rows of a stored matrix, vector or scalar; blocks of experts are `[E, N, ...]`."""
    shape = ref.spec.shape
    return shape[0] * shape[1] if len(shape) > 2 else shape[0] if shape else 1


def _read_columns(ref: TensorRef, columns: range, read: ReadRange) -> Array:
    """Columns of a stored matrix, `[rows, columns]`; the rest of its rows passes through a small buffer."""
    rows, width = ref.spec.shape
    if len(columns) == width:
        return _read_all(ref, read).reshape(rows, width)
    row_bytes = width * _dtype(ref).itemsize
    found = np.empty((rows, len(columns)), _dtype(ref))
    step = max(1, CHUNK_BYTES // row_bytes)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        chunk = _read_span(ref, first * row_bytes, count * row_bytes, read).reshape(count, width)
        found[first : first + count] = chunk[:, columns.start : columns.stop]
    return found


def decode_rows(decode: Decode, stored: Stored, rows: range) -> Floats:
    """Give the values of some rows in float32, `[rows, cols]`; what is NaN or Inf stays so.

    Args:
        rows: among those that `stored` was read for, in any step.
    """
    values = code_numbers(decode, stored, rows)
    zeros = zero_grid(decode, stored, rows)
    if zeros is not None:
        values -= _spread(decode, stored, zeros)
    scales = scale_grid(decode, stored, rows)
    return _scaled(decode, stored, values, scales)


def _within(stored: Stored, rows: range) -> slice:
    start = rows.start - stored.rows.start
    return slice(start, start + len(rows) * rows.step, rows.step)


@cache
def _e4m3() -> Floats:
    """Value by code."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, (code & 7).astype(np.float64)
    value = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10.0), mantissa * 2.0**-9)
    value = np.where((code & 127) == 127, np.nan, value)
    return np.where(code < 128, value, -value).astype(np.float32)


@cache
def _pairs(kind: str) -> npt.NDArray[np.uint64]:
    """Both values in a byte, the one in the low half first, as the bits of two float32."""
    code = np.arange(256)
    halves = np.stack([code & 15, code >> 4], axis=1)
    if kind == E2M1:
        grid = np.array([*_E2M1, *[-value for value in _E2M1]], np.float32)
        return np.ascontiguousarray(grid[halves]).view(np.uint64).reshape(256)
    return np.ascontiguousarray(halves.astype(np.float32)).view(np.uint64).reshape(256)


def _take(table: Array, index: Array) -> Array:
    return np.take(table, index, mode="clip")  # in this mode NumPy lets other threads work


def code_numbers(decode: Decode, stored: Stored, rows: range) -> Floats:
    """Codes as numbers, without what is added to them for storage."""
    held = stored.arrays[CODES]
    if decode.codes == GPTQ:
        found = _fields_down(held[:, _within(stored, rows)], decode.bits, decode.cols)
        return np.ascontiguousarray(found.T).astype(np.float32) - np.float32(decode.bias)
    if decode.codes == AWQ:
        return _awq_rows(held, stored, rows).astype(np.float32) - np.float32(decode.bias)
    block = np.ascontiguousarray(held[_within(stored, rows)])
    if decode.codes == E4M3:
        return _take(_e4m3(), block)
    if decode.codes == INT8:
        return block.view(np.int8).astype(np.float32)
    octets = block.view(np.uint8).reshape(len(rows), -1)
    if decode.codes == E2M1:
        return _take(_pairs(E2M1), octets).view(np.float32)[:, : decode.cols]
    return _unsigned(octets, decode.bits, decode.cols) - np.float32(decode.bias)


def _unsigned(octets: npt.NDArray[np.uint8], bits: int, cols: int) -> Floats:
    """Fields of a little-endian stream of bits per row."""
    if bits == 8:
        return octets[:, :cols].astype(np.float32)
    if bits == 4:
        return _take(_pairs("int"), octets).view(np.float32)[:, :cols]
    stream = np.unpackbits(octets, axis=1, bitorder="little")[:, : cols * bits].reshape(len(octets), cols, bits)
    return (stream @ (1 << np.arange(bits)).astype(np.float32)).astype(np.float32)


def _fields_down(words: Array, bits: int, count: int) -> npt.NDArray[np.uint8]:
    """Fields of a stream of bits that runs down each column of 32-bit words; `[count, columns]`."""
    words = words.astype(np.uint32)
    if _WORD % bits == 0:
        shifts = np.arange(0, _WORD, bits, dtype=np.uint32)
        fields = words[:, None, :] >> shifts[None, :, None] & np.uint32((1 << bits) - 1)
        return fields.astype(np.uint8).reshape(-1, words.shape[1])[:count]
    starts = np.arange(count) * bits
    low, shift = starts // _WORD, (starts % _WORD).astype(np.uint64)[:, None]
    following = np.minimum(low + 1, len(words) - 1)
    pair = words[low].astype(np.uint64) | words[following].astype(np.uint64) << np.uint64(_WORD)
    return (pair >> shift & np.uint64((1 << bits) - 1)).astype(np.uint8)


def _awq_rows(words: Array, stored: Stored, rows: range) -> npt.NDArray[np.uint8]:
    """Rows `[len(rows), K]` of words `[K, columns]` that hold eight columns each."""
    first = stored.rows.start // _WORD * _WORD
    begin, end = (rows.start - first) // 8, -(-(rows[-1] + 1 - first) // 8)
    block = words[:, begin:end].astype(np.uint32)
    fields = np.empty((block.shape[1], 8, block.shape[0]), np.uint8)
    for place, column in enumerate(_AWQ_ORDER):
        fields[:, column, :] = (block >> np.uint32(4 * place) & np.uint32(15)).T
    start = rows.start - first - 8 * begin
    return fields.reshape(-1, block.shape[0])[start : start + len(rows) * rows.step : rows.step]


def zero_grid(decode: Decode, stored: Stored, rows: range) -> Floats | None:
    """Zero points on the grid of the scales, `[rows or 1, groups]`, in the numbers of the codes."""
    held = stored.arrays.get(ZERO_POINT)
    if held is None:
        return None
    if decode.codes == AWQ:
        return _awq_rows(held, stored, rows).astype(np.float32)
    if decode.codes == GPTQ:
        return _gptq_zero_points(decode, held, stored, rows)
    if decode.ref(ZERO_POINT).spec.dtype == "I32":  # type: ignore[union-attr]  # it was read
        return _packed_zero_points(decode, held, stored, rows)
    found = held.view(np.int8).astype(np.float32)
    return _scale_rows(decode, stored, found, rows)


def _gptq_zero_points(decode: Decode, held: Array, stored: Stored, rows: range) -> Floats:
    """Zero points of GPTQ; those of its first layout are stored minus one.

    Where words hold whole fields, writers subtract one from each field of a word at once, borrows included; so it is
    undone the same way.
    """
    bits, mask = decode.bits, (1 << decode.bits) - 1
    words, by_field = held.T.astype(np.uint32), decode.zero_offset
    if by_field and _WORD % bits == 0:
        words, by_field = words + np.uint32(((1 << _WORD) - 1) // mask), 0
    fields = _fields_down(words, bits, held.shape[1] * _WORD // bits)
    start = rows.start - stored.rows.start // _WORD * _WORD
    found = fields[start : start + len(rows) * rows.step : rows.step]
    return (found + np.uint8(by_field) & np.uint8(mask)).astype(np.float32)


def _packed_zero_points(decode: Decode, held: Array, stored: Stored, rows: range) -> Floats:
    """Zero points of compressed-tensors, packed along the rows of the weight."""
    bits = decode.bits
    first_word = stored.rows.start * bits // _WORD
    octets = np.ascontiguousarray(held.T).view(np.uint8).reshape(held.shape[1], -1)
    skipped = stored.rows.start * bits - first_word * _WORD
    stream = np.unpackbits(octets, axis=1, bitorder="little")[:, skipped : skipped + len(stored.rows) * bits]
    fields = stream.reshape(len(octets), len(stored.rows), bits) @ (1 << np.arange(bits)).astype(np.float32)
    return np.asarray(fields.T[_within(stored, rows)] - np.float32(decode.bias), np.float32)


def scale_grid(decode: Decode, stored: Stored, rows: range) -> Floats:
    """Scales on their grid, `[rows or 1, groups]`, the global one taken in."""
    held, ref = stored.arrays[SCALE], decode.ref(SCALE)
    if decode.is_transposed:
        found = to_floats(held[:, _within(stored, rows)], ref.spec.dtype).T  # type: ignore[union-attr]  # it was read
    else:
        found = _scale_rows(decode, stored, to_floats(held, ref.spec.dtype), rows)  # type: ignore[union-attr]
    second, second_ref = stored.arrays.get(GLOBAL_SCALE), decode.ref(GLOBAL_SCALE)
    if second is None or second_ref is None:
        return found
    factor = to_floats(second, second_ref.spec.dtype).reshape(1, 1)
    with np.errstate(all="ignore"):
        return np.asarray(found / factor if decode.divides else found * factor, np.float32)


def _scale_rows(decode: Decode, stored: Stored, grid: Floats, rows: range) -> Floats:
    """The row of a grid of scales for each row of the weight; one where all share it."""
    if len(grid) == 1:
        return grid
    height = decode.tile[0]
    if height == 1:
        return grid[_within(stored, rows)]
    return np.asarray(grid[np.asarray(rows) // height - stored.rows.start // height], np.float32)


def _spread(decode: Decode, stored: Stored, grid: Floats) -> Floats:
    """A grid by groups as one by columns."""
    order = stored.arrays.get(ORDER)
    if order is not None:
        return np.asarray(grid[:, _group_numbers(order, grid.shape[1])], np.float32)
    if grid.shape[1] in (1, decode.cols):
        return grid
    return np.repeat(grid, decode.tile[1], axis=1)[:, : decode.cols]


def scale_index(stored: Stored, groups: int) -> Array:
    """Group of each column, where a tensor tells it."""
    return _group_numbers(stored.arrays[ORDER], groups)


def _group_numbers(order: Array, groups: int) -> Array:
    """Group of each column; -1, which means that nothing was ordered, gives groups in their order."""
    found = order.reshape(-1).view(np.int32 if order.itemsize == 4 else np.int64).astype(np.int64)
    if len(found) and (found == -1).all():
        return np.arange(len(found)) * groups // len(found)
    if len(found) and not (found.min() >= 0 and found.max() < groups):
        raise _bad_order(int(found.min()), int(found.max()), groups)
    return found


def _bad_order(low: int, high: int, groups: int) -> CheckpointInvalid:
    message = f"group numbers of columns reach from {low} to {high}, there are {groups} groups"
    return refuse("scale-shape", message, way_out=f"repair {show('g_idx')}")


def _scaled(decode: Decode, stored: Stored, values: Floats, scales: Floats) -> Floats:
    """Multiply by the scales, each rounded once."""
    width, groups = decode.tile[1], scales.shape[1]
    with np.errstate(all="ignore"):
        if ORDER not in stored.arrays and groups > 1 and groups * width == decode.cols:
            blocks = np.ascontiguousarray(values).reshape(len(values), groups, width)
            return np.multiply(blocks, scales[:, :, None], out=blocks).reshape(len(values), decode.cols)
        return np.asarray(values * _spread(decode, stored, scales), np.float32)


def to_floats(bits: Array, dtype: str) -> Floats:
    """Read stored scales as float32; exponents are powers of two, of which 255 is NaN.

    >>> to_floats(np.array([127, 130], np.uint8), "F8_E8M0").tolist()
    [1.0, 8.0]
    >>> to_floats(np.array([0x38], np.uint8), "F8_E4M3").tolist()
    [1.0]
    """
    if dtype in ("F8_E8M0", "U8"):
        shifted = bits.astype(np.uint32) << np.uint32(23)
        shifted = np.where(bits == 0, np.uint32(0x00400000), np.where(bits == 255, np.uint32(0x7FC00000), shifted))
        return shifted.astype(np.uint32).view(np.float32)
    if dtype == "F8_E4M3":
        return _take(_e4m3(), bits)
    if dtype == "BF16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]).astype(np.float32)


def to_bf16(values: Floats) -> npt.NDArray[np.uint16]:
    """Round finite float32 values to the nearest bf16, ties to even; gives its bits.

    >>> [hex(bits) for bits in to_bf16(np.array([1.0, 1.00390625, -0.0], np.float32)).tolist()]
    ['0x3f80', '0x3f80', '0x8000']
    """
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits + (bits >> np.uint32(16) & np.uint32(1)) + np.uint32(0x7FFF)
    return (rounded >> np.uint32(16)).astype(np.uint16)
