"""Lanes: what turns the bytes of one row block into quantized bytes, each with memory of its own.

A lane is used by one thread at a time. `CpuLane` is `kernels.cpu`, and imports no torch; `TorchLane` is
`kernels.reference` on a device, also where numba is missing and for schemes that the former does not know. Which of
them ran shows in no byte.

Source bytes are read straight into a lane's staging memory, which is page-locked where an accelerator fetches them from
it; every lane of an accelerator has a stream of its own, so one lane's copies overlap with the arithmetic of others.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from shardmill.core.dtypes import BITS, scale_dtype_for
from shardmill.core.layout import row_alignment
from shardmill.core.plan import DECODED, ShardPlan
from shardmill.core.scheme import Scheme
from shardmill.core.statistics import Extent, Statistics
from shardmill.errors import DeviceExhausted, show
from shardmill.kernels import cpu

if TYPE_CHECKING:
    from shardmill.kernels import reference

KERNELS_VARIABLE: Final = "SHARDMILL_KERNELS"
"""Environment variable that forces `cpu` or `reference`, for tests; without it the faster one that fits is taken."""
ImportanceOf = Callable[[Scheme, str], memoryview | None]
"""Gives how much errors in each input feature of a module count, as float32 bytes; None for all alike."""
CPU_BLOCK_BYTES: Final = 4 << 20
"""Source bytes of a row block on the CPU: what is read, hashed, quantized and written stays in the caches."""
DEVICE_BLOCK_BYTES: Final = 32 << 20
"""The same on an accelerator, which needs more to be busy.

`reference.encode` of a 16-bit block holds up to four times the block in device memory, rows included, and up to six
times for 4-bit floats. So a device needs room for lanes x block x 6: three lanes of 32 MiB take 576 MiB at most.
"""
_LEAST_BLOCK_BYTES: Final = 1 << 20
_NUMBERS: Final = {
    "BF16": (np.uint16, np.uint16(0x7F80)),
    "F16": (np.uint16, np.uint16(0x7C00)),
    "F32": (np.uint32, np.uint32(0x7F800000)),
    "F64": (np.uint64, np.uint64(0x7FF0000000000000)),
}
"""By dtype: as what its values are read, and the bits that are all set in NaN and Inf alone."""
_QPARAMS: Final = ("weight_scale", "weight_zero_point")
_KEPT_BYTES: Final = 64 << 20
"""Staging memory above this is given back after use."""


def alike(_scheme: Scheme, _module: str) -> memoryview | None:
    """All input features count alike."""
    return None


@dataclass(slots=True)
class BlockSize:
    """Target size of the row blocks of one device, in source bytes; shrinks when the device has no room."""

    nbytes: int

    def shrink(self) -> None:
        """Halve it from now on."""
        self.nbytes = max(_LEAST_BLOCK_BYTES, self.nbytes // 2)


@dataclass(frozen=True, slots=True)
class EncodedBlock:
    """A quantized row block as bytes, by param name; the codes last until the lane encodes again."""

    tensors: dict[str, memoryview]
    statistics: Statistics
    finite: bool
    """Whether every weight was finite as float32. If not, all else is unspecified."""
    global_scale: memoryview | None = None
    """Where it does not follow from the extent."""


class Lane(Protocol):
    """What encoding a shard asks of the arithmetic; blocks are raw bytes of a dtype and shape."""

    needs_staging: bool
    """Whether blocks have to lie in its staging memory."""

    def staging(self, length: int) -> memoryview:
        """Memory to read source bytes into; it lasts until the next call."""

    def measure(self, block: memoryview, dtype: str, shape: tuple[int, ...]) -> Extent:
        """Find the extent of a block; what is not finite shows in its `amax`."""

    def first_nonfinite(
        self, block: memoryview, dtype: str, shape: tuple[int, ...]
    ) -> tuple[int, tuple[int, ...]] | None:
        """Count the values that are not finite, and find the first."""

    def count_nonfinite(self, block: memoryview, dtype: str) -> tuple[int, int] | None:
        """Count NaN and Inf among values that are copied, and find the first; None for none."""

    def encode(
        self,
        block: memoryview,
        dtype: str,
        shape: tuple[int, int],
        scheme: Scheme,
        whole: Extent | None,
        importance: memoryview | None = None,
    ) -> EncodedBlock:
        """Quantize a row block; `importance` is float32 bytes, one number for each column."""

    def global_scale(self, extent: Extent) -> memoryview:
        """Choose the second-level scale of NVFP4."""


class CpuLane:
    """`kernels.cpu` on arrays."""

    needs_staging = False

    def __init__(self) -> None:
        self._workspace = cpu.Workspace()
        self._staging = np.empty(0, np.uint8)

    def staging(self, length: int) -> memoryview:
        """As `Lane.staging`."""
        if len(self._staging) < length or len(self._staging) > max(length, _KEPT_BYTES):
            self._staging = np.empty(length, np.uint8)
        return self._staging.data[:length]

    def measure(self, block: memoryview, dtype: str, shape: tuple[int, ...]) -> Extent:
        """As `Lane.measure`."""
        return cpu.measure(cpu.from_buffer(block, dtype, shape), dtype)

    def first_nonfinite(
        self, block: memoryview, dtype: str, shape: tuple[int, ...]
    ) -> tuple[int, tuple[int, ...]] | None:
        """As `Lane.first_nonfinite`."""
        return cpu.first_nonfinite(cpu.from_buffer(block, dtype, shape), dtype)

    def count_nonfinite(self, block: memoryview, dtype: str) -> tuple[int, int] | None:
        """As `Lane.count_nonfinite`; compiled, because nearly all values are fine."""
        rows = cpu.from_buffer(block, dtype, _flat(block, dtype))
        return None if cpu.is_finite(rows, dtype) else _count(block, dtype)

    def encode(
        self,
        block: memoryview,
        dtype: str,
        shape: tuple[int, int],
        scheme: Scheme,
        whole: Extent | None,
        importance: memoryview | None = None,
    ) -> EncodedBlock:
        """As `Lane.encode`."""
        found = cpu.encode(
            cpu.from_buffer(block, dtype, shape),
            dtype,
            scheme.weights,
            format=scheme.format,
            scale_dtype=scale_dtype_for(dtype),
            whole=whole,
            search=scheme.search,
            importance=None if importance is None else np.frombuffer(importance, np.float32),
            workspace=self._workspace,
        )
        tensors = {param: cpu.to_bytes(array) for param, array in found.tensors.items()}
        return EncodedBlock(tensors, found.statistics, found.finite)

    def global_scale(self, extent: Extent) -> memoryview:
        """As `Lane.global_scale`."""
        return cpu.to_bytes(cpu.global_scale(extent))


class TorchLane:
    """`kernels.reference` on a device."""

    needs_staging = True

    def __init__(self, device: str, size: BlockSize) -> None:
        import torch  # takes seconds to import, and the CPU needs none of it

        from shardmill.kernels import reference

        self._torch = torch
        self._reference = reference
        self._device = device
        self._size = size
        self._is_cpu = torch.device(device).type == "cpu"
        self._stream: AbstractContextManager[Any] = nullcontext() if self._is_cpu else torch.Stream(device=device)
        self._staging = self._locked(0)
        self._fetched = self._locked(0)

    def _locked(self, length: int) -> Any:
        return self._torch.empty(length, dtype=self._torch.uint8, pin_memory=not self._is_cpu)

    def staging(self, length: int) -> memoryview:
        """As `Lane.staging`."""
        if len(self._staging) < length or len(self._staging) > max(length, _KEPT_BYTES):
            self._staging = self._locked(length)
        view: memoryview = self._staging.numpy().data
        return view[:length]

    def _load(self, block: memoryview, dtype: str, shape: tuple[int, ...]) -> Any:
        return self._reference.from_buffer(block, dtype, shape, self._device)

    def measure(self, block: memoryview, dtype: str, shape: tuple[int, ...]) -> Extent:
        """Find the extent of a block; in halves, and smaller blocks from then on, where the device has no room for it.

        Raises:
            DeviceExhausted: not even one row finds room.
        """
        try:
            with self._stream:
                return self._reference.measure(self._load(block, dtype, shape))
        except self._torch.OutOfMemoryError:
            pass  # as in `encode`
        self._size.shrink()
        first = shape[0] // 2
        if not first:
            raise self._exhausted(dtype, shape)
        middle = len(block) // shape[0] * first
        upper = self.measure(block[:middle], dtype, (first, *shape[1:]))
        return upper.merge(self.measure(block[middle:], dtype, (shape[0] - first, *shape[1:])))

    def _exhausted(self, dtype: str, shape: tuple[int, ...]) -> DeviceExhausted:
        sizes = " x ".join(map(str, shape[1:]))
        message = f"device {show(self._device)} has no room for {shape[0]} rows of {sizes} {dtype}"
        return DeviceExhausted(f"{message}; free its memory or set --device cpu")

    def first_nonfinite(
        self, block: memoryview, dtype: str, shape: tuple[int, ...]
    ) -> tuple[int, tuple[int, ...]] | None:
        """As `Lane.first_nonfinite`; on the host, where the block is already."""
        return self._reference.first_nonfinite(self._reference.from_buffer(block, dtype, shape))

    def count_nonfinite(self, block: memoryview, dtype: str) -> tuple[int, int] | None:
        """As `Lane.count_nonfinite`; on the host, where the block is already."""
        rows = self._reference.from_buffer(block, dtype, _flat(block, dtype))
        return None if bool(self._torch.isfinite(rows).all()) else _count(block, dtype)

    def encode(
        self,
        block: memoryview,
        dtype: str,
        shape: tuple[int, int],
        scheme: Scheme,
        whole: Extent | None,
        importance: memoryview | None = None,
    ) -> EncodedBlock:
        """Quantize a row block; in halves, and smaller blocks from then on, where the device has no room for it.

        Raises:
            DeviceExhausted: not even the smallest block finds room.
        """
        try:
            with self._stream:
                rows = self._load(block, dtype, shape)
                found = self._reference.encode(
                    rows,
                    scheme.weights,
                    format=scheme.format,
                    scale_dtype=scale_dtype_for(dtype),
                    whole=whole,
                    search=scheme.search,
                    importance=None if importance is None else self._load(importance, "F32", (shape[1],)),
                )
                return self._fetch(found)
        except self._torch.OutOfMemoryError:
            pass  # the handler ends here, so that its traceback no longer holds the tensors of the attempt
        self._size.shrink()
        return self._encode_halves(block, dtype, shape, scheme, whole, importance)

    def _encode_halves(
        self,
        block: memoryview,
        dtype: str,
        shape: tuple[int, int],
        scheme: Scheme,
        whole: Extent | None,
        importance: memoryview | None,
    ) -> EncodedBlock:
        step = row_alignment(scheme.weights)
        first = -(-shape[0] // (2 * step)) * step
        if first >= shape[0]:
            raise self._exhausted(dtype, shape)
        middle = first * shape[1] * BITS[dtype] // 8
        upper = self.encode(block[:middle], dtype, (first, shape[1]), scheme, whole, importance)
        kept = {param: memoryview(bytes(view)) for param, view in upper.tensors.items()}
        lower = self.encode(block[middle:], dtype, (shape[0] - first, shape[1]), scheme, whole, importance)
        if not (upper.finite and lower.finite):
            return EncodedBlock({}, Statistics(), finite=False)
        has_one_scale = scheme.weights.strategy == "tensor"
        tensors = {
            param: kept[param] if has_one_scale and param in _QPARAMS else memoryview(b"".join((kept[param], view)))
            for param, view in lower.tensors.items()
        }
        return EncodedBlock(tensors, upper.statistics.merge(lower.statistics), finite=True)

    def _fetch(self, found: reference.Encoded) -> EncodedBlock:
        """Bring a block to the host: one copy into page-locked memory for the codes, the rest is small."""
        if not bool(found.finite):
            return EncodedBlock({}, found.statistics, finite=False)
        name, codes = next(iter(found.tensors.items()))
        tensors = {param: self._reference.to_bytes(tensor) for param, tensor in found.tensors.items() if param != name}
        if self._is_cpu:
            return EncodedBlock({name: self._reference.to_bytes(codes), **tensors}, found.statistics, finite=True)
        octets = codes.reshape(-1).view(self._torch.uint8)
        if len(self._fetched) < len(octets):
            self._fetched = self._locked(len(octets))
        self._fetched[: len(octets)].copy_(octets)
        view: memoryview = self._fetched.numpy().data
        return EncodedBlock({name: view[: len(octets)], **tensors}, found.statistics, finite=True)

    def global_scale(self, extent: Extent) -> memoryview:
        """As `Lane.global_scale`."""
        return self._reference.to_bytes(self._reference.global_scale(extent))


def _flat(block: memoryview, dtype: str) -> tuple[int]:
    return (block.nbytes * 8 // BITS[dtype],)


def _count(block: memoryview, dtype: str) -> tuple[int, int]:
    """How many values are NaN or Inf, and the number of the first; the dtype's own exponent tells."""
    numbers, inside = np.frombuffer(block, _NUMBERS[dtype][0]), _NUMBERS[dtype][1]
    found = (numbers & inside) == inside
    return int(found.sum()), int(found.argmax())


def gather(slab: memoryview, dtype: str, shape: tuple[int, int], rows: slice, *, transposed: bool) -> memoryview:
    """Copy rows of a matrix in memory, or of its transpose.

    Args:
        slab: the bytes of a matrix of `shape`, stored row by row.
        rows: of the matrix, or of its transpose where `transposed`.

    >>> gather(memoryview(bytes([1, 2, 3, 4])), "U8", (2, 2), slice(0, 1), transposed=True).tolist()
    [1, 3]
    """
    matrix = cpu.from_buffer(slab, dtype, shape)
    return cpu.to_bytes((matrix.T if transposed else matrix)[rows].copy(order="C"))


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
    wanted = {
        (shard.schemes[tensor.scheme], DECODED if tensor.decode else tensor.spec.dtype)
        for tensor in shard.tensors
        if tensor.scheme >= 0
    }
    fits = device == "cpu" and all(cpu.supports(scheme.weights, scheme.format, dtype) for scheme, dtype in wanted)
    found = fits and cpu.is_available()
    if forced and not found:
        raise ValueError(f"{KERNELS_VARIABLE} is `cpu`, which needs device `cpu` (found `{device}`) and numba")
    return not found
