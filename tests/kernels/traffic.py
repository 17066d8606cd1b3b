"""Count what torch operations move in memory: on an accelerator that is what their time depends on.

Counted are bytes, so the figures are the same on every machine. A broadcast operand counts once, a view costs nothing,
and operands that an elementwise operation promotes are converted on the way, as accelerators do. Reductions that sum
in another dtype than they read first copy their operand, unless they widen a 16-bit float to float32.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_REDUCTIONS = frozenset({"aten::sum", "aten::linalg_vector_norm", "aten::mean", "aten::prod"})
_SHORT_FLOATS = (torch.bfloat16, torch.float16)


class Traffic(TorchDispatchMode):
    """Counts the operations that run inside a `with` block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read = 0
        """Bytes."""
        self.written = 0
        """Bytes."""
        self.peak = 0
        """Largest sum of bytes that were allocated inside the block and alive at one time."""
        self.by_operation: dict[str, int] = {}
        """Bytes read and written, by the name of the operation."""
        self.to_host = 0
        """Times that a number was asked for, each of which waits for an accelerator."""
        self._live = 0
        self._known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation and count it."""
        named = dict(kwargs or {})
        found = func(*args, **named)
        name = func._schema.name
        if name == "aten::_local_scalar_dense":
            self.to_host += 1
        outputs, inputs = _tensors(found), _tensors((args, named))
        old = {_storage(tensor) for tensor in inputs}
        mutates = any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments)
        fresh = [tensor for tensor in outputs if _storage(tensor) not in old]
        self._allocate(fresh)
        if fresh or mutates or not outputs:
            written = fresh or outputs[:1]
            only_written = name in ("aten::fill_", "aten::zero_", "aten::copy_") or "out" in named
            read = [tensor for tensor in inputs if not (only_written and tensor is outputs[0])]
            self._count(name, _size(read), _size(written))
            self._count_copy(name, inputs, outputs)
        return found

    def _count(self, name: str, read: int, written: int) -> None:
        self.read += read
        self.written += written
        self.by_operation[name] = self.by_operation.get(name, 0) + read + written

    def _count_copy(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if name not in _REDUCTIONS or inputs[0].dtype == outputs[0].dtype:
            return
        if inputs[0].dtype in _SHORT_FLOATS and outputs[0].dtype == torch.float32:
            return
        size = inputs[0].numel() * outputs[0].element_size()
        self._count(name, size, size)
        self.peak = max(self.peak, self._live + size)

    def _allocate(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = _storage(tensor)
            if key in self._known:
                continue
            self._known[key] = storage
            self._live += storage.nbytes()
            weakref.finalize(storage, self._release, storage.nbytes())
        self.peak = max(self.peak, self._live)

    def _release(self, size: int) -> None:
        self._live -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _size(tensors: list[Tensor]) -> int:
    """Bytes of the distinct elements of distinct tensors."""
    seen = {(_storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()): tensor for tensor in tensors}
    return sum(
        tensor.element_size()
        * math.prod(size for size, step in zip(tensor.shape, tensor.stride(), strict=True) if step)
        for tensor in seen.values()
    )
