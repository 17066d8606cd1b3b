"""Local files: range reads that notice a changed source, and writes that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import queue
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self, cast

from blake3 import blake3

from shardmill.core.digest import Digest
from shardmill.core.receipt import BlobDigests
from shardmill.errors import SourceChanged, StorageFailed, show

EDGE_BYTES: Final = 64_000_000
"""Length of the first and last block whose digests a receipt holds."""
_CHUNK_BYTES: Final = 4 << 20
_AHEAD_BYTES: Final = 32 << 20
"""How far the disk reads ahead of what is asked for."""
_FLUSH_BYTES: Final = 16 << 20
"""Written bytes after which the kernel is asked to put them on the disk."""
_SYNC_FILE_RANGE_WRITE: Final = 2
_DIRECT_BYTES: Final = 4 << 20
_DIRECT_BLOCKS: Final = 4
"""What a file that is written past the page cache may have on its way to the disk."""
_ALIGNMENT: Final = 4096
"""Of memory, offsets and lengths that bypass the page cache; a multiple of every disk's block."""
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
        self.bytes_read = 0
        self._ahead = 0
        """Up to where the kernel was asked to read."""
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
        self._read_ahead(offset + len(view))
        done = 0
        while done < len(view):
            with operation("read", self.path):
                count = os.preadv(self._fd, [view[done:]], offset + done)
            if count == 0:
                raise SourceChanged(
                    f"{show(str(self.path), 200)} ends at byte {offset + done}; it was longer when planned"
                )
            done += count
        self.bytes_read += done

    def _read_ahead(self, end: int) -> None:
        """Let the disk fetch what will be asked for soon, while what was asked for is worked on."""
        if end > self._ahead or end < self._ahead - 2 * _AHEAD_BYTES:
            self._ahead = end
        if end > self._ahead - _AHEAD_BYTES // 2 and self._ahead < self.identity.size:
            os.posix_fadvise(self._fd, self._ahead, end + _AHEAD_BYTES - self._ahead, os.POSIX_FADV_WILLNEED)
            self._ahead = end + _AHEAD_BYTES


class _Stream:
    """Appends to an open file through the page cache; what is written starts on its way to the disk at once."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._written = 0
        self._flushed = 0

    def write(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += os.write(self._fd, view[done:])
        self._written += done
        if self._written - self._flushed >= _FLUSH_BYTES:
            start_write_back(self._fd, self._flushed, self._written - self._flushed)
            self._flushed = self._written

    def finish(self) -> None:
        """Everything is with the kernel already."""

    def stop(self) -> None:
        """Nothing to give up."""


class _DirectStream:
    """Appends to an open file past the page cache, by a thread of its own, in aligned blocks.

    The processor neither copies the bytes into the page cache nor drives them out of it later, and who writes waits
    only while all blocks are on their way.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._free: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[tuple[mmap.mmap, int] | None] = queue.SimpleQueue()
        for _ in range(_DIRECT_BLOCKS):
            self._free.put(mmap.mmap(-1, _DIRECT_BYTES))
        self._block, self._used = self._free.get(), 0
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._serve, name="write-behind", daemon=True)
        self._thread.start()

    def write(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            count = min(len(view) - done, _DIRECT_BYTES - self._used)
            self._block[self._used : self._used + count] = view[done : done + count]
            self._used += count
            done += count
            if self._used == _DIRECT_BYTES:
                self._full.put((self._block, self._used))
                self._block, self._used = self._free.get(), 0
                self._raise_error()

    def finish(self) -> None:
        """Write the rest; its last part is no whole block, so it takes the usual way."""
        whole = self._used // _ALIGNMENT * _ALIGNMENT
        if whole:
            self._full.put((self._block, whole))
        self.stop()
        self._raise_error()
        _set_direct(self._fd, on=False)
        with memoryview(self._block) as view:
            done = whole
            while done < self._used:
                done += os.write(self._fd, view[done : self._used])

    def stop(self) -> None:
        """End the thread when it has written what it was given."""
        self._full.put(None)
        self._thread.join()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _serve(self) -> None:
        while (item := self._full.get()) is not None:
            block, length = item
            try:
                if self._error is None:
                    self._write_block(block, length)
            except OSError as error:
                self._error = error
            self._free.put(block)

    def _write_block(self, block: mmap.mmap, length: int) -> None:
        with memoryview(block) as view:
            done = 0
            while done < length:
                try:
                    done += os.write(self._fd, view[done:length])
                except OSError as error:
                    if error.errno != errno.EINVAL or not _set_direct(self._fd, on=False):
                        raise
                    # this file system takes the flag and refuses such writes: go on through the page cache


def _set_direct(fd: int, *, on: bool) -> bool:
    """Let writes pass the page cache or not; False where that is so already, cannot be, or gains nothing.

    It gains where a block device takes the bytes. File systems without one, RAM disks and networks among them, have
    devices of number 0, and either copy the bytes all the same or wait for each write.
    """
    if on and not os.major(os.fstat(fd).st_dev):
        return False
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    wanted = flags | os.O_DIRECT if on else flags & ~os.O_DIRECT
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, wanted)
    except OSError:
        return False
    return flags != wanted


class FileWriter:
    """Writes one file of known size under a temporary name; `commit` names it, anything else leaves nothing."""

    def __init__(self, folder: Path, size: int, *, mode: int = 0o666) -> None:
        self._temporary = folder / f".{secrets.token_hex(12)}{_TEMPORARY}"
        self._hashes = BlobHashes(size)
        self._stream: _Stream | _DirectStream | None = None
        with operation("create", self._temporary):
            self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if size:
            with operation("allocate", self._temporary), _without_file(self):
                os.posix_fallocate(self._fd, 0, size)
        is_direct = size >= _DIRECT_BYTES * _DIRECT_BLOCKS and _set_direct(self._fd, on=True)
        with operation("create", self._temporary), _without_file(self):
            self._stream = _DirectStream(self._fd) if is_direct else _Stream(self._fd)

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
        if self._stream is not None:
            with operation("write", self._temporary):
                self._stream.write(view)

    def commit(self, target: Path, *, read_only: bool = False) -> BlobDigests:
        """Make the file durable under its name; return the digests of what was written.

        Args:
            target: a name in the folder of the file.
            read_only: whether nobody may write it from then on.

        Raises:
            StorageFailed: fewer or more bytes than announced, or the file system refuses.
        """
        digests = self._hashes.result()
        if digests.size != self._hashes.size:
            raise StorageFailed(
                f"write {show(str(target), 200)}: {self._hashes.size} bytes announced, {digests.size} written"
            )
        with operation("write", self._temporary):
            self._finish()
        with operation("publish", target):
            if read_only:
                os.fchmod(self._fd, 0o444)
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1
            self._temporary.replace(target)
            sync_folder(target.parent)
        return digests

    def _finish(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.finish()

    def abort(self) -> None:
        """Drop what was written; nothing to do after `commit`."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.stop()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._temporary.unlink(missing_ok=True)


def _find_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
        function.restype = ctypes.c_int
    return cast("Callable[[int, int, int, int], int] | None", function)


_sync_file_range: Final = _find_sync_file_range()


def start_write_back(fd: int, offset: int, length: int) -> None:
    """Ask the kernel to start writing a range to the disk; a hint, so that refusal changes nothing but speed."""
    if _sync_file_range is not None:
        _sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)


@contextlib.contextmanager
def _without_file(writer: FileWriter) -> Iterator[None]:
    """Leave no temporary file behind when the writer cannot even start."""
    try:
        yield
    except BaseException:
        writer.abort()
        raise


def write_small(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all."""
    with FileWriter(path.parent, len(data)) as writer:
        writer.write(memoryview(data))
        writer.commit(path)


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
        hashes = BlobHashes(reader.identity.size)
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
