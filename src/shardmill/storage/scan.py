"""Finding checkpoints below a place: folders with a config.json and safetensors shards, by a pattern of their path."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from shardmill.core.assemble import CONFIG_NAME, MANIFEST_NAME
from shardmill.core.batch import Found, split_pattern
from shardmill.errors import refuse
from shardmill.storage.location import HUB, LOCAL, Location, open_location, parse_location
from shardmill.storage.operations import operation

_SHARD_SUFFIX: Final = ".safetensors"


def find_checkpoints(pattern: str) -> tuple[Found, ...]:
    """Find every checkpoint whose path matches a pattern, sorted.

    `*`, `?` and `[…]` stand for parts of a folder's name. A folder without config.json or shards is no checkpoint, and
    neither is a result of ours. Hidden folders are passed over.
    On disk, links to folders are followed.

    Raises:
        CheckpointInvalid: there is no such place, or one that cannot be searched.
        StorageFailed: it cannot be reached.
    """
    fixed, parts = split_pattern(pattern)
    if fixed.startswith(f"{HUB}://"):
        raise refuse("batch-source", "the Hub cannot be searched", file=pattern, way_out="name each repository")
    place = parse_location(fixed)
    paths = _folders_on_disk(place, parts) if place.kind == LOCAL else _folders_by_listing(place, parts)
    prefix = str(place).rstrip("/")
    return tuple(
        Found(source=f"{prefix}/{path}", name=path.rpartition("/")[2], path=path, is_scanned=True)
        for path in sorted(paths)
    )


def _is_checkpoint(names: set[str]) -> bool:
    has_shards = any(name.endswith(_SHARD_SUFFIX) for name in names)
    return CONFIG_NAME in names and has_shards and MANIFEST_NAME not in names


def _is_match(name: str, part: str) -> bool:
    return not name.startswith(".") and fnmatchcase(name, part)


def _folders_by_listing(place: Location, parts: Sequence[str]) -> Iterator[str]:
    folder = open_location(place)
    names: dict[tuple[str, ...], set[str]] = {}
    for name in folder.listing():
        *path, leaf = name.split("/")
        if len(path) == len(parts) and all(map(_is_match, path, parts)):
            names.setdefault(tuple(path), set()).add(leaf)
    return ("/".join(path) for path, found in names.items() if _is_checkpoint(found))


def _folders_on_disk(place: Location, parts: Sequence[str]) -> Iterator[str]:
    root = Path(place.path)
    if not root.is_dir():
        raise refuse("batch-source", "there is no such folder to search", file=place.path, way_out="correct the path")
    found = [root]
    for part in parts:
        found = [Path(child) for folder in found for child in _children(folder) if _is_match(Path(child).name, part)]
    return (
        path.relative_to(root).as_posix() for path in found if _is_checkpoint({file.name for file in path.iterdir()})
    )


def _children(folder: Path) -> list[str]:
    with operation("list", folder), os.scandir(folder) as entries:
        return [entry.path for entry in entries if entry.is_dir()]
