"""The store: blobs named by job key, receipts that vouch for them, and remembered digests of source files.

    blobs/<stem>.safetensors     the bytes of one output shard, read-only; the stem is the job key, see `Receipt.stem`
    receipts/<key>.json          written after its blob, never before
    digests/<identity>.json      digest of a source file by what tells its states apart: inode and times, or ETag
    shapes/<shape>               an empty file for every job, its sources left out, that has a receipt
    verified/<key>.json          the state in which a blob was last found to be the one of its receipt
    published/<destination>.json the jobs whose results were published somewhere
    set-aside/                   blobs whose check failed
    errors/<key>.json            what a job would leave of each weight, where that was measured and nothing written

A hit = the receipt parses, its key is the one asked for, it promises what the plan wants, and the blob has the recorded
size and digests. Anything less is a counted miss with a warning. A blob in the state in which it was verified is
not read again, but by full verification. With a key in the environment only sealed records count, see `storage.seal`,
and a blob that is met for the first time is read whole.

No locks: every write that counts appears whole under its name, and equal keys mean equal bytes.
"""

from __future__ import annotations

import io
import json
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import IO, Final

from shardmill.core.digest import Digest, canonical_json, digest_json
from shardmill.core.layout import ShardLayout
from shardmill.core.plan import ShardPlan
from shardmill.core.receipt import Receipt, WeightRecord, parse_receipt, parse_weights, weights_to_json
from shardmill.errors import ObjectMissing, Problem, SourceChanged, StorageFailed, StorageUnavailable, show
from shardmill.storage.folder import FileIdentity, Folder, Writer
from shardmill.storage.hashing import hash_edges, hash_file
from shardmill.storage.operations import operation
from shardmill.storage.seal import seal_from_environment
from shardmill.storage.source import SourceFolder

log = logging.getLogger(__name__)
FOLDER_NAME: Final = ".shardmill"
FAST: Final = "fast"
FULL: Final = "full"
_FRESH_NS: Final = 2_000_000_000
"""Files younger than this are not remembered: a later write may keep their modification time."""
_SMALL_LIMIT: Final = 512_000_000
"""Bytes of a receipt; it holds the names of all tensors of a shard."""
_MEMO_LIMIT: Final = 64_000
_EARLY: Final = "f-"
"""Begins the stem of a blob that was named by fingerprints of its sources."""


def blob_name(stem: str) -> str:
    """Where a blob lies in the store."""
    return f"blobs/{stem}.safetensors"


def _receipt_name(key: str) -> str:
    return f"receipts/{key}.json"


def _key_of(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[0]


@dataclass(frozen=True, slots=True)
class KnownJob:
    """A job that can be named without reading the source's tensors."""

    key: str
    sources: tuple[tuple[str, str], ...]
    """`(shard, digest)` of every source shard that the job depends on."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One receipt with its blob, as `store ls` shows it."""

    key: str
    size: int
    modified: float
    """Of the receipt, seconds since the epoch."""
    is_published: bool
    """Whether some destination links to the blob."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """What the store knows of a result that was published."""

    destination: str
    plan: str
    keys: frozenset[str]
    """Of the jobs whose results it holds."""
    made_of: str = ""
    """See `core.plan.made_of`; empty where that could not be told."""


class Store:
    """A store in a folder of any storage that can be written.

    Raises:
        Refused: the environment holds a key that is too short, see `storage.seal`.
    """

    def __init__(self, folder: Folder, *, verify: str = FAST) -> None:
        self.folder = folder
        self.verify_level = verify
        self._seal = seal_from_environment()
        self._lock = threading.Lock()
        self._failed: set[str] = set()
        self._untold: set[str] = set()
        self._trusted: dict[str, Receipt] = {}
        """By key: receipts whose blob this process has verified or written."""
        self._digests: dict[FileIdentity, Digest] = {}
        """Remembered digests that this process has looked up."""

    @property
    def failed_checks(self) -> frozenset[str]:
        """Names of records and blobs that this process found to be not what they should be."""
        with self._lock:
            return frozenset(self._failed)

    def take_failed_checks(self) -> tuple[str, ...]:
        """Those that were found since the last call, for whoever counts over several processes."""
        with self._lock:
            found = tuple(sorted(self._untold))
            self._untold.clear()
            return found

    def _doubt(self, name: str, message: str) -> None:
        """Count and tell a check that failed."""
        log.warning("store: %s", message)
        with self._lock:
            self._failed.add(name)
            self._untold.add(name)

    def _read(self, name: str, limit: int) -> bytes:
        """A record without its seal.

        Raises:
            ObjectMissing: there is none.
            ValueError: its seal is not ours.
        """
        return self._seal.open(name, self.folder.read(name, limit))

    def prepare(self) -> None:
        """Make the folder, private to its owner, and remove what dead writers left.

        Raises:
            StorageFailed: the store cannot be created.
        """
        self.folder.prepare()
        self.folder.sweep()

    def exists(self) -> bool:
        """Whether there is a store."""
        return bool(self.folder.listing("receipts/")) or bool(self.folder.listing("blobs/"))

    def writer(self, key: str, size: int) -> Writer:
        """Start writing a blob of `size` bytes; see `stem` for its name."""
        return self.folder.writer(blob_name(key), size, tags={"key": key})

    def stem(self, shard: ShardPlan, identities: Mapping[str, FileIdentity]) -> str:
        """Name of the blob of a job where it is needed before its sources are known by content; else empty.

        The same states of the same files always give the same name, whatever is known of them by then: so a job that
        is done again replaces what an interrupted run left of it.
        """
        if self.folder.traits.names_late:
            return ""
        return _EARLY + shard.job_key({name: f"state:{identities[name].fingerprint()}" for name in shard.sources})

    def new_scratch(self) -> IO[bytes]:
        """Make a nameless file that is gone when it is closed; in memory where the store is not on disk.

        Raises:
            StorageFailed: the file system refuses.
        """
        if self.folder.path is None:
            return io.BytesIO()
        with operation("create", self.folder.path / "blobs"):
            (self.folder.path / "blobs").mkdir(exist_ok=True)
            return tempfile.TemporaryFile(dir=self.folder.path / "blobs")

    def may_hold(self, shape: str) -> bool:
        """Whether some source's result of a job of this shape was ever stored; see `ShardPlan.shape`."""
        return self.folder.identity(f"shapes/{shape}") is not None

    def put_receipt(self, receipt: Receipt, shape: str) -> Receipt:
        """Vouch for a blob that is durable, the result of a job of a shape.

        Returns:
            The receipt that counts: another run may have been first, under another name of the blob.
        """
        self.folder.put(f"shapes/{shape}", b"", durable=False)
        name = _receipt_name(receipt.key)
        sealed = self._seal.close(name, receipt.to_bytes())
        if not self.folder.create(name, sealed):
            first = self._read_receipt(receipt.key)
            if name in self.failed_checks:
                first = None
            if first is not None and first.blob == receipt.blob and self._blob_state(first) is not None:
                if first.blob_stem != receipt.blob_stem:
                    self.folder.remove(blob_name(receipt.blob_stem))
                receipt = first
            else:
                self.folder.put(name, sealed)
        self._trust(receipt, self._blob_state(receipt))
        return receipt

    def lookup(self, key: str, shard: ShardPlan | None = None) -> Receipt | None:
        """Return the receipt of a job when its blob can be trusted; a failed check is a warned and counted miss.

        Args:
            shard: what the job is to give; a receipt that promises anything else is none of this job.
        """
        if (trusted := self._trusted.get(key)) is not None:
            return trusted
        receipt = self._read_receipt(key)
        if receipt is None:
            return None
        state = self._blob_state(receipt)
        header = b""
        if shard is not None:
            layout = shard.layout()
            header = layout.header()
            if not _promises(receipt, layout, len(header)):
                self._doubt(_receipt_name(key), f"receipt {key[:12]} promises another result; the shard is done again")
                return None
        if state is not None and self._is_verified(receipt, state):
            self._trusted[key] = receipt
            return receipt
        is_full = self.verify_level == FULL or self._seal.is_strict
        defect = self._blob_defect(receipt, state, header, full=is_full)
        if defect is None:
            self._trust(receipt, state)
            return receipt
        message = f"blob {key[:12]} {defect}; it is set aside and the shard is done again"
        self._doubt(blob_name(receipt.blob_stem), message)
        self._set_aside(receipt)
        return None

    def errors(self, key: str) -> tuple[WeightRecord, ...] | None:
        """What a job leaves of each weight: from its receipt, or from a pass that only measured; None if unknown."""
        receipt = self._read_receipt(key)
        if receipt is not None:
            return receipt.weights
        name = _errors_name(key)
        try:
            return _parse_errors(self._read(name, _SMALL_LIMIT), of=key)
        except ObjectMissing:
            return None
        except StorageUnavailable:
            raise
        except (StorageFailed, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self._doubt(name, f"measured errors {key[:12]} cannot be used: {error}; the shard is measured again")
            return None

    def put_errors(self, key: str, weights: Sequence[WeightRecord]) -> tuple[WeightRecord, ...]:
        """Keep what a job leaves of each weight; returns it as it is found again."""
        name = _errors_name(key)
        record = canonical_json({"of": key, "weights": weights_to_json(weights)})
        self.folder.put(name, self._seal.close(name, record), durable=False)
        return _parse_errors(record, of=key)

    def drop_gone(self, receipts: Iterable[Receipt]) -> list[Receipt]:
        """Forget the receipts whose blob is not there any more, and return them."""
        gone = [receipt for receipt in receipts if self._blob_state(receipt) is None]
        for receipt in gone:
            self._doubt(blob_name(receipt.blob_stem), f"blob {receipt.key[:12]} is gone; the shard is done again")
            self._forget(receipt.key)
            self.folder.remove(_receipt_name(receipt.key))
        return gone

    def known_job(self, shard: ShardPlan, source: SourceFolder) -> KnownJob | None:
        """The job of a shard, or None where naming it takes reading the source's tensors.

        Raises:
            CheckpointInvalid: a source shard is gone.
        """
        digests: dict[str, str] = {}
        for name in shard.sources:
            digest = self.known_digest(source.identity(name))
            if digest is None:
                return None
            digests[name] = str(digest)
        return KnownJob(shard.job_key(digests), tuple(digests.items()))

    def seems_to_hold(self, shard: ShardPlan, source: SourceFolder) -> bool | None:
        """Whether receipt and blob of a shard are there; None where that takes reading the source. Checks no bytes.

        Raises:
            CheckpointInvalid: a source shard is gone.
        """
        job = self.known_job(shard, source)
        if job is None or job.key in self._trusted:
            return None if job is None else True
        if self.folder.identity(_receipt_name(job.key)) is None:
            return False
        if self.folder.traits.names_late:
            return self.folder.identity(blob_name(job.key)) is not None
        receipt = self._read_receipt(job.key)
        return receipt is not None and self._blob_state(receipt) is not None

    def _blob_state(self, receipt: Receipt) -> FileIdentity | None:
        return self.folder.identity(blob_name(receipt.blob_stem))

    def _is_verified(self, receipt: Receipt, state: FileIdentity) -> bool:
        """Whether the blob is in the state in which it was found to be the one of this receipt."""
        if self.verify_level == FULL or state.size != receipt.blob.size:
            return False
        try:
            return self._read(_memo_name(receipt.key), _MEMO_LIMIT) == _memo(receipt, state)
        except StorageUnavailable:
            raise
        except ObjectMissing:
            return False
        except (StorageFailed, ValueError) as error:
            key = receipt.key
            self._doubt(_memo_name(key), f"what is known of blob {key[:12]} cannot be used: {error}; it is read again")
            return False

    def _trust(self, receipt: Receipt, state: FileIdentity | None) -> None:
        """Keep a receipt whose blob was verified or written in `state`; later processes learn it if the state is old.

        A torn memo equals no state, so it is written without the cost of making it durable.
        """
        self._trusted[receipt.key] = receipt
        if state is None or not _is_settled(state.mtime_ns):
            return
        memo = _memo(receipt, state)
        if self.folder.traits.is_remote:
            after: FileIdentity | None = state  # its version cannot be kept by a later write
        else:
            after = self._blob_state(receipt)
        if after is not None and _memo(receipt, after) == memo:
            with suppress(StorageFailed):
                name = _memo_name(receipt.key)
                self.folder.put(name, self._seal.close(name, memo), durable=False)

    def _forget(self, key: str) -> None:
        self._trusted.pop(key, None)
        self.folder.remove(_memo_name(key))

    def _read_receipt(self, key: str) -> Receipt | None:
        name = _receipt_name(key)
        try:
            receipt = parse_receipt(self._read(name, _SMALL_LIMIT))
        except ObjectMissing:
            return None
        except StorageUnavailable:
            raise
        except (StorageFailed, ValueError) as error:
            self._doubt(name, f"receipt {key[:12]} cannot be used: {error}; the shard is done again")
            return None
        if receipt.key != key:
            self._doubt(name, f"receipt {key[:12]} speaks of another job; the shard is done again")
            return None
        return receipt

    def _blob_defect(
        self, receipt: Receipt, state: FileIdentity | None, header: bytes = b"", *, full: bool
    ) -> str | None:
        if state is None:
            return "is gone"
        if state.size != receipt.blob.size:
            return f"has {state.size} bytes, its receipt says {receipt.blob.size}"
        name = blob_name(receipt.blob_stem)
        try:
            if header and self.folder.read_start(name, len(header))[1] != header:
                return "does not begin with the planned header"
            if full:
                same = hash_file(self.folder, name)[0] == receipt.blob
            else:
                same = hash_edges(self.folder, name) == (receipt.blob.head, receipt.blob.tail)
        except StorageUnavailable:
            raise
        except (StorageFailed, SourceChanged) as error:
            return f"cannot be read: {error}"
        return None if same else "does not have the digest of its receipt"

    def _set_aside(self, receipt: Receipt) -> None:
        self._forget(receipt.key)
        self.folder.remove(_receipt_name(receipt.key))
        self.folder.move(blob_name(receipt.blob_stem), f"set-aside/{receipt.blob_stem}.{time.time_ns()}")

    def source_digest(
        self, source: SourceFolder, name: str, *, stop: Callable[[], bool] = bool
    ) -> tuple[Digest, FileIdentity, bool]:
        """Digest of a source file: told by its storage, remembered by its identity, else read once.

        Returns:
            The digest, the identity of the file it belongs to, and whether bytes were read for it.
        """
        identity = source.identity(name)
        if (self.verify_level != FULL or identity.digest) and (known := self.known_digest(identity)) is not None:
            return known, identity, False
        digests, identity = hash_file(source.folder, name, stop)
        if not stop():
            self.remember(identity, digests.whole)
        return digests.whole, identity, True

    def remember(self, identity: FileIdentity, digest: Digest) -> None:
        """Keep the digest of a source file, unless the file is so young that a later write may go unnoticed."""
        if identity.digest is None and _is_settled(max(identity.mtime_ns, identity.ctime_ns)):
            name = _digest_name(identity)
            record = canonical_json({"digest": str(digest), "of": _key_of(name)})
            self.folder.put(name, self._seal.close(name, record))
            self._digests[identity] = digest

    def known_digest(self, identity: FileIdentity) -> Digest | None:
        """Digest of a source file if its storage tells it or it is remembered; never reads the file."""
        if identity.digest is not None:
            return identity.digest
        found = self._digests.get(identity) or self._remembered(_digest_name(identity))
        if found is not None:
            self._digests[identity] = found
        return found

    def _remembered(self, name: str) -> Digest | None:
        try:
            return _parse_digest(self._read(name, _MEMO_LIMIT), of=_key_of(name))
        except ObjectMissing:
            return None
        except StorageUnavailable:
            raise
        except (StorageFailed, ValueError, KeyError, TypeError, RecursionError) as error:
            self._doubt(name, f"remembered digest {show(name)} cannot be used: {error}")
            return None

    def entries(self) -> Iterator[Entry]:
        """Every receipt whose blob is there, sorted by key."""
        blobs = self.folder.listing("blobs/")
        published = self._published()
        for name, state in self.folder.listing("receipts/").items():
            key = _key_of(name)
            blob = blobs.get(blob_name(key)) or self._early_blob(key, blobs)
            if blob is not None:
                yield Entry(key, blob.size, state.modified, blob.links > 1 or key in published)

    def _early_blob(self, key: str, blobs: Mapping[str, FileIdentity]) -> FileIdentity | None:
        """The blob of a job that was named by fingerprints."""
        if not any(name.startswith(blob_name(_EARLY)[: -len(".safetensors")]) for name in blobs):
            return None
        receipt = self._read_receipt(key)
        return blobs.get(blob_name(receipt.blob_stem)) if receipt else None

    def verify(self) -> list[Problem]:
        """Read every blob whole and compare it with its receipt; bad ones are no longer remembered as verified."""
        problems = []
        for name in self.folder.listing("receipts/"):
            key = _key_of(name)
            receipt = self._read_receipt(key)
            if receipt is None:
                defect: str | None = "has an unusable receipt"
            else:
                defect = self._blob_defect(receipt, self._blob_state(receipt), full=True)
            if defect:
                self._forget(key)
                problems.append(
                    Problem(
                        file=key, kind="store-corrupt", message=f"blob {defect}", way_out="it is redone when asked for"
                    )
                )
        return problems

    def note_publication(self, publication: Publication) -> None:
        """Remember what a destination was made of: for `collect`, and for who asks whether there is anything new."""
        document = asdict(publication) | {"keys": sorted(publication.keys)}
        name = _publication_name(publication.destination)
        self.folder.put(name, self._seal.close(name, canonical_json(document)), durable=False)

    def publication(self, destination: str) -> Publication | None:
        """What is known of the result at a destination; it may be gone by now."""
        return self._read_publication(_publication_name(destination))

    def publications(self) -> Iterator[Publication]:
        """What is known of every result that was published."""
        found = map(self._read_publication, self.folder.listing("published/"))
        return (publication for publication in found if publication is not None)

    def _read_publication(self, name: str) -> Publication | None:
        try:
            return _parse_publication(self._read(name, _SMALL_LIMIT), name)
        except ObjectMissing:
            return None
        except StorageUnavailable:
            raise
        except (StorageFailed, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self._doubt(name, f"{show(name)} cannot be used: {error}")
            return None

    def _published(self) -> frozenset[str]:
        return frozenset().union(*(publication.keys for publication in self.publications()))

    def forget_publication(self, destination: str) -> None:
        """A destination does not hold its result any more."""
        self.folder.remove(_publication_name(destination))

    def collect(self, *, older_than: float, keep: Collection[str] = ()) -> list[Entry]:
        """Delete what is older than `older_than` seconds, not in use by a destination and not in `keep`.

        The receipt goes before its blob, so that no receipt ever speaks of a blob that is gone. Measured errors go
        without being told of: they are small.
        """
        limit = time.time() - older_than
        for name, state in self.folder.listing("errors/").items():
            if state.modified < limit:
                self.folder.remove(name)
        doomed = [e for e in self.entries() if not e.is_published and e.key not in keep and e.modified < limit]
        for entry in doomed:
            receipt = self._read_receipt(entry.key)
            self._forget(entry.key)
            self.folder.remove(_receipt_name(entry.key))
            self.folder.remove(blob_name(receipt.blob_stem if receipt else entry.key))
        return doomed + self._collect_orphans(limit)

    def _collect_orphans(self, limit: float) -> list[Entry]:
        """Blobs of which no receipt speaks, and blobs that were set aside."""
        blobs = self.folder.listing("blobs/")
        keys = [_key_of(name) for name in self.folder.listing("receipts/")]
        stems = {*keys}
        if any(_key_of(name).startswith(_EARLY) for name in blobs):
            stems |= {receipt.stem for key in keys if (receipt := self._read_receipt(key))}
        doomed = []
        for name, state in (blobs | self.folder.listing("set-aside/")).items():
            if _key_of(name) not in stems and state.links == 1 and state.modified < limit:
                self._forget(_key_of(name))
                self.folder.remove(name)
                doomed.append(Entry(_key_of(name), state.size, state.modified, is_published=False))
        return doomed


def listing_state(listing: Mapping[str, FileIdentity]) -> str:
    """Name the state of all files of a folder without reading them; empty where one is too young to tell its states.

    The status change time is left out: a link to a file changes it, and no byte.
    """
    if not all(_is_settled(state.mtime_ns) for state in listing.values()):
        return ""
    return digest_json([[name, state.fingerprint(with_ctime=False)] for name, state in sorted(listing.items())])


def _publication_name(destination: str) -> str:
    return f"published/{digest_json(destination)}.json"


def _memo_name(key: str) -> str:
    return f"verified/{key}.json"


def _promises(receipt: Receipt, layout: ShardLayout, header_bytes: int) -> bool:
    """Whether a receipt speaks of the very tensors of a layout."""
    weights = [unit.module for unit in layout.units if unit.scheme is not None]
    return (
        receipt.blob.size == header_bytes + layout.data_bytes
        and receipt.tensors == tuple(placed.spec.name for placed in layout.placed)
        and [weight.module for weight in receipt.weights] == weights
    )


def _errors_name(key: str) -> str:
    return f"errors/{key}.json"


def _parse_errors(data: bytes, *, of: str) -> tuple[WeightRecord, ...]:
    raw = json.loads(data)
    if raw["of"] != of:
        raise ValueError("it speaks of another job")
    return parse_weights(raw["weights"])


def _parse_digest(data: bytes, *, of: str) -> Digest:
    raw = json.loads(data)
    if raw["of"] != of:
        raise ValueError("it speaks of another file")
    return Digest.parse(str(raw["digest"]))


def _parse_publication(data: bytes, name: str) -> Publication:
    raw = json.loads(data)
    found = Publication(
        destination=str(raw["destination"]),
        plan=str(raw["plan"]),
        keys=frozenset(map(str, raw["keys"])),
        made_of=str(raw.get("made_of", "")),  # notes of older releases do not say
    )
    if _publication_name(found.destination) != name:
        raise ValueError("it speaks of another destination")
    return found


def _digest_name(identity: FileIdentity) -> str:
    return f"digests/{identity.fingerprint()}.json"


def _is_settled(changed_ns: int) -> bool:
    """Whether a state is so old that a later write cannot be taken for it; 0 where no write ever can."""
    return time.time_ns() - changed_ns > _FRESH_NS


def _memo(receipt: Receipt, state: FileIdentity) -> bytes:
    """What is remembered of a verified blob.

    The status change time is left out: publishing and removing a result change it, as the blob gains or loses a name.
    """
    blob = receipt.blob
    found = {"state": state.fingerprint(with_ctime=False)}
    return canonical_json(found | {"whole": str(blob.whole), "head": str(blob.head), "tail": str(blob.tail)})
