"""Stage 4: shards, other files, manifest, index and config.json become visible in one step. Cheap and idempotent."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shardmill.core import assemble
from shardmill.core.outcome import ShardOutcome
from shardmill.core.plan import Plan
from shardmill.errors import ShardmillError, show
from shardmill.stages.plan import Locations
from shardmill.storage.local import hash_file
from shardmill.storage.publish import in_use, is_free, publish, read_manifest
from shardmill.storage.source import SourceFolder
from shardmill.storage.store import Store


def finalize(plan: Plan, outcomes: Sequence[ShardOutcome], locations: Locations, store: Store) -> dict[str, Any]:
    """Publish the result and return its manifest; a destination that holds this very result is left as it is.

    Raises:
        DestinationInvalid: the destination holds something else.
        ShardmillError: a shard has no outcome, or its blob vanished.
    """
    source = locations.open_source()
    receipts = {outcome.shard: outcome.receipt for outcome in outcomes}
    missing = [shard.name for shard in plan.shards if shard.name not in receipts]
    if missing:
        raise ShardmillError(f"{len(missing)} shards have no result, the first is {show(missing[0])}")
    document = _manifest(plan, outcomes, source)
    if is_published(locations.destination_path, document):
        return document
    if not is_free(locations.destination_path):
        raise in_use(locations.destination_path, "it holds the result of another plan")
    publish(
        locations.destination_path,
        run=secrets.token_hex(4),
        blobs=[(shard.name, _blob(store, receipts[shard.name].key)) for shard in plan.shards],
        files=[(name, source.path(name)) for name in plan.files],
        manifest=assemble.encode_document(document),
        index=assemble.output_index(plan),
        config=assemble.encode_document(assemble.config_document(plan)),
    )
    return document


def _blob(store: Store, key: str) -> Path:
    path = store.blob_path(key)
    if not path.exists():
        raise ShardmillError(f"blob {key[:12]} vanished from the store; run again")
    return path


def _manifest(plan: Plan, outcomes: Sequence[ShardOutcome], source: SourceFolder) -> dict[str, Any]:
    receipts = {outcome.shard: outcome.receipt for outcome in outcomes}
    files = _file_digests(plan, source)
    sources = dict(sorted({pair for outcome in outcomes for pair in outcome.sources}))
    digest = assemble.plan_digest(plan, {name: receipt.key for name, receipt in receipts.items()}, files)
    versions = {"shardmill": version("shardmill"), "compressed-tensors layout": assemble.LAYOUT_VERSION}
    return assemble.manifest(plan, receipts, digest=digest, sources=sources, file_digests=files, versions=versions)


def published_result(plan: Plan, locations: Locations, store: Store) -> dict[str, Any]:
    """Return the manifest of a destination that holds the result of this very plan.

    Source shards without a remembered digest are read for it; nothing is computed.

    Raises:
        DestinationInvalid: it holds something else.
    """
    source = locations.open_source()
    digests = {shard.name: str(store.source_digest(source.path(shard.name))[0]) for shard in plan.shards}
    keys = {shard.name: shard.job_key(digests) for shard in plan.shards}
    digest = assemble.plan_digest(plan, keys, _file_digests(plan, source))
    found = read_manifest(locations.destination_path)
    if found is None or found.get("plan") != digest or not _is_whole(locations.destination_path, found):
        raise in_use(locations.destination_path, "it holds the result of another plan")
    return found


def _file_digests(plan: Plan, source: SourceFolder) -> dict[str, str]:
    return {name: str(hash_file(source.path(name))[0].whole) for name in plan.files}


def is_published(destination: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether a destination holds exactly the result that a manifest describes, as far as names and sizes tell."""
    found = read_manifest(destination)
    return found is not None and found.get("plan") == manifest["plan"] and _is_whole(destination, manifest)


def _is_whole(destination: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether every shard of a manifest is there, in the size that it says."""
    return all(
        (path := destination / entry["name"]).is_file() and path.stat().st_size == entry["size"]
        for entry in manifest.get("shards", ())
    )
