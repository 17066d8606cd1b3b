"""Stage 4: shards, other files, manifest, index and config.json become visible in one step. Cheap and idempotent."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any, Final

from shardmill.core import assemble
from shardmill.core.digest import Digest, digest_json
from shardmill.core.groups import LAYOUT_VERSION
from shardmill.core.outcome import ShardOutcome
from shardmill.core.plan import Plan
from shardmill.core.receipt import Receipt
from shardmill.errors import BlobsGone, DestinationInvalid, ObjectMissing, ShardmillError, SourceChanged, show
from shardmill.stages.plan import Locations, collection_paused
from shardmill.storage.claim import Claim, new_claim
from shardmill.storage.hashing import hash_bytes, hash_file
from shardmill.storage.location import parse_location
from shardmill.storage.publish import Destination, Piece, Release, in_use, is_whole
from shardmill.storage.source import SourceFolder
from shardmill.storage.store import Publication, Store, blob_name

log = logging.getLogger(__name__)
_READERS: Final = 4


def finalize(
    plan: Plan, outcomes: Sequence[ShardOutcome], locations: Locations, store: Store, claim: Claim
) -> dict[str, Any]:
    """Publish the result and return its manifest; a destination that holds this very result is left as it is.

    Args:
        claim: of this run on the destination, see `claim_of`.

    Raises:
        DestinationInvalid: the destination holds something else.
        SourceChanged: the source is not in the state of which the claim speaks.
        BlobsGone: the store lost blobs; it has forgotten them, so that their shards can be done again.
        ShardmillError: a shard has no outcome.
    """
    source, destination = locations.open_source(), locations.open_destination()
    receipts = {outcome.shard: outcome.receipt for outcome in outcomes}
    missing = [shard.name for shard in plan.shards if shard.name not in receipts]
    if missing:
        raise ShardmillError(f"{len(missing)} shards have no result, the first is {show(missing[0])}")
    _check_source(plan, outcomes, source, claim)
    files = _file_digests(plan, source)
    with collection_paused():
        document = _manifest(plan, outcomes, files)
    for warning in assemble.copied_nonfinite(plan, receipts):
        log.warning("%s", warning)
    is_free = destination.is_free()
    if not is_free and not is_published(destination, document):
        raise in_use(destination.url, "it holds the result of another plan")
    _note(plan, document["plan"], [receipt.key for receipt in receipts.values()], locations, store)
    if is_free:
        _check_blobs(receipts.values(), store)
        release = Release(
            shards=tuple(_shard_piece(shard.name, receipts[shard.name], store) for shard in plan.shards),
            files=tuple(_file_piece(name, digest, source, dict(plan.rewritten)) for name, digest in files.items()),
            manifest=assemble.encode_document(document),
            index=assemble.output_index(plan, receipts),
            config=assemble.encode_document(assemble.config_document(plan)),
        )
        try:
            _publish(destination, release, claim, document)
        except ObjectMissing:
            _check_blobs(receipts.values(), store)
            raise
    return document


def _check_blobs(receipts: Iterable[Receipt], store: Store) -> None:
    """Make sure that every blob is there: whoever looks after the store may have deleted one meanwhile."""
    if gone := store.drop_gone(receipts):
        keys = ", ".join(receipt.key[:12] for receipt in gone[:3])
        raise BlobsGone(f"{len(gone)} finished shards vanished from the store, such as {keys}; run again")


def _check_source(plan: Plan, outcomes: Sequence[ShardOutcome], source: SourceFolder, claim: Claim) -> None:
    """Make sure that all shards come from one state of the source, however long the run took.

    A file that was replaced by one with the same header, before its turn came, would else go unnoticed.
    """
    digests: dict[str, str] = {}
    for name, digest in (pair for outcome in outcomes for pair in outcome.sources):
        if digests.setdefault(name, digest) != digest:
            raise SourceChanged(f"{show(name)} changed while the source was quantized; run again")
    if claim_of(plan, source).plan != claim.plan:
        raise SourceChanged(f"files of {show(source.folder.url, 200)} changed since the plan was made; run again")


def _publish(destination: Destination, release: Release, claim: Claim, document: Mapping[str, Any]) -> None:
    try:
        destination.publish(release, claim)
    except DestinationInvalid:
        if not is_published(destination, document):  # a run of the same plan may have been first
            raise


def _shard_piece(name: str, receipt: Receipt, store: Store) -> Piece:
    return Piece(
        name=name, folder=store.folder, origin=blob_name(receipt.blob_stem), mark=receipt.key, digest=receipt.blob.whole
    )


def _file_piece(name: str, digest: str, source: SourceFolder, rewritten: Mapping[str, str]) -> Piece:
    data = rewritten[name].encode() if name in rewritten else None
    return Piece(name=name, folder=source.folder, origin=name, mark=digest, digest=Digest.parse(digest), data=data)


def claim_of(plan: Plan, source: SourceFolder, run: str = "") -> Claim:
    """What a run says of itself while it makes a destination; the same states of the same files are the same plan."""
    config = assemble.config_document(plan)
    names = (*(shard.name for shard in plan.shards), *plan.files)
    with ThreadPoolExecutor(_READERS) as pool:
        states = dict(zip(names, (found.fingerprint() for found in pool.map(source.identity, names)), strict=True))
    outlines = [(shard.name, shard.outline()) for shard in plan.shards]
    return new_claim(digest_json([outlines, states, config, plan.rewritten]), run)


def clear_claim(plan: Plan, source: SourceFolder, locations: Locations) -> None:
    """Remove the claim that a run may have left which was killed after it had published."""
    with locations.open_destination().claimed(claim_of(plan, source)):
        pass  # taking it over and giving it up is all


def _manifest(plan: Plan, outcomes: Sequence[ShardOutcome], files: Mapping[str, str]) -> dict[str, Any]:
    receipts = {outcome.shard: outcome.receipt for outcome in outcomes}
    sources = dict(sorted({pair for outcome in outcomes for pair in outcome.sources}))
    digest = assemble.plan_digest(plan, {name: receipt.key for name, receipt in receipts.items()}, files)
    versions = {"shardmill": version("shardmill"), "compressed-tensors layout": LAYOUT_VERSION}
    return assemble.manifest(plan, receipts, digest=digest, sources=sources, file_digests=files, versions=versions)


def published_result(plan: Plan, locations: Locations, store: Store) -> dict[str, Any]:
    """Return the manifest of a destination that holds the result of this very plan.

    Source shards without a remembered digest are read for it; nothing is computed.

    Raises:
        DestinationInvalid: it holds something else.
    """
    source, destination = locations.open_source(), locations.open_destination()
    digests = {shard.name: str(store.source_digest(source, shard.name)[0]) for shard in plan.shards}
    keys = {shard.name: shard.job_key(digests) for shard in plan.shards}
    digest = assemble.plan_digest(plan, keys, _file_digests(plan, source))
    found = destination.manifest()
    if found is None or found.get("plan") != digest or not is_whole(destination, found):
        raise in_use(destination.url, "it holds the result of another plan")
    _note(plan, digest, keys.values(), locations, store)
    return found


def _note(plan: Plan, digest: str, keys: Iterable[str], locations: Locations, store: Store) -> None:
    """Let the store know what the destination holds, or will in a moment."""
    destination = str(parse_location(locations.destination))
    note = Publication(destination=destination, plan=digest, keys=frozenset(keys), made_of=plan.made_of)
    store.note_publication(note)


def _file_digests(plan: Plan, source: SourceFolder) -> dict[str, str]:
    """Digests of all other files of the result, sorted by name."""
    with ThreadPoolExecutor(_READERS) as pool:
        digests = pool.map(lambda name: str(hash_file(source.folder, name)[0].whole), plan.files)
        found = dict(zip(plan.files, digests, strict=True))
    found |= {name: str(hash_bytes(text.encode())) for name, text in plan.rewritten}
    return dict(sorted(found.items()))


def is_published(destination: Destination, manifest: Mapping[str, Any]) -> bool:
    """Whether a destination holds exactly the result that a manifest describes, as far as names and sizes tell."""
    found = destination.manifest()
    return found is not None and found.get("plan") == manifest["plan"] and is_whole(destination, manifest)
