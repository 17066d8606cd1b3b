"""Digests of files while their bytes pass by, and of files at rest."""

from __future__ import annotations

from typing import Final

from blake3 import blake3

from shardmill.core.digest import Digest
from shardmill.core.receipt import BlobDigests

EDGE_BYTES: Final = 64_000_000
"""Length of the first and last block whose digests a receipt holds."""


class BlobHashes:
    """BLAKE3 of a stream of known length, and of its first and last block."""

    def __init__(self, size: int) -> None:
        self.size = size
        """Announced length in bytes."""
        self._seen = 0
        self._whole, self._tail = blake3(), blake3()
        self._head: Digest | None = None

    def update(self, view: memoryview) -> None:
        """Take in the next bytes."""
        begin, end = self._seen, self._seen + len(view)
        rest = view
        if begin < EDGE_BYTES <= end:
            self._whole.update(view[: EDGE_BYTES - begin])
            self._head = self._digest()
            rest = view[EDGE_BYTES - begin :]
        self._whole.update(rest)
        if end > self.size - EDGE_BYTES > 0:
            self._tail.update(view[max(0, self.size - EDGE_BYTES - begin) :])
        self._seen = end

    def _digest(self) -> Digest:
        return Digest("blake3", self._whole.hexdigest())

    def result(self) -> BlobDigests:
        """Digests of what was taken in."""
        whole = self._digest()
        tail = Digest("blake3", self._tail.hexdigest()) if self.size > EDGE_BYTES else whole
        return BlobDigests(whole=whole, head=self._head or whole, tail=tail, size=self._seen)
