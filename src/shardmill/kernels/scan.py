"""A pass over one tensor that looks for values which cannot be quantized; changes nothing and keeps nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from shardmill.core.dtypes import BITS
from shardmill.core.header import TensorSpec
from shardmill.core.receipt import NonFinite
from shardmill.kernels import cpu
from shardmill.kernels.lanes import BlockSize, CpuLane, Lane, TorchLane

_BLOCK_BYTES: Final = 4 << 20


def scan_tensor(spec: TensorSpec, read: Callable[[int, memoryview], None]) -> NonFinite | None:
    """Count the values that are not finite as float32, and find the first; None where all are.

    Args:
        read: fills the view with bytes of the tensor, from an offset counted from its first.
    """
    lane: Lane = CpuLane() if cpu.is_available() else TorchLane("cpu", BlockSize(_BLOCK_BYTES))
    width = BITS[spec.dtype] // 8
    count, first = 0, -1
    for offset in range(0, spec.nbytes, _BLOCK_BYTES):
        block = lane.staging(min(_BLOCK_BYTES, spec.nbytes - offset))
        read(offset, block)
        shape = (len(block) // width,)
        if math.isfinite(lane.measure(block, spec.dtype, shape).amax):
            continue
        found = lane.first_nonfinite(block, spec.dtype, shape)
        if found is not None:
            first = offset // width + found[1][0] if first < 0 else first
            count += found[0]
    return NonFinite(spec.name, count, index_of(first, spec.shape)) if count else None


def index_of(place: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Index of an element by its place in row-major order.

    >>> index_of(7, (2, 5))
    (1, 2)
    """
    found: list[int] = []
    for extent in reversed(shape):
        place, rest = divmod(place, extent)
        found.append(rest)
    return tuple(reversed(found))
