"""What the Hub library keeps on disk: `refs/<revision>`, `snapshots/<commit>/<file>`, `blobs/<name of the content>`.

A file of a snapshot is a link to a blob, named by the SHA-256 of its content where the Hub tells one, else by its git
object; or, on file systems without links, the file itself. Nothing here writes.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from huggingface_hub import constants

from shardmill.core.digest import Digest
from shardmill.core.index import SINGLE_NAME, choose_index, parse_index
from shardmill.core.limits import DEFAULTS
from shardmill.errors import Refused
from shardmill.storage.operations import operation

COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_REF_LIMIT: Final = 100


@dataclass(frozen=True, slots=True)
class CachedFile:
    """A file of a snapshot."""

    path: Path
    size: int
    """In bytes."""
    blob: str
    """Name of its blob; empty where the snapshot holds the file itself."""

    @property
    def digest(self) -> Digest | None:
        """Digest of the content, where the library named the blob by it."""
        return Digest("sha256", self.blob) if _SHA256.fullmatch(self.blob) else None


def is_inside(name: str) -> bool:
    """Whether a name of the Hub, or of a revision, stays below the folder it is joined to.

    >>> is_inside("refs/pr/1"), is_inside("../secret"), is_inside("/etc/passwd")
    (True, False, False)
    """
    return "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


def repo_folder(repo: str) -> Path:
    """Where the cache keeps a model repository."""
    return Path(constants.HF_HUB_CACHE) / "--".join(["models", *repo.split("/")])


def cached_commit(repo: str, revision: str) -> str | None:
    """The commit that a revision meant when the cache last heard of it; itself for the name of a commit."""
    path = repo_folder(repo) / "refs" / revision
    with operation("read", path):
        try:
            with path.open(encoding="ascii", errors="replace") as file:
                found = file.read(_REF_LIMIT).strip()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            found = revision
    return found if COMMIT.fullmatch(found) else None


def cached_files(repo: str, commit: str) -> dict[str, CachedFile]:
    """The regular files that the cache holds of a commit, by name; links that lead elsewhere are passed over."""
    snapshot = repo_folder(repo) / "snapshots" / commit
    found: dict[str, CachedFile] = {}
    with operation("list", snapshot):
        for path in _walk(snapshot):
            file = _look_at(path, snapshot)
            if file is not None:
                found[path.relative_to(snapshot).as_posix()] = file
    return found


def missing_files(files: Mapping[str, CachedFile], subfolder: str) -> tuple[str, ...]:
    """What a snapshot lacks to be a whole checkpoint, as far as its own files tell."""
    prefix = f"{subfolder}/" if subfolder else ""
    names = {name.removeprefix(prefix) for name in files if name.startswith(prefix)}
    needed = {"config.json", *_shards(names, files.get(f"{prefix}{choose_index(names)}"))}
    return tuple(sorted(needed - names))


def _shards(names: set[str], index: CachedFile | None) -> tuple[str, ...]:
    if index is not None and index.size <= DEFAULTS.index_bytes:
        with operation("read", index.path):
            data = index.path.read_bytes()
        try:
            return parse_index(data).shards
        except Refused:  # told with more words by who reads the checkpoint
            return ()
    return () if any(name.endswith(".safetensors") for name in names) else (SINGLE_NAME,)


def _walk(snapshot: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(snapshot):
        yield from (Path(folder) / name for name in names)


def _look_at(path: Path, snapshot: Path) -> CachedFile | None:
    """The file of a snapshot, if it is one, and lies where the library puts files of this repository."""
    try:
        real = path.resolve(strict=True)
        status = real.stat()
        target = path.parent / path.readlink() if path.is_symlink() else None
    except (OSError, RuntimeError):
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    if target is None:
        return CachedFile(path, status.st_size, "") if real.is_relative_to(snapshot.resolve()) else None
    repo = snapshot.parent.parent
    # a blob may itself be a link into the store that all repositories share; that one is named by another hash
    homes = (repo.resolve() / "blobs", repo.parent.resolve() / "blobs")
    if target.parent.resolve() != homes[0] or not any(real.is_relative_to(home) for home in homes):
        return None
    return CachedFile(path, status.st_size, target.name)
