from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

import pytest

from shardmill.core.receipt import Receipt
from shardmill.storage import local
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
