"""Runs that read a source together: each block once, nobody far ahead, nobody waiting for who is gone."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from shardmill.errors import SourceChanged, StorageFailed
from shardmill.storage import shared
from shardmill.storage.local import LocalFolder, RangeReader
from shardmill.storage.shared import Companion, Companions
from shardmill.storage.source import SourceFolder

BLOCK = 64
NAME = "model.safetensors"
CONTENT = bytes(range(256)) * 10


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SourceFolder:
    monkeypatch.setattr(shared, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(shared, "ROOM_BYTES", 8 * BLOCK)
    monkeypatch.setattr(shared, "LEAD_BYTES", 4 * BLOCK)
    (tmp_path / NAME).write_bytes(CONTENT)
    return SourceFolder(LocalFolder(tmp_path))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


class Run:
    """One of the runs, with its reader of the shard open."""

    def __init__(self, companion: Companion, stack: ExitStack) -> None:
        self.companion = companion
        self.reader = stack.enter_context(stack.enter_context(companion.taking(NAME)).open(NAME))

    def read(self, begin: int, end: int) -> bytes:
        data = bytearray(end - begin)
        self.reader.read_into(begin, memoryview(data))
        assert bytes(data) == CONTENT[begin:end]
        return bytes(data)

    def may_read(self) -> bool:
        return self.reader.announce(())


def runs(source: SourceFolder, stack: ExitStack, count: int = 2) -> list[Run]:
    companions = Companions(source, count)
    return [Run(companions.companion(number), stack) for number in range(count)]


def test_whoever_comes_first_fetches(source: SourceFolder, stack: ExitStack) -> None:
    first, second = runs(source, stack)
    for begin in range(0, len(CONTENT), 100):
        end = min(begin + 100, len(CONTENT))
        first.read(begin, end)
        second.read(begin, end)
    assert (first.reader.bytes_read, second.reader.bytes_read) == (len(CONTENT), 0)


def test_who_is_far_ahead_comes_back_later_and_who_is_behind_never(source: SourceFolder, stack: ExitStack) -> None:
    first, second = runs(source, stack)
    assert first.may_read()
    first.read(0, 4 * BLOCK)
    assert (first.may_read(), second.may_read()) == (False, True)
    second.read(0, 10)
    assert first.may_read()
    second.read(0, 9 * BLOCK)
    assert (first.may_read(), second.may_read()) == (True, False)


@pytest.mark.parametrize("how", ["leave", "pass_over"])
def test_nobody_waits_for_who_is_gone_or_never_comes(source: SourceFolder, stack: ExitStack, how: str) -> None:
    companions = Companions(source, 3)
    first, second = Run(companions.companion(0), stack), companions.companion(1)
    first.read(0, 6 * BLOCK)
    second.leave() if how == "leave" else second.pass_over(NAME)
    assert not first.may_read()  # the third has not come
    companions.companion(2).pass_over(NAME)
    assert first.may_read()
    late = Run(companions.companion(1), stack)  # a shard may be needed after all
    assert not first.may_read()
    late.read(0, 6 * BLOCK)
    assert first.may_read()


def test_what_is_announced_is_kept_for_the_second_time(source: SourceFolder, stack: ExitStack) -> None:
    first, second = runs(source, stack)
    assert first.reader.announce([(0, 4 * BLOCK)])
    for reader in (first, second):
        reader.read(0, 4 * BLOCK)
    second.read(4 * BLOCK, 6 * BLOCK)
    first.read(0, 6 * BLOCK)
    assert first.reader.bytes_read + second.reader.bytes_read == 6 * BLOCK


def test_what_finds_no_room_is_fetched_again(source: SourceFolder, stack: ExitStack) -> None:
    first, second = runs(source, stack)
    first.read(0, 12 * BLOCK)
    second.read(0, 12 * BLOCK)
    assert first.reader.bytes_read == 12 * BLOCK
    assert 0 < second.reader.bytes_read <= 12 * BLOCK


def test_many_threads_fetch_each_block_once(source: SourceFolder, stack: ExitStack) -> None:
    several = runs(source, stack, 4)
    threads = [threading.Thread(target=run.read, args=(0, 8 * BLOCK)) for run in several]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(run.reader.bytes_read for run in several) == 8 * BLOCK


def test_a_failed_read_is_tried_again_by_the_next(
    source: SourceFolder, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = runs(source, stack)
    read_into = RangeReader.read_into
    failures = [StorageFailed(5, "once")]

    def fail(reader: RangeReader, offset: int, view: memoryview) -> None:
        if failures:
            raise failures.pop()
        read_into(reader, offset, view)

    monkeypatch.setattr(RangeReader, "read_into", fail)
    with pytest.raises(StorageFailed, match="once"):
        first.read(0, 10)
    second.read(0, 10)


def test_reading_beyond_the_end_is_a_source_that_changed(source: SourceFolder, stack: ExitStack) -> None:
    [run] = runs(source, stack, 1)
    with pytest.raises(SourceChanged, match="it was longer when planned"):
        run.reader.read_into(len(CONTENT) - 5, memoryview(bytearray(10)))


def test_each_run_finds_out_that_the_file_changed(source: SourceFolder, tmp_path: Path) -> None:
    companions = Companions(source, 2)
    opened = [companions.companion(number) for number in range(2)]
    with opened[0].taking(NAME) as first, opened[1].taking(NAME) as second:
        readers = [first.open(NAME), second.open(NAME)]
        readers[0].read_into(0, memoryview(bytearray(10)))
        os.utime(tmp_path / NAME, ns=(1, 1))
        for reader in readers:
            with pytest.raises(SourceChanged, match="changed while it was read"):
                reader.__exit__(None, None, None)
            reader.__exit__(ValueError, ValueError(), None)  # something else went wrong, which is told instead
