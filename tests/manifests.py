"""Manifests of results that were never computed: figures are given, bytes are not."""

from __future__ import annotations

import json
from typing import Any

from shardmill.core import assemble
from shardmill.core.digest import Digest
from shardmill.core.plan import Plan
from shardmill.core.receipt import BlobDigests, Receipt, WeightRecord
from shardmill.core.statistics import Statistics


def digest_of(text: str) -> Digest:
    return Digest("blake3", text.encode().hex().ljust(64, "0")[:64])


def manifest_of(plan: Plan, error: float = 0.03, zeroed: int = 0) -> dict[str, Any]:
    """The manifest of a plan's result, with the given relative error everywhere."""
    receipts = {}
    for shard in plan.shards:
        layout = shard.layout()
        digest = digest_of(shard.name)
        size = len(layout.header()) + layout.data_bytes
        weights = tuple(
            WeightRecord(
                unit.module,
                unit.scheme.label,
                Statistics(count=4, squared_error=error**2, squared_weight=1.0, zeroed=zeroed, nonzero=4),
            )
            for unit in layout.units
            if unit.scheme is not None
        )
        receipts[shard.name] = Receipt(
            key=digest.value,
            blob=BlobDigests(whole=digest, head=digest, tail=digest, size=size),
            tensors=tuple(placed.spec.name for placed in layout.placed),
            weights=weights,
            producer=(),
        )
    document = assemble.manifest(
        plan, receipts, digest="0" * 64, sources={}, file_digests={"tokenizer.json": "blake3:00"}, versions={}
    )
    parsed: dict[str, Any] = json.loads(assemble.encode_document(document))
    return parsed
