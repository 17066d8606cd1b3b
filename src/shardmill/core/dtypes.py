"""The one table of safetensors dtypes: width in bits and what shardmill may do with them."""

from __future__ import annotations

BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Width of one element in bits, by safetensors dtype name."""

COMPUTABLE = frozenset({"F16", "BF16", "F32", "F64"})
"""Dtypes whose values are numbers that may be quantized."""

CODES = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E5M2", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "I32"})
"""Dtypes in which already quantized weights are stored."""


E4M3_MAX = 448.0
"""Largest number of F8_E4M3."""
E2M1_MAX = 6.0
"""Largest number of F4."""


def size_in_bytes(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Bytes that `shape` elements of `dtype` take, or None when they do not fill whole bytes.

    >>> size_in_bytes("BF16", (2, 3))
    12
    >>> size_in_bytes("F4", (3,)) is None
    True
    """
    bits = BITS[dtype]
    for extent in shape:
        bits *= extent
    whole, rest = divmod(bits, 8)
    return None if rest else whole


def scale_dtype_for(source_dtype: str) -> str:
    """Dtype in which FP8 and INT scales of a `source_dtype` weight are stored.

    BF16 keeps BF16; F16, F32 and F64 store F32. An F16 scale underflows for small weights; engines expect at most F32.

    >>> scale_dtype_for("BF16"), scale_dtype_for("F16"), scale_dtype_for("F64")
    ('BF16', 'F32', 'F32')
    """
    return "BF16" if source_dtype == "BF16" else "F32"
