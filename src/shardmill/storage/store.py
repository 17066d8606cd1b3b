"""The store: blobs named by job key, receipts that vouch for them, and remembered digests of source files.

    blobs/<key>.safetensors      the bytes of one output shard, read-only
    receipts/<key>.json          written after its blob, never before
    digests/<identity>.json      BLAKE3 of a source file by path, device, inode, size and times
    shapes/<shape>               an empty file for every job, its sources left out, that has a receipt
    verified/<key>.json          the state in which a blob was last found to be the one of its receipt
    set-aside/                   blobs whose check failed

A hit = the receipt parses, its key is the one asked for, and the blob has the recorded size and digests. Anything less
is a miss with a warning. A blob in the state in which it was verified is not read again, except by full verification.
No locks: every write that counts appears whole under its name, and equal keys mean equal bytes.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Final

from shardmill.core.digest import Digest, canonical_json, digest_json
from shardmill.core.plan import ShardPlan
from shardmill.core.receipt import Receipt, parse_receipt
from shardmill.errors import Problem, SourceChanged, show
from shardmill.storage.local import (
    FileIdentity,
    FileWriter,
    hash_edges,
    hash_file,
    operation,
    remove_dead_temporaries,
    write_small,
)
from shardmill.storage.source import SourceFolder

log = logging.getLogger(__name__)
FOLDER_NAME: Final = ".shardmill"
FAST: Final = "fast"
FULL: Final = "full"
_FRESH_NS: Final = 2_000_000_000
"""Files younger than this are not remembered: a later write may keep their modification time."""
_PARTS: Final = ("blobs", "receipts", "digests", "shapes", "verified", "set-aside")


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


class Store:
    """A store in a local folder."""

    def __init__(self, root: Path, *, verify: str = FAST) -> None:
        self.root = root
        self.verify_level = verify
        self._trusted: dict[str, Receipt] = {}
        """By key: receipts whose blob this process has verified or written."""
        self._digests: dict[FileIdentity, Digest] = {}
        """Remembered digests that this process has looked up."""

    def prepare(self) -> None:
        """Create the folders, private to their owner, and remove temporary files of dead writers.

        Raises:
            StorageFailed: the store cannot be created.
        """
        with operation("create", self.root):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for part in _PARTS:
                (self.root / part).mkdir(exist_ok=True)
        for part in _PARTS:
            remove_dead_temporaries(self.root / part)

    def blob_path(self, key: str) -> Path:
        """Where the blob of a job lies."""
        return self.root / "blobs" / f"{key}.safetensors"

    def receipt_path(self, key: str) -> Path:
        """Where the receipt of a job lies."""
        return self.root / "receipts" / f"{key}.json"

    def writer(self, size: int) -> FileWriter:
        """Start writing a blob, whose key may be told when it is committed; `size` in bytes is known from the plan."""
        return FileWriter(self.root / "blobs", size)

    def new_scratch(self) -> IO[bytes]:
        """Make a nameless file that is gone when it is closed.

        Raises:
            StorageFailed: the file system refuses.
        """
        with operation("create", self.root / "blobs"):
            return tempfile.TemporaryFile(dir=self.root / "blobs")

    def may_hold(self, shape: str) -> bool:
        """Whether some source's result of a job of this shape was ever stored; see `ShardPlan.shape`."""
        return (self.root / "shapes" / shape).exists()

    def put_receipt(self, receipt: Receipt, shape: str) -> None:
        """Vouch for a blob that is durable, the result of a job of a shape."""
        with operation("create", self.root / "shapes"):
            (self.root / "shapes" / shape).touch()
        write_small(self.receipt_path(receipt.key), receipt.to_bytes())
        self._backdate(receipt.key)
        self._trust(receipt, self._blob_state(receipt.key))

    def lookup(self, key: str) -> Receipt | None:
        """Return the receipt of a job when its blob can be trusted; a failed check is a warned miss."""
        if (trusted := self._trusted.get(key)) is not None:
            return trusted
        receipt = self._read_receipt(key)
        if receipt is None:
            return None
        state = self._blob_state(key)
        if state is not None and self._is_verified(receipt, state):
            self._trusted[key] = receipt
            return receipt
        defect = self._blob_defect(receipt, full=self.verify_level == FULL)
        if defect is None:
            self._trust(receipt, state)
            return receipt
        log.warning("store: blob %s %s; it is set aside and the shard is done again", key[:12], defect)
        self._set_aside(key)
        return None

    def known_job(self, shard: ShardPlan, source: SourceFolder) -> KnownJob | None:
        """The job of a shard, or None where naming it takes reading the source's tensors.

        Raises:
            CheckpointInvalid: a source shard is gone.
        """
        digests: dict[str, str] = {}
        for name in shard.sources:
            digest = self.known_digest(source.path(name))
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
        return None if job is None else self.receipt_path(job.key).exists() and self.blob_path(job.key).exists()

    def _backdate(self, key: str) -> None:
        """Set a new blob's modification time back: no later write can keep it, so the blob is remembered at once."""
        with suppress(OSError):
            status = self.blob_path(key).stat()
            os.utime(self.blob_path(key), ns=(status.st_atime_ns, status.st_mtime_ns - 2 * _FRESH_NS))

    def _memo_path(self, key: str) -> Path:
        return self.root / "verified" / f"{key}.json"

    def _blob_state(self, key: str) -> FileIdentity | None:
        path = self.blob_path(key)
        try:
            return FileIdentity.of(path, path.stat())
        except OSError:
            return None

    def _is_verified(self, receipt: Receipt, state: FileIdentity) -> bool:
        """Whether the blob is in the state in which it was found to be the one of this receipt."""
        if self.verify_level == FULL or state.size != receipt.blob.size:
            return False
        try:
            return self._memo_path(receipt.key).read_bytes() == _memo(receipt, state)
        except OSError:
            return False

    def _trust(self, receipt: Receipt, state: FileIdentity | None) -> None:
        """Keep a receipt whose blob was verified or written in `state`; later processes learn it if the state is old.

        A torn memo equals no state, so it is written without the cost of making it durable.
        """
        self._trusted[receipt.key] = receipt
        if state is None or time.time_ns() - state.mtime_ns <= _FRESH_NS:
            return
        memo = _memo(receipt, state)
        after = self._blob_state(receipt.key)
        if after is not None and _memo(receipt, after) == memo:
            with suppress(OSError):
                self._memo_path(receipt.key).write_bytes(memo)

    def _forget(self, key: str) -> None:
        self._trusted.pop(key, None)
        self._memo_path(key).unlink(missing_ok=True)

    def _read_receipt(self, key: str) -> Receipt | None:
        try:
            receipt = parse_receipt(self.receipt_path(key).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("store: receipt %s cannot be used: %s; the shard is done again", key[:12], error)
            return None
        if receipt.key != key:
            log.warning("store: receipt %s speaks of another job; the shard is done again", key[:12])
            return None
        return receipt

    def _blob_defect(self, receipt: Receipt, *, full: bool) -> str | None:
        path = self.blob_path(receipt.key)
        try:
            size = path.stat().st_size
            if size != receipt.blob.size:
                return f"has {size} bytes, its receipt says {receipt.blob.size}"
            if full:
                same = hash_file(path)[0] == receipt.blob
            else:
                same = hash_edges(path) == (receipt.blob.head, receipt.blob.tail)
        except (OSError, SourceChanged) as error:
            return f"cannot be read: {error}"
        return None if same else "does not have the digest of its receipt"

    def _set_aside(self, key: str) -> None:
        self._forget(key)
        self.receipt_path(key).unlink(missing_ok=True)
        blob = self.blob_path(key)
        if blob.exists():
            blob.replace(self.root / "set-aside" / f"{key}.{time.time_ns()}")

    def source_digest(self, path: Path, *, stop: Callable[[], bool] = bool) -> tuple[Digest, FileIdentity, bool]:
        """Digest of a source file: remembered by its identity, else read once.

        Returns:
            The digest, the identity of the file it belongs to, and whether bytes were read for it.
        """
        identity = FileIdentity.of(path, path.stat())
        if self.verify_level != FULL and (known := self._remembered(identity)) is not None:
            return known, identity, False
        digests, identity = hash_file(path, stop)
        self.remember(identity, digests.whole)
        return digests.whole, identity, True

    def remember(self, identity: FileIdentity, digest: Digest) -> None:
        """Keep the digest of a source file, unless the file is so young that a later write may go unnoticed."""
        if time.time_ns() - max(identity.mtime_ns, identity.ctime_ns) > _FRESH_NS:
            write_small(self._digest_path(identity), json.dumps({"digest": str(digest)}).encode())
            self._digests[identity] = digest

    def known_digest(self, path: Path) -> Digest | None:
        """Digest of a source file if it is remembered; never reads the file."""
        return self._remembered(FileIdentity.of(path, path.stat()))

    def _digest_path(self, identity: FileIdentity) -> Path:
        return self.root / "digests" / f"{digest_json(asdict(identity))}.json"

    def _remembered(self, identity: FileIdentity) -> Digest | None:
        found = self._digests.get(identity) or _read_memo(self._digest_path(identity))
        if found is not None:
            self._digests[identity] = found
        return found

    def entries(self) -> Iterator[Entry]:
        """Every receipt whose blob is there, sorted by key."""
        for path in sorted((self.root / "receipts").glob("*.json")):
            blob = self.blob_path(path.stem)
            if blob.exists():
                status = blob.stat()
                yield Entry(path.stem, status.st_size, path.stat().st_mtime, status.st_nlink > 1)

    def verify(self) -> list[Problem]:
        """Read every blob whole and compare it with its receipt; bad ones are no longer remembered as verified."""
        problems = []
        for path in sorted((self.root / "receipts").glob("*.json")):
            receipt = self._read_receipt(path.stem)
            defect = "has an unusable receipt" if receipt is None else self._blob_defect(receipt, full=True)
            if defect:
                self._forget(path.stem)
                problems.append(
                    Problem(
                        file=path.stem,
                        kind="store-corrupt",
                        message=f"blob {defect}",
                        way_out="it is redone when asked for",
                    )
                )
        return problems

    def collect(self, *, older_than: float, keep: Collection[str] = ()) -> list[Entry]:
        """Delete what is older than `older_than` seconds, not linked by a destination and not in `keep`.

        The receipt goes before its blob, so that no receipt ever speaks of a blob that is gone.
        """
        limit = time.time() - older_than
        doomed = [e for e in self.entries() if not e.is_published and e.key not in keep and e.modified < limit]
        for entry in doomed:
            self._forget(entry.key)
            self.receipt_path(entry.key).unlink(missing_ok=True)
            self.blob_path(entry.key).unlink(missing_ok=True)
        for path in (self.root / "blobs").glob("*.safetensors"):
            orphaned = not self.receipt_path(path.stem).exists() and path.stat().st_nlink == 1
            if orphaned and path.stat().st_mtime < limit:
                self._forget(path.stem)
                doomed.append(Entry(path.stem, path.stat().st_size, path.stat().st_mtime, is_published=False))
                path.unlink(missing_ok=True)
        return doomed


def _memo(receipt: Receipt, state: FileIdentity) -> bytes:
    """What is remembered of a verified blob.

    The status change time is left out: publishing and removing a result change it, as the blob gains or loses a name.
    """
    found = {name: value for name, value in asdict(state).items() if name != "ctime_ns"}
    blob = receipt.blob
    return canonical_json(found | {"whole": str(blob.whole), "head": str(blob.head), "tail": str(blob.tail)})


def _read_memo(path: Path) -> Digest | None:
    try:
        return Digest.parse(str(json.loads(path.read_bytes())["digest"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("store: remembered digest %s cannot be used: %s", show(path.name), error)
        return None


def default_root(destination: Path) -> Path:
    """The store beside a destination: the same file system, so that publishing is a hard link."""
    return destination.parent / FOLDER_NAME


def check_location(store: Path, source: Path) -> list[Problem]:
    """A store inside the source would change what is read."""
    if store.resolve().is_relative_to(source.resolve()):
        return [
            Problem(
                file=str(store),
                kind="store-in-source",
                message="the store lies inside the source",
                way_out="set --store",
            )
        ]
    return []
