"""Digests of files while their bytes pass by, and of files at rest."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable
from typing import Any, Final

from blake3 import blake3

from shardmill.core.digest import Digest
from shardmill.core.receipt import BlobDigests
from shardmill.errors import TransferDamaged, show
from shardmill.storage.buffers import new_buffer
from shardmill.storage.folder import FileIdentity, Folder, Reader

EDGE_BYTES: Final = 64_000_000
"""Length of the first and last block whose digests a receipt holds."""
_CHUNK_BYTES: Final = 4 << 20


def hash_bytes(data: bytes) -> Digest:
    """Digest of what is in memory, as of a file with this content."""
    return Digest("blake3", blake3(data).hexdigest())


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


class SourceHash:
    """Digest of an open file that is taken along while its parts are read, in whatever order, each byte once."""

    def __init__(self, reader: Reader, expected: Digest | None = None) -> None:
        self._reader = reader
        self._expected = expected
        self._algorithm = expected.algorithm if expected is not None else "blake3"
        self._hash: Any = hashlib.sha256() if self._algorithm == "sha256" else blake3()
        self._seen = 0
        self._buffer = memoryview(b"")

    def reach(self, offset: int) -> None:
        """Read what lies before an offset and was not read yet: so files are read in their order."""
        self._catch_up(offset)

    def cover(self, offset: int, view: memoryview) -> None:
        """Take in bytes that were read at an offset; what lies before them and was not read yet is read here."""
        self.reach(offset)
        if offset <= self._seen < offset + len(view):
            self._hash.update(view[self._seen - offset :])
            self._seen = offset + len(view)

    def finish(self) -> Digest:
        """Digest of the whole file; reads what nobody asked for.

        Raises:
            TransferDamaged: it is not the expected one.
        """
        self._catch_up(self._reader.identity.size)
        found = Digest(self._algorithm, self._hash.hexdigest())
        if self._expected is not None and found != self._expected:
            where = show(self._reader.identity.url, 200)
            message = f"read {where}: expected {_short(self._expected)}, found {_short(found)}; run again"
            raise TransferDamaged(errno.EIO, message)
        return found

    def _catch_up(self, end: int) -> None:
        while self._seen < end:
            length = min(_CHUNK_BYTES, end - self._seen)
            loan = self._reader.lend(self._seen, length)
            if loan is None:
                self._hash.update(self._read(length))
            else:
                try:
                    self._hash.update(loan.view)
                finally:
                    loan.give_back()
            self._seen += length

    def _read(self, length: int) -> memoryview:
        if not self._buffer:
            self._buffer = new_buffer(_CHUNK_BYTES)
        view = self._buffer[:length]
        self._reader.read_into(self._seen, view)
        return view


def _short(digest: Digest) -> str:
    return f"{digest.algorithm} {digest.value[:16]}…"


def hash_file(folder: Folder, name: str, stop: Callable[[], bool] = bool) -> tuple[BlobDigests, FileIdentity]:
    """Read a file once for its digests; returns the identity it had all the while.

    Raises:
        SourceChanged: it changed meanwhile.
    """
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with folder.open(name) as reader:
        hashes = BlobHashes(reader.identity.size)
        for begin in range(0, reader.identity.size, _CHUNK_BYTES):
            if stop():
                break
            view = buffer[: min(_CHUNK_BYTES, reader.identity.size - begin)]
            reader.read_into(begin, view)
            hashes.update(view)
    return hashes.result(), reader.identity


def digest_file(folder: Folder, name: str, algorithm: str) -> Digest:
    """Digest of a file by an algorithm of the caller's choice, `blake3` or `sha256`; reads it once.

    Raises:
        SourceChanged: it changed meanwhile.
    """
    new: dict[str, Callable[[], Any]] = {"blake3": blake3, "sha256": hashlib.sha256}
    hashed = new[algorithm]()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with folder.open(name) as reader:
        size = reader.identity.size
        for begin in range(0, size, _CHUNK_BYTES):
            view = buffer[: min(_CHUNK_BYTES, size - begin)]
            reader.read_into(begin, view)
            hashed.update(view)
    return Digest(algorithm, hashed.hexdigest())


def hash_edges(folder: Folder, name: str) -> tuple[Digest, Digest]:
    """Digests of the first and last block of a file."""
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    found = []
    with folder.open(name) as reader:
        size = reader.identity.size
        length = min(EDGE_BYTES, size)
        for begin in (0, size - length):
            hashed = blake3()
            for offset in range(begin, begin + length, _CHUNK_BYTES):
                view = buffer[: min(_CHUNK_BYTES, begin + length - offset)]
                reader.read_into(offset, view)
                hashed.update(view)
            found.append(Digest("blake3", hashed.hexdigest()))
    return found[0], found[1]
