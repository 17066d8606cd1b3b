"""Publishing: a folder becomes visible in one rename, with config.json written last.

Everything goes to `<destination>.partial-<run>` first. Loaders refuse a folder without config.json, so at no instant is
there anything that loads and is wrong.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from shardmill.core.assemble import CONFIG_NAME, MANIFEST_NAME
from shardmill.core.index import INDEX_NAME
from shardmill.errors import DestinationInvalid, Problem
from shardmill.storage.local import operation, sync_folder, write_small

_PARTIAL: Final = ".partial-"
_LINK_REFUSED: Final = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder that shardmill finished, else None."""
    try:
        document = json.loads((folder / MANIFEST_NAME).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return document if isinstance(document, dict) and (folder / CONFIG_NAME).is_file() else None


def is_free(destination: Path) -> bool:
    """Whether the destination is absent or an empty folder."""
    if destination.is_symlink():
        return False
    return not destination.exists() or (destination.is_dir() and not any(destination.iterdir()))


def in_use(
    destination: Path, message: str, way_out: str = "choose another destination, or remove it"
) -> DestinationInvalid:
    """Build the refusal of a destination."""
    return DestinationInvalid(
        [Problem(file=str(destination), kind="destination-in-use", message=message, way_out=way_out)]
    )


def check_destination(destination: Path, source: Path) -> list[Problem]:
    """Problems of a destination that can be told before work: where it lies and whether it can be written."""
    problems: list[Problem] = []
    real, real_source = destination.resolve(), source.resolve()
    if real == real_source or real.is_relative_to(real_source) or real_source.is_relative_to(real):
        problems += in_use(destination, "it is the source, or one lies inside the other").problems
    elif not is_free(destination) and read_manifest(destination) is None:
        kind = (
            "a link" if destination.is_symlink() else "a folder that is not empty" if destination.is_dir() else "a file"
        )
        problems += in_use(
            destination, f"expected nothing or an empty folder, found {kind} with other content"
        ).problems
    return problems + _check_writable(destination.parent)


def _check_writable(folder: Path) -> list[Problem]:
    """Try what publishing will do: make a folder, and remove it."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        canary = existing / f".shardmill-canary-{os.getpid()}"
        canary.mkdir()
        canary.rmdir()
    except OSError as error:
        message = f"cannot be written: {error.strerror}"
        return [
            Problem(
                file=str(existing), kind="destination-unwritable", message=message, way_out="choose another destination"
            )
        ]
    return []


@contextlib.contextmanager
def _partial_folder(destination: Path, run: str) -> Iterator[Path]:
    """A locked working folder beside the destination; removed when publishing fails."""
    remove_dead_partials(destination)
    partial = destination.parent / f"{destination.name}{_PARTIAL}{run}"
    with operation("create", partial):
        partial.mkdir(parents=True)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield partial
    finally:
        os.close(lock)
        shutil.rmtree(partial, ignore_errors=True)


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


def place_file(source: Path, target: Path) -> None:
    """Give a blob its published name: a hard link where the file system allows one, else a durable copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _LINK_REFUSED:
            raise
        copy_file(source, target)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes durably; its mode follows the umask."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, target.open("xb") as write:
        shutil.copyfileobj(read, write, 16 << 20)
        write.flush()
        os.fsync(write.fileno())


def publish(
    destination: Path,
    *,
    run: str,
    blobs: Iterable[tuple[str, Path]],
    files: Iterable[tuple[str, Path]],
    manifest: bytes,
    index: bytes | None,
    config: bytes,
) -> None:
    """Make the finished checkpoint visible: shards, other files, manifest, index, config.json, then one rename.

    Raises:
        DestinationInvalid: something else stands at the destination by now.
        StorageFailed: the file system refuses.
    """
    with _partial_folder(destination, run) as partial, operation("publish", destination):
        for name, path in blobs:
            place_file(path, partial / name)
        for name, path in files:
            copy_file(path, partial / name)
        write_small(partial / MANIFEST_NAME, manifest)
        if index is not None:
            write_small(partial / INDEX_NAME, index)
        write_small(partial / CONFIG_NAME, config)
        for folder, _, _ in os.walk(partial):
            sync_folder(Path(folder))
        _rename(partial, destination)
        sync_folder(destination.parent)


def _rename(partial: Path, destination: Path) -> None:
    try:
        partial.rename(destination)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise in_use(destination, "something else appeared there while shards were quantized") from error
        raise
