"""Stage 3: one shard from source to store. Looks the job up first; takes a device only for a miss."""

from __future__ import annotations

import errno
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version

from shardmill.core.digest import Digest
from shardmill.core.layout import RowSpan, ShardLayout, row_spans
from shardmill.core.outcome import ShardOutcome
from shardmill.core.plan import ShardPlan
from shardmill.core.receipt import NonFinite, Receipt
from shardmill.errors import Interrupted, SourceChanged, TransferDamaged, show
from shardmill.stages.devices import DevicePool, limit_threads
from shardmill.stages.importance import importance_of
from shardmill.stages.plan import collection_paused
from shardmill.stages.validate import check_unchanged
from shardmill.storage.folder import FileIdentity, Loan, Reader
from shardmill.storage.hashing import SourceHash
from shardmill.storage.source import SourceFolder
from shardmill.storage.store import Store, blob_name


@dataclass(frozen=True, slots=True)
class Controls:
    """How a run watches and stops its shards; none of it changes bytes."""

    devices: DevicePool
    should_stop: Callable[[], bool] = bool
    on_bytes: Callable[[int], None] = field(default=lambda _count: None)
    """Called with the number of source bytes that were read or found finished."""


@dataclass(slots=True)
class Sources:
    """Open source shards of one job; each stays in the state in which it was first met."""

    shard: ShardPlan
    source: SourceFolder
    stack: ExitStack
    on_bytes: Callable[[int], None]
    identities: dict[str, FileIdentity] = field(default_factory=dict)
    digests: dict[str, Digest] = field(default_factory=dict)
    readers: dict[str, Reader] = field(default_factory=dict)
    seconds: dict[str, Reader] = field(default_factory=dict)
    """Readers of their own for what is read twice, because nothing else tells whether it arrived undamaged."""
    hash: SourceHash | None = None
    """Of the shard itself, while its digest is not known, or where its bytes may be damaged on their way."""
    rows: Sequence[RowSpan] = ()
    """Of the shard, where they are known before it is opened."""
    reported: int = 0

    def learn(self, name: str, store: Store, stop: Callable[[], bool]) -> int:
        """Take the digest of a source shard, remembered or read; returns the bytes that were read for it."""
        digest, identity, was_read = store.source_digest(self.source, name, stop=stop)
        if stop():
            raise interrupted()
        self.identities[name], self.digests[name] = identity, digest
        return identity.size if was_read else 0

    def meet(self, name: str) -> FileIdentity:
        """The state in which a source shard is to be read."""
        if name not in self.identities:
            self.identities[name] = self.source.identity(name)
        return self.identities[name]

    def open(self, name: str) -> Reader:
        """Open a source shard.

        Raises:
            SourceChanged: it is not in the state that was digested.
        """
        if name not in self.readers:
            self.readers[name] = self._open(name)
            if name == self.shard.name:
                announces = any(scheme.weights.needs_extent for scheme in self.shard.schemes)
                self.readers[name].expect_once(announces=announces, rows=self.rows)
        return self.readers[name]

    def _open(self, name: str) -> Reader:
        reader = self.stack.enter_context(self.source.open(name))
        if reader.identity != self.meet(name):
            raise SourceChanged(f"{show(name)} changed after its digest was taken; run again")
        return reader

    def start_hash(self) -> None:
        """Hash the shard while it is read, to learn its digest or to compare it with the known one."""
        known = self.digests.get(self.shard.name)
        if known is None or self.source.folder.traits.is_remote:
            self.hash = SourceHash(self.open(self.shard.name), known)

    def read(self, name: str, offset: int, view: memoryview) -> None:
        """Read bytes of a source shard."""
        reader = self.open(name)
        if self.hash is not None and name == self.shard.name:
            self.hash.reach(offset)
        reader.read_into(offset, view)
        if name != self.shard.name:
            if self.source.folder.traits.is_remote:
                self._confirm(name, offset, view)
            return
        self._note(offset, view)

    def lend(self, name: str, offset: int, nbytes: int) -> Loan | None:
        """As `read`, of bytes of the shard itself that lie in memory; None where they have to be read."""
        if name != self.shard.name:
            return None
        if self.hash is not None:
            self.hash.reach(offset)
        loan = self.open(name).lend(offset, nbytes)
        if loan is not None:
            try:
                self._note(offset, loan.view)
            except BaseException:
                loan.give_back()
                raise
        return loan

    def _note(self, offset: int, view: memoryview) -> None:
        """Hash bytes of the shard that were read, and report them."""
        if self.hash is not None:
            self.hash.cover(offset, view)
        fresh = min(len(view), self.shard.size - self.reported)
        self.reported += fresh
        self.on_bytes(fresh)

    def peek(self, name: str, offset: int, view: memoryview) -> None:
        """Read a little out of turn, such as scales that lie behind their codes.

        The hash of the shard goes on where it is: reading all up to here for it would read the codes twice.
        """
        if name != self.shard.name:
            self.read(name, offset, view)
            return
        self.open(name).read_into(offset, view)
        if self.source.folder.traits.is_remote:
            self._confirm(name, offset, view)

    @property
    def seams(self) -> Sequence[int]:
        """See `Reader.seams`, of the shard itself."""
        return self.open(self.shard.name).seams

    def announce(self, ranges: Sequence[tuple[int, int]]) -> bool:
        """Hear of ranges of the shard itself that are about to be read twice; see `Reader.announce`."""
        return self.open(self.shard.name).announce(ranges)

    def _confirm(self, name: str, offset: int, view: memoryview) -> None:
        """Read a part of another shard once more: its digest, which is of the whole, cannot vouch for it."""
        if name not in self.seconds:
            self.seconds[name] = self._open(name)
        again = memoryview(bytearray(len(view)))
        self.seconds[name].read_into(offset, again)
        if again != view.cast("B"):
            where = f"bytes {offset} to {offset + len(view)} of {show(name)}"
            raise TransferDamaged(errno.EIO, f"read {where}: two reads of one state differ; run again")

    def close(self) -> None:
        """Complete the digests and close every file.

        Raises:
            SourceChanged: one is not what it was when it was opened.
            TransferDamaged: what was read does not have the digest that is known of it.
        """
        if self.hash is not None:
            self.digests[self.shard.name] = self.hash.finish()
        self.stack.close()
        self.on_bytes(self.shard.size - self.reported)

    @property
    def bytes_read(self) -> int:
        """Bytes read from all of them."""
        return sum(reader.bytes_read for reader in (*self.readers.values(), *self.seconds.values()))

    @property
    def key(self) -> str:
        """The job key."""
        return self.shard.job_key({name: str(digest) for name, digest in self.digests.items()})


def interrupted() -> Interrupted:
    """What tells that a shard was stopped."""
    return Interrupted("stopped on request; finished shards stay in the store, run again to go on")


def quantize_shard(shard: ShardPlan, source: SourceFolder, store: Store, controls: Controls) -> ShardOutcome:
    """Make sure that the store holds the result of one shard.

    Where the digest of the shard is not known, and no job of its shape has a result that could be found by it, the
    source is hashed while it is quantized: so it is read once.

    Raises:
        SourceChanged: a source file is not the planned one, or changes meanwhile.
        TransferDamaged: bytes of a source file do not have the digest that is known of them.
        NonFiniteWeight: NaN or Inf in a weight that is to be quantized.
        DeviceExhausted: an accelerator has no room for the smallest row block.
        StorageFailed: reading or writing failed.
        Interrupted: stopped on request.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        sources = Sources(shard, source, stack, controls.on_bytes)
        with collection_paused():
            shape = shard.shape()
        hashed = sum(
            sources.learn(name, store, controls.should_stop)
            for name in shard.sources
            if name != shard.name or store.known_digest(sources.meet(name)) is not None or store.may_hold(shape)
        )
        if controls.should_stop():
            raise interrupted()
        receipt = store.lookup(sources.key, shard) if shard.name in sources.digests else None
        is_hit = receipt is not None
        if receipt is None:
            receipt = store.put_receipt(_compute(sources, store, controls), shape)
        else:
            controls.on_bytes(shard.size)
    return ShardOutcome(
        shard=shard.name,
        receipt=receipt,
        is_hit=is_hit,
        sources=tuple((name, str(sources.digests[name])) for name in shard.sources),
        bytes_read=sources.bytes_read + hashed,
        seconds=time.monotonic() - started,
        failed_checks=store.take_failed_checks(),
    )


def find_stored(shard: ShardPlan, source: SourceFolder, store: Store) -> ShardOutcome | None:
    """The finished result of a shard, if it can be told without reading the source's tensors."""
    job = store.known_job(shard, source)
    receipt = store.lookup(job.key, shard) if job is not None else None
    if job is None or receipt is None:
        return None
    return ShardOutcome(shard=shard.name, receipt=receipt, is_hit=True, sources=job.sources, bytes_read=0, seconds=0.0)


def failed_checks(outcomes: Iterable[ShardOutcome], store: Store) -> int:
    """Records and blobs of the store that a run found bad, in whatever process."""
    return len(store.failed_checks.union(*(outcome.failed_checks for outcome in outcomes)))


def open_unchanged(sources: Sources, layout: ShardLayout) -> None:
    """Open the shard and compare headers with the plan, all under the identities that the digests belong to."""
    shard, source = sources.shard, sources.source
    if source.folder.traits.is_remote:  # nothing else lends, and a shard may have a hundred thousand weights
        sources.rows = row_spans(layout.units, shard.data_start)
    sources.open(shard.name)
    sources.start_hash()
    for problem in check_unchanged(shard, source):
        raise SourceChanged(str(problem))
    for name, identity in sources.identities.items():
        if source.identity(name) != identity:
            raise SourceChanged(f"{show(name)} changed after its digest was taken; run again")


def _compute(sources: Sources, store: Store, controls: Controls) -> Receipt:
    shard = sources.shard
    with collection_paused():
        layout = shard.layout()
        header = layout.header()
    with controls.devices.lend() as device:
        if controls.should_stop():
            raise interrupted()
        open_unchanged(sources, layout)
        from shardmill.kernels.lanes import needs_torch  # kernels take long to import, and a hit needs none
        from shardmill.kernels.shard import encode_shard

        if needs_torch(shard, device):
            limit_threads(controls.devices.devices)
        stem = store.stem(shard, sources.identities)
        writer = store.writer(stem or shard.shape(), len(header) + layout.data_bytes)
        nonfinite: list[NonFinite] = []
        try:
            writer.write(memoryview(header))
            weights = encode_shard(
                shard,
                sources.read,
                writer.write,
                device=device,
                announce=sources.announce,
                should_stop=controls.should_stop,
                new_scratch=store.new_scratch,
                on_nonfinite=nonfinite.append,
                layout=layout,
                importance_of=importance_of,
                peek=sources.peek,
                lend=sources.lend,
                seams=sources.seams,
            )
        except BaseException:
            writer.abort()
            raise
    with writer:  # others compute while this one waits for its disk
        sources.close()
        store.remember(sources.identities[shard.name], sources.digests[shard.name])
        key = sources.key
        blob = writer.commit("" if stem else blob_name(key), sealed=True)
    return Receipt(
        key=key,
        blob=blob,
        tensors=tuple(placed.spec.name for placed in layout.placed),
        weights=weights,
        producer=producer(),
        nonfinite=tuple(nonfinite),
        stem=stem,
    )


def producer() -> tuple[tuple[str, str], ...]:
    """Versions of what computes bytes."""
    return (("machine", platform.machine()), ("shardmill", version("shardmill")), ("torch", version("torch")))
