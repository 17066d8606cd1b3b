"""Local files: range reads that notice a changed source, and writes that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from blake3 import blake3

from shardmill.core.digest import Digest
from shardmill.core.receipt import BlobDigests
from shardmill.errors import SourceChanged, StorageFailed, show

EDGE_BYTES: Final = 64_000_000
"""Length of the first and last block whose digests a receipt holds."""
_CHUNK_BYTES: Final = 4 << 20
_TEMPORARY: Final = ".tmp"


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells one state of a local file from another without reading it."""

    path: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path, status: os.stat_result) -> FileIdentity:
        """Take the identity out of a stat result."""
        return cls(str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@contextlib.contextmanager
def operation(name: str, path: Path) -> Iterator[None]:
    """Turn an `OSError` into a `StorageFailed` that names operation and path."""
    try:
        yield
    except StorageFailed:
        raise
    except OSError as error:
        raise StorageFailed(error.errno, f"{name} {show(str(path), 200)} failed: {error.strerror or error}") from error


class RangeReader:
    """An open source file; raises `SourceChanged` on leaving when the file is not the one it opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with operation("open", path):
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self.identity = FileIdentity.of(path, os.fstat(self._fd))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        after = FileIdentity.of(self.path, os.fstat(self._fd))
        os.close(self._fd)
        if kind is None and after != self.identity:
            raise SourceChanged(f"{show(str(self.path), 200)} changed while it was read; run again")

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes from `offset` on.

        Raises:
            SourceChanged: the file ends before the view is full.
        """
        done = 0
        while done < len(view):
            with operation("read", self.path):
                count = os.preadv(self._fd, [view[done:]], offset + done)
            if count == 0:
                raise SourceChanged(
                    f"{show(str(self.path), 200)} ends at byte {offset + done}; it was longer when planned"
                )
            done += count


class _Hashes:
    """BLAKE3 of a stream of known length, and of its first and last block."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._seen = 0
        self._whole, self._head, self._tail = blake3(), blake3(), blake3()

    def update(self, view: memoryview) -> None:
        begin, end = self._seen, self._seen + len(view)
        self._whole.update(view)
        if begin < EDGE_BYTES:
            self._head.update(view[: EDGE_BYTES - begin])
        if end > self.size - EDGE_BYTES:
            self._tail.update(view[max(0, self.size - EDGE_BYTES - begin) :])
        self._seen = end

    def result(self) -> BlobDigests:
        whole, head, tail = (Digest("blake3", h.hexdigest()) for h in (self._whole, self._head, self._tail))
        return BlobDigests(whole=whole, head=head, tail=tail, size=self._seen)


class FileWriter:
    """Writes one file of known size under a temporary name; `commit` names it, anything else leaves nothing."""

    def __init__(self, target: Path, size: int, *, mode: int = 0o666) -> None:
        self.target = target
        self._temporary = target.parent / f".{target.name}.{secrets.token_hex(6)}{_TEMPORARY}"
        self._hashes = _Hashes(size)
        with operation("create", self._temporary):
            self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if size:
            with operation("allocate", self._temporary), _without_file(self):
                os.posix_fallocate(self._fd, 0, size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def write(self, data: memoryview) -> None:
        """Append bytes."""
        view = data.cast("B") if data.nbytes else memoryview(b"")
        self._hashes.update(view)
        done = 0
        while done < len(view):
            with operation("write", self._temporary):
                done += os.write(self._fd, view[done:])

    def commit(self, *, read_only: bool = False) -> BlobDigests:
        """Make the file durable under its name unless one stands there already; return the digests of what was written.

        Raises:
            StorageFailed: fewer or more bytes than announced, or the file system refuses.
        """
        digests = self._hashes.result()
        if digests.size != self._hashes.size:
            raise StorageFailed(
                f"write {show(str(self.target), 200)}: {self._hashes.size} bytes announced, {digests.size} written"
            )
        with operation("publish", self.target):
            if read_only:
                os.fchmod(self._fd, 0o444)
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1
            self._temporary.replace(self.target)
            sync_folder(self.target.parent)
        return digests

    def abort(self) -> None:
        """Drop what was written; nothing to do after `commit`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _without_file(writer: FileWriter) -> Iterator[None]:
    """Leave no temporary file behind when the writer cannot even start."""
    try:
        yield
    except OSError:
        writer.abort()
        raise


def write_small(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all."""
    with FileWriter(path, len(data)) as writer:
        writer.write(memoryview(data))
        writer.commit()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def hash_file(path: Path, stop: Callable[[], bool] = bool) -> tuple[BlobDigests, FileIdentity]:
    """Read a file once for its digests; returns the identity it had all the while.

    Raises:
        SourceChanged: it changed meanwhile.
    """
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with RangeReader(path) as reader:
        hashes = _Hashes(reader.identity.size)
        for begin in range(0, reader.identity.size, _CHUNK_BYTES):
            if stop():
                break
            view = buffer[: min(_CHUNK_BYTES, reader.identity.size - begin)]
            reader.read_into(begin, view)
            hashes.update(view)
    return hashes.result(), reader.identity


def hash_edges(path: Path) -> tuple[Digest, Digest]:
    """Digests of the first and last block of a file."""
    with RangeReader(path) as reader:
        size = reader.identity.size
        length = min(EDGE_BYTES, size)
        buffer = memoryview(bytearray(length))
        found = []
        for begin in (0, size - length):
            reader.read_into(begin, buffer)
            found.append(Digest("blake3", blake3(buffer).hexdigest()))
    return found[0], found[1]


def remove_dead_temporaries(folder: Path) -> int:
    """Delete temporary files whose writer is gone; a living writer holds a lock on its file."""
    removed = 0
    for path in folder.glob(f".*{_TEMPORARY}"):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                removed += 1
            finally:
                os.close(fd)
    return removed
