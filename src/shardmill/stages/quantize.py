"""Stage 3: one shard from source to store. Looks the job up first; takes a device only for a miss."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version

from shardmill.core.outcome import ShardOutcome
from shardmill.core.plan import ShardPlan
from shardmill.core.receipt import Receipt
from shardmill.errors import Interrupted, SourceChanged, show
from shardmill.stages.devices import DevicePool, limit_threads
from shardmill.stages.validate import check_unchanged
from shardmill.storage.local import FileIdentity, RangeReader
from shardmill.storage.source import SourceFolder
from shardmill.storage.store import Store


@dataclass(frozen=True, slots=True)
class Controls:
    """How a run watches and stops its shards; none of it changes bytes."""

    devices: DevicePool
    should_stop: Callable[[], bool] = bool
    on_bytes: Callable[[int], None] = field(default=lambda _count: None)
    """Called with the number of source bytes that were read or found finished."""


@dataclass(slots=True)
class _Sources:
    """Open source shards of one job, all of them in the state that was digested."""

    source: SourceFolder
    identities: Mapping[str, FileIdentity]
    stack: ExitStack
    own: str
    on_bytes: Callable[[int], None]
    readers: dict[str, RangeReader] = field(default_factory=dict)
    bytes_read: int = 0

    def read(self, shard: str, offset: int, view: memoryview) -> None:
        """Read bytes of a source shard."""
        if shard not in self.readers:
            reader = self.stack.enter_context(self.source.open(shard))
            if reader.identity != self.identities[shard]:
                raise SourceChanged(f"{show(shard)} changed after its digest was taken; run again")
            self.readers[shard] = reader
        self.readers[shard].read_into(offset, view)
        self.bytes_read += len(view)


def quantize_shard(shard: ShardPlan, source: SourceFolder, store: Store, controls: Controls) -> ShardOutcome:
    """Make sure that the store holds the result of one shard.

    Raises:
        SourceChanged: a source file is not the planned one, or changes meanwhile.
        NonFiniteWeight: NaN or Inf in a weight that is to be quantized.
        StorageFailed: reading or writing failed.
        Interrupted: stopped on request.
    """
    started = time.monotonic()
    identities, digests, hashed = _identify(shard, source, store, controls)
    key = shard.job_key(digests)
    receipt = store.lookup(key)
    is_hit = receipt is not None
    read = 0
    if receipt is None:
        with controls.devices.lend() as device, ExitStack() as stack:
            sources = _Sources(source, identities, stack, shard.name, controls.on_bytes)
            receipt = _compute(shard, key, sources, store, device, controls)
            read = sources.bytes_read
        store.put_receipt(receipt)
    else:
        controls.on_bytes(shard.size)
    return ShardOutcome(
        shard=shard.name,
        receipt=receipt,
        is_hit=is_hit,
        sources=tuple(digests.items()),
        bytes_read=read + hashed,
        seconds=time.monotonic() - started,
    )


def find_stored(shard: ShardPlan, source: SourceFolder, store: Store) -> ShardOutcome | None:
    """The finished result of a shard, if it can be told without reading the source's tensors."""
    known = {name: store.known_digest(source.path(name)) for name in shard.sources}
    digests = {name: str(digest) for name, digest in known.items() if digest is not None}
    receipt = store.lookup(shard.job_key(digests)) if len(digests) == len(known) else None
    if receipt is None:
        return None
    return ShardOutcome(
        shard=shard.name, receipt=receipt, is_hit=True, sources=tuple(digests.items()), bytes_read=0, seconds=0.0
    )


def _identify(
    shard: ShardPlan, source: SourceFolder, store: Store, controls: Controls
) -> tuple[dict[str, FileIdentity], dict[str, str], int]:
    """Digest of every source shard of the job; the header is compared with the plan under the same identity."""
    identities: dict[str, FileIdentity] = {}
    digests: dict[str, str] = {}
    hashed = 0
    for name in shard.sources:
        digest, identity, was_read = store.source_digest(source.path(name), stop=controls.should_stop)
        if controls.should_stop():
            raise Interrupted("stopped on request; finished shards stay in the store, run again to go on")
        identities[name], digests[name] = identity, str(digest)
        hashed += identity.size if was_read else 0
    for problem in check_unchanged(shard, source):
        raise SourceChanged(str(problem))
    for name, identity in identities.items():
        if FileIdentity.of(source.path(name), source.path(name).stat()) != identity:
            raise SourceChanged(f"{show(name)} changed after its digest was taken; run again")
    return identities, digests, hashed


def _compute(shard: ShardPlan, key: str, sources: _Sources, store: Store, device: str, controls: Controls) -> Receipt:
    from shardmill.kernels.shard import encode_shard, needs_torch  # kernels take long to import, and a hit needs none

    if needs_torch(shard, device):
        limit_threads(controls.devices.devices)
    layout = shard.layout()
    header = layout.header()
    reported = 0

    def read(name: str, offset: int, view: memoryview) -> None:
        nonlocal reported
        sources.read(name, offset, view)
        if name == shard.name and (fresh := min(len(view), shard.size - reported)) > 0:
            reported += fresh
            controls.on_bytes(fresh)

    with store.writer(key, len(header) + layout.data_bytes) as writer:
        writer.write(memoryview(header))
        weights = encode_shard(shard, read, writer.write, device=device, should_stop=controls.should_stop)
        sources.stack.close()
        blob = writer.commit(read_only=True)
    controls.on_bytes(shard.size - reported)
    return Receipt(
        key=key,
        blob=blob,
        tensors=tuple(placed.spec.name for placed in layout.placed),
        weights=weights,
        producer=producer(),
    )


def producer() -> tuple[tuple[str, str], ...]:
    """Versions of what computes bytes."""
    return (("machine", platform.machine()), ("shardmill", version("shardmill")), ("torch", version("torch")))
