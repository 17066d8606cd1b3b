"""Stage 2: every problem of every shard, and of the places where the run works; nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from shardmill.core.checks import check_shard, source_names
from shardmill.core.plan import Plan, ShardPlan
from shardmill.errors import CheckpointInvalid, DestinationInvalid, Problem, Refused, StorageFailed, show
from shardmill.stages.plan import Locations, look_up
from shardmill.storage.folder import Folder
from shardmill.storage.location import parse_location
from shardmill.storage.publish import check_apart
from shardmill.storage.source import SourceFolder
from shardmill.storage.store import Store

_ABOUT_PLACES: Final = frozenset(
    [
        "destination-in-use",
        "destination-claimed",
        "destination-unwritable",
        "no-space",
        "storage-unreachable",
        "store-in-source",
        "store-in-destination",
    ]
)


def validate_shards(
    shards: Iterable[ShardPlan], taken: frozenset[str], source: SourceFolder | None = None
) -> list[Problem]:
    """Check some shards of a plan.

    Args:
        taken: names of all source tensors, see `source_names`.
        source: when given, each header is read again and must still be the planned one.
    """
    problems: list[Problem] = []
    for shard in shards:
        problems += check_shard(shard, taken)
        if source is not None:
            problems += check_unchanged(shard, source)
    return problems


def check_unchanged(shard: ShardPlan, source: SourceFolder) -> list[Problem]:
    """Problems of a shard whose header is no longer the planned one."""
    try:
        found = source.read_header(shard.name)
    except CheckpointInvalid as error:
        return list(error.problems)
    if found.size == shard.size and found.header.tensors == tuple(tensor.spec for tensor in shard.tensors):
        return _check_partners(shard, source)
    return [
        Problem(
            file=shard.name, kind="source-changed", message="its header is not the planned one", way_out="run again"
        )
    ]


def _check_partners(shard: ShardPlan, source: SourceFolder) -> list[Problem]:
    """Problems of what is read of other shards and is no longer where it was planned."""
    problems: list[Problem] = []
    for name in shard.sources[1:]:
        header = source.read_header(name).header
        refs = {(ref.data_start, ref.spec) for ref in shard.refs() if ref.shard == name}
        there = frozenset(header.tensors)
        moved = sorted(spec.name for start, spec in refs if start != header.data_start or spec not in there)
        message = "a fused partner, or a part of a weight in this shard, is no longer where it was planned"
        problems += [
            Problem(file=name, tensor=t, kind="source-changed", message=message, way_out="run again") for t in moved
        ]
    return problems


def validate_plan(plan: Plan) -> list[Problem]:
    """Every problem of a plan and of all its shards, sorted."""
    return sorted({*plan.problems, *validate_shards(plan.shards, source_names(plan))})


def validate_locations(plan: Plan, locations: Locations, store: Store) -> list[Problem]:
    """Problems of destination and store: in use, out of reach, not writable, too small for what is not there yet."""
    problems = check_places(locations, store)
    if not problems:
        destination = locations.open_destination()
        problems = _told(destination.url, lambda: _check_space(plan, locations, store, destination.folder))
    return sorted(set(problems))


def check_places(locations: Locations, store: Store) -> list[Problem]:
    """Problems of destination and store that have nothing to do with what is to be written there."""
    destination_at = parse_location(locations.destination)
    problems = check_apart(destination_at, parse_location(locations.source), locations.store_location)
    destination = locations.open_destination()
    with ThreadPoolExecutor(2) as pool:
        checks = pool.map(_told, (destination.url, store.folder.url), (destination.check, store.folder.probe))
        return [*problems, *(problem for found in checks for problem in found)]


def pin_readable(locations: Locations, store: Store) -> Locations:
    """Pin the source, see `Locations.pinned`; if it cannot be read, what is wrong with other places is told as well.

    Raises:
        Refused: it cannot be reached, or there is no such folder; carries the problems of all places.
    """
    try:
        pinned = locations.pinned()
        pinned.open_source()
    except StorageFailed as error:
        raise Refused([_unreachable(locations.source, error), *check_places(locations, store)]) from error
    except Refused as error:
        if problems := check_places(locations, store):
            raise Refused([*error.problems, *problems]) from error
        raise
    return pinned


def _told(place: str, check: Callable[[], list[Problem]]) -> list[Problem]:
    """What a check finds, or why it could not look."""
    try:
        return check()
    except StorageFailed as error:
        return [_unreachable(place, error)]


def _unreachable(place: str, error: StorageFailed) -> Problem:
    way_out = "check the location and the credentials"
    return Problem(file=place, kind="storage-unreachable", message=str(error), way_out=way_out)


def _check_space(plan: Plan, locations: Locations, store: Store, destination: Folder) -> list[Problem]:
    """Compare the bytes that will be written with what is free, on the disks of store and destination."""
    if all(folder.free_bytes() is None for folder in (store.folder, destination)):
        return []
    if any(check_shard(shard) for shard in plan.shards):
        return []  # what cannot be treated as decided has no size
    source = locations.open_source()
    sizes = {shard.name: shard.sizes().output_bytes for shard in plan.shards}
    held = look_up(plan.shards, lambda shard: store.seems_to_hold(shard, source), store.folder, source.folder)
    missing = sum(sizes[shard.name] for shard, is_held in zip(plan.shards, held, strict=True) if not is_held)
    files = sum(source.identity(name).size for name in plan.files)
    if _device(store.folder) == _device(destination):  # publishing makes hard links
        return _too_small(destination, store.folder, missing + files)
    copied = sum(sizes.values()) + files
    return _too_small(destination, store.folder, missing) + _too_small(destination, destination, copied)


def _device(folder: Folder) -> int | None:
    """Number of the disk on which a folder lies or will lie; None elsewhere."""
    if folder.path is None:
        return None
    return next(path for path in (folder.path, *folder.path.parents) if path.exists()).stat().st_dev


def _too_small(destination: Folder, folder: Folder, need: int) -> list[Problem]:
    free = folder.free_bytes()
    if free is None or need <= free:
        return []
    message = f"{need} bytes are needed for the output, {free} are free at {show(folder.url, 120)}"
    return [Problem(file=destination.url, kind="no-space", message=message, way_out="free space or set --store")]


def refuse_problems(problems: Iterable[Problem]) -> None:
    """Raise when anything was found.

    Raises:
        DestinationInvalid: all of it is about destination and store.
        Refused: otherwise; carries every problem.
    """
    found = sorted(set(problems))
    if not found:
        return
    if all(problem.kind in _ABOUT_PLACES for problem in found):
        raise DestinationInvalid(found)
    raise Refused(found)
