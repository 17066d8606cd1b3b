"""What one quantized shard reports; crosses task boundaries, so it is plain, frozen and keeps its name."""

from __future__ import annotations

from dataclasses import dataclass

from shardmill.core.receipt import Receipt


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardOutcome:
    """The result of the quantize stage for one shard."""

    shard: str
    receipt: Receipt
    is_hit: bool
    """Whether the store had it already."""
    sources: tuple[tuple[str, str], ...]
    """`(shard, digest)` of every source shard that the job depends on."""
    bytes_read: int
    """Source tensor bytes that were read, for digests and for values."""
    seconds: float
    failed_checks: tuple[str, ...] = ()
    """Records and blobs of the store that were found bad since the last outcome of the same process."""
