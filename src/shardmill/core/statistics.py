"""What is measured about a weight while it is quantized: its extent before, its error after.

Both are monoids: merging the values of row blocks gives the value of the tensor, in whatever order the blocks come.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Self

SIGNIFICANT_DIGITS: Final = 6
"""Digits that the JSON of statistics keeps: sums of floats depend on the number of threads beyond that."""

_COUNTS: Final = frozenset({"count", "clipped", "zeroed", "nonzero"})


def _larger(first: float, second: float) -> float:
    """Return the larger number; NaN counts as larger than any."""
    return first if math.isnan(first) or first >= second else second


def _rounded(value: float) -> float | None:
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None


def _float(value: object) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"expected a number, found {type(value).__name__}")
    return float(value)


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected an integer, found {type(value).__name__}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """Range of the values of a tensor or of a fused set, zero included; float32 values.

    A NaN among the values makes `amax` NaN. `Extent()` is the neutral element of `merge`.

    >>> Extent(low=-2.0, high=1.5).amax
    2.0
    """

    low: float = 0.0
    """`min(0, smallest value)`."""
    high: float = 0.0
    """`max(0, largest value)`."""

    @property
    def amax(self) -> float:
        """Largest magnitude."""
        return _larger(self.high, -self.low)

    def merge(self, other: Extent) -> Extent:
        """Return the extent of both.

        >>> Extent(low=-1.0).merge(Extent(high=3.0))
        Extent(low=-1.0, high=3.0)
        """
        return Extent(low=-_larger(-self.low, -other.low), high=_larger(self.high, other.high))

    def to_json(self) -> dict[str, float | None]:
        """Describe the extent exactly, because bytes depend on it; what is not finite becomes None.

        >>> Extent(low=-0.1, high=float("inf")).to_json()
        {'low': -0.1, 'high': None}
        """
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote; None becomes NaN. Other keys are ignored.

        Raises:
            KeyError: a number is missing.
            TypeError: a number is something else.

        >>> Extent.from_json({"low": -0.1, "high": 0.0})
        Extent(low=-0.1, high=0.0)
        """
        return cls(low=_float(data["low"]), high=_float(data["high"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What quantization did to the elements of a weight; sums over its row blocks.

    `Statistics()` is the neutral element of `merge`.
    """

    count: int = 0
    squared_error: float = 0.0
    """Sum of `(weight - dequantized)²`."""
    squared_weight: float = 0.0
    """Sum of `weight²`."""
    max_error: float = 0.0
    amax: float = 0.0
    clipped: int = 0
    """Elements that saturation changed by more than rounding may: see `kernels.reference.clip_bounds`."""
    zeroed: int = 0
    """Elements that were not zero and are zero when dequantized."""
    nonzero: int = 0

    @property
    def relative_error(self) -> float:
        """Square root of squared error over squared weight; 0 for a weight without error.

        >>> Statistics(count=2, squared_error=0.04, squared_weight=4.0).relative_error
        0.1
        """
        if self.squared_error == 0:
            return 0.0
        return math.sqrt(self.squared_error / self.squared_weight) if self.squared_weight else math.inf

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio in decibels; infinite for a weight without error.

        >>> Statistics(count=2, squared_error=0.04, squared_weight=4.0).sqnr_db
        20.0
        """
        error = self.relative_error
        if error == 0:
            return math.inf
        return -20 * math.log10(error)

    def merge(self, other: Statistics) -> Statistics:
        """Return the statistics of the elements of both.

        >>> Statistics(count=2, amax=1.0).merge(Statistics(count=3, amax=0.5)).count
        5
        """
        return Statistics(
            count=self.count + other.count,
            squared_error=self.squared_error + other.squared_error,
            squared_weight=self.squared_weight + other.squared_weight,
            max_error=_larger(self.max_error, other.max_error),
            amax=_larger(self.amax, other.amax),
            clipped=self.clipped + other.clipped,
            zeroed=self.zeroed + other.zeroed,
            nonzero=self.nonzero + other.nonzero,
        )

    def to_json(self) -> dict[str, int | float | None]:
        """Describe the statistics; floats keep six significant digits, and None stands for what is not finite.

        >>> Statistics(count=1, squared_weight=1 / 3).to_json()["squared_weight"]
        0.333333
        """
        return {name: value if isinstance(value, int) else _rounded(value) for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote; None becomes NaN. Other keys are ignored.

        Raises:
            KeyError: a number is missing.
            TypeError: a number is something else.

        >>> Statistics.from_json(Statistics(count=7, amax=0.5).to_json()) == Statistics(count=7, amax=0.5)
        True
        """
        numbers: dict[str, Any] = {f.name: (_count if f.name in _COUNTS else _float)(data[f.name]) for f in fields(cls)}
        return cls(**numbers)
