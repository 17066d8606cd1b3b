"""What is measured about a finished result: whether scales are sound, and what is left of a weight.

Neighbours: `ct_adapter` dequantizes, `core.statistics` holds the figures. Nothing here knows how a weight was
quantized.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from shardmill.core.statistics import Statistics
from shardmill.kernels.reference import from_buffer, sum_of_squares

_MX_NAN: Final = 255


def scale_defect(data: bytearray | memoryview, dtype: str) -> str | None:
    """Say what is wrong with stored scales, if anything: each must be finite and above zero.

    >>> scale_defect(bytearray.fromhex("0000803f"), "F32") is None
    True
    >>> scale_defect(bytearray([127, 255]), "U8")
    '1 of 2 exponents are 255, which is NaN'
    """
    size = memoryview(data).nbytes
    if dtype == "U8":
        bad = int((from_buffer(data, "U8", (size,)) == _MX_NAN).sum())
        return f"{bad} of {size} exponents are {_MX_NAN}, which is NaN" if bad else None
    values = as_values(data, dtype).to(torch.float32)
    bad = int((~(torch.isfinite(values) & (values > 0))).sum())
    return f"{bad} of {values.numel()} scales are not finite and above zero" if bad else None


def as_values(data: bytearray | memoryview, dtype: str) -> Tensor:
    """Read stored bytes as a flat tensor.

    >>> as_values(bytearray(8), "I64").tolist()
    [0]
    """
    return from_buffer(data, dtype, (-1,)) if memoryview(data).nbytes else from_buffer(data, dtype, (0,))


def widen_scales(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn 16-bit scales into float32 ones of the same value, so that dequantizing rounds nothing."""
    return {
        param: tensor.to(torch.float32) if param == "weight_scale" and tensor.dtype in _SHORT else tensor
        for param, tensor in tensors.items()
    }


_SHORT: Final = (torch.bfloat16, torch.float16)


def compare(weight: Tensor, restored: Tensor) -> Statistics:
    """Measure what is left of a weight; both `[rows, cols]`, in any float dtype.

    Only count and squares are filled in: they are what a relative error needs.

    >>> compare(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]])).relative_error
    0.8
    """
    exact = weight.to(torch.float32)
    return Statistics(
        count=weight.numel(),
        squared_error=float(sum_of_squares(exact - restored.to(torch.float32))),
        squared_weight=float(sum_of_squares(exact)),
    )


def histogram(values: Tensor, reach: float, counts: Sequence[int]) -> list[int]:
    """Add values to the counts of equally wide bins from `-reach` to `reach`; what lies beyond counts as at the end.

    >>> histogram(torch.tensor([-1.0, 0.0, 0.1, 5.0]), 1.0, [0, 0, 0])
    [1, 2, 1]
    """
    if not 0 < reach < math.inf:
        middle = len(counts) // 2
        return [count + (values.numel() if number == middle else 0) for number, count in enumerate(counts)]
    inside = values.to(torch.float32).clamp(-reach, reach)
    found = torch.histc(inside, bins=len(counts), min=-reach, max=reach)
    return [count + int(more) for count, more in zip(counts, found.tolist(), strict=True)]
