"""A folder in this process's memory, shared with whoever uses fsspec's `memory://`; for tests and for trying things."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from shardmill.core.layout import RowSpan
from shardmill.core.receipt import BlobDigests
from shardmill.errors import FileTooLarge, ObjectMissing, Problem, SourceChanged, StorageFailed, refuse, show
from shardmill.storage.folder import FileIdentity, Folder, Loan, Traits
from shardmill.storage.hashing import BlobHashes
from shardmill.storage.operations import operation

_TRAITS: Final = Traits(kind="memory", names_late=True)
_VERSION: Final = "shardmill_version"
_TAGS: Final = "shardmill_tags"
_CANARY: Final = ".shardmill-canary"
_lock: Final = threading.Lock()
"""Held while the files of the process are looked at or changed, so that a decision and its write are one step."""
_versions: Final = itertools.count(1)


def open_memory(path: str) -> MemoryFolder:
    """Open the folder that `memory://<path>` names."""
    return MemoryFolder(path)


class MemoryFolder:
    """Files whose names begin with `/<path>/` in fsspec's memory."""

    def __init__(self, path: str) -> None:
        self._files = MemoryFileSystem()
        self._root = f"/{path.strip('/')}" if path.strip("/") else ""
        self.url = f"memory:/{self._root or '/'}"
        self.traits = _TRAITS
        self.path: Path | None = None

    # ---- looking

    def exists(self) -> bool:
        """Whether there is a folder, or at least one file below it."""
        with operation("look up", self.url), _lock:
            return self._root in self._files.pseudo_dirs or any(self._names(""))

    def listing(self, prefix: str = "") -> dict[str, FileIdentity]:
        """Every file below `prefix`, by name, sorted."""
        with operation("list", self.place(prefix)), _lock:
            return {name: self._identity(name, self._files.store[self._key(name)]) for name in self._names(prefix)}

    def identity(self, name: str) -> FileIdentity | None:
        """The state of a file; None when there is none."""
        with operation("look up", self.place(name)), _lock:
            file = self._files.store.get(self._key(name))
            return None if file is None else self._identity(name, file)

    def check(self, name: str) -> None:
        """Make sure that there is such a file.

        Raises:
            CheckpointInvalid: there is none.
        """
        if self.identity(name) is None:
            raise refuse("file-missing", "file is missing", file=name, way_out="fetch it again")

    # ---- reading

    def read(self, name: str, limit: int) -> bytes:
        """Read a small file whole.

        Raises:
            ObjectMissing: there is none.
            FileTooLarge: it is larger than `limit` bytes.
        """
        with operation("read", self.place(name)), _lock:
            file = self._file(name)
            if file.size > limit:
                message = f"read {show(self.place(name), 200)} failed: {file.size} bytes, the limit is {limit}"
                raise FileTooLarge(errno.EFBIG, message)
            return _part(file, 0, limit)

    def read_start(self, name: str, length: int) -> tuple[FileIdentity, bytes]:
        """The identity and the first bytes of a file.

        Raises:
            ObjectMissing: there is none.
        """
        with operation("read", self.place(name)), _lock:
            file = self._file(name)
            return self._identity(name, file), _part(file, 0, length)

    def open(self, name: str) -> MemoryReader:
        """Open a file for reads.

        Raises:
            ObjectMissing: there is none.
        """
        with operation("open", self.place(name)), _lock:
            return MemoryReader(self, name, self._identity(name, self._file(name)))

    def read_part(self, name: str, identity: FileIdentity, offset: int, length: int) -> bytes:
        """Bytes of a file in a given state; fewer than `length` where it ends.

        Raises:
            SourceChanged: the file is in another state.
        """
        with operation("read", self.place(name)), _lock:
            file = self._files.store.get(self._key(name))
            if file is None or self._identity(name, file) != identity:
                raise SourceChanged(f"{show(self.place(name), 200)} changed while it was read; run again")
            return _part(file, offset, length)

    # ---- writing

    def prepare(self) -> None:
        """Make the folder."""
        with operation("create", self.url), _lock:
            self._files.makedirs(self._root, exist_ok=True)

    def put(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """Write a small file whole; one that is there is replaced."""
        del durable  # nothing here outlasts the process
        self.keep(name, data, {})

    def create(self, name: str, data: bytes) -> bool:
        """Write a small file whole unless one is there; tell whether it was written."""
        with operation("create", self.place(name)), _lock:
            if self._key(name) in self._files.store:
                return False
            self._keep(name, data, {})
            return True

    def writer(self, name: str, size: int, *, tags: Mapping[str, str] = {}) -> MemoryWriter:
        """Start writing a file of `size` bytes."""
        with operation("create", self.place(name)):
            return MemoryWriter(self, name, size, tags)

    def keep(self, name: str, data: bytes | bytearray, tags: Mapping[str, str]) -> None:
        """Give bytes a name, which they had not before or which had others."""
        with operation("publish", self.place(name)), _lock:
            self._keep(name, data, tags)

    def copy_in(self, name: str, origin: Folder, origin_name: str, *, tags: Mapping[str, str] = {}) -> bool:
        """Copy a file of another folder in memory; False where the other folder lies elsewhere.

        Raises:
            ObjectMissing: there is no such file.
        """
        if not isinstance(origin, MemoryFolder):
            return False
        with operation("copy", self.place(name)), _lock:
            self._keep(name, origin._file(origin_name).getvalue(), tags)  # noqa: SLF001 - of this class
        return True

    def move(self, name: str, target: str) -> None:
        """Give a file another name; one that is not there is no error."""
        with operation("move", self.place(name)), _lock:
            file = self._files.store.pop(self._key(name), None)
            if file is not None:
                file.path = self._key(target)
                self._files.store[file.path] = file

    def remove(self, name: str) -> None:
        """Delete a file; one that is not there is no error."""
        with operation("remove", self.place(name)), _lock:
            self._files.store.pop(self._key(name), None)

    # ---- before and after work

    def probe(self) -> list[Problem]:
        """Prove with a canary that files can be created once, read and deleted here; return what is wrong."""
        name = f"{_CANARY}-{os.getpid()}-{threading.get_ident()}"
        try:
            self.remove(name)
            is_kept = self.create(name, b"1") and not self.create(name, b"2") and self.read(name, 1) == b"1"
            self.remove(name)
        except StorageFailed as error:
            return [self._unwritable(str(error))]
        return [] if is_kept else [self._unwritable("does not keep what is written to it")]

    def _unwritable(self, message: str) -> Problem:
        return Problem(file=self.url, kind="destination-unwritable", message=message, way_out="choose another place")

    def free_bytes(self) -> int | None:
        """None: memory is not asked for."""
        return None

    def sweep(self, prefix: str = "", *, grace_seconds: float = 24 * 3600) -> int:
        """Nothing to do: what a writer has not published is its own, and gone with it."""
        del prefix, grace_seconds
        return 0

    # ---- within

    def place(self, name: str) -> str:
        """Where a file lies, for messages."""
        return f"{self.url}/{name}" if name else self.url

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _names(self, prefix: str) -> list[str]:
        begin, cut = self._key(prefix), len(self._root) + 1
        return sorted(key[cut:] for key in self._files.store if key.startswith(begin))

    def _file(self, name: str) -> Any:
        file = self._files.store.get(self._key(name))
        if file is None:
            raise ObjectMissing(errno.ENOENT, f"read {show(self.place(name), 200)} failed: no such file")
        return file

    def _identity(self, name: str, file: Any) -> FileIdentity:
        # a file that another user of fsspec wrote gets its version when it is first seen
        if _VERSION not in vars(file):
            vars(file)[_VERSION] = next(_versions)
        return FileIdentity(
            url=self.place(name),
            version=str(vars(file)[_VERSION]),
            size=file.size,
            modified=file.modified.timestamp(),
            tags=vars(file).get(_TAGS, {}),
        )

    def _keep(self, name: str, data: bytes | bytearray, tags: Mapping[str, str]) -> None:
        file = MemoryFile(self._files, self._key(name), data)
        vars(file).update({_VERSION: next(_versions), _TAGS: dict(tags)})
        file.commit()


class MemoryReader:
    """An open file in memory; raises `SourceChanged` as soon as another one has its name."""

    seams: Sequence[int] = ()

    def __init__(self, folder: MemoryFolder, name: str, identity: FileIdentity) -> None:
        self.identity = identity
        self.bytes_read = 0
        self._folder, self._name = folder, name

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._folder.read_part(self._name, self.identity, 0, 0)

    def expect_once(self, *, announces: bool, rows: Sequence[RowSpan] = ()) -> None:
        """As `Reader.expect_once`; nothing is remembered anyway."""

    def lend(self, offset: int, nbytes: int) -> Loan | None:  # noqa: ARG002
        """As `Reader.lend`; the folder may drop its bytes at any time."""
        return None

    def announce(self, ranges: Sequence[tuple[int, int]]) -> bool:  # noqa: ARG002 - everything is kept
        """As `Reader.announce`."""
        return True

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes from `offset` on.

        Raises:
            SourceChanged: the file is another one by now, or ends before the view is full.
        """
        data = self._folder.read_part(self._name, self.identity, offset, view.nbytes)
        if len(data) < view.nbytes:
            raise SourceChanged(
                f"{show(self.identity.url, 200)} ends at byte {offset + len(data)}; it was longer when planned"
            )
        if data:
            view.cast("B")[:] = data
        self.bytes_read += len(data)


class MemoryWriter:
    """Collects the bytes of one file of known size; `commit` gives them a name, anything else drops them."""

    def __init__(self, folder: MemoryFolder, name: str, size: int, tags: Mapping[str, str]) -> None:
        self._folder, self._name, self._tags = folder, name, dict(tags)
        self._hashes = BlobHashes(size)
        self._data: bytearray | None = bytearray()
        """None when it was published or dropped."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def write(self, data: memoryview) -> None:
        """Append bytes.

        Raises:
            StorageFailed: the file was published or dropped.
        """
        view = data.cast("B") if data.nbytes else memoryview(b"")
        with operation("write", self._folder.place(self._name)):
            self._open_data("write").extend(view)
        self._hashes.update(view)

    def commit(self, name: str = "", *, sealed: bool = False) -> BlobDigests:
        """Make the file visible; return the digests of what was written.

        Raises:
            StorageFailed: fewer or more bytes than announced, or the file was published or dropped before.
        """
        del sealed  # nobody writes a file of this storage in place
        target = name or self._name
        data = self._open_data("publish")
        digests = self._hashes.result()
        if digests.size != self._hashes.size:
            raise StorageFailed(
                f"write {show(self._folder.place(target), 200)}: "
                f"{self._hashes.size} bytes announced, {digests.size} written"
            )
        self._folder.keep(target, data, self._tags)
        self._data = None
        return digests

    def abort(self) -> None:
        """Drop what was written."""
        self._data = None

    def _open_data(self, what: str) -> bytearray:
        if self._data is None:
            raise StorageFailed(
                f"{what} {show(self._folder.place(self._name), 200)}: it was published or dropped before"
            )
        return self._data


def _part(file: Any, offset: int, length: int) -> bytes:
    with file.getbuffer() as view:
        return bytes(view[offset : offset + length])
