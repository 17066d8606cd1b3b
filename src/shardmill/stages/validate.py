"""Stage 2: every problem of every shard, and of the places where the run works; nothing is changed."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from shardmill.core.checks import check_shard, source_names
from shardmill.core.plan import Plan, ShardPlan
from shardmill.errors import CheckpointInvalid, DestinationInvalid, Problem, Refused
from shardmill.stages.plan import Locations
from shardmill.storage.publish import check_destination
from shardmill.storage.source import SourceFolder
from shardmill.storage.store import Store, check_location


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
    """Problems of fused partners in other shards that are no longer where they were planned."""
    problems: list[Problem] = []
    for name in shard.sources[1:]:
        header = source.read_header(name).header
        refs = {ref for tensor in shard.tensors for ref in tensor.fused if ref.shard == name}
        moved = sorted(
            ref.spec.name for ref in refs if ref.data_start != header.data_start or ref.spec not in header.tensors
        )
        message = "a fused partner is no longer where it was planned"
        problems += [
            Problem(file=name, tensor=t, kind="source-changed", message=message, way_out="run again") for t in moved
        ]
    return problems


def validate_plan(plan: Plan) -> list[Problem]:
    """Every problem of a plan and of all its shards, sorted."""
    return sorted({*plan.problems, *validate_shards(plan.shards, source_names(plan))})


def validate_locations(plan: Plan, locations: Locations, store: Store) -> list[Problem]:
    """Problems of destination and store: in use, not writable, too small for what is not there yet."""
    source = locations.open_source()
    destination = locations.destination_path
    problems = check_destination(destination, source.root) + check_location(locations.store_path, source.root)
    return problems + _check_space(plan, source, store, destination)


def _check_space(plan: Plan, source: SourceFolder, store: Store, destination: Path) -> list[Problem]:
    if any(check_shard(shard) for shard in plan.shards):
        return []  # what cannot be treated as decided has no size
    existing = next(path for path in (store.root, *store.root.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    need = 0
    for shard in plan.shards:
        if not store.seems_to_hold(shard, source):
            need += shard.sizes().output_bytes
    if need <= free:
        return []
    message = f"{need} bytes are needed for the output, {free} are free at `{existing}`"
    return [Problem(file=str(destination), kind="no-space", message=message, way_out="free space or set --store")]


def refuse_problems(problems: Iterable[Problem]) -> None:
    """Raise when anything was found.

    Raises:
        DestinationInvalid: all of it is about destination and store.
        Refused: otherwise; carries every problem.
    """
    found = sorted(set(problems))
    if not found:
        return
    if all(
        problem.kind in ("destination-in-use", "destination-unwritable", "no-space", "store-in-source")
        for problem in found
    ):
        raise DestinationInvalid(found)
    raise Refused(found)
