"""Codes of a quantized weight in the layout of another format, with the same values: nothing is decoded and rounded.

Works on the rows that `kernels.decode` has read. Where a condition on values does not hold, there is no result, and the
caller quantizes the decoded rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from shardmill.core.encoding import (
    CODES,
    E2M1,
    E4M3,
    GLOBAL_SCALE,
    GPTQ,
    ORDER,
    SCALE,
    Decode,
)
from shardmill.core.recode import is_raised
from shardmill.core.scheme import Scheme
from shardmill.core.statistics import Statistics
from shardmill.kernels.decode import Floats, Stored, code_numbers, scale_grid, scale_index, to_floats, zero_grid

Octets = npt.NDArray[np.uint8]

_ZERO_GROUP: Final = np.uint8(0x20)
"""E4M3 of 0.125, the scale of a group of zeros in NVFP4."""
_MX_NAN: Final = 255
_LARGEST: Final = 0x7E
"""E4M3 of 448; larger bytes are NaN or negative."""
_RAISE: Final = 8
"""Exponent of the largest power of two in E4M3: the local scale of the largest group."""
_SPAN: Final = 17
"""Exponents below it that E4M3 holds, subnormal ones included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What of the scales of a tensor or fused set decides whether its codes can stay; merges over row blocks."""

    globals: frozenset[float] = frozenset()
    """Global scales as divisors."""
    low: int = 255
    """Smallest exponent byte of a group that is not all zero."""
    high: int = -1
    is_sound: bool = True
    """Whether no local scale of NVFP4 is negative or NaN."""

    def merge(self, other: Traits) -> Traits:
        """Of both."""
        return Traits(
            globals=self.globals | other.globals,
            low=min(self.low, other.low),
            high=max(self.high, other.high),
            is_sound=self.is_sound and other.is_sound,
        )

    @classmethod
    def of(cls, decode: Decode, stored: Stored, rows: range) -> Self:
        """Of some rows."""
        if GLOBAL_SCALE in stored.arrays:
            local = _rows_of(stored.arrays[SCALE], stored, rows)
            divisor = float(global_divisor(decode, stored))
            return cls(globals=frozenset([divisor]), is_sound=not bool((local > _LARGEST).any()))
        if decode.codes != E2M1:
            return cls()
        exponents = _rows_of(stored.arrays[SCALE], stored, rows)
        used = exponents[_nonzero_groups(_rows_of(stored.arrays[CODES], stored, rows), exponents.shape[1])]
        return cls(low=int(used.min()), high=int(used.max())) if used.size else cls()


@dataclass(frozen=True, slots=True)
class Recoded:
    """Rows in another layout."""

    tensors: dict[str, npt.NDArray[Any]]
    """By param name, codes first."""
    global_scale: npt.NDArray[np.float32] | None = field(default=None)


def global_divisor(decode: Decode, stored: Stored) -> np.float32:
    """The global scale as compressed-tensors stores it: what local scales are divided by.

    A multiplier is turned into one, which rounds once: by at most one unit in the last place of float32.
    """
    ref = decode.ref(GLOBAL_SCALE)
    if ref is None:
        raise AssertionError(f"{decode.format} has no global scale")
    value = np.float32(to_floats(stored.arrays[GLOBAL_SCALE], ref.spec.dtype).reshape(-1)[0])
    with np.errstate(all="ignore"):
        return value if decode.divides else np.float32(np.float32(1) / value)


def _rows_of(array: npt.NDArray[Any], stored: Stored, rows: range) -> npt.NDArray[Any]:
    start = rows.start - stored.rows.start
    return array[start : start + len(rows) * rows.step : rows.step]


def _nonzero_groups(codes: npt.NDArray[Any], groups: int) -> npt.NDArray[np.bool_]:
    """Whether a group of E2M1 codes holds anything but zeros."""
    octets = codes.reshape(len(codes), groups, -1)
    return np.asarray(((octets & 0x77) != 0).any(axis=2))


def recode_rows(
    decode: Decode, stored: Stored, rows: range, scheme: Scheme, traits: Traits, *, as_is: bool = False
) -> Recoded | None:
    """Lay the codes of some rows out as a scheme has them; None where their values do not allow it.

    Args:
        traits: of the whole tensor, or of its fused set.
        as_is: take scales as they are, sound or not.
    """
    args = scheme.weights
    if args.type == "int":
        return _integers(decode, stored, rows, scheme, as_is=as_is)
    if decode.codes == E4M3:
        return _eights(decode, stored, rows, scheme, as_is=as_is)
    if is_raised(decode, scheme):
        return _raised(stored, rows, traits)
    codes = np.ascontiguousarray(_rows_of(stored.arrays[CODES], stored, rows)).reshape(len(rows), -1)
    scales = np.ascontiguousarray(_rows_of(stored.arrays[SCALE], stored, rows)).reshape(len(rows), -1)
    if not args.has_global_scale:
        if not as_is and bool((scales == _MX_NAN).any()):
            return None
        return Recoded({"weight_packed": codes, "weight_scale": scales})
    return _fours(decode, stored, codes, scales, traits, as_is=as_is)


def _fours(
    decode: Decode, stored: Stored, codes: Octets, scales: Octets, traits: Traits, *, as_is: bool
) -> Recoded | None:
    """NVFP4: all members of a fused set must have one global scale, and local scales must not be negative or NaN."""
    divisor = global_divisor(decode, stored)
    if not as_is:
        if len(traits.globals) > 1 or not traits.is_sound or not np.isfinite(divisor) or divisor <= 0:
            return None
        empty = scales == 0
        codes = np.where(np.repeat(empty, 8, axis=1)[:, : codes.shape[1]], np.uint8(0), codes)
        scales = np.where(empty, _ZERO_GROUP, scales)
    return Recoded({"weight_packed": codes, "weight_scale": scales}, np.array([divisor], np.float32))


def _raised(stored: Stored, rows: range, traits: Traits) -> Recoded | None:
    """MXFP4 as NVFP4: with a power of two as global scale, local scales are powers of two in E4M3.

    The largest exponent of the set becomes 2^8; the smallest may be 2^-9.
    """
    shift = _RAISE - (traits.high - 127)
    if traits.high < 0 or traits.high == _MX_NAN or traits.high - traits.low > _SPAN or not -126 <= shift <= 127:
        return None
    if traits.low < 1:
        return None  # a subnormal scale, which engines may take for zero
    exponents = np.ascontiguousarray(_rows_of(stored.arrays[SCALE], stored, rows)).reshape(len(rows), -1)
    codes = np.ascontiguousarray(_rows_of(stored.arrays[CODES], stored, rows)).reshape(len(rows), -1)
    used = _nonzero_groups(codes, exponents.shape[1])
    power = exponents.astype(np.int32) - traits.high + _RAISE
    normal = np.clip(power + 7, 0, 15).astype(np.uint8) << 3
    subnormal = np.uint8(1) << np.clip(power + 9, 0, 2).astype(np.uint8)
    local = np.where(used, np.where(power >= -6, normal, subnormal), _ZERO_GROUP).astype(np.uint8)
    kept = np.where(np.repeat(used, 16, axis=1), codes, np.uint8(0))
    divisor = np.array([2.0**shift], np.float32)
    return Recoded({"weight_packed": kept, "weight_scale": np.repeat(local, 2, axis=1)}, divisor)


def _eights(decode: Decode, stored: Stored, rows: range, scheme: Scheme, *, as_is: bool) -> Recoded | None:
    """FP8: the same codes, and scales in float32, or exponents as they are."""
    codes = np.ascontiguousarray(_rows_of(stored.arrays[CODES], stored, rows)).reshape(len(rows), -1)
    if not as_is and bool(((codes & 0x7F) == 0x7F).any()):
        return None
    if scheme.weights.is_mx:
        exponents = np.ascontiguousarray(_rows_of(stored.arrays[SCALE], stored, rows)).reshape(len(rows), -1)
        sound = not bool((exponents == _MX_NAN).any())
        return Recoded({"weight": codes, "weight_scale": exponents}) if sound or as_is else None
    ref = decode.ref(SCALE)
    if ref is None:
        return None
    grid = to_floats(stored.arrays[SCALE], ref.spec.dtype)
    height = decode.tile[0]
    if scheme.weights.strategy == "block":
        first = rows.start // height - stored.rows.start // height
        grid = grid[first : first + -(-len(rows) // height)]
    elif scheme.weights.strategy == "channel":
        grid = _rows_of(grid, stored, rows).reshape(len(rows), 1)
    if not as_is and not _are_sound(grid):
        return None
    return Recoded({"weight": codes, "weight_scale": np.ascontiguousarray(grid)})


def _are_sound(scales: Floats) -> bool:
    return bool((np.isfinite(scales) & (scales > 0)).all())


def _integers(decode: Decode, stored: Stored, rows: range, scheme: Scheme, *, as_is: bool) -> Recoded | None:
    """Integers, packed or one per byte; a symmetric scheme takes zero points that are all in the middle."""
    args, bits = scheme.weights, decode.bits
    middle = 1 << (bits - 1)
    grid = scale_grid(decode, stored, rows)
    if ORDER in stored.arrays and not _is_in_order(decode, stored, grid.shape[1]):
        return None
    if not as_is and not _are_sound(grid):
        return None
    zeros = zero_grid(decode, stored, rows)
    signed = code_numbers(decode, stored, rows)
    if zeros is not None and decode.bias == 0:  # codes and zero points are unsigned
        signed, zeros = signed - np.float32(middle), zeros - np.float32(middle)
    if args.symmetric and zeros is not None:
        if bool(zeros.any()):
            return None
        zeros = None
    fields = signed.astype(np.int16)
    scales = np.ascontiguousarray(np.broadcast_to(grid, (len(rows), grid.shape[1])), np.float32)
    if scheme.format != "pack-quantized":
        if zeros is not None or not args.symmetric:
            return None
        return Recoded({"weight": fields.astype(np.int8), "weight_scale": scales})
    found: dict[str, npt.NDArray[Any]] = {
        "weight_packed": pack_words((fields + middle).astype(np.uint8), bits),
        "weight_scale": scales,
    }
    if not args.symmetric:
        points = np.zeros_like(scales) if zeros is None else np.broadcast_to(zeros, scales.shape)
        unsigned = (points + np.float32(middle)).astype(np.uint8)
        found["weight_zero_point"] = np.ascontiguousarray(pack_words(np.ascontiguousarray(unsigned.T), bits).T)
    return Recoded(found)


def _is_in_order(decode: Decode, stored: Stored, groups: int) -> bool:
    if decode.codes != GPTQ:
        return False
    columns = scale_index(stored, groups)
    return bool((columns == np.arange(decode.cols) // decode.tile[1]).all())


def pack_words(fields: Octets, bits: int) -> npt.NDArray[np.uint32]:
    """Pack each row as one little-endian stream of bits in 32-bit words; unused bits are zero.

    >>> [hex(word) for word in pack_words(np.arange(9, dtype=np.uint8)[None], 4)[0].tolist()]
    ['0x76543210', '0x8']
    """
    rows, count = fields.shape
    words = -(-count * bits // 32)
    stream = np.zeros((rows, words * 32), np.uint8)
    stream[:, : count * bits] = (fields[:, :, None] >> np.arange(bits, dtype=np.uint8) & 1).reshape(rows, -1)
    return np.packbits(stream, axis=1, bitorder="little").view("<u4")


def statistics(values: Floats) -> Statistics:
    """Of weights that lose nothing."""
    wide = values.astype(np.float64)
    return Statistics(
        count=values.size,
        squared_weight=float(np.square(wide, out=wide).sum()),
        amax=float(np.abs(values).max(initial=np.float32(0))),
        nonzero=int(np.count_nonzero(values)),
    )
