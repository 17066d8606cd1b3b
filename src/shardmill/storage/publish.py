"""Publishing: config.json is written last, so that at no instant is there anything that loads and is wrong.

On disk everything goes to `<destination>.partial-<run>` first, and one rename makes it visible. In an object storage,
which has no such rename, files appear one by one under a claim, in the order shards, other files, manifest, index,
config.json; loaders refuse a folder without config.json.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from shardmill.core.assemble import CONFIG_NAME, MANIFEST_NAME
from shardmill.core.digest import Digest
from shardmill.core.index import is_index_name
from shardmill.errors import (
    DestinationInvalid,
    ObjectMissing,
    Problem,
    StorageFailed,
    StorageUnavailable,
    show,
)
from shardmill.storage.claim import Claim, check_claim, claimed_folder, claimed_path, release
from shardmill.storage.folder import FileIdentity, Folder
from shardmill.storage.hashing import SourceHash
from shardmill.storage.local import LocalFolder, sync_folder
from shardmill.storage.location import HUB, LOCAL, Location, open_location, parse_location
from shardmill.storage.operations import operation
from shardmill.storage.store import Store

log = logging.getLogger(__name__)
_PARTIAL: Final = ".partial-"
_COPY_BYTES: Final = 8 << 20
_COPIERS: Final = 4
_MANIFEST_LIMIT: Final = 512_000_000
_MARK: Final = "key"
"""Tag of the files that were written here: job key of a shard, digest of another file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A file of the result that is copied from elsewhere."""

    name: str
    folder: Folder
    origin: str
    """Its name in `folder`."""
    mark: str
    """Names the content: job key of a shard, digest of another file."""
    digest: Digest | None
    """BLAKE3 of the content."""
    data: bytes | None = None
    """The content itself where there is no such file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Everything that a finished destination holds."""

    shards: tuple[Piece, ...]
    files: tuple[Piece, ...]
    manifest: bytes
    index: tuple[str, bytes] | None
    """Its name and what it says."""
    config: bytes

    @property
    def documents(self) -> tuple[tuple[str, bytes], ...]:
        """What is written after shards and files, in order; config.json is the commit."""
        index = () if self.index is None else (self.index,)
        return ((MANIFEST_NAME, self.manifest), *index, (CONFIG_NAME, self.config))


class Destination(Protocol):
    """Where a result becomes visible."""

    @property
    def url(self) -> str:
        """Where it lies."""

    @property
    def folder(self) -> Folder:
        """Its files."""

    def is_free(self) -> bool:
        """Whether it holds nothing, or nothing but what an unfinished run left."""

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of a result that shardmill finished, else None."""

    def check(self) -> list[Problem]:
        """What stands in the way of writing there."""

    def claimed(self, claim: Claim) -> contextlib.AbstractContextManager[None]:
        """Keep runs of other plans away.

        Raises:
            DestinationInvalid: a living run of another plan keeps this one away.
        """

    def publish(self, release: Release, claim: Claim) -> None:
        """Make the finished result visible.

        Raises:
            DestinationInvalid: something else stands there by now.
            StorageFailed: the storage refuses.
        """


def open_destination(location: Location) -> Destination:
    """Open a destination, which need not be there yet.

    Raises:
        DestinationInvalid: nothing can be written to such a place.
    """
    if location.kind == LOCAL:
        return LocalDestination(Path(location.path))
    if location.kind == HUB:
        raise in_use(str(location), "the Hub is a source only", "choose a folder or a bucket, and upload it from there")
    return ObjectDestination(open_location(location))


def in_use(
    destination: str, message: str, way_out: str = "choose another destination, or remove it"
) -> DestinationInvalid:
    """Build the refusal of a destination."""
    return DestinationInvalid([Problem(file=destination, kind="destination-in-use", message=message, way_out=way_out)])


def check_apart(destination: Location, source: Location, store: Location) -> list[Problem]:
    """Problems of where source, destination and store lie to each other."""
    problems: list[Problem] = []
    if source.contains(destination) or destination.contains(source):
        problems += in_use(str(destination), "it is the source, or one lies inside the other").problems
    if source.contains(store):
        message = "the store lies inside the source"
        problems.append(Problem(file=str(store), kind="store-in-source", message=message, way_out="set --store"))
    if destination.contains(store):
        message = "the store lies inside the destination"
        problems.append(Problem(file=str(store), kind="store-in-destination", message=message, way_out="set --store"))
    return problems


def forget_gone(store: Store) -> None:
    """Drop what a store knows of destinations that do not hold the result any more; unreachable ones are kept."""
    for note in list(store.publications()):
        try:
            destination = open_destination(parse_location(note.destination))
            found = destination.manifest()
            is_there = found is not None and found.get("plan") == note.plan and is_whole(destination, found)
        except StorageFailed as error:
            log.warning("store: %s cannot be looked at, what it holds is kept: %s", show(note.destination, 200), error)
            continue
        if not is_there:
            store.forget_publication(note.destination)


def is_whole(destination: Destination, manifest: Mapping[str, Any]) -> bool:
    """Whether every shard of a manifest is there, in the size that it says."""
    found = destination.folder.listing()
    return all(
        (state := found.get(entry["name"])) is not None and state.size == entry["size"]
        for entry in manifest.get("shards", ())
    )


def _read_manifest(folder: Folder) -> dict[str, Any] | None:
    try:
        document = json.loads(folder.read(MANIFEST_NAME, _MANIFEST_LIMIT))
    except StorageUnavailable:
        raise
    except (ObjectMissing, ValueError):
        return None
    return document if isinstance(document, dict) and folder.identity(CONFIG_NAME) is not None else None


def copy_file(piece: Piece, folder: Folder) -> None:
    """Copy a file's bytes durably.

    Raises:
        TransferDamaged: they do not have the digest that they should have.
    """
    if piece.data is not None:
        with folder.writer(piece.name, len(piece.data), tags={_MARK: piece.mark}) as writer:
            writer.write(memoryview(piece.data))
            writer.commit()
        return
    buffer = memoryview(bytearray(_COPY_BYTES))
    with piece.folder.open(piece.origin) as reader:
        size, hashed = reader.identity.size, SourceHash(reader, piece.digest)
        with folder.writer(piece.name, size, tags={_MARK: piece.mark}) as writer:
            for begin in range(0, size, _COPY_BYTES):
                view = buffer[: min(_COPY_BYTES, size - begin)]
                reader.read_into(begin, view)
                hashed.cover(begin, view)
                writer.write(view)
            hashed.finish()  # before the file gets a name, which would vouch for it
            writer.commit()


# ---- on disk ----------------------------------------------------------------------------------------------------


class LocalDestination:
    """A folder on disk, which appears whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder: Folder = LocalFolder(path)

    @property
    def url(self) -> str:
        """The path."""
        return str(self.path)

    def is_free(self) -> bool:
        """Whether the destination is absent or an empty folder."""
        if self.path.is_symlink():
            return False
        return not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir()))

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of a folder that shardmill finished, else None."""
        return _read_manifest(self.folder) if self.path.is_dir() else None

    def check(self) -> list[Problem]:
        """In use by something else, or not writable."""
        problems: list[Problem] = []
        if not self.is_free() and self.manifest() is None:
            is_link, is_folder = self.path.is_symlink(), self.path.is_dir()
            kind = "a link" if is_link else "a folder that is not empty" if is_folder else "a file"
            message = f"expected nothing or an empty folder, found {kind} with other content"
            problems += in_use(self.url, message).problems
        return problems + LocalFolder(self.path.parent).probe()

    def claimed(self, claim: Claim) -> contextlib.AbstractContextManager[None]:
        """Lock a file beside the destination."""
        return claimed_path(self.path, claim)

    def publish(self, release: Release, claim: Claim) -> None:
        """Fill a folder beside the destination, and rename it."""
        with _partial_folder(self.path, claim.run) as partial, operation("publish", self.path):
            folder = LocalFolder(partial)
            for piece in release.shards:
                if not folder.copy_in(piece.name, piece.folder, piece.origin):
                    copy_file(piece, folder)
            for piece in release.files:
                copy_file(piece, folder)
            for name, data in release.documents:
                folder.put(name, data)
            for path, _, _ in os.walk(partial):
                sync_folder(Path(path))
            _rename(partial, self.path)
            sync_folder(self.path.parent)


@contextlib.contextmanager
def _partial_folder(destination: Path, run: str) -> Iterator[Path]:
    """A locked working folder beside the destination; removed when publishing fails."""
    remove_dead_partials(destination)
    partial = destination.parent / f"{destination.name}{_PARTIAL}{run}"
    with operation("create", partial):
        lock = _lock_new(partial)
    try:
        yield partial
    finally:
        os.close(lock)
        shutil.rmtree(partial, ignore_errors=True)


def _lock_new(folder: Path) -> int:
    """Make a folder and lock it; one that another run took for a dead run's before it was locked is made again."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(lock), folder.stat()):
                    return lock
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)


def remove_dead_partials(destination: Path) -> int:
    """Delete working folders of this destination whose owner is gone; a living owner holds a lock."""
    removed = 0
    for path in destination.parent.glob(f"{destination.name}{_PARTIAL}*"):
        if path.is_symlink() or not path.is_dir():
            continue
        with contextlib.suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
                removed += 1
            finally:
                os.close(lock)
    return removed


def _rename(partial: Path, destination: Path) -> None:
    with operation("rename", destination):
        try:
            partial.rename(destination)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                message = "something else appeared there while shards were quantized"
                raise in_use(str(destination), message) from error
            raise


# ---- in an object storage ---------------------------------------------------------------------------------------


class ObjectDestination:
    """A prefix in an object storage, whose files appear one by one."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    @property
    def url(self) -> str:
        """Where it lies."""
        return self.folder.url

    def is_free(self) -> bool:
        """Whether there is nothing, or nothing but what an unfinished run wrote."""
        names = [name for name in self.folder.listing() if not _is_apart(name)]
        return CONFIG_NAME not in names and len(self._left_over(names)) == len(names)

    def _left_over(self, names: Sequence[str]) -> list[str]:
        """Which of some files an unfinished run wrote: marked ones, its manifest, and an index beside a manifest."""
        ours = {MANIFEST_NAME, *filter(is_index_name, names)} if MANIFEST_NAME in names else set()
        with ThreadPoolExecutor(_COPIERS) as pool:
            states = pool.map(self.folder.identity, names)
            return [
                name
                for name, state in zip(names, states, strict=True)
                if name in ours or state is None or _MARK in state.tags
            ]

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of a result that shardmill finished, else None."""
        return _read_manifest(self.folder)

    def check(self) -> list[Problem]:
        """In use by something else, or not writable."""
        problems = self.folder.probe()
        if not problems and not self.is_free() and self.manifest() is None:
            message = "expected nothing there, found files that are no result of ours"
            problems += in_use(self.url, message).problems
        return problems

    def claimed(self, claim: Claim) -> contextlib.AbstractContextManager[None]:
        """Put a claim into the destination."""
        return claimed_folder(self.folder, claim)

    def publish(self, release: Release, claim: Claim) -> None:
        """Copy shards and other files, each unless it is there, then write manifest, index and config.json."""
        pieces = (*release.shards, *release.files)
        self._remove_others({piece.name for piece in pieces}, dict(release.documents))
        with ThreadPoolExecutor(_COPIERS) as pool:
            states = list(pool.map(self._place, pieces))
        check_claim(self.folder, claim)
        for piece, expected in zip(pieces, states, strict=True):
            found = self.folder.identity(piece.name)
            if found is None or found.size != expected.size or found.tags != expected.tags:
                raise in_use(self.url, f"{show(piece.name)} was changed by somebody else meanwhile")
        for name, data in release.documents:
            if not self.folder.create(name, data):
                raise in_use(self.url, f"{show(name)} of another result appeared there meanwhile")
        self._release(claim)

    def _release(self, claim: Claim) -> None:
        with contextlib.suppress(StorageFailed):
            release(self.folder, claim)

    def _remove_others(self, kept: set[str], documents: Mapping[str, bytes]) -> None:
        """Delete what an unfinished run of another plan left; one of the same plan may be writing right now."""
        names = [name for name in self.folder.listing() if name not in kept and not _is_apart(name)]
        for name in self._left_over(names):
            if name not in documents or self._differs(name, documents[name]):
                self.folder.remove(name)

    def _differs(self, name: str, data: bytes) -> bool:
        try:
            return self.folder.read(name, _MANIFEST_LIMIT) != data
        except ObjectMissing:
            return False

    def _place(self, piece: Piece) -> FileIdentity:
        found = self.folder.identity(piece.name)
        if found is not None and found.tags.get(_MARK) == piece.mark:
            return found
        if found is not None and _MARK not in found.tags:
            raise in_use(self.url, f"{show(piece.name)} appeared there, and is not ours")
        is_text = piece.data is not None
        if is_text or not self.folder.copy_in(piece.name, piece.folder, piece.origin, tags={_MARK: piece.mark}):
            copy_file(piece, self.folder)
        placed = self.folder.identity(piece.name)
        if placed is None:
            raise StorageFailed(errno.EIO, f"copy {show(f'{self.url}/{piece.name}', 200)} failed: it is not there")
        return placed


def _is_apart(name: str) -> bool:
    """What is no part of a result: claims, canaries and marks of uploads."""
    return name.partition("/")[0].startswith(".shardmill-")
