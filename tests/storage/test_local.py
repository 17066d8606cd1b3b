from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmill.errors import SourceChanged, StorageFailed
from shardmill.storage import local
from shardmill.storage.local import FileWriter, RangeReader, hash_edges, hash_file, remove_dead_temporaries, write_small


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_committed_file_has_its_bytes_digests_and_mode(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    with FileWriter(tmp_path, len(data)) as writer:
        for begin in range(0, len(data), 700_001):
            writer.write(memoryview(data)[begin : begin + 700_001])
        digests = writer.commit(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == data
    assert digests.whole.value == blake3(data).hexdigest()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask
    assert leftovers(tmp_path) == []


@given(size=st.integers(0, 400), edge=st.integers(1, 200), cut=st.integers(1, 90))
@settings(max_examples=100)
def test_streamed_digests_equal_those_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, size: int, edge: int, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("edge")
    data = os.urandom(size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "EDGE_BYTES", edge)
        with FileWriter(folder, size) as writer:
            for begin in range(0, size, cut):
                writer.write(memoryview(data)[begin : begin + cut])
            digests = writer.commit(folder / "a")
        assert hash_file(folder / "a")[0] == digests
        assert hash_edges(folder / "a") == (digests.head, digests.tail)
    assert digests.head.value == blake3(data[:edge]).hexdigest()
    assert digests.tail.value == blake3(data[max(0, size - edge) :]).hexdigest()


@pytest.mark.parametrize("written", [0, 3, 7, 9])
def test_too_few_or_too_many_bytes_are_never_committed(tmp_path: Path, written: int) -> None:
    with FileWriter(tmp_path, 8) as writer:
        writer.write(memoryview(b"x" * written))
        with pytest.raises(StorageFailed, match="8 bytes announced"):
            writer.commit(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with FileWriter(tmp_path, 8) as writer:
            writer.write(memoryview(b"1234"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_with_operation_and_path_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(StorageFailed, match=r"allocate .*\.tmp.*No space left"):
        FileWriter(tmp_path, 8)
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_of_dead_writers_are_removed_and_of_living_ones_kept(tmp_path: Path) -> None:
    (tmp_path / ".old.abcdef.tmp").write_bytes(b"dead")
    (tmp_path / "other.tmp").write_bytes(b"not ours")
    with FileWriter(tmp_path, 1) as writer:
        assert remove_dead_temporaries(tmp_path) == 1
        writer.write(memoryview(b"x"))
        writer.commit(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "other.tmp"]


def test_many_writers_of_one_name_leave_one_whole_file(tmp_path: Path) -> None:
    threads = [threading.Thread(target=write_small, args=(tmp_path / "a", b"same" * 1000)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a").read_bytes() == b"same" * 1000
    assert leftovers(tmp_path) == []


def read(path: Path, offset: int, length: int) -> bytes:
    view = memoryview(bytearray(length))
    with RangeReader(path) as reader:
        reader.read_into(offset, view)
    return bytes(view)


@pytest.mark.parametrize(("offset", "length"), [(0, 10), (0, 1), (9, 1), (4, 0), (10, 0), (3, 5)])
def test_ranges(tmp_path: Path, offset: int, length: int) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    assert read(tmp_path / "a", offset, length) == b"0123456789"[offset : offset + length]


def test_a_range_past_the_end_is_a_changed_source(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    with pytest.raises(SourceChanged, match="ends at byte 10"):
        read(tmp_path / "a", 5, 6)


def test_a_file_that_changes_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"0123456789")

    def change() -> None:
        with RangeReader(path):
            path.write_bytes(b"abcdefghij")
            os.utime(path, ns=(1, 1))

    with pytest.raises(SourceChanged, match="changed while"):
        change()


def test_a_missing_file_is_told_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match=r"open .*absent.*No such file"):
        RangeReader(tmp_path / "absent")
