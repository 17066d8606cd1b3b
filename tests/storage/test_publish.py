from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardmill.errors import DestinationInvalid, StorageFailed
from shardmill.storage import publish as publishing
from shardmill.storage.publish import check_destination, publish, read_manifest, remove_dead_partials


def run(destination: Path, tmp_path: Path, index: bytes | None = b"{}") -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(b"shard")
    publish(
        destination,
        run="r1",
        blobs=[("model.safetensors", blob), ("sub/two.safetensors", blob)],
        files=[("tokenizer.json", blob)],
        manifest=b'{"plan": "p"}',
        index=index,
        config=b"{}",
    )


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
    assert read_manifest(tmp_path / "dst") == {"plan": "p"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blob", "dst"]


def test_blobs_are_linked_where_that_is_possible_and_copied_where_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "a", tmp_path)
    assert (tmp_path / "a" / "model.safetensors").stat().st_nlink > 1

    def refuse(*_: Path) -> None:
        raise OSError(errno.EXDEV, "cross-device")

    monkeypatch.setattr(os, "link", refuse)
    run(tmp_path / "b", tmp_path)
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == b"shard"


def test_config_comes_last_and_each_step_is_durable_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def note(step: str, name: Callable[[tuple[Path, ...]], str]) -> None:
        original = getattr(publishing, step)

        def noted(*arguments: Any) -> Any:
            seen.append(name(arguments))
            return original(*arguments)

        monkeypatch.setattr(publishing, step, noted)

    note("place_file", lambda arguments: arguments[1].name)
    note("write_small", lambda arguments: arguments[0].name)
    note("_rename", lambda _: "rename")
    run(tmp_path / "dst", tmp_path)
    order = [
        "model.safetensors",
        "two.safetensors",
        "shardmill.json",
        "model.safetensors.index.json",
        "config.json",
        "rename",
    ]
    assert seen == order


@pytest.mark.parametrize("step", ["place_file", "copy_file", "write_small", "_rename"])
def test_a_failure_at_any_step_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(publishing, step, fail)
    with pytest.raises(StorageFailed, match="No space left"):
        run(tmp_path / "dst", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blob"]


def test_a_destination_that_appears_meanwhile_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "theirs").write_text("x")
    with pytest.raises(DestinationInvalid, match="appeared"):
        run(tmp_path / "dst", tmp_path)
    assert [p.name for p in (tmp_path / "dst").iterdir()] == ["theirs"]


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


@pytest.mark.parametrize("kind", ["file", "folder", "link", "source", "inside", "outside"])
def test_a_destination_that_cannot_be_ours_is_refused(tmp_path: Path, kind: str) -> None:
    source, destination = tmp_path / "a" / "src", tmp_path / "dst"
    source.mkdir(parents=True)
    if kind == "file":
        destination.write_text("x")
    elif kind == "folder":
        destination.mkdir()
        (destination / "x").write_text("")
    elif kind == "link":
        destination.symlink_to(tmp_path)
    else:
        destination = {"source": source, "inside": source / "out", "outside": tmp_path / "a"}[kind]
    assert [problem.kind for problem in check_destination(destination, source)] == ["destination-in-use"]


def test_an_absent_or_empty_destination_is_fine(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "empty").mkdir()
    assert check_destination(tmp_path / "empty", tmp_path / "src") == []
    assert check_destination(tmp_path / "new" / "deep", tmp_path / "src") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "src"]
