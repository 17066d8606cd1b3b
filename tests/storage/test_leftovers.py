"""What an operation that fails, or has nothing to do, leaves in a folder: nothing."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from shardmill.errors import StorageFailed
from shardmill.storage.local import LocalFolder
from shardmill.storage.memory import open_memory


def test_a_file_that_cannot_be_locked_is_closed_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_fd: int, _how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    before = len(list(Path("/proc/self/fd").iterdir()))
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        with pytest.raises(StorageFailed, match=os.strerror(errno.ENOLCK)):
            LocalFolder(tmp_path).writer("blob", 10)

    assert list(tmp_path.iterdir()) == []
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_moving_an_absent_file_makes_no_folder(tmp_path: Path) -> None:
    LocalFolder(tmp_path).move("absent", "below/target")

    assert list(tmp_path.iterdir()) == []


def test_moving_makes_the_folder_of_the_target(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")

    LocalFolder(tmp_path).move("file", "below/target")

    assert (tmp_path / "below" / "target").read_bytes() == b"1"


def test_memory_that_cannot_be_written_is_told_as_every_storage_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_memory(tmp_path.name)

    def refuse(*_: object) -> None:
        raise StorageFailed(errno.EACCES, "no")

    assert folder.probe() == []
    monkeypatch.setattr(type(folder), "create", refuse)
    [problem] = folder.probe()
    assert (problem.kind, problem.file) == ("destination-unwritable", folder.url)
