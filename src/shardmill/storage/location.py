"""Locations as people write them: paths and URLs, taken apart once, and the folders that they name.

Credentials are never part of a location: they come from the environment, a profile or the machine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shardmill.errors import refuse, show
from shardmill.storage.folder import Folder
from shardmill.storage.local import LocalFolder

LOCAL: Final = "file"
MEMORY: Final = "memory"
S3: Final = "s3"
HUB: Final = "hf"
_KINDS: Final = (LOCAL, MEMORY, S3, HUB)
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_REPOSITORY: Final = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([^@/\s][^@\s]*?))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Location:
    """A folder by name."""

    kind: str
    """`file`, `memory`, `s3` or `hf`."""
    root: str
    """Bucket or repository; empty on disk."""
    path: str
    """Absolute on disk, else relative to the root, without slashes at its ends."""
    revision: str = ""
    """Branch, tag or commit of a repository."""

    def __str__(self) -> str:
        if self.kind == LOCAL:
            return self.path
        at = f"@{self.revision.replace('/', '%2F')}" if self.revision else ""
        return f"{self.kind}://{self.root}{at}" + (f"/{self.path}" if self.path else "")

    def beside(self, name: str) -> Location:
        """A folder in the same parent.

        Raises:
            CheckpointInvalid: there is no parent, as for a whole bucket.
        """
        if self.kind == LOCAL:
            return Location(LOCAL, "", str(Path(self.path).parent / name))
        if not self.path:
            message = "it has no parent in which a store could lie"
            raise refuse("location", message, file=str(self), way_out="set --store, or choose a folder below it")
        parent = self.path.rpartition("/")[0]
        return Location(self.kind, self.root, f"{parent}/{name}" if parent else name)

    def contains(self, other: Location) -> bool:
        """Whether another location is this one or lies below it; links on disk are followed."""
        if (self.kind, self.root) != (other.kind, other.root):
            return False
        if self.kind == LOCAL:
            return Path(other.path).resolve().is_relative_to(Path(self.path).resolve())
        return not self.path or f"{other.path}/".startswith(f"{self.path}/")


def parse_location(url: str) -> Location:
    """Take a path or URL apart.

    Raises:
        CheckpointInvalid: another kind of URL, one with a user or key in it, or one that leads upwards.

    >>> str(parse_location("s3://models//base/"))
    's3://models/base'
    """
    kind, separator, rest = url.partition("://")
    if not separator or kind == LOCAL:
        return Location(LOCAL, "", _parse_path(rest if separator else url, is_url=bool(separator)))
    if kind not in _KINDS:
        message = f"locations of kind {show(kind)} are not supported"
        raise refuse("location", message, file=_masked(url), way_out="use a path, s3://, hf:// or memory://")
    if kind == HUB:
        return _parse_hub(rest)
    if "@" in rest.partition("/")[0] or "?" in rest or "#" in rest:
        message = "expected no user, key or option in the URL"
        way_out = "give credentials by environment, profile or role"
        raise refuse("location-credentials", message, file=_masked(url), way_out=way_out)
    root, _, path = rest.partition("/")
    parts = [part for part in path.split("/") if part]
    if not _BUCKET.fullmatch(root) or {".", ".."} & set(parts) or not path.isprintable():
        raise refuse("location", f"expected {kind}://name/path", file=_masked(url), way_out="write it anew")
    return Location(kind, root, "/".join(parts))


def _parse_path(text: str, *, is_url: bool) -> str:
    try:
        path = Path(text) if is_url else Path(text).expanduser()
    except RuntimeError as error:
        raise refuse("location", "there is no such home folder", file=text, way_out="write it anew") from error
    if "\0" in text:
        raise refuse("location", "no path holds a zero byte", file=text, way_out="write it anew")
    return str(path.absolute())


def _parse_hub(rest: str) -> Location:
    repository, parts = "/".join(rest.split("/")[:2]), rest.split("/")[2:]
    found = _REPOSITORY.fullmatch(repository)
    if found is None or "?" in rest or {".", "..", ""} & {*parts, *repository.split("/")}:
        message = "expected hf://organization/repository, with @revision behind it if need be"
        raise refuse("location", message, file=_masked(f"{HUB}://{rest}"), way_out="write it anew")
    return Location(HUB, found[1], "/".join(parts), (found[2] or "").replace("%2F", "/"))


def _masked(url: str) -> str:
    """A URL without what could be a secret."""
    kind, _, rest = url.partition("://")
    _, at, rest = rest.rpartition("@")
    return f"{kind}://{'…@' if at else ''}{re.split('[?#]', rest)[0]}"


def open_folder(url: str, *, foreign: bool = False) -> Folder:
    """Open the folder that a path or URL names; there need not be one yet.

    Args:
        foreign: whether strangers filled it: links to the outside are not followed then.

    Raises:
        CheckpointInvalid: not a location that can be used.
        StorageFailed: a repository cannot be looked up.
    """
    return open_location(parse_location(url), foreign=foreign)


def open_location(location: Location, *, foreign: bool = False) -> Folder:
    """Open the folder at a location."""
    if location.kind == LOCAL:
        return LocalFolder(Path(location.path), foreign=foreign)
    if location.kind == MEMORY:
        from shardmill.storage.memory import open_memory

        return open_memory(f"{location.root}/{location.path}".rstrip("/"))
    if location.kind == S3:
        from shardmill.storage.s3 import open_s3  # its libraries take half a second to import

        return open_s3(location.root, location.path)
    from shardmill.storage.hub import open_hub

    return open_hub(location.root, location.revision, location.path)
