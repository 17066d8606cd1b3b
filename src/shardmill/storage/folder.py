"""What every storage offers, in the same words: a folder of files, some of which are large.

A `Folder` is a folder on disk, a prefix in a bucket, a repository on the Hub. A file appears whole or not at all, and
what is read belongs to one state of a file. Names are relative, joined by `/`. Nothing else in shardmill knows which
kind it works with; what a kind cannot do is told by `Folder.traits`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from shardmill.core.digest import Digest, digest_json
from shardmill.core.layout import RowSpan
from shardmill.core.receipt import BlobDigests
from shardmill.errors import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIdentity:
    """What tells one state of a file from another without reading it."""

    url: str
    """Where the file lies, name included."""
    version: str
    """Device and inode on disk, ETag or version in a bucket, commit and blob on the Hub."""
    size: int
    """In bytes."""
    mtime_ns: int = 0
    """Of a file on disk: when its bytes were last written; 0 where `version` changes with every write."""
    ctime_ns: int = 0
    """Of a file on disk: when its bytes, mode, names or times last changed; else 0."""
    modified: float = field(default=0.0, compare=False)
    """Seconds since the epoch, as far as the storage tells; for people and for grace times."""
    links: int = field(default=1, compare=False)
    """Names that the bytes have on disk."""
    digest: Digest | None = field(default=None, compare=False)
    """Digest of the content, where the storage itself vouches for one."""
    tags: Mapping[str, str] = field(default_factory=dict, compare=False)
    """What its writer bound to the file, where the storage keeps such a thing."""

    def fingerprint(self, *, with_ctime: bool = True) -> str:
        """Digest of the identity; never to be taken for one of the content."""
        times = [self.mtime_ns, self.ctime_ns] if with_ctime else [self.mtime_ns]
        return digest_json([self.url, self.version, self.size, *times])


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What kind of storage a folder lies on."""

    kind: str
    """`local`, `memory`, `s3` or `hub`."""
    is_writable: bool = True
    names_late: bool = False
    """Whether a file may get its name when it is complete; else the name must be known when writing starts."""
    renames_folders: bool = False
    """Whether a whole folder becomes visible in one step."""
    is_remote: bool = False
    """Whether bytes cross a network, which may damage them."""


@dataclass(frozen=True, slots=True)
class Loan:
    """Bytes of a file where they lie in memory; `give_back` must follow, once, when nobody looks at them any more."""

    view: memoryview
    """Read-only."""
    give_back: Callable[[], None]


class Reader(Protocol):
    """An open file; every byte it gives belongs to `identity`."""

    identity: FileIdentity
    bytes_read: int
    """Bytes that were asked for so far."""

    @property
    def seams(self) -> Sequence[int]:
        """Where the blocks begin that it lends from, in order; none where it lends nothing."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file.

        Raises:
            SourceChanged: it is not the one that was opened; only when nothing else went wrong.
        """

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes from `offset` on.

        Raises:
            SourceChanged: the file is another one by now, or ends before the view is full.
            StorageFailed: the storage refuses.
            TransferDamaged: bytes that were read twice differ.
        """

    def lend(self, offset: int, nbytes: int) -> Loan | None:
        """Give the bytes from `offset` on without a copy; None where only `read_into` gives them.

        It counts as a read, and raises the same. Loans take up memory that later reads may wait for: who holds one must
        not read on before it is given back, unless another thread gives it back.
        """

    def announce(self, ranges: Sequence[tuple[int, int]]) -> bool:
        """Tell of ranges, begin and end, that are about to be read twice: all of them in order, then all again.

        False where it is better to come back later, because memory to keep them will be free then. Without ranges it
        tells whether to read on just now, or to come back later for the sake of others that read the same file.
        """

    def expect_once(self, *, announces: bool, rows: Sequence[RowSpan] = ()) -> None:
        """Promise to read all of it from the beginning on and, but for what is announced, only once.

        So the first bytes may be on their way before they are asked for, and what was read need not be remembered.

        Args:
            announces: whether there will be ranges to announce; memory is left to them.
            rows: what will be asked for in whole steps, in the order of the file; seams keep out of their middles.
        """


class Writer(Protocol):
    """One file of known size in the making; `commit` makes it visible, anything else leaves nothing.

    A context manager: leaving it without `commit`, with an exception or not, is `abort`. Being dropped never publishes.
    """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def write(self, data: memoryview) -> None:
        """Append bytes; the view may be used again as soon as this returns."""

    def commit(self, name: str = "", *, sealed: bool = False) -> BlobDigests:
        """Make the file durable and visible; return the digests of what was written.

        Args:
            name: another name than the one given at the start, where `Traits.names_late`.
            sealed: whether nobody is to write it from then on.

        Raises:
            StorageFailed: fewer or more bytes than announced, or the storage refuses.
        """

    def abort(self) -> None:
        """Drop what was written; nothing to do after `commit` or another `abort`."""


class Folder(Protocol):
    """Files below one place."""

    @property
    def url(self) -> str:
        """Where the folder lies; holds no secret."""

    @property
    def traits(self) -> Traits:
        """What kind of storage it is."""

    @property
    def path(self) -> Path | None:
        """The folder on this machine's disk; None elsewhere."""

    # ---- looking

    def exists(self) -> bool:
        """Whether there is a folder, or at least one file below it."""

    def listing(self, prefix: str = "") -> dict[str, FileIdentity]:
        """Every file below `prefix` (empty, or ends in `/`), by name, sorted; always as it is now.

        `FileIdentity.digest` and `tags` may be missing here. Hidden folders are not entered on disk, unless `prefix`
        names one.
        """

    def identity(self, name: str) -> FileIdentity | None:
        """The state of a file; None when there is none."""

    def check(self, name: str) -> None:
        """Make sure that a file of a foreign checkpoint is a regular file inside the folder.

        Raises:
            CheckpointInvalid: absent, irregular, or it leads out of the folder.
        """

    # ---- reading

    def read(self, name: str, limit: int) -> bytes:
        """Read a small file whole.

        Raises:
            ObjectMissing: there is none.
            FileTooLarge: it is larger than `limit` bytes.
        """

    def read_start(self, name: str, length: int) -> tuple[FileIdentity, bytes]:
        """The identity and the first bytes of a file, `length` of them or all, in as few requests as possible.

        Raises:
            ObjectMissing: there is none.
        """

    def open(self, name: str) -> Reader:
        """Open a file for reads that mostly go forward.

        Raises:
            ObjectMissing: there is none.
        """

    # ---- writing

    def prepare(self) -> None:
        """Make the folder, private to its owner, where the storage has folders."""

    def put(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """Write a small file whole or not at all; one that is there is replaced.

        Args:
            durable: whether it must outlast a power cut.
        """

    def create(self, name: str, data: bytes) -> bool:
        """Write a small file whole unless one is there; tell whether it was written.

        Where a lost reply leaves open who wrote it, the same content counts as written.
        """

    def writer(self, name: str, size: int, *, tags: Mapping[str, str] = {}) -> Writer:
        """Start writing a file of `size` bytes.

        Args:
            name: final, unless `Traits.names_late`: then it may be given to `commit`.
            tags: bound to the file where the storage keeps such a thing.
        """

    def copy_in(self, name: str, origin: Folder, origin_name: str, *, tags: Mapping[str, str] = {}) -> bool:
        """Give a file of another folder a name here without moving its bytes through this process, where that works.

        A hard link on disk, a server-side copy within one object storage. Tells whether it was done.
        """

    def move(self, name: str, target: str) -> None:
        """Give a file another name; one that is not there is no error."""

    def remove(self, name: str) -> None:
        """Delete a file; one that is not there is no error."""

    # ---- before and after work

    def probe(self) -> list[Problem]:
        """Prove with a canary that files can be created once, read and deleted here; return what is wrong."""

    def free_bytes(self) -> int | None:
        """Free space; None where there is no limit that can be asked for."""

    def sweep(self, prefix: str = "", *, grace_seconds: float = 24 * 3600) -> int:
        """Remove what dead writers left below `prefix`: temporary files, unfinished uploads. Returns how many.

        What a living writer holds is not touched: on disk it is locked; elsewhere what is younger than the grace time
        stays, unless it bears the mark of a run of this machine that is gone.
        """
