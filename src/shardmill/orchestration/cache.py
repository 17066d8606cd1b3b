"""A result record counts only when it is one of ours and says what the store says."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from prefect.cache_policies import CachePolicy
from prefect.context import TaskRunContext
from prefect.filesystems import LocalFileSystem
from prefect.serializers import JSONSerializer

from shardmill.core.outcome import ShardOutcome
from shardmill.core.plan import ShardPlan
from shardmill.errors import Refused
from shardmill.orchestration.bench import bench_of
from shardmill.stages.quantize import find_stored
from shardmill.storage.source import SourceFolder
from shardmill.storage.store import FULL, Store

CACHED: Final = "Cached"
"""Name of the state of a shard that was not computed; Prefect uses the same word."""

STORED_TYPE: Final = f"{ShardOutcome.__module__}.{ShardOutcome.__qualname__}"
"""The class that a result record may name; reading a record calls what it names."""
_DECODER: Final = JSONSerializer[ShardOutcome]()
"""Made once: naming the type makes a class, which two threads must not do at the same time."""
RECORD_FIELDS: Final = frozenset({"storage_key", "expiration", "serializer", "prefect_version", "storage_block_id"})
"""Of a record's metadata, as this Prefect writes them; a record with others is foreign."""


def bytes_to_digest(shards: Iterable[ShardPlan], source: SourceFolder, store: Store) -> int:
    """Bytes of the shards whose digest is not known and must be taken."""
    is_full = store.verify_level == FULL
    return sum(shard.size for shard in shards if is_full or store.known_digest(source.identity(shard.name)) is None)


@dataclass
class StageCachePolicy(CachePolicy):
    """A stage's key is its job key; a record under it counts only while the store vouches for it.

    Prefect takes any readable record for a hit, and reading one imports and calls what it names. So every record is
    looked at before Prefect does, and removed unless it is ours and agrees with the store.
    """

    stage: str = "quantize"

    def compute_key(
        self, task_ctx: TaskRunContext, inputs: dict[str, Any], flow_parameters: dict[str, Any], **_: Any
    ) -> str | None:
        """Name the work, and leave a record under that name only if it can be trusted.

        Returns:
            The key, or None where naming the job takes reading the source, or where records do not lie on this
            machine's disk: then nothing is looked up or recorded, and the body asks the store.
        """
        del flow_parameters
        shard, bench = inputs["shard"], bench_of(inputs["job"])
        with suppress(Refused):  # the body says what is wrong with the source
            job = bench.store.known_job(shard, bench.source)
            key = f"{self.stage}-{job.key}" if job is not None else ""
            record = _record_path(task_ctx, key) if key else None
            if record is not None and record.exists():
                stored = find_stored(shard, bench.source, bench.store)
                if stored is None or not agrees(record.read_bytes(), stored):
                    record.unlink(missing_ok=True)
            return None if record is None else key
        return None


def _record_path(task_ctx: TaskRunContext, key: str) -> Path | None:
    """Where the engine will look for the record of `key`."""
    storage = task_ctx.result_store.result_storage
    if not isinstance(storage, LocalFileSystem) or not storage.basepath:
        return None
    return Path(storage.basepath).expanduser().resolve() / key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a JSON object names a key twice")
    return found


def _is_ours(value: Any) -> bool:
    """Whether everything that a decoder would import or call below `value` is one of our types."""
    if isinstance(value, list):
        return all(map(_is_ours, value))
    if not isinstance(value, dict):
        return True
    named = value.get("__class__", STORED_TYPE)
    return named == STORED_TYPE and "__exc_type__" not in value and all(map(_is_ours, value.values()))


def is_own_record(content: bytes) -> bool:
    """Whether a result record can be decoded without running anything foreign.

    The decoder obeys the serializer, the classes and even the older field names that a record holds, so a record must
    have exactly the form in which it is written.
    """
    try:
        record = json.loads(content, object_pairs_hook=_unique)
        metadata, result = record["metadata"], json.loads(record["result"], object_pairs_hook=_unique)
        return (
            set(record) == {"metadata", "result"}
            and set(metadata) == RECORD_FIELDS
            and metadata["serializer"] == JSONSerializer().model_dump()
            and metadata["storage_block_id"] is None
            and isinstance(result, dict)
            and result.get("__class__") == STORED_TYPE
            and _is_ours(result)
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def agrees(content: bytes, stored: ShardOutcome) -> bool:
    """Whether a result record is ours and holds what the store holds for the same sources."""
    if not is_own_record(content):
        return False
    try:
        recorded = _DECODER.loads(json.loads(content)["result"].encode())
    except (ValueError, KeyError, TypeError):
        return False
    if recorded.failed_checks:  # they were told when they were found
        return False
    if (recorded.shard, recorded.sources) != (stored.shard, stored.sources):
        return False
    # A receipt is stored with rounded figures, and a record may hold them as they were computed.
    return recorded.receipt == stored.receipt or recorded.receipt.to_bytes() == stored.receipt.to_bytes()
