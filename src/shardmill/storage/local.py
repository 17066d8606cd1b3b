"""Folders on disk: range reads that notice a changed file, and writes that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import queue
import secrets
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self, cast

from shardmill.core.layout import RowSpan
from shardmill.core.receipt import BlobDigests
from shardmill.errors import FileTooLarge, ObjectMissing, Problem, SourceChanged, StorageFailed, show
from shardmill.storage.folder import FileIdentity, Folder, Loan, Traits
from shardmill.storage.guard import open_inside, real_file
from shardmill.storage.hashing import BlobHashes
from shardmill.storage.operations import operation

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
_CREATE_TRIES: Final = 20
"""Temporary files that sweeps may remove before they are locked, one after another."""
_TEMPORARY: Final = ".shardmill-*.tmp"
_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


_BACKDATED_NS: Final = 4_000_000_000
"""How far the modification time of a sealed file is set back: no later write can keep it."""
_LINK_REFUSED: Final = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP})


def identify(path: Path, status: os.stat_result) -> FileIdentity:
    """Take the identity of a file out of a stat result."""
    return FileIdentity(
        url=str(path),
        version=f"{status.st_dev}:{status.st_ino}",
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        ctime_ns=status.st_ctime_ns,
        modified=status.st_mtime,
        links=status.st_nlink,
    )


class RangeReader:
    """An open source file; raises `SourceChanged` on leaving when the file is not the one it opened."""

    seams: Sequence[int] = ()

    def __init__(self, path: Path, open_file: Callable[[], int] | None = None) -> None:
        self.path = path
        self.bytes_read = 0
        self._ahead = 0
        """Up to where the kernel was asked to read."""
        with operation("open", path):
            try:
                self._fd = open_file() if open_file else os.open(path, _READ)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise missing("open", path) from error
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._fd)
            raise missing("open", path)
        self.identity = identify(path, status)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        after = identify(self.path, os.fstat(self._fd))
        os.close(self._fd)
        if kind is None and after != self.identity:
            raise SourceChanged(f"{show(str(self.path), 200)} changed while it was read; run again")

    def expect_once(self, *, announces: bool, rows: Sequence[RowSpan] = ()) -> None:
        """As `Reader.expect_once`; nothing is remembered anyway."""

    def lend(self, offset: int, nbytes: int) -> Loan | None:  # noqa: ARG002
        """As `Reader.lend`; nothing lies in memory of ours."""
        return None

    def announce(self, ranges: Sequence[tuple[int, int]]) -> bool:  # noqa: ARG002 - the page cache keeps what is read twice
        """As `Reader.announce`."""
        return True

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

    def __init__(self, root: Path, name: str, size: int, *, mode: int = 0o666) -> None:
        self._root, self._name = root, name
        folder = (root / name).parent
        self._temporary = folder / _TEMPORARY
        self._fd = -1
        self._hashes = BlobHashes(size)
        self._stream: _Stream | _DirectStream | None = None
        if not folder.is_dir():
            with operation("create", folder):
                folder.mkdir(parents=True, exist_ok=True)
        if not any(self._create(folder, mode) for _ in range(_CREATE_TRIES)):
            raise StorageFailed(
                errno.EBUSY, f"create {show(str(self._temporary), 200)} failed: it is removed each time"
            )
        if size:
            with _without_file(self), operation("allocate", self._temporary):
                os.posix_fallocate(self._fd, 0, size)
        is_direct = size >= _DIRECT_BYTES * _DIRECT_BLOCKS and _set_direct(self._fd, on=True)
        with _without_file(self), operation("create", self._temporary):
            self._stream = _DirectStream(self._fd) if is_direct else _Stream(self._fd)

    def _create(self, folder: Path, mode: int) -> bool:
        """Create the temporary file and lock it; False where a sweep took it for a dead run's before it was locked."""
        self._temporary = folder / _TEMPORARY.replace("*", secrets.token_hex(12))
        with operation("create", self._temporary):
            self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with _without_file(self), operation("lock", self._temporary):
            is_ours = _lock(self._fd) and os.fstat(self._fd).st_nlink > 0
        if not is_ours:
            self.abort()
        return is_ours

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

    def commit(
        self, name: str = "", *, sealed: bool = False, durable: bool = True, exclusive: bool = False
    ) -> BlobDigests:
        """Make the file durable under its name; return the digests of what was written.

        Args:
            name: another name, in the folder of the first one.
            sealed: whether nobody may write it from then on; its modification time is set back, so that its state
                can be told from every later one at once.
            durable: whether it must outlast a power cut.
            exclusive: whether a file that is there by then is kept, and this one dropped.

        Raises:
            StorageFailed: fewer or more bytes than announced, or the file system refuses.
        """
        target = self._root / (name or self._name)
        if self._fd < 0:
            raise StorageFailed(f"publish {show(str(target), 200)}: the file was committed or dropped before")
        digests = self._hashes.result()
        if digests.size != self._hashes.size:
            raise StorageFailed(
                f"write {show(str(target), 200)}: {self._hashes.size} bytes announced, {digests.size} written"
            )
        with operation("write", self._temporary):
            self._finish()
        if sealed:
            with operation("seal", self._temporary):
                os.fchmod(self._fd, 0o444)
                status = os.fstat(self._fd)
                os.utime(self._fd, ns=(status.st_atime_ns, status.st_mtime_ns - _BACKDATED_NS))
        if durable:
            with operation("sync", self._temporary):
                os.fsync(self._fd)
        self._rename(target, exclusive=exclusive)
        if durable:
            sync_folder(target.parent)
        return digests

    def _rename(self, target: Path, *, exclusive: bool) -> None:
        with operation("rename", target):
            if exclusive:
                try:
                    os.link(self._temporary, target)
                except FileExistsError:
                    self.abort()
                    raise _Occupied from None
                self._temporary.unlink()
            else:
                self._temporary.replace(target)
            os.close(self._fd)
            self._fd = -1

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


def _lock(fd: int) -> bool:
    """Lock a file; False where another one holds it, such as a sweep that is about to remove it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _without_file(writer: FileWriter) -> Iterator[None]:
    """Leave no temporary file behind when the writer cannot even start."""
    try:
        yield
    except BaseException:
        writer.abort()
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    with operation("sync", folder):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def remove_dead_temporaries(folder: Path) -> int:
    """Delete temporary files whose writer is gone; a living writer holds a lock on its file."""
    removed = 0
    for path in folder.glob(_TEMPORARY):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with operation("delete", path):
                    path.unlink()
                removed += 1
            finally:
                os.close(fd)
    return removed


class _Occupied(Exception):
    """A file is there already."""


def missing(name: str, path: Path) -> ObjectMissing:
    """Build the error of a file that is not there."""
    return ObjectMissing(errno.ENOENT, f"{name} {show(str(path), 200)} failed: there is no such file")


class LocalFolder:
    """A folder on this machine's disk; see `Folder`.

    Of a `foreign` one no file is opened that is a link to the outside, or no regular file.
    """

    traits: Final = Traits(kind="local", names_late=True, renames_folders=True)

    def __init__(self, path: Path, *, foreign: bool = False) -> None:
        self.path: Path = path
        self._foreign = foreign

    @property
    def url(self) -> str:
        """The path."""
        return str(self.path)

    def exists(self) -> bool:
        """Whether there is a folder."""
        return self.path.is_dir()

    def listing(self, prefix: str = "") -> dict[str, FileIdentity]:
        """Every file below `prefix`; hidden folders are not entered."""
        found: dict[str, FileIdentity] = {}
        with operation("list", self.path / prefix):
            for folder, folders, files in os.walk(self.path / prefix, onerror=_raise_unless_absent):
                folders[:] = [name for name in folders if not name.startswith(".")]
                for name in files:
                    if fnmatchcase(name, _TEMPORARY):
                        continue  # no file yet
                    path = Path(folder) / name
                    with contextlib.suppress(FileNotFoundError):
                        found[path.relative_to(self.path).as_posix()] = identify(path, _status(path))
        return dict(sorted(found.items()))

    def identity(self, name: str) -> FileIdentity | None:
        """The state of a file, links followed."""
        path = self.path / name
        with operation("look at", path):
            try:
                status = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return identify(path, status) if stat.S_ISREG(status.st_mode) else None

    def check(self, name: str) -> None:
        """Make sure that a name is a regular file inside the folder, or in the Hub's cache."""
        real_file(self.path, name)

    def read(self, name: str, limit: int) -> bytes:
        """Read a small file whole."""
        path = self.path / name
        with operation("read", path):
            try:
                fd = open_inside(self.path, name) if self._foreign else os.open(path, _READ)
                with os.fdopen(fd, "rb") as file:
                    status = os.fstat(fd)
                    if not stat.S_ISREG(status.st_mode):
                        raise missing("read", path)
                    if status.st_size > limit:
                        message = f"read {show(str(path), 200)}: {status.st_size} bytes, the limit is {limit}"
                        raise FileTooLarge(errno.EFBIG, message)
                    return file.read(limit)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
                raise missing("read", path) from error

    def read_start(self, name: str, length: int) -> tuple[FileIdentity, bytes]:
        """The identity and the first bytes of a file."""
        with self.open(name) as reader:
            data = bytearray(min(length, reader.identity.size))
            reader.read_into(0, memoryview(data))
        return reader.identity, bytes(data)

    def open(self, name: str) -> RangeReader:
        """Open a file for range reads."""
        path = self.path / name
        return RangeReader(path, partial(open_inside, self.path, name) if self._foreign else None)

    def prepare(self) -> None:
        """Make the folder, private to its owner."""
        if not self.path.is_dir():
            with operation("create", self.path):
                self.path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """Write a small file whole or not at all."""
        with FileWriter(self.path, name, len(data)) as writer:
            writer.write(memoryview(data))
            writer.commit(durable=durable)

    def create(self, name: str, data: bytes) -> bool:
        """Write a small file whole unless one is there."""
        with FileWriter(self.path, name, len(data)) as writer:
            writer.write(memoryview(data))
            try:
                writer.commit(exclusive=True)
            except _Occupied:
                return False
        return True

    def writer(self, name: str, size: int, *, tags: Mapping[str, str] = {}) -> FileWriter:
        """Start writing a file; `tags` are not kept."""
        del tags
        return FileWriter(self.path, name, size)

    def copy_in(self, name: str, origin: Folder, origin_name: str, *, tags: Mapping[str, str] = {}) -> bool:
        """Make a hard link where the file system allows one."""
        del tags
        if origin.path is None:
            return False
        target = self.path / name
        with operation("link", target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(origin.path / origin_name, target)
            except FileNotFoundError as error:
                raise missing("link", origin.path / origin_name) from error
            except OSError as error:
                if error.errno not in _LINK_REFUSED:
                    raise
                return False
        return True

    def move(self, name: str, target: str) -> None:
        """Rename a file."""
        origin, path = self.path / name, self.path / target
        with operation("rename", path), contextlib.suppress(FileNotFoundError):
            origin.lstat()  # no folder is made for nothing
            path.parent.mkdir(parents=True, exist_ok=True)
            origin.replace(path)

    def remove(self, name: str) -> None:
        """Delete a file."""
        with operation("delete", self.path / name):
            (self.path / name).unlink(missing_ok=True)

    def probe(self) -> list[Problem]:
        """Write, read and delete a canary in the folder, or make the folder above it where there is none yet."""
        existing = next(path for path in (self.path, *self.path.parents) if os.path.lexists(path))
        path = existing / _TEMPORARY.replace("*", f"canary-{secrets.token_hex(12)}")
        try:
            with operation("try to write", path):
                kept = _try_file(path)
        except StorageFailed as error:
            cause = error.__cause__
            reason = (cause.strerror if isinstance(cause, OSError) else None) or error
            return [_unwritable(existing, f"cannot be written: {reason}")]
        return [] if kept else [_unwritable(existing, "does not keep what is written to it")]

    def free_bytes(self) -> int:
        """Free space of the file system."""
        existing = next(path for path in (self.path, *self.path.parents) if path.exists())
        return shutil.disk_usage(existing).free

    def sweep(self, prefix: str = "", *, grace_seconds: float = 0.0) -> int:
        """Remove temporary files whose writer is gone; a living one holds a lock."""
        del grace_seconds
        root = self.path / prefix
        if not root.is_dir():
            return 0
        folders = (Path(folder) for folder, _, _ in os.walk(root))
        return sum(map(remove_dead_temporaries, folders))


def _try_file(path: Path) -> bool:
    """Create, write, read and delete a file; it is locked, so that nobody takes it for one that a dead run left."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _lock(fd)  # a sweep that was quicker removes its name, and what was opened still tells what is asked
        os.write(fd, b"canary")
        os.fsync(fd)
        return os.pread(fd, 64, 0) == b"canary"
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)


def _unwritable(path: Path, message: str) -> Problem:
    way_out = "choose another place, or change its rights"
    return Problem(file=str(path), kind="destination-unwritable", message=message, way_out=way_out)


def _status(path: Path) -> os.stat_result:
    """Of the file that a link leads to, or of the link where it leads nowhere."""
    try:
        return path.stat()
    except OSError:
        return path.lstat()


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
