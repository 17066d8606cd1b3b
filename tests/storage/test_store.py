from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

import checkpoints
from shardmill.core.digest import Digest
from shardmill.core.plan import ShardPlan
from shardmill.core.receipt import BlobDigests, Receipt
from shardmill.core.recipe import uniform
from shardmill.stages.plan import make_plan
from shardmill.storage import hashing
from shardmill.storage import store as store_module
from shardmill.storage.folder import FileIdentity, Folder
from shardmill.storage.local import LocalFolder
from shardmill.storage.source import SourceFolder
from shardmill.storage.store import FULL, Store, blob_name

DATA = bytes(range(256)) * 64


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(LocalFolder(tmp_path / "store"))
    made.prepare()
    return made


def root(store: Store) -> Path:
    assert store.folder.path is not None
    return store.folder.path


def blob_path(store: Store, key: str) -> Path:
    return root(store) / blob_name(key)


def receipt_path(store: Store, key: str) -> Path:
    return root(store) / "receipts" / f"{key}.json"


def put(store: Store, key: str, data: bytes = DATA) -> Receipt:
    with store.writer("a", len(data)) as writer:
        writer.write(memoryview(data))
        blob = writer.commit(blob_name(key), sealed=True)
    receipt = Receipt(key=key, blob=blob, tensors=("a",), weights=(), producer=())
    store.put_receipt(receipt, shape="s")
    return receipt


def reopened(store: Store, verify: str = "fast") -> Store:
    """The store as another process sees it."""
    return Store(store.folder, verify=verify)


def tamper(path: Path, data: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(data)


def test_what_is_put_is_found(store: Store) -> None:
    receipt = put(store, "k")
    assert reopened(store).lookup("k") == receipt
    assert reopened(store, FULL).lookup("k") == receipt
    assert blob_path(store, "k").stat().st_mode & 0o777 == 0o444
    assert root(store).stat().st_mode & 0o777 == 0o700


def test_a_blob_without_a_receipt_is_a_miss(store: Store) -> None:
    put(store, "k")
    receipt_path(store, "k").unlink()
    assert reopened(store).lookup("k") is None


@pytest.mark.parametrize(
    "damaged",
    [DATA[:-1], DATA + b"x", b"\0" * len(DATA), DATA[:-1] + b"x", b"x" + DATA[1:], b""],
)
def test_a_damaged_blob_is_a_warned_miss_and_set_aside(
    store: Store, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    put(store, "k")
    tamper(blob_path(store, "k"), damaged)
    with caplog.at_level(logging.WARNING):
        assert reopened(store).lookup("k") is None
    assert "set aside" in caplog.text
    assert len(list((root(store) / "set-aside").iterdir())) == 1
    put(store, "k")
    assert reopened(store).lookup("k") is not None


def test_a_flip_in_the_middle_is_found_by_full_verification(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "EDGE_BYTES", 100)
    put(store, "k")
    tamper(blob_path(store, "k"), DATA[:8000] + b"!" + DATA[8001:])
    assert reopened(store).lookup("k") is not None
    assert [problem.kind for problem in reopened(store).verify()] == ["store-corrupt"]
    assert reopened(store, FULL).lookup("k") is None


@pytest.mark.parametrize(
    "receipt",
    [b"", b"{}", b"[]", b"\xff", b'{"schema": 99}', b"null", b'{"schema": 1, "key": "k"}'],
)
def test_a_damaged_receipt_is_a_warned_miss(store: Store, receipt: bytes, caplog: pytest.LogCaptureFixture) -> None:
    put(store, "k")
    tamper(receipt_path(store, "k"), receipt)
    assert reopened(store).lookup("k") is None
    assert "done again" in caplog.text


def test_a_receipt_of_another_job_is_a_miss(store: Store) -> None:
    put(store, "k")
    put(store, "other", DATA[::-1])
    receipt_path(store, "other").replace(receipt_path(store, "k"))
    assert reopened(store).lookup("k") is None


def test_a_missing_blob_is_a_miss(store: Store) -> None:
    put(store, "k")
    blob_path(store, "k").unlink()
    assert reopened(store).lookup("k") is None


def aged(path: Path, seconds: float = 100.0) -> Path:
    """A file as old as real checkpoints are, as far as the modification time tells."""
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


def source_with(tmp_path: Path, data: bytes) -> SourceFolder:
    """A source with one file, `shard`."""
    (tmp_path / "shard").write_bytes(data)
    return SourceFolder(LocalFolder(tmp_path))


def test_a_young_file_is_not_remembered_and_an_old_one_is(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_with(tmp_path, DATA)
    assert store.source_digest(source, "shard")[2]
    assert store.source_digest(source, "shard")[2]
    assert store.known_digest(source.identity("shard")) is None
    monkeypatch.setattr("shardmill.storage.store._FRESH_NS", 0)
    first, _, was_read = store.source_digest(source, "shard")
    again, _, read_again = store.source_digest(source, "shard")
    assert (was_read, read_again) == (True, False)
    assert first == again == store.known_digest(source.identity("shard"))


def test_a_changed_file_is_read_again_and_full_verification_always_reads(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardmill.storage.store._FRESH_NS", 0)
    source = source_with(tmp_path, DATA)
    first = store.source_digest(source, "shard")[0]
    source_with(tmp_path, DATA[::-1])
    assert store.source_digest(source, "shard")[0] != first
    assert reopened(store, FULL).source_digest(source, "shard")[2]


def test_a_damaged_memo_is_read_past(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardmill.storage.store._FRESH_NS", 0)
    source = source_with(tmp_path, DATA)
    digest = store.source_digest(source, "shard")[0]
    for memo in (root(store) / "digests").iterdir():
        memo.write_text(json.dumps({"digest": 3}))
    assert reopened(store).source_digest(source, "shard")[::2] == (digest, True)
    assert reopened(store).source_digest(source, "shard")[::2] == (digest, False)


def test_collection_keeps_what_is_young_published_or_wanted(store: Store, tmp_path: Path) -> None:
    for key in ("young", "published", "wanted", "old"):
        put(store, key)
    os.link(blob_path(store, "published"), tmp_path / "model.safetensors")
    (root(store) / "blobs" / "orphan.safetensors").write_bytes(b"x")
    for path in (
        root(store) / "blobs" / "orphan.safetensors",
        *(receipt_path(store, k) for k in ("published", "wanted", "old")),
    ):
        aged(path)
    gone = {entry.key for entry in store.collect(older_than=50.0, keep=["wanted"])}
    assert gone == {"old", "orphan"}
    assert {entry.key for entry in store.entries()} == {"young", "published", "wanted"}
    assert not blob_path(store, "old").exists()


# ---- what is remembered of verified blobs -----------------------------------------------------------------------


@pytest.fixture
def verified(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Blobs whose bytes were read for verification, in order."""
    found: list[Path] = []
    edges, whole = hashing.hash_edges, hashing.hash_file

    def note_edges(folder: Folder, name: str) -> tuple[Digest, Digest]:
        found.append(root(store) / name)
        return edges(folder, name)

    def note_whole(folder: Folder, name: str) -> tuple[BlobDigests, FileIdentity]:
        found.append(root(store) / name)
        return whole(folder, name)

    monkeypatch.setattr(store_module, "hash_edges", note_edges)
    monkeypatch.setattr(store_module, "hash_file", note_whole)
    put(store, "k")
    return found


def test_a_blob_that_was_written_is_not_read_for_a_hit(store: Store, verified: list[Path]) -> None:
    assert reopened(store).lookup("k") is not None
    assert verified == []


def test_full_verification_reads_whatever_is_remembered(store: Store, verified: list[Path]) -> None:
    assert reopened(store, FULL).lookup("k") is not None
    assert reopened(store, FULL).lookup("k") is not None
    assert verified == [blob_path(store, "k")] * 2


def test_publishing_and_removing_a_result_do_not_unsettle_its_blob(
    store: Store, tmp_path: Path, verified: list[Path]
) -> None:
    os.link(blob_path(store, "k"), tmp_path / "model.safetensors")
    assert reopened(store).lookup("k") is not None
    (tmp_path / "model.safetensors").unlink()
    assert reopened(store).lookup("k") is not None
    assert verified == []


def test_a_blob_of_unknown_state_is_verified_once(store: Store, verified: list[Path]) -> None:
    aged(blob_path(store, "k"))
    assert reopened(store).lookup("k") is not None
    assert reopened(store).lookup("k") is not None
    assert verified == [blob_path(store, "k")]


def test_a_young_blob_is_verified_each_time(store: Store, verified: list[Path]) -> None:
    os.utime(blob_path(store, "k"))
    assert reopened(store).lookup("k") is not None
    assert reopened(store).lookup("k") is not None
    assert verified == [blob_path(store, "k")] * 2


def test_a_write_right_after_the_blob_was_put_does_not_keep_its_time(store: Store) -> None:
    put(store, "k")
    before = blob_path(store, "k").stat().st_mtime_ns
    tamper(blob_path(store, "k"), DATA[:-1] + b"x")
    assert blob_path(store, "k").stat().st_mtime_ns - before > 2_000_000_000
    assert reopened(store).lookup("k") is None


def test_another_file_of_equal_size_and_time_is_verified(store: Store, tmp_path: Path, verified: list[Path]) -> None:
    status = blob_path(store, "k").stat()
    other = tmp_path / "other"
    other.write_bytes(DATA[::-1])
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(blob_path(store, "k"))
    assert reopened(store).lookup("k") is None
    assert verified == [blob_path(store, "k")]


@pytest.mark.parametrize("size", [0, len(DATA) - 1, len(DATA) + 1])
def test_a_blob_of_another_size_is_a_miss_whatever_its_time_says(
    store: Store, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    put(store, "k")
    path = blob_path(store, "k")
    status = path.stat()
    path.chmod(0o600)
    os.truncate(path, size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert reopened(store).lookup("k") is None
    assert "set aside" in caplog.text


@pytest.mark.parametrize("memo", [b"", b"{}", b"\xff", None])
def test_a_damaged_memo_costs_a_verification(store: Store, memo: bytes | None, verified: list[Path]) -> None:
    path = root(store) / "verified" / "k.json"
    if memo is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(memo)
    assert reopened(store).lookup("k") is not None
    assert verified == [blob_path(store, "k")]


def test_a_memo_does_not_vouch_for_an_edited_receipt(store: Store) -> None:
    receipt = put(store, "k")
    edited = replace(receipt, blob=replace(receipt.blob, head=Digest("blake3", "00")))
    tamper(receipt_path(store, "k"), edited.to_bytes())
    assert reopened(store).lookup("k") is None


def test_verification_forgets_a_blob_that_decayed_without_a_trace(store: Store) -> None:
    put(store, "k")
    path = blob_path(store, "k")
    status = path.stat()
    tamper(path, DATA[:-1] + b"x")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert [problem.kind for problem in reopened(store).verify()] == ["store-corrupt"]
    assert reopened(store).lookup("k") is None


def test_what_is_collected_is_forgotten(store: Store) -> None:
    put(store, "k")
    aged(receipt_path(store, "k"))
    assert len(store.collect(older_than=50.0)) == 1
    assert list((root(store) / "verified").iterdir()) == []
    assert store.lookup("k") is None


# ---- job keys ---------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> SourceFolder:
    path = checkpoints.write(tmp_path / "source", [{"m.weight": checkpoints.gaussian(1, 64, 128)}])
    return SourceFolder(LocalFolder(path))


def planned(source: SourceFolder, scheme: str = "FP8_DYNAMIC") -> ShardPlan:
    return make_plan(source, uniform(scheme)).shards[0]


def test_a_job_is_known_once_its_source_was_read(
    store: Store, source: SourceFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_FRESH_NS", 0)
    shard = planned(source)
    assert (store.known_job(shard, source), store.seems_to_hold(shard, source)) == (None, None)
    digest = store.source_digest(source, shard.name)[0]
    job = store.known_job(shard, source)
    assert job is not None
    assert job.sources == ((shard.name, str(digest)),)
    assert store.seems_to_hold(shard, source) is False
    put(store, job.key)
    assert store.seems_to_hold(shard, source) is True
    (tmp_path / "source" / shard.name).write_bytes(b"other")
    assert store.known_job(shard, source) is None
