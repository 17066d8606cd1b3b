"""What a batch does before it converts anything: find checkpoints, and tell what is new from what is done.

A checkpoint is done when the destination stands and the store's note of it says that it was made of this very state of
the source, by this very recipe. That takes a listing, a note and a look at the destination, and reads no header.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import yaml

from shardmill.core.assemble import CONFIG_NAME, MANIFEST_NAME
from shardmill.core.batch import Entry, Found, listed, parse_entries, split_pattern
from shardmill.core.index import choose_index, parse_index
from shardmill.core.plan import made_of
from shardmill.core.recipe import Recipe
from shardmill.core.summary import Summary, summarize_manifest
from shardmill.errors import FileTooLarge, ObjectMissing, Refused, refuse, show
from shardmill.stages.plan import Locations
from shardmill.stages.result import INTAKE, read_manifest
from shardmill.storage.folder import FileIdentity
from shardmill.storage.location import open_folder, open_location, parse_location
from shardmill.storage.scan import find_checkpoints
from shardmill.storage.source import SourceFolder, open_source
from shardmill.storage.store import listing_state

_MANIFEST_LIMIT: Final = 4_000_000
_SETTLE_SECONDS: Final = 2.1
"""After which the state of files that were just written can be told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceState:
    """What a listing tells of a checkpoint."""

    state: str
    """See `storage.store.listing_state`."""
    waits_for: str = ""
    """Why it is left for a later batch; empty for no reason."""


def read_entries(url: str) -> tuple[Entry, ...]:
    """Read a manifest of a batch, YAML or JSON.

    Raises:
        Refused: absent, too large, or no manifest; names every bad entry.
        StorageFailed: it cannot be read.
    """
    folder, _, name = str(parse_location(url)).rpartition("/")
    try:
        data = open_folder(folder or "/").read(name, _MANIFEST_LIMIT)
        return parse_entries(yaml.safe_load(data))
    except ObjectMissing as error:
        raise refuse("batch-manifest", "there is no such file", file=url, way_out="correct the location") from error
    except FileTooLarge as error:
        message = f"larger than the limit of {_MANIFEST_LIMIT} bytes"
        raise refuse("batch-manifest", message, file=url, way_out="split it") from error
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise refuse("batch-manifest", f"neither YAML nor JSON: {where}", file=url, way_out="correct it") from error


def find_sources(source: str) -> tuple[Found, ...]:
    """The checkpoint that a source names, or all that match it as a pattern.

    Raises:
        CheckpointInvalid: no location, or nothing that can be searched.
        StorageFailed: it cannot be reached.
    """
    return find_checkpoints(source) if split_pattern(source)[1] else (listed(source),)


def look_at(found: Found, min_age_seconds: float = 0.0) -> SourceState:
    """Tell the state of a checkpoint, and whether it is still being written.

    Raises:
        CheckpointInvalid: there is no such folder.
        StorageFailed: it cannot be reached.
    """
    source = open_source(found.source)
    listing = source.listing()
    state = listing_state(listing)
    if not state:
        time.sleep(_SETTLE_SECONDS)
        listing = source.listing()
        state = listing_state(listing)
    if not state:
        return SourceState(state="", waits_for="it is being written")
    age = time.time() - max(file.modified for file in listing.values()) if listing else 0.0
    if age < min_age_seconds:
        waits_for = f"its youngest file is {age:.0f} s old, expected are {min_age_seconds:.0f} s"
    else:
        waits_for = _missing_shards(source, listing) if found.is_scanned else ""
    return SourceState(state=state, waits_for=waits_for)


def _missing_shards(source: SourceFolder, listing: Mapping[str, FileIdentity]) -> str:
    """Why a checkpoint that nobody named is not whole yet; a broken index is for the conversion to tell."""
    index = choose_index(listing)
    if index is None:
        return ""
    try:
        shards = parse_index(source.read_text(index, "index_bytes"), limits=source.intake.limits).shards
    except Refused:
        return ""
    missing = [name for name in shards if name not in listing]
    if not missing:
        return ""
    return f"{len(missing)} of {len(shards)} shards are not there yet, the first is {show(missing[0])}"


def is_done(locations: Locations, recipe: Recipe, state: str) -> bool:
    """Whether the destination holds the result of this state of the source, as far as the store knows.

    Raises:
        StorageFailed: destination or store cannot be reached.
    """
    wanted = made_of(state, recipe, allow_code=locations.intake.allow_code)
    if not wanted:
        return False
    destination = parse_location(locations.destination)
    note = locations.open_store().publication(str(destination))
    if note is None or note.made_of != wanted:
        return False
    folder = open_location(destination)
    return all(folder.identity(name) is not None for name in (MANIFEST_NAME, CONFIG_NAME))


def read_summary(destination: str) -> Summary:
    """Summarize a finished result.

    Raises:
        CheckpointInvalid: there is none.
        StorageFailed: it cannot be read.
    """
    return summarize_manifest(read_manifest(open_source(destination, INTAKE)))
