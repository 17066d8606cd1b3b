"""Single files that people ask for, such as a report: written whole or not at all, to a path or an URL."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shardmill.errors import DestinationInvalid, Problem
from shardmill.storage.folder import Folder
from shardmill.storage.location import HUB, LOCAL, open_location, parse_location


def _place(location: str) -> tuple[Folder, str]:
    """Folder and name of a file.

    Raises:
        DestinationInvalid: nothing can be written there.
    """
    found = parse_location(location)
    if found.kind == LOCAL:
        path = Path(found.path)
        if path.is_dir() or not path.parent.is_dir():
            what = "a folder" if path.is_dir() else "no folder that it could lie in"
            raise _invalid(location, f"expected a file, found {what}", "choose another name")
        return open_location(replace(found, path=str(path.parent))), path.name
    parent, _, name = found.path.rpartition("/")
    if found.kind == HUB or not name:
        raise _invalid(location, "no file can be written there", "give a path or s3://bucket/file")
    return open_location(replace(found, path=parent)), name


def _invalid(location: str, message: str, way_out: str) -> DestinationInvalid:
    return DestinationInvalid([Problem(file=location, kind="document", message=message, way_out=way_out)])


def check_document(location: str, *, replaces: bytes = b"") -> None:
    """Make sure that a file may be written, as far as can be told before.

    Args:
        replaces: what a file that is there must begin with to be replaced.

    Raises:
        DestinationInvalid: nothing can be written there, or what is there is somebody else's.
    """
    folder, name = _place(location)
    if replaces and folder.identity(name) is not None and folder.read_start(name, len(replaces))[1] != replaces:
        raise _invalid(location, "there is a file that shardmill did not write", "choose another name, or move it away")


def write_document(location: str, data: bytes) -> None:
    """Write a file whole; one that is there is replaced.

    Raises:
        DestinationInvalid: nothing can be written there.
        StorageFailed: the storage refuses.
    """
    folder, name = _place(location)
    folder.put(name, data)
