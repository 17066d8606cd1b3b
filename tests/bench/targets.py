"""What the figures are held against; they are shown beside them and never asserted."""

from __future__ import annotations

from typing import Final

SPEEDUP: Final = {
    "FP8_DYNAMIC": 12,
    "FP8_BLOCK": 12,
    "W8A8": 8,
    "W4A16": 10,
    "W4A16_ASYM": 10,
    "W8A16": 10,
    "NVFP4A16": 35,
    "MXFP4A16": 35,
    "MXFP8A16": 12,
}
"""Wall time of the reference over ours, at least."""
PRESETS: Final = tuple(SPEEDUP)
_FOUR_BITS: Final = ("W4A16", "W4A16_ASYM", "NVFP4A16", "MXFP4A16")
PLAN_TENSORS: Final = 1_000_000
PLAN_SECONDS: Final = 10
PLAN_BYTES: Final = 1_000_000_000


def over_floor(preset: str) -> float:
    """Processing over the copy floor, at most."""
    return 2.0 if preset in _FOUR_BITS else 1.5


def verdict(*, is_reached: bool) -> str:
    """How a figure stands to its target, as a word."""
    return "reached" if is_reached else "missed"
