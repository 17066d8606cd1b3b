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
from shardmill.storage import local
from shardmill.storage import store as store_module
from shardmill.storage.local import FileIdentity
from shardmill.storage.source import SourceFolder
from shardmill.storage.store import FULL, Store

DATA = bytes(range(256)) * 64


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "store")
    made.prepare()
    return made


def put(store: Store, key: str, data: bytes = DATA) -> Receipt:
    with store.writer(len(data)) as writer:
        writer.write(memoryview(data))
        blob = writer.commit(store.blob_path(key), read_only=True)
    receipt = Receipt(key=key, blob=blob, tensors=("a",), weights=(), producer=())
    store.put_receipt(receipt, shape="s")
    return receipt


def reopened(store: Store, verify: str = "fast") -> Store:
    """The store as another process sees it."""
    return Store(store.root, verify=verify)


def tamper(path: Path, data: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(data)


def test_what_is_put_is_found(store: Store) -> None:
    receipt = put(store, "k")
    assert reopened(store).lookup("k") == receipt
    assert reopened(store, FULL).lookup("k") == receipt
    assert store.blob_path("k").stat().st_mode & 0o777 == 0o444
    assert store.root.stat().st_mode & 0o777 == 0o700


def test_a_blob_without_a_receipt_is_a_miss(store: Store) -> None:
    put(store, "k")
    store.receipt_path("k").unlink()
    assert reopened(store).lookup("k") is None


@pytest.mark.parametrize(
    "damaged",
    [DATA[:-1], DATA + b"x", b"\0" * len(DATA), DATA[:-1] + b"x", b"x" + DATA[1:], b""],
)
def test_a_damaged_blob_is_a_warned_miss_and_set_aside(
    store: Store, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    put(store, "k")
    tamper(store.blob_path("k"), damaged)
    with caplog.at_level(logging.WARNING):
        assert reopened(store).lookup("k") is None
    assert "set aside" in caplog.text
    assert len(list((store.root / "set-aside").iterdir())) == 1
    put(store, "k")
    assert reopened(store).lookup("k") is not None


def test_a_flip_in_the_middle_is_found_by_full_verification(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "EDGE_BYTES", 100)
    put(store, "k")
    tamper(store.blob_path("k"), DATA[:8000] + b"!" + DATA[8001:])
    assert reopened(store).lookup("k") is not None
    assert [problem.kind for problem in reopened(store).verify()] == ["store-corrupt"]
    assert reopened(store, FULL).lookup("k") is None


@pytest.mark.parametrize(
    "receipt",
    [b"", b"{}", b"[]", b"\xff", b'{"schema": 99}', b"null", b'{"schema": 1, "key": "k"}'],
)
def test_a_damaged_receipt_is_a_warned_miss(store: Store, receipt: bytes, caplog: pytest.LogCaptureFixture) -> None:
    put(store, "k")
    tamper(store.receipt_path("k"), receipt)
    assert reopened(store).lookup("k") is None
    assert "done again" in caplog.text


def test_a_receipt_of_another_job_is_a_miss(store: Store) -> None:
    put(store, "k")
    put(store, "other", DATA[::-1])
    store.receipt_path("other").replace(store.receipt_path("k"))
    assert reopened(store).lookup("k") is None


def test_a_missing_blob_is_a_miss(store: Store) -> None:
    put(store, "k")
    store.blob_path("k").unlink()
    assert reopened(store).lookup("k") is None


def aged(path: Path, seconds: float = 100.0) -> Path:
    """A file as old as real checkpoints are, as far as the modification time tells."""
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


def test_a_young_file_is_not_remembered_and_an_old_one_is(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "shard"
    path.write_bytes(DATA)
    assert store.source_digest(path)[2]
    assert store.source_digest(path)[2]
    assert store.known_digest(path) is None
    monkeypatch.setattr("shardmill.storage.store._FRESH_NS", 0)
    first, _, was_read = store.source_digest(path)
    again, _, read_again = store.source_digest(path)
    assert (was_read, read_again) == (True, False)
    assert first == again == store.known_digest(path)


def test_a_changed_file_is_read_again_and_full_verification_always_reads(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardmill.storage.store._FRESH_NS", 0)
    path = tmp_path / "shard"
    path.write_bytes(DATA)
    first = store.source_digest(path)[0]
    path.write_bytes(DATA[::-1])
    assert store.source_digest(path)[0] != first
    assert reopened(store, FULL).source_digest(path)[2]


def test_a_damaged_memo_is_read_past(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardmill.storage.store._FRESH_NS", 0)
    path = tmp_path / "shard"
    path.write_bytes(DATA)
    digest = store.source_digest(path)[0]
    for memo in (store.root / "digests").iterdir():
        memo.write_text(json.dumps({"digest": 3}))
    assert store.source_digest(path)[:1] == (digest,)


def test_collection_keeps_what_is_young_published_or_wanted(store: Store, tmp_path: Path) -> None:
    for key in ("young", "published", "wanted", "old"):
        put(store, key)
    os.link(store.blob_path("published"), tmp_path / "model.safetensors")
    (store.root / "blobs" / "orphan.safetensors").write_bytes(b"x")
    for path in (
        store.root / "blobs" / "orphan.safetensors",
        *(store.receipt_path(k) for k in ("published", "wanted", "old")),
    ):
        aged(path)
    gone = {entry.key for entry in store.collect(older_than=50.0, keep=["wanted"])}
    assert gone == {"old", "orphan"}
    assert {entry.key for entry in store.entries()} == {"young", "published", "wanted"}
    assert not store.blob_path("old").exists()


# ---- what is remembered of verified blobs -----------------------------------------------------------------------


@pytest.fixture
def verified(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Blobs whose bytes were read for verification, in order."""
    found: list[Path] = []
    edges, whole = local.hash_edges, local.hash_file

    def note_edges(path: Path) -> tuple[Digest, Digest]:
        found.append(path)
        return edges(path)

    def note_whole(path: Path) -> tuple[BlobDigests, FileIdentity]:
        found.append(path)
        return whole(path)

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
    assert verified == [store.blob_path("k")] * 2


def test_publishing_and_removing_a_result_do_not_unsettle_its_blob(
    store: Store, tmp_path: Path, verified: list[Path]
) -> None:
    os.link(store.blob_path("k"), tmp_path / "model.safetensors")
    assert reopened(store).lookup("k") is not None
    (tmp_path / "model.safetensors").unlink()
    assert reopened(store).lookup("k") is not None
    assert verified == []


def test_a_blob_of_unknown_state_is_verified_once(store: Store, verified: list[Path]) -> None:
    aged(store.blob_path("k"))
    assert reopened(store).lookup("k") is not None
    assert reopened(store).lookup("k") is not None
    assert verified == [store.blob_path("k")]


def test_a_young_blob_is_verified_each_time(store: Store, verified: list[Path]) -> None:
    os.utime(store.blob_path("k"))
    assert reopened(store).lookup("k") is not None
    assert reopened(store).lookup("k") is not None
    assert verified == [store.blob_path("k")] * 2


def test_a_write_right_after_the_blob_was_put_does_not_keep_its_time(store: Store) -> None:
    put(store, "k")
    before = store.blob_path("k").stat().st_mtime_ns
    tamper(store.blob_path("k"), DATA[:-1] + b"x")
    assert store.blob_path("k").stat().st_mtime_ns - before > 2_000_000_000
    assert reopened(store).lookup("k") is None


def test_another_file_of_equal_size_and_time_is_verified(store: Store, tmp_path: Path, verified: list[Path]) -> None:
    status = store.blob_path("k").stat()
    other = tmp_path / "other"
    other.write_bytes(DATA[::-1])
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(store.blob_path("k"))
    assert reopened(store).lookup("k") is None
    assert verified == [store.blob_path("k")]


@pytest.mark.parametrize("size", [0, len(DATA) - 1, len(DATA) + 1])
def test_a_blob_of_another_size_is_a_miss_whatever_its_time_says(
    store: Store, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    put(store, "k")
    path = store.blob_path("k")
    status = path.stat()
    path.chmod(0o600)
    os.truncate(path, size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert reopened(store).lookup("k") is None
    assert "set aside" in caplog.text


@pytest.mark.parametrize("memo", [b"", b"{}", b"\xff", None])
def test_a_damaged_memo_costs_a_verification(store: Store, memo: bytes | None, verified: list[Path]) -> None:
    path = store.root / "verified" / "k.json"
    if memo is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(memo)
    assert reopened(store).lookup("k") is not None
    assert verified == [store.blob_path("k")]


def test_a_memo_does_not_vouch_for_an_edited_receipt(store: Store) -> None:
    receipt = put(store, "k")
    edited = replace(receipt, blob=replace(receipt.blob, head=Digest("blake3", "00")))
    tamper(store.receipt_path("k"), edited.to_bytes())
    assert reopened(store).lookup("k") is None


def test_verification_forgets_a_blob_that_decayed_without_a_trace(store: Store) -> None:
    put(store, "k")
    path = store.blob_path("k")
    status = path.stat()
    tamper(path, DATA[:-1] + b"x")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert [problem.kind for problem in reopened(store).verify()] == ["store-corrupt"]
    assert reopened(store).lookup("k") is None


def test_what_is_collected_is_forgotten(store: Store) -> None:
    put(store, "k")
    aged(store.receipt_path("k"))
    assert len(store.collect(older_than=50.0)) == 1
    assert list((store.root / "verified").iterdir()) == []
    assert store.lookup("k") is None


# ---- job keys ---------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> SourceFolder:
    return SourceFolder(checkpoints.write(tmp_path / "source", [{"m.weight": checkpoints.gaussian(1, 64, 128)}]))


def planned(source: SourceFolder, scheme: str = "FP8_DYNAMIC") -> ShardPlan:
    return make_plan(source, uniform(scheme)).shards[0]


def test_a_job_is_known_once_its_source_was_read(
    store: Store, source: SourceFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_FRESH_NS", 0)
    shard = planned(source)
    assert (store.known_job(shard, source), store.seems_to_hold(shard, source)) == (None, None)
    digest = store.source_digest(source.path(shard.name))[0]
    job = store.known_job(shard, source)
    assert job is not None
    assert job.sources == ((shard.name, str(digest)),)
    assert store.seems_to_hold(shard, source) is False
    put(store, job.key)
    assert store.seems_to_hold(shard, source) is True
    source.path(shard.name).write_bytes(b"other")
    assert store.known_job(shard, source) is None
