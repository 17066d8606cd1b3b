from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardmill.core.digest import Digest
from shardmill.errors import DestinationInvalid, StorageFailed, TransferDamaged
from shardmill.storage.claim import new_claim
from shardmill.storage.local import LocalFolder
from shardmill.storage.location import parse_location
from shardmill.storage.memory import MemoryFolder
from shardmill.storage.operations import Faults, watched
from shardmill.storage.publish import (
    LocalDestination,
    ObjectDestination,
    Piece,
    Release,
    check_apart,
    open_destination,
    remove_dead_partials,
)

CLAIM = new_claim("p", "r1")


def piece(tmp_path: Path, name: str) -> Piece:
    (tmp_path / "blob").write_bytes(b"shard")
    return Piece(name=name, folder=LocalFolder(tmp_path), origin="blob", mark="k", digest=None)


def release(tmp_path: Path) -> Release:
    return Release(
        shards=(piece(tmp_path, "model.safetensors"), piece(tmp_path, "sub/two.safetensors")),
        files=(piece(tmp_path, "tokenizer.json"),),
        manifest=b'{"plan": "p"}',
        index=("model.safetensors.index.json", b"{}"),
        config=b"{}",
    )


def run(destination: Path, tmp_path: Path) -> None:
    LocalDestination(destination).publish(release(tmp_path), CLAIM)


def test_everything_appears_and_nothing_else(tmp_path: Path) -> None:
    run(tmp_path / "dst", tmp_path)
    found = sorted(str(p.relative_to(tmp_path / "dst")) for p in (tmp_path / "dst").rglob("*") if p.is_file())
    assert found == [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "shardmill.json",
        "sub/two.safetensors",
        "tokenizer.json",
    ]
    assert LocalDestination(tmp_path / "dst").manifest() == {"plan": "p"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blob", "dst"]


def test_blobs_are_linked_where_that_is_possible_and_copied_where_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "a", tmp_path)
    assert (tmp_path / "a" / "model.safetensors").stat().st_nlink > 1
    assert (tmp_path / "a" / "tokenizer.json").stat().st_nlink == 1

    def refuse(*_: Path) -> None:
        raise OSError(errno.EXDEV, "cross-device")

    monkeypatch.setattr(os, "link", refuse)
    run(tmp_path / "b", tmp_path)
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == b"shard"
    assert (tmp_path / "b" / "model.safetensors").stat().st_nlink == 1


@pytest.mark.parametrize("found", ["blake3:00", "sha256:00"])
def test_a_copy_that_is_not_what_it_should_be_gets_no_name(tmp_path: Path, found: str) -> None:
    damaged = piece(tmp_path, "tokenizer.json")
    damaged = Piece(
        name=damaged.name, folder=damaged.folder, origin=damaged.origin, mark="k", digest=Digest.parse(found)
    )
    named = Release(shards=(), files=(damaged,), manifest=b"{}", index=None, config=b"{}")
    with watched(Faults()) as seen, pytest.raises(TransferDamaged, match="expected"):
        LocalDestination(tmp_path / "dst").publish(named, CLAIM)
    assert "rename" not in [name for name, _ in seen.log]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blob"]


def published(tmp_path: Path) -> list[tuple[str, str]]:
    """Operations of publishing, with places in the working folder told as relative paths."""
    (tmp_path / "blob").write_bytes(b"shard")
    partial = f"{tmp_path / 'dst'}.partial-{CLAIM.run}"
    with watched(Faults()) as seen:
        run(tmp_path / "dst", tmp_path)
    return [(name, where.replace(f"{partial}/", "")) for name, where in seen.log]


def test_config_comes_last_and_one_rename_shows_everything(tmp_path: Path) -> None:
    named = [(name, where) for name, where in published(tmp_path) if name in ("link", "rename")]
    assert named == [
        ("link", "model.safetensors"),
        ("link", "sub/two.safetensors"),
        ("rename", "tokenizer.json"),
        ("rename", "shardmill.json"),
        ("rename", "model.safetensors.index.json"),
        ("rename", "config.json"),
        ("rename", str(tmp_path / "dst")),
    ]


def test_each_step_is_durable_before_the_next(tmp_path: Path) -> None:
    log = published(tmp_path)
    last = len(log) - 1 - log[::-1].index(("rename", str(tmp_path / "dst")))
    for place, (name, where) in enumerate(log[:last]):
        if name == "rename":
            assert log[place - 1][0] == "sync", f"the bytes of {where} are on the disk before it gets its name"
            assert log[place + 1][0] == "sync", "and its name before the next"
    folders = {where for name, where in log[last - 2 : last] if name == "sync"}
    assert folders == {f"{tmp_path / 'dst'}.partial-{CLAIM.run}", "sub"}
    assert log[last + 1 :] == [("sync", str(tmp_path))]


def test_a_failure_at_any_step_leaves_nothing(tmp_path: Path) -> None:
    steps = published(tmp_path)
    for number, (name, where) in enumerate(steps, 1):
        shutil.rmtree(tmp_path / "dst")
        with watched(Faults("ENOSPC", number)), pytest.raises(StorageFailed, match="No space left") as caught:
            run(tmp_path / "dst", tmp_path)
        assert caught.value.errno == errno.ENOSPC
        left = ["blob", "dst"] if number == len(steps) else ["blob"]  # the last step makes durable what is there
        assert sorted(p.name for p in tmp_path.iterdir()) == left, f"{name} {where}"
        (tmp_path / "dst").mkdir(exist_ok=True)
    assert len(steps) > 30


def test_a_destination_that_appears_meanwhile_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "theirs").write_text("x")
    with pytest.raises(DestinationInvalid, match="appeared"):
        run(tmp_path / "dst", tmp_path)
    assert [p.name for p in (tmp_path / "dst").iterdir()] == ["theirs"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blob", "dst"]


def test_dead_partial_folders_go_and_living_ones_stay(tmp_path: Path) -> None:
    dead, alive = tmp_path / "dst.partial-1", tmp_path / "dst.partial-2"
    dead.mkdir()
    alive.mkdir()
    (dead / "x").write_text("")
    lock = os.open(alive, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert remove_dead_partials(tmp_path / "dst") == 1
    os.close(lock)
    assert [p.name for p in tmp_path.iterdir()] == ["dst.partial-2"]


def problems(destination: Path, source: Path) -> list[str]:
    """Kinds of what a run finds before work, with a store that is in nobody's way."""
    place, store = parse_location(str(destination)), parse_location(str(source.parent.parent / "store"))
    found = [*check_apart(place, parse_location(str(source)), store), *open_destination(place).check()]
    return [problem.kind for problem in found]


@pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling", "source", "inside", "outside"])
def test_a_destination_that_cannot_be_ours_is_refused(tmp_path: Path, kind: str) -> None:
    source, destination = tmp_path / "a" / "src", tmp_path / "dst"
    source.mkdir(parents=True)
    if kind == "file":
        destination.write_text("x")
    elif kind == "folder":
        destination.mkdir()
        (destination / "x").write_text("")
    elif kind == "link":
        (tmp_path / "empty").mkdir()
        destination.symlink_to(tmp_path / "empty")
    elif kind == "dangling":
        destination.symlink_to(tmp_path / "absent")
    else:
        destination = {"source": source, "inside": source / "out", "outside": tmp_path / "a"}[kind]
    found = problems(destination, source)
    assert set(found) == {"destination-in-use"}
    assert len(found) == (2 if kind == "outside" else 1)


def test_an_absent_or_empty_destination_is_fine(tmp_path: Path) -> None:
    (tmp_path / "a" / "src").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    assert problems(tmp_path / "empty", tmp_path / "a" / "src") == []
    assert problems(tmp_path / "new" / "deep", tmp_path / "a" / "src") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "empty"]


STORES: list[tuple[str, Callable[[Path], Path], list[str]]] = [
    ("in the source", lambda root: root / "src" / "store", ["store-in-source"]),
    ("the source", lambda root: root / "src", ["store-in-source"]),
    ("in the destination", lambda root: root / "dst" / "store", ["store-in-destination"]),
    ("through a link", lambda root: root / "link" / "store", ["store-in-source"]),
    ("beside", lambda root: root / ".shardmill", []),
]


@pytest.mark.parametrize(("store", "expected"), [row[1:] for row in STORES], ids=[row[0] for row in STORES])
def test_a_store_lies_in_neither_source_nor_destination(tmp_path: Path, store: Any, expected: list[str]) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "src")
    places = [parse_location(str(path)) for path in (tmp_path / "dst", tmp_path / "src", store(tmp_path))]
    assert [problem.kind for problem in check_apart(*places)] == expected


def test_a_damaged_copy_gets_no_name_in_an_object_storage_where_the_name_would_vouch_for_it(tmp_path: Path) -> None:
    whole = piece(tmp_path, "model.safetensors")
    damaged = Piece(name=whole.name, folder=whole.folder, origin="blob", mark="k", digest=Digest("blake3", "00"))
    destination = ObjectDestination(MemoryFolder(f"{tmp_path}/dst"))
    broken = Release(shards=(damaged,), files=(), manifest=b"{}", index=None, config=b"{}")
    with pytest.raises(TransferDamaged, match="expected"):
        destination.publish(broken, CLAIM)
    assert destination.folder.listing() == {}
    destination.publish(release(tmp_path), CLAIM)
    assert destination.folder.read("model.safetensors", 100) == b"shard"
