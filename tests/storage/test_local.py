from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmill.errors import SourceChanged, StorageFailed
from shardmill.storage import hashing, local
from shardmill.storage.folder import Loan
from shardmill.storage.hashing import SourceHash, hash_edges, hash_file
from shardmill.storage.local import FileWriter, LocalFolder, RangeReader, remove_dead_temporaries


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_committed_file_has_its_bytes_digests_and_mode(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    with FileWriter(tmp_path, "a", len(data)) as writer:
        for begin in range(0, len(data), 700_001):
            writer.write(memoryview(data)[begin : begin + 700_001])
        digests = writer.commit()
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
        patch.setattr(hashing, "EDGE_BYTES", edge)
        with FileWriter(folder, "a", size) as writer:
            for begin in range(0, size, cut):
                writer.write(memoryview(data)[begin : begin + cut])
            digests = writer.commit()
        assert hash_file(LocalFolder(folder), "a")[0] == digests
        assert hash_edges(LocalFolder(folder), "a") == (digests.head, digests.tail)
    assert digests.head.value == blake3(data[:edge]).hexdigest()
    assert digests.tail.value == blake3(data[max(0, size - edge) :]).hexdigest()


@pytest.mark.parametrize("written", [0, 3, 7, 9])
def test_too_few_or_too_many_bytes_are_never_committed(tmp_path: Path, written: int) -> None:
    with FileWriter(tmp_path, "a", 8) as writer:
        writer.write(memoryview(b"x" * written))
        with pytest.raises(StorageFailed, match="8 bytes announced"):
            writer.commit()
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with FileWriter(tmp_path, "a", 8) as writer:
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
        FileWriter(tmp_path, "a", 8)
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_of_dead_writers_are_removed_and_of_living_ones_kept(tmp_path: Path) -> None:
    (tmp_path / ".shardmill-abcdef.tmp").write_bytes(b"dead")
    (tmp_path / "other.tmp").write_bytes(b"not ours")
    (tmp_path / ".other.abcdef.tmp").write_bytes(b"not ours")
    with FileWriter(tmp_path, "a", 1) as writer:
        assert remove_dead_temporaries(tmp_path) == 1
        writer.write(memoryview(b"x"))
        writer.commit()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.abcdef.tmp", "a", "other.tmp"]


def test_many_writers_of_one_name_leave_one_whole_file(tmp_path: Path) -> None:
    threads = [threading.Thread(target=LocalFolder(tmp_path).put, args=("a", b"same" * 1000)) for _ in range(8)]
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
    with pytest.raises(StorageFailed, match=r"open .*absent.*no such file"):
        RangeReader(tmp_path / "absent")


def test_a_reader_counts_what_it_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    with RangeReader(tmp_path / "a") as reader:
        for offset, length in ((0, 4), (2, 5), (9, 0)):
            reader.read_into(offset, memoryview(bytearray(length)))
        assert reader.bytes_read == 9


# The digest of a source that is taken along


@given(
    size=st.integers(0, 300),
    ranges=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 120)), max_size=12),
    chunk=st.integers(1, 64),
)
@settings(max_examples=200)
def test_a_digest_taken_along_is_that_of_the_file_and_reads_no_byte_twice(
    tmp_path_factory: pytest.TempPathFactory, size: int, ranges: list[tuple[int, int]], chunk: int
) -> None:
    path = tmp_path_factory.mktemp("hash") / "a"
    data = os.urandom(size)
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch, RangeReader(path) as reader:
        patch.setattr(hashing, "_CHUNK_BYTES", chunk)
        own: list[int] = []
        plain = reader.read_into

        def read_into(offset: int, view: memoryview) -> None:
            own.extend(range(offset, offset + len(view)))
            plain(offset, view)

        patch.setattr(reader, "read_into", read_into)
        digest = SourceHash(reader)
        covered: set[int] = set()
        for begin, length in ranges:
            offset = min(begin, size)
            view = memoryview(data)[offset : offset + length]
            digest.cover(offset, view)
            if len(view):
                covered |= set(range(offset, offset + len(view)))
        assert digest.finish().value == blake3(data).hexdigest()
        assert digest.finish().value == blake3(data).hexdigest()
    assert len(set(own)) == len(own)
    assert set(own) | covered == set(range(size))


@pytest.mark.parametrize("cuts", [(0, 10, 20, 30), (0, 1, 30), (0, 30)])
def test_what_is_covered_in_order_is_not_read_again(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    data = bytes(range(30))
    (tmp_path / "a").write_bytes(data)
    with RangeReader(tmp_path / "a") as reader:
        digest = SourceHash(reader)
        for begin, end in pairwise(cuts):
            digest.cover(begin, memoryview(data)[begin:end])
        assert digest.finish().value == blake3(data).hexdigest()
        assert reader.bytes_read == 0


@pytest.mark.parametrize("lends", [1, 2, 3])
def test_what_lies_in_memory_is_hashed_where_it_is(tmp_path: Path, lends: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_CHUNK_BYTES", 4)
    data = bytes(range(30))
    (tmp_path / "a").write_bytes(data)
    ended: list[int] = []

    def lend(offset: int, nbytes: int) -> Loan | None:
        if offset // 4 % lends:
            return None
        return Loan(memoryview(data)[offset : offset + nbytes], lambda: ended.append(offset))

    with RangeReader(tmp_path / "a") as reader:
        monkeypatch.setattr(reader, "lend", lend)
        assert SourceHash(reader).finish().value == blake3(data).hexdigest()
        assert ended == list(range(0, 30, 4 * lends))
        assert reader.bytes_read == 30 - sum(min(4, 30 - begin) for begin in ended)


# Past the page cache

BLOCK = 8192


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(local, "_DIRECT_BYTES", BLOCK)
    before = threading.active_count()
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name == "write-behind"] == []
    assert threading.active_count() <= before


def written(folder: Path, data: bytes, cut: int) -> bytes:
    with FileWriter(folder, "a", len(data)) as writer:
        for begin in range(0, len(data), cut):
            writer.write(memoryview(data)[begin : begin + cut])
        digests = writer.commit()
    assert digests.whole.value == blake3(data).hexdigest()
    assert leftovers(folder) == []
    return (folder / "a").read_bytes()


SIZES = [n * BLOCK + more for n in (4, 5, 9) for more in (-1, 0, 1, 4095, 4096, 4097)]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cut", [1000, BLOCK, 5 * BLOCK + 3])
def test_a_file_past_the_page_cache_has_its_bytes(tmp_path: Path, size: int, cut: int) -> None:
    data = os.urandom(size)
    assert written(tmp_path, data, cut) == data


def test_large_files_go_past_the_page_cache_and_small_ones_do_not(tmp_path: Path, small_blocks: None) -> None:  # noqa: ARG001
    probe = os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT)
    can_be = local._set_direct(probe, on=True)
    os.close(probe)
    for size, is_large in ((4 * BLOCK - 1, False), (4 * BLOCK, True)):
        with FileWriter(tmp_path, "a", size) as writer:
            assert isinstance(writer._stream, local._DirectStream) == (is_large and can_be)


def refuse_direct_writes(monkeypatch: pytest.MonkeyPatch, refused: list[int]) -> None:
    plain = os.write

    def write(fd: int, data: Any) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(len(data))
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return plain(fd, data)

    monkeypatch.setattr(os, "write", write)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("size", SIZES)
def test_a_file_system_that_refuses_such_writes_gets_the_usual_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    refused: list[int] = []
    refuse_direct_writes(monkeypatch, refused)
    data = os.urandom(size)
    assert written(tmp_path, data, 3000) == data
    assert len(refused) <= 1


@pytest.mark.usefixtures("small_blocks")
def test_a_file_system_that_does_not_know_the_flag_gets_the_usual_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = fcntl.fcntl

    def refuse(fd: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return plain(fd, command, flags)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    data = os.urandom(6 * BLOCK + 5)
    with FileWriter(tmp_path, "a", len(data)) as writer:
        assert isinstance(writer._stream, local._Stream)
    assert written(tmp_path, data, 3000) == data


@pytest.mark.usefixtures("small_blocks")
def test_writes_that_take_part_of_a_block_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: plain(fd, data[: max(1, len(data) // 2)]))
    data = os.urandom(5 * BLOCK + 4097)
    assert written(tmp_path, data, 3000) == data


def fail_after(monkeypatch: pytest.MonkeyPatch, count: int) -> list[str]:
    """Let the disk be full after some writes; gives the threads that wrote."""
    plain, threads = os.write, list[str]()

    def write(fd: int, data: Any) -> int:
        threads.append(threading.current_thread().name)
        if len(threads) > count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(fd, data)

    monkeypatch.setattr(os, "write", write)
    return threads


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("good", range(7))
def test_a_disk_that_gets_full_behind_the_writer_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: int
) -> None:
    threads = fail_after(monkeypatch, good)
    with pytest.raises(StorageFailed, match=r"write .*\.tmp.*No space left") as caught:
        written(tmp_path, bytes(6 * BLOCK + 5000), 3000)
    assert caught.value.errno == errno.ENOSPC
    assert len(threads) == good + 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("blocks", [0, 1, 3, 5])
def test_giving_up_ends_the_writing_thread_and_leaves_nothing(tmp_path: Path, blocks: int) -> None:
    writer = FileWriter(tmp_path, "a", 6 * BLOCK)
    writer.write(memoryview(bytes(blocks * BLOCK)))
    writer.abort()
    assert list(tmp_path.iterdir()) == []
    writer.abort()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("error", "told"), [(OSError(errno.ENOMEM, "no memory"), StorageFailed), (RuntimeError("no thread"), RuntimeError)]
)
def test_a_writer_that_cannot_start_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, told: type[Exception]
) -> None:
    def refuse(_fd: int) -> None:
        raise error

    monkeypatch.setattr(local, "_DirectStream", refuse)
    monkeypatch.setattr(local, "_set_direct", lambda _fd, on: on)
    with pytest.raises(told, match=r"no memory|no thread"):
        FileWriter(tmp_path, "a", 6 * BLOCK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_blocks")
def test_many_writers_leave_no_thread(tmp_path: Path) -> None:
    def write(number: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        data = os.urandom(5 * BLOCK + number)
        assert written(folder, data, 7000) == data

    run_all([lambda number=number: write(number) for number in range(20)])  # type: ignore[misc]
    assert len(list(tmp_path.glob("*/a"))) == 20


def run_all(targets: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=target) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_files_on_no_block_device_are_written_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_DIRECT_BYTES", BLOCK)
    monkeypatch.setattr(os, "major", lambda _device: 0)  # as on a RAM disk
    with FileWriter(tmp_path, "a", 100 * BLOCK) as writer:
        assert isinstance(writer._stream, local._Stream)


@pytest.mark.parametrize("is_held", [False, True], ids=["swept", "about to be swept"])
def test_a_file_that_is_swept_before_it_is_locked_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_held: bool
) -> None:
    create, held = os.open, list[int]()

    def open_and_sweep(path: str | Path, flags: int, mode: int = 0o777) -> int:
        fd = create(path, flags, mode)
        if flags & os.O_CREAT and not held:
            held.append(create(path, os.O_RDONLY))
            fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not is_held:
                Path(path).unlink()
                os.close(held[0])
        return fd

    monkeypatch.setattr(os, "open", open_and_sweep)
    LocalFolder(tmp_path).put("a", b"data")
    assert held
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"data"}
    if is_held:
        os.close(held[0])


def test_a_sweep_does_not_disturb_the_canary(tmp_path: Path) -> None:
    folder, is_over = LocalFolder(tmp_path), threading.Event()

    def sweep() -> None:
        while not is_over.is_set():
            folder.sweep()

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        assert [folder.probe() for _ in range(200)] == [[]] * 200
        for _ in range(200):
            folder.put("a", b"data", durable=False)
    finally:
        is_over.set()
        sweeper.join()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
