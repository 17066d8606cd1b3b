"""What a reader makes of stored codes and scales, in NumPy and by the book; shares nothing with the package.

Formats as compressed-tensors lays them out; numbers as IEEE 754, OCP FP8 (E4M3) and OCP MX (E2M1, E8M0) define them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Stored = Mapping[str, tuple[str, tuple[int, ...], bytes]]
"""Dtype, shape and bytes by param name."""
Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

E2M1: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def e4m3(octets: Array) -> Floats:
    """Sign, 4 bits of exponent with bias 7, 3 of mantissa; all ones but the sign is NaN, and there is no Inf."""
    code = octets.astype(np.int64)
    sign, exponent, mantissa = np.where(code & 0x80, -1.0, 1.0), (code >> 3) & 15, code & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    value = sign * np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    return np.where((code & 0x7F) == 0x7F, np.nan, value)


def nearest(grid: Floats, values: Floats) -> Floats:
    """The nearest number of an ascending grid, of two the one at an even place; both ends hold what is beyond."""
    above = np.clip(np.searchsorted(grid, values), 1, len(grid) - 1)
    low, high = values - grid[above - 1], grid[above] - values
    found: Floats = grid[np.where((high < low) | ((high == low) & (above % 2 == 0)), above, above - 1)]
    return found


def nvfp4_activations(values: Floats, scale: float) -> Floats:
    """Activations as an engine with 4 bits has them: local scales of 16 in E4M3, below a global one, and E2M1."""
    groups = values.reshape(-1, 16)
    local = nearest(e4m3(np.arange(127)), scale * np.abs(groups).max(1, keepdims=True) / 6) / scale
    wanted = np.divide(np.abs(groups), local, out=np.zeros_like(groups), where=local > 0)
    return np.reshape(np.sign(groups) * nearest(E2M1[:8], wanted) * local, values.shape)


def e8m0(octets: Array) -> Floats:
    """A power of two with bias 127; 255 is NaN."""
    return np.where(octets == 255, np.nan, 2.0 ** (octets.astype(np.float64) - 127))


def numbers(dtype: str, shape: tuple[int, ...], data: bytes) -> Floats:
    """Values of a tensor of numbers."""
    octets = np.frombuffer(data, np.uint8)
    if dtype == "BF16":
        found = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    elif dtype == "F8_E4M3":
        found = e4m3(octets)
    elif dtype == "U8":
        found = e8m0(octets)
    else:
        kinds = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I8": "i1", "I64": "<i8"}
        found = np.frombuffer(data, kinds[dtype]).astype(np.float64)
    return found.reshape(shape)


def unpack(words: Array, bits: int, count: int) -> Array:
    """Fields of `bits` bits from the lowest up, one after another through the words of each row, with an offset."""
    octets = np.ascontiguousarray(words).astype("<u4").view(np.uint8)
    stream = np.unpackbits(octets, axis=1, bitorder="little")[:, : count * bits].astype(np.int64)
    fields = stream.reshape(len(words), count, bits) << np.arange(bits)
    found: Array = fields.sum(-1) - (1 << (bits - 1))
    return found


def nibbles(octets: Array) -> Floats:
    """Two E2M1 numbers in a byte, the first in its lower half."""
    return E2M1[np.stack((octets & 15, octets >> 4), axis=-1).reshape(len(octets), -1)]


def _spread(scale: Floats, rows: int, cols: int, block: tuple[int, int] | None) -> Floats:
    if scale.size == 1:
        return np.broadcast_to(scale.reshape(1, 1), (rows, cols))
    if block is not None:
        return scale.repeat(block[0], 0).repeat(block[1], 1)[:rows, :cols]
    return scale.repeat(-(-cols // scale.shape[1]), 1)[:, :cols]


def decode(stored: Stored, shape: tuple[int, int], bits: int, block: tuple[int, int] | None = None) -> Floats:
    """Values of a quantized weight."""
    rows, cols = shape
    name = next(name for name in ("weight_packed", "weight") if name in stored)
    dtype, code_shape, data = stored[name]
    scale = numbers(*stored["weight_scale"])
    if "weight_global_scale" in stored:
        scale = scale / numbers(*stored["weight_global_scale"]).reshape(1, 1)
    offsets: Floats = np.zeros(1)
    if name == "weight_packed" and dtype == "I32":
        codes: Array = unpack(np.frombuffer(data, "<i4").reshape(code_shape), bits, cols)
        if "weight_zero_point" in stored:
            packed = np.frombuffer(stored["weight_zero_point"][2], "<i4").reshape(stored["weight_zero_point"][1])
            offsets = _spread(unpack(packed.T, bits, rows).T.astype(np.float64), rows, cols, None)
    elif name == "weight_packed":
        codes = nibbles(np.frombuffer(data, np.uint8).reshape(code_shape))
    else:
        codes = numbers(dtype, code_shape, data)
    values: Floats = (codes - offsets) * _spread(scale, rows, cols, block)
    return values
