"""Small row blocks, so that a small tensor is many of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from shardmill.kernels.crew import crew_of


@contextmanager
def row_blocks(nbytes: int) -> Iterator[None]:
    """Give the CPU row blocks of `nbytes` of source."""
    crews = [crew_of("cpu", is_torch=is_torch) for is_torch in (False, True)]
    before = [crew.block.nbytes for crew in crews]
    for crew in crews:
        crew.block.nbytes = nbytes
    try:
        with mock.patch("shardmill.kernels.pieces.COPY_BYTES", nbytes):
            yield
    finally:
        for crew, size in zip(crews, before, strict=True):
            crew.block.nbytes = size
