"""Stage 1: read listing, index, config and headers; decide about every tensor. Never reads tensor bytes."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

from shardmill.core.limits import Intake
from shardmill.core.nonfinite import Kept
from shardmill.core.plan import Plan, ShardPlan
from shardmill.core.planner import build_plan
from shardmill.core.recipe import Recipe
from shardmill.errors import show
from shardmill.stages.importance import check_importance, resolve_importance
from shardmill.stages.input_scale import take_input_scales
from shardmill.storage.folder import Folder
from shardmill.storage.location import HUB, Location, open_location, parse_location
from shardmill.storage.publish import Destination, open_destination
from shardmill.storage.source import SourceFolder, Survey, open_source, read_checkpoint
from shardmill.storage.store import FAST, FOLDER_NAME, Store, listing_state

_LOOKUPS: Final = 16
"""Shards that are looked up at a time where that means waiting for a network."""
_T = TypeVar("_T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Locations:
    """Where a run reads, writes and remembers; paths or URLs."""

    source: str
    destination: str
    store: str = ""
    """Empty for `.shardmill` beside the destination."""
    intake: Intake = field(default_factory=Intake)
    """What is taken in of the source."""

    def open_source(self) -> SourceFolder:
        """Open the source.

        Raises:
            CheckpointInvalid: there is no such folder.
        """
        return open_source(self.source, self.intake)

    def pinned(self) -> Locations:
        """The same locations, with the commit of a Hub source in place of its branch or tag, looked up once.

        Raises:
            StorageFailed: the repository cannot be looked up.
        """
        if parse_location(self.source).kind != HUB:
            return self
        return replace(self, source=open_location(parse_location(self.source)).url)

    def open_destination(self) -> Destination:
        """Open the destination, which need not be there yet.

        Raises:
            DestinationInvalid: nothing can be written to such a place.
        """
        return open_destination(parse_location(self.destination))

    @property
    def store_location(self) -> Location:
        """Where the store lies: by default beside the destination, so that publishing moves no bytes."""
        return parse_location(self.store) if self.store else parse_location(self.destination).beside(FOLDER_NAME)

    def open_store(self, verify: str = FAST) -> Store:
        """Open the store without creating it."""
        return Store(open_location(self.store_location), verify=verify)


def make_plan(source: SourceFolder, recipe: Recipe, kept: Kept | None = None) -> Plan:
    """Plan the conversion of a checkpoint; what is wrong with it is in `Plan.problems`.

    Args:
        kept: what is copied because of its values; see `stages.nonfinite`.
    """
    with collection_paused():
        seen = source.survey()  # before anything is read: what arrives later is not in the plan
        _tell_second_names(seen)
        found = build_plan(read_checkpoint(source, seen), resolve_importance(recipe), kept)
        problems = found.problems
        if not problems:
            found, more = take_input_scales(found, source.intake)
            problems = tuple(sorted({*check_importance(found), *more}))
        return replace(found, source_state=listing_state(seen.files), problems=problems)


def _tell_second_names(seen: Survey) -> None:
    """Warn of files that could be changed under another name; a property of the disk, and so not of the result."""
    names = [name for name, state in seen.files.items() if state.links > 1]
    if names:
        more = f" and {len(names) - 1} more files have" if len(names) > 1 else " has"
        log.warning("%s%s a second name on this disk (hard link); used as it is", show(names[0]), more)


def look_up(shards: Sequence[ShardPlan], look: Callable[[ShardPlan], _T], *folders: Folder) -> list[_T]:
    """What is found of each shard; of many at a time where one of the folders lies behind a network."""
    with ThreadPoolExecutor(_LOOKUPS if any(folder.traits.is_remote for folder in folders) else 1) as pool:
        return list(pool.map(look, shards))


@contextmanager
def collection_paused() -> Iterator[None]:
    """Keep the cyclic garbage collector from visiting a growing plan again and again: it holds no cycle."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
