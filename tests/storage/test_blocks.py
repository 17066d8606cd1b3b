from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmill.core.layout import RowSpan
from shardmill.errors import SourceChanged, StorageFailed, StorageUnavailable, TransferDamaged
from shardmill.storage.blocks import BlockReader, KeptRoom, seams_of
from shardmill.storage.folder import FileIdentity, Reader

DATA = np.random.default_rng(1).bytes(1 << 16)
BLOCK = 1 << 10


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as made:
        yield made


def identity(size: int, url: str = "s3://b/model.safetensors") -> FileIdentity:
    return FileIdentity(url=url, version="1", size=size)


class Server:
    """Serves bytes; remembers every request and every buffer it was given."""

    def __init__(self, data: bytes = DATA) -> None:
        self.data = data
        self.starts: list[int] = []
        self.lengths: list[int] = []
        self.buffers: dict[int, object] = {}
        self.errors: dict[int, Exception] = {}
        """By start: the failure of the next request."""
        self.on_submit: Callable[[memoryview], None] = lambda _view: None
        self.flips: dict[int, int] = {}
        """By start: how many requests are answered wrong."""

    def submit(self, start: int, view: memoryview) -> Future[None]:
        self.note(start, view)
        future: Future[None] = Future()
        self.answer(start, view, future)
        return future

    def note(self, start: int, view: memoryview) -> None:
        self.starts.append(start)
        self.lengths.append(len(view))
        self.buffers[id(view.obj)] = view.obj
        self.on_submit(view)

    def answer(self, start: int, view: memoryview, future: Future[None]) -> None:
        error = self.errors.pop(start, None)
        if error is not None:
            future.set_exception(error)
            return
        self.fill(start, view)
        future.set_result(None)

    def fill(self, start: int, view: memoryview) -> None:
        view[:] = self.data[start : start + len(view)]
        if self.flips.get(start, 0) > 0:
            self.flips[start] -= 1
            view[-1] ^= 1


class Held(Server):
    """Answers only when told to."""

    def __init__(self, data: bytes = DATA) -> None:
        super().__init__(data)
        self.waiting: dict[int, tuple[memoryview, Future[None]]] = {}
        self.arrived = threading.Semaphore(0)

    def submit(self, start: int, view: memoryview) -> Future[None]:
        self.note(start, view)
        future: Future[None] = Future()
        self.waiting[start] = (view, future)
        self.arrived.release()
        return future

    def release(self, start: int) -> None:
        view, future = self.waiting.pop(start)
        if future.set_running_or_notify_cancel():
            self.answer(start, view, future)


def open_(
    submit: Callable[[int, memoryview], Future[None]],
    *,
    size: int = len(DATA),
    block_bytes: int = BLOCK,
    blocks: int = 4,
    more_blocks: int = 0,
    on_close: Callable[[], None] = lambda: None,
    room: KeptRoom | None = None,
) -> BlockReader:
    return BlockReader(
        identity(size),
        submit,
        block_bytes=block_bytes,
        blocks=blocks,
        more_blocks=more_blocks,
        on_close=on_close,
        room=room or KeptRoom(0),
    )


def take(reader: Reader, offset: int, length: int) -> bytes:
    found = bytearray(length)
    reader.read_into(offset, memoryview(found))
    return bytes(found)


def borrow(reader: Reader, offset: int, length: int) -> bytes | None:
    loan = reader.lend(offset, length)
    if loan is None:
        return None
    found = bytes(loan.view)
    loan.give_back()
    return found


def numbers(server: Server, since: int = 0) -> list[int]:
    return [start // BLOCK for start in server.starts[since:]]


# ---- the same as plain bytes ------------------------------------------------------------------------------------


@st.composite
def reads(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """A size, and ranges within it: forward pieces, jumps, and the same piece again."""
    size = draw(st.integers(0, 5000))
    found: list[tuple[int, int]] = []
    position = 0
    for _ in range(draw(st.integers(1, 12))):
        how = draw(st.sampled_from(["on", "jump", "again"]))
        offset = position if how == "on" else draw(st.integers(0, size))
        if how == "again" and found:
            offset = found[-1][0]
        length = draw(st.integers(0, size - offset))
        found.append((offset, length))
        position = offset + length
    return size, found


@settings(max_examples=200, deadline=None)
@given(plan=reads(), block_bytes=st.integers(1, 700), blocks=st.integers(1, 6), seed=st.integers(0, 1 << 20))
def test_reads_are_those_of_the_bytes_within_the_budget(
    pool: ThreadPoolExecutor, plan: tuple[int, list[tuple[int, int]]], block_bytes: int, blocks: int, seed: int
) -> None:
    size, ranges = plan
    server, delays, flying = Server(DATA[:size]), np.random.default_rng(seed), list[Future[None]]()
    writing = set[int]()

    def serve(start: int, view: memoryview) -> None:
        writing.add(start)
        time.sleep(delays.random() * 1e-4)
        server.fill(start, view)
        writing.remove(start)

    def submit(start: int, view: memoryview) -> Future[None]:
        server.note(start, view)
        flying[:] = [future for future in flying if not future.done()]
        assert len(flying) < blocks
        flying.append(pool.submit(serve, start, view))
        return flying[-1]

    with open_(submit, size=size, block_bytes=block_bytes, blocks=blocks) as reader:
        for number, (offset, length) in enumerate(ranges):
            lent = borrow(reader, offset, length) if (seed >> number) % 2 else None
            found = take(reader, offset, length) if lent is None else lent
            assert found == DATA[offset : offset + length]
        assert reader.bytes_read == sum(length for _, length in ranges)
    assert not writing
    assert all(future.done() for future in flying)
    assert all(start % block_bytes == 0 for start in server.starts)
    assert all(start + length <= size for start, length in zip(server.starts, server.lengths, strict=True))


def test_threads_that_read_at_once_get_their_bytes(pool: ThreadPoolExecutor) -> None:
    def serve(start: int, view: memoryview) -> None:
        time.sleep(1e-4)
        view[:] = DATA[start : start + len(view)]

    def work(seed: int) -> list[tuple[int, bytes]]:
        found = []
        for offset, length in np.random.default_rng(seed).integers(5000, size=(40, 2)).tolist():
            found.append((offset, take(reader, offset, length)))
        return found

    with (
        open_(lambda start, view: pool.submit(serve, start, view), blocks=2) as reader,
        ThreadPoolExecutor(6) as readers,
    ):
        results = list(readers.map(work, range(6)))
    assert all(data == DATA[offset : offset + len(data)] for found in results for offset, data in found)


# ---- what is fetched --------------------------------------------------------------------------------------------


def test_a_small_file_takes_one_short_request() -> None:
    server = Server(DATA[:100])
    with open_(server.submit, size=100, block_bytes=8 << 20) as reader:
        assert take(reader, 0, 100) == DATA[:100]
    assert (server.starts, server.lengths) == ([0], [100])
    [buffer] = server.buffers.values()
    assert isinstance(buffer, np.ndarray)
    assert len(buffer) == 100


def test_a_header_takes_one_block_and_reads_that_go_on_fetch_ahead() -> None:
    server = Server()
    with open_(server.submit, blocks=8) as reader:
        take(reader, 0, 8)
        take(reader, 8, 200)
        assert numbers(server) == [0]
        take(reader, BLOCK, BLOCK)
        assert numbers(server) == [0, 1, 2]
        take(reader, 2 * BLOCK, BLOCK)
        assert numbers(server) == [0, 1, 2, 3, 4]
        take(reader, 3 * BLOCK, BLOCK)
        assert numbers(server) == [0, 1, 2, 3, 4, 5, 6, 7]
        take(reader, 4 * BLOCK, BLOCK)
        assert numbers(server) == list(range(12))  # 4 to 11 are the whole budget


def test_a_read_in_mid_file_fetches_nothing_before_it() -> None:
    server = Server()
    with open_(server.submit) as reader:
        assert take(reader, 20 * BLOCK + 5, BLOCK) == DATA[20 * BLOCK + 5 :][:BLOCK]
    assert numbers(server) == [20, 21]


def test_nothing_is_fetched_beyond_the_end() -> None:
    server = Server()
    size = 10 * BLOCK + 1
    with open_(server.submit, size=size, blocks=8) as reader:
        for index in range(10):
            take(reader, index * BLOCK, BLOCK)
        take(reader, 10 * BLOCK, 1)
    assert numbers(server) == list(range(11))
    assert server.lengths[-1] == 1


def test_a_piece_that_is_read_again_is_not_fetched_again() -> None:
    server = Server()
    with open_(server.submit, blocks=8) as reader:
        for _ in range(2):
            for index in range(10, 13):
                take(reader, index * BLOCK, BLOCK)
    assert sorted(numbers(server)) == sorted(set(numbers(server)))


def test_pieces_read_twice_are_soon_fetched_once_where_half_the_room_holds_them() -> None:
    server = Server()
    with open_(server.submit, blocks=8) as reader:
        for piece in range(0, 60, 3):
            for _ in range(2):
                for index in range(piece, piece + 3):
                    take(reader, index * BLOCK, BLOCK)
    found = numbers(server)
    assert sorted(set(found)) == list(range(64))
    assert len(found) < 64 + 8


def test_a_view_larger_than_the_budget_is_filled_within_it() -> None:
    server = Server()
    with open_(server.submit, blocks=3) as reader:
        assert take(reader, 7, len(DATA) - 7) == DATA[7:]
    assert numbers(server) == list(range(64))
    assert len(server.buffers) == 3


def test_jumps_make_it_fetch_less_far_ahead() -> None:
    server = Server()
    with open_(server.submit, blocks=4) as reader:
        for index in range(5):
            take(reader, index * BLOCK, BLOCK)
        for index in (40, 20, 50, 30):
            take(reader, index * BLOCK, BLOCK)
        before = len(server.starts)
        take(reader, 10 * BLOCK, BLOCK)
    assert numbers(server, before) == [10]


def test_what_was_read_long_ago_makes_room_first() -> None:
    server = Server()
    with open_(server.submit, blocks=3) as reader:
        for index in (20, 10, 30, 20, 40):  # none of them next to another: nothing is fetched ahead
            take(reader, index * BLOCK, 1)
        before = len(server.starts)
        take(reader, 30 * BLOCK, 1)
        take(reader, 20 * BLOCK, 1)
        assert numbers(server, before) == []
        take(reader, 10 * BLOCK, 1)
        assert numbers(server, before) == [10]


# ---- what is lent -----------------------------------------------------------------------------------------------


def test_what_lies_in_one_block_is_lent_where_it_lies() -> None:
    server = Server()
    with open_(server.submit) as reader:
        loan = reader.lend(BLOCK + 3, 100)
        assert loan is not None
        assert loan.view == DATA[BLOCK + 3 :][:100]
        assert loan.view.readonly
        assert loan.view.obj in server.buffers.values()
        loan.give_back()
        assert reader.bytes_read == 100


@pytest.mark.parametrize(("offset", "length"), [(BLOCK - 1, 2), (0, BLOCK + 1), (5, 0), (len(DATA) - 1, 2)])
def test_what_does_not_is_not_lent_and_not_fetched(offset: int, length: int) -> None:
    server = Server()
    with open_(server.submit) as reader:
        assert reader.lend(offset, length) is None
        assert reader.bytes_read == 0
    assert server.starts == []


def test_what_is_lent_stays_as_it_is_until_it_is_given_back() -> None:
    server = Server()
    with open_(server.submit, blocks=3) as reader:
        loan = reader.lend(0, BLOCK)
        assert loan is not None
        read_blocks(reader, *range(1, 40))
        assert loan.view == DATA[:BLOCK]
        before, lent = len(server.starts), loan.view.obj
        loan.give_back()
        again: list[object] = []
        server.on_submit = lambda view: again.append(view.obj)
        read_blocks(reader, *range(40, 50))
        assert numbers(server, before)
        assert any(buffer is lent for buffer in again)
    assert len(server.buffers) == 3


@pytest.mark.parametrize(("blocks", "most"), [(1, 1), (2, 1), (3, 1), (4, 2), (8, 4)])
def test_loans_leave_half_of_the_blocks_to_be_filled(blocks: int, most: int) -> None:
    with open_(Server().submit, blocks=blocks) as reader:
        loans = [reader.lend(index * BLOCK, 10) for index in range(most)]
        assert all(loans)
        assert reader.lend(most * BLOCK, 10) is None
        loans.append(reader.lend(20, 10))  # of a block that is lent already
        assert reader.bytes_read == (most + 1) * 10
        for loan in loans:
            assert loan is not None
            loan.give_back()
        assert borrow(reader, most * BLOCK, 10) == DATA[most * BLOCK :][:10]


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_memory_that_loans_held_up_is_given_back_with_them(blocks: int) -> None:
    server, room = Server(), KeptRoom(20 * BLOCK)
    with open_(server.submit, blocks=blocks, room=room) as reader, open_(Server().submit, room=room):
        assert reader.announce([span(0, 8)])
        read_blocks(reader, *range(8))
        loans = []
        for index in range(8):
            loan = reader.lend(index * BLOCK, BLOCK)
            if loan is None:
                read_blocks(reader, index)
            else:
                loans.append(loan)
        assert room.lent == 0
        assert 0 < len(loans) <= blocks  # more would take memory that others were promised
        for loan in loans:
            loan.give_back()
        spare = {id(room.buffer(BLOCK).obj) for _ in range(20)} & set(server.buffers)
        assert len(spare) >= len(server.buffers) - blocks


def test_memory_of_a_loan_that_ends_while_its_reader_closes_is_given_to_one_reader(pool: ThreadPoolExecutor) -> None:
    server, room, flying = Server(), KeptRoom(10 * BLOCK), list[tuple[int, memoryview, Future[None]]]()

    def submit(start: int, view: memoryview) -> Future[None]:
        if not start:
            return server.submit(start, view)
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        flying.append((start, view, future))
        return future

    with open_(Server().submit, room=room):
        reader = open_(submit, blocks=3, room=room)
        reader.expect_once(announces=False)
        loan = reader.lend(0, BLOCK)
        assert loan is not None
        closing = pool.submit(reader.__exit__, None, None, None)
        time.sleep(0.05)
        assert not closing.done()
        loan.give_back()
        for start, view, future in flying:
            server.answer(start, view, future)
        closing.result(timeout=10)
        found = [room.buffer(BLOCK) for _ in range(6)]
        assert len({id(buffer.obj) for buffer in found}) == len(found)


@pytest.mark.parametrize("announces", [True, False])
def test_a_block_that_is_fetched_again_against_the_promise_is_lent_once_two_fetches_agree(*, announces: bool) -> None:
    server = Server()
    with open_(server.submit, blocks=2) as reader:
        reader.expect_once(announces=announces)
        for index in range(6):
            assert borrow(reader, index * BLOCK, BLOCK) == DATA[index * BLOCK :][:BLOCK]
        server.flips = {0: 1}
        assert reader.lend(0, BLOCK) is None
        with pytest.raises(TransferDamaged):
            take(reader, 0, BLOCK)
    server = Server()
    with open_(server.submit, blocks=2) as reader:
        reader.expect_once(announces=announces)
        for index in range(6):
            assert borrow(reader, index * BLOCK, BLOCK) == DATA[index * BLOCK :][:BLOCK]
        assert reader.lend(0, BLOCK) is None
        read_blocks(reader, 0)
        assert borrow(reader, 0, BLOCK) == DATA[:BLOCK]


def test_a_partly_lent_block_that_comes_back_different_is_damaged() -> None:
    server = Server()
    with open_(server.submit, blocks=1) as reader:
        reader.expect_once(announces=False)
        assert borrow(reader, 0, 100) == DATA[:100]
        read_blocks(reader, 5)
        server.flips = {0: 3}
        assert reader.lend(100, 100) is None
        with pytest.raises(TransferDamaged):
            take(reader, 100, 100)


def test_who_needs_the_memory_of_a_loan_waits_for_it(pool: ThreadPoolExecutor) -> None:
    with open_(Server().submit, blocks=1) as reader:
        loan = reader.lend(0, BLOCK)
        assert loan is not None
        other = pool.submit(take, reader, 5 * BLOCK, BLOCK)
        time.sleep(0.05)
        assert not other.done()
        assert loan.view == DATA[:BLOCK]
        loan.give_back()
        assert other.result(timeout=10) == DATA[5 * BLOCK :][:BLOCK]


def test_a_loan_counts_as_one_of_two_reads() -> None:
    server, room = Server(), KeptRoom(20 * BLOCK)
    with open_(server.submit, blocks=2, room=room) as reader:
        assert reader.announce([span(0, 10)])
        for index in (*range(10), *range(5)):
            assert borrow(reader, index * BLOCK, BLOCK) == DATA[index * BLOCK :][:BLOCK]
        assert room.lent == 5 * BLOCK
        read_blocks(reader, *range(5, 10))
        assert room.lent == 0
    assert sorted(numbers(server)) == sorted(set(numbers(server)))


def test_loans_that_end_late_do_not_undo_what_was_read_meanwhile() -> None:
    server, room = Server(), KeptRoom(20 * BLOCK)
    with open_(server.submit, blocks=2, room=room) as reader:
        assert reader.announce([span(0, 4)])
        loans = [reader.lend(index * BLOCK, BLOCK) for index in range(4)]
        for loan in reversed(loans):
            assert loan is not None
            loan.give_back()
        assert room.lent == 4 * BLOCK  # all of it is read again
        read_blocks(reader, *range(4))
        assert room.lent == 0
    assert sorted(numbers(server)) == sorted(set(numbers(server)))


def test_a_block_that_came_back_different_is_not_lent() -> None:
    server = Server()
    with open_(server.submit, blocks=1) as reader:
        read_blocks(reader, 0, 5)
        server.flips = {0: 3}
        assert reader.lend(0, BLOCK) is None
        with pytest.raises(TransferDamaged, match="differ from what was read"):
            take(reader, 0, BLOCK)


def test_a_block_that_cannot_be_fetched_is_told_to_the_borrower_and_leaves_no_loan() -> None:
    server = Server()
    server.errors[0] = StorageUnavailable(errno.EIO, "get: no answer")
    with open_(server.submit, blocks=1) as reader:
        with pytest.raises(StorageUnavailable, match="no answer"):
            reader.lend(0, BLOCK)
        read_blocks(reader, 5)
        assert borrow(reader, 0, BLOCK) == DATA[:BLOCK]


# ---- what is read twice ------------------------------------------------------------------------------------------


def span(first: int, last: int) -> tuple[int, int]:
    """The byte range of some blocks, `last` excluded."""
    return first * BLOCK, last * BLOCK


def read_blocks(reader: BlockReader, *indexes: int) -> None:
    for index in indexes:
        assert take(reader, index * BLOCK, BLOCK) == DATA[index * BLOCK :][:BLOCK]


def test_what_was_announced_is_fetched_once_and_its_room_given_back() -> None:
    server, room = Server(), KeptRoom(20 * BLOCK)
    with open_(server.submit, blocks=2, room=room) as reader:
        assert reader.announce([span(3, 18)])
        read_blocks(reader, *range(18))
        assert room.lent == 15 * BLOCK
        read_blocks(reader, *range(3, 8))
        assert room.lent == 10 * BLOCK
        read_blocks(reader, *range(8, 30))
        assert room.lent == 0
    assert sorted(numbers(server)) == sorted(set(numbers(server)))
    assert len(server.buffers) <= 17


def test_ranges_of_a_set_are_kept_with_what_lies_between_them() -> None:
    server, room = Server(), KeptRoom(20 * BLOCK)
    with open_(server.submit, blocks=2, room=room) as reader:
        assert reader.announce([span(0, 4), span(8, 10)])
        read_blocks(reader, *range(10))
        assert reader.announce([span(4, 8)])
        read_blocks(reader, *range(4), *range(4, 8), *range(4, 8), 8, 9)
        assert room.lent == 0
        read_blocks(reader, *range(10, 20))
    assert sorted(numbers(server)) == sorted(set(numbers(server)))


def test_what_exceeds_the_room_is_kept_in_part() -> None:
    server, room = Server(), KeptRoom(10 * BLOCK)
    with open_(server.submit, blocks=2, room=room) as reader:
        assert reader.announce([span(0, 30)])
        read_blocks(reader, *range(30), *range(30))
        assert room.lent == 0
    found = numbers(server)
    assert all(found.count(index) == 1 for index in range(10))
    assert all(found.count(index) == 2 for index in range(13, 28))
    assert len(server.buffers) <= 12


def test_while_kept_blocks_are_read_again_those_behind_them_are_fetched() -> None:
    server = Server()
    with open_(server.submit, blocks=4, room=KeptRoom(20 * BLOCK)) as reader:
        assert reader.announce([span(0, 10)])
        read_blocks(reader, *range(10), 0, 1)
        assert set(numbers(server)) == set(range(13))


def test_another_reader_is_put_off_until_room_is_given_back() -> None:
    room = KeptRoom(10 * BLOCK)
    with open_(Server().submit, room=room) as first, open_(Server().submit, room=room) as second:
        assert first.announce([span(0, 8)])
        assert not second.announce([span(0, 4)])
        assert second.announce([span(0, 2)])
        read_blocks(first, *range(8), *range(8))
        assert room.lent == 2 * BLOCK
        assert second.announce([span(4, 12)])
        assert room.lent == 10 * BLOCK
    assert room.lent == 0


def test_who_keeps_something_is_never_put_off() -> None:
    # Two that both hold a part and wait for more would wait for ever.
    room = KeptRoom(10 * BLOCK)
    with open_(Server().submit, room=room) as first, open_(Server().submit, room=room) as second:
        assert first.announce([span(0, 4)])
        assert second.announce([span(0, 4)])
        assert first.announce([span(8, 20)])
        assert second.announce([span(8, 20)])
        assert room.lent == 10 * BLOCK
        for reader in (first, second):
            read_blocks(reader, *range(4), *range(8, 20), *range(4), *range(8, 20))
        assert room.lent == 0


@pytest.mark.parametrize("error", [None, OSError("broken"), KeyboardInterrupt()])
def test_leaving_gives_back_the_room_whatever_happened(error: BaseException | None) -> None:
    server, room = Server(), KeptRoom(10 * BLOCK)
    if error is not None and isinstance(error, Exception):
        server.errors[5 * BLOCK] = error
    with pytest.raises(type(error)) if error is not None else nullcontext(), open_(server.submit, room=room) as reader:
        assert reader.announce([span(0, 8)])
        read_blocks(reader, *range(8), 0)
        if error is not None:
            raise error
    assert room.lent == 0


def test_memory_goes_from_one_reader_to_the_next_and_the_last_leaves_none() -> None:
    first_server, second_server, third_server, room = Server(), Server(), Server(), KeptRoom(10 * BLOCK)
    with open_(first_server.submit, room=room) as first, open_(second_server.submit, room=room) as second:
        assert first.announce([span(0, 8)])
        read_blocks(first, *range(8), *range(8))
        read_blocks(second, 20)
        assert set(second_server.buffers) <= set(first_server.buffers)
    with open_(third_server.submit, room=room) as third:
        read_blocks(third, 0)
    assert not set(third_server.buffers) & set(first_server.buffers)


@settings(max_examples=100, deadline=None)
@given(
    sets=st.lists(st.lists(st.integers(1, 900), min_size=1, max_size=4), min_size=1, max_size=5),
    step=st.integers(1, 300),
    blocks=st.integers(1, 4),
    limit=st.integers(0, 4000),
)
def test_sets_of_any_sizes_are_read_right_within_the_budget(
    sets: list[list[int]], step: int, blocks: int, limit: int
) -> None:
    server, room, position = Server(), KeptRoom(limit), 0
    with open_(server.submit, block_bytes=100, blocks=blocks, room=room) as reader:
        for sizes in sets:
            ranges = []
            for size in sizes:
                ranges.append((position, position + size))
                position += size + step % 7 * 20
            assert reader.announce(ranges)
            for begin, end in ranges * 2:
                for offset in range(begin, end, step):
                    length = min(step, end - offset)
                    assert take(reader, offset, length) == DATA[offset : offset + length]
                    assert reader._allocated <= blocks + limit // 100
            assert room.lent == 0


# ---- what goes wrong --------------------------------------------------------------------------------------------


def test_reading_past_the_end_is_a_changed_source() -> None:
    server = Server()
    with open_(server.submit, size=1000) as reader, pytest.raises(SourceChanged, match=r"b/model.*ends at byte 1000"):
        take(reader, 999, 2)
    assert server.starts == []


def test_an_empty_view_needs_no_request() -> None:
    server = Server()
    with open_(server.submit, size=0) as reader:
        assert take(reader, 0, 0) == b""
    assert server.starts == []


def read_far_and_back(reader: BlockReader) -> bytes:
    """Read block 0, then enough others to lose it, then block 0 again."""
    first = take(reader, 0, BLOCK)
    for index in (10, 20, 30):
        take(reader, index * BLOCK, 1)
    assert take(reader, 0, BLOCK) == first
    return first


def test_a_block_that_differs_when_fetched_again_is_fetched_once_more() -> None:
    server = Server()

    def submit(start: int, view: memoryview) -> Future[None]:
        server.flips = {0: 1} if server.starts.count(0) == 1 else {}
        return server.submit(start, view)

    with open_(submit, blocks=2) as reader:
        assert read_far_and_back(reader) == DATA[:BLOCK]
    assert server.starts.count(0) == 3


@pytest.mark.parametrize("flips", [{0: 1}, {0: 0}])
def test_a_block_that_differs_twice_is_damaged(flips: dict[int, int]) -> None:
    server = Server()
    server.flips = dict(flips)  # the first answer is the wrong one, or the later ones are

    def submit(start: int, view: memoryview) -> Future[None]:
        if server.starts.count(0) and not flips[0]:
            server.flips = {0: 1}
        return server.submit(start, view)

    with open_(submit, blocks=2) as reader, pytest.raises(TransferDamaged) as caught:
        read_far_and_back(reader)
    assert caught.value.errno == errno.EIO
    assert "s3://b/model.safetensors" in str(caught.value)
    assert "bytes 0 to 1024" in str(caught.value)
    assert server.starts.count(0) == 3


def test_a_failure_reaches_the_read_that_needs_the_block_and_another_read_tries_anew() -> None:
    server = Server()
    server.errors[BLOCK] = StorageUnavailable(errno.ETIMEDOUT, "no answer")
    with open_(server.submit) as reader:
        with pytest.raises(StorageUnavailable, match="no answer"):
            take(reader, BLOCK, 10)
        assert take(reader, BLOCK, 10) == DATA[BLOCK : BLOCK + 10]


def test_a_submitter_that_raises_fails_the_read() -> None:
    server = Server()

    def submit(start: int, view: memoryview) -> Future[None]:
        if not server.starts:
            server.starts.append(-1)
            raise StorageFailed(errno.EACCES, "denied")
        return server.submit(start, view)

    with open_(submit) as reader:
        with pytest.raises(StorageFailed, match="denied"):
            take(reader, 0, 10)
        assert take(reader, 0, 10) == DATA[:10]


def test_a_block_fetched_ahead_in_vain_is_forgotten_and_tried_anew_when_asked_for() -> None:
    server = Server()
    server.errors[2 * BLOCK] = StorageUnavailable(errno.ETIMEDOUT, "no answer")
    with open_(server.submit, blocks=8) as reader:
        take(reader, 0, BLOCK)
        take(reader, BLOCK, BLOCK)
        assert 2 * BLOCK in server.starts
        assert server.errors == {}
        assert take(reader, 2 * BLOCK, BLOCK) == DATA[2 * BLOCK : 3 * BLOCK]


def test_a_block_fetched_ahead_in_vain_makes_room_first() -> None:
    server = Server()
    server.errors[2 * BLOCK] = StorageUnavailable(errno.ETIMEDOUT, "no answer")
    with open_(server.submit, blocks=3) as reader:
        take(reader, 0, 1)
        take(reader, BLOCK, 1)
        take(reader, 30 * BLOCK, 1)
        before = len(server.starts)
        take(reader, 0, 1)
        take(reader, BLOCK, 1)
    assert not {0, 1} & set(numbers(server, before))


@pytest.mark.parametrize(("announces", "fetched"), [(True, 4), (False, 7)])
def test_who_reads_once_has_the_beginning_fetched_before_it_asks(*, announces: bool, fetched: int) -> None:
    server = Server()
    with open_(server.submit, more_blocks=3) as reader:
        reader.expect_once(announces=announces)
        reader.expect_once(announces=announces)
        assert numbers(server) == list(range(fetched))
        read_blocks(reader, *range(30))
    assert sorted(numbers(server)) == sorted(set(numbers(server)))
    assert len(server.buffers) == fetched


def spans(bounds: list[int], steps: list[int]) -> list[RowSpan]:
    """Ranges of whole steps between each two bounds, some of them empty."""
    return [
        RowSpan(begin, begin + (end - begin) // step * step, step)
        for begin, end, step in zip(bounds[::2], bounds[1::2], steps, strict=False)
    ]


row_spans = st.builds(
    spans,
    st.lists(st.integers(0, len(DATA)), min_size=2, max_size=12, unique=True).map(sorted),
    st.lists(st.integers(1, 2 * BLOCK), min_size=6, max_size=6),
)


@given(rows=row_spans, most=st.integers(1, 3 * BLOCK))
def test_blocks_end_between_steps_of_rows_where_these_are_short(rows: list[RowSpan], most: int) -> None:
    seams = seams_of(len(DATA), most, rows)
    ends = [*seams[1:], len(DATA)]
    assert seams[0] == 0
    assert all(0 < end - begin <= most for begin, end in zip(seams, ends, strict=True))
    assert all(end - begin >= most // 2 for begin, end in zip(seams[:-1], ends[:-1], strict=True))
    for span in rows:
        amid = [seam for seam in seams if span.begin < seam < span.end and (seam - span.begin) % span.step]
        assert not amid or span.step >= most // 2


@given(
    rows=row_spans,
    parts=st.lists(st.tuples(st.integers(0, len(DATA) - 1), st.integers(1, 4 * BLOCK), st.booleans()), max_size=30),
    announced=st.none() | st.tuples(st.integers(0, len(DATA)), st.integers(1, 8 * BLOCK)),
)
def test_blocks_of_any_length_give_the_bytes_of_the_file(
    rows: list[RowSpan], parts: list[tuple[int, int, bool]], announced: tuple[int, int] | None
) -> None:
    server = Server()
    with open_(server.submit, room=KeptRoom(6 * BLOCK)) as reader:
        reader.expect_once(announces=announced is not None, rows=rows)
        if announced is not None:
            assert reader.announce([(announced[0], min(len(DATA), sum(announced)))])
        for begin, length, is_lent in parts:
            end = min(len(DATA), begin + length)
            found = borrow(reader, begin, end - begin) if is_lent else None
            assert (found or take(reader, begin, end - begin)) == DATA[begin:end]
    blocks = dict(zip(reader.seams, np.diff([*reader.seams, len(DATA)]).tolist(), strict=True))
    assert all(blocks[start] == length for start, length in zip(server.starts, server.lengths, strict=True))


def test_what_lies_between_two_seams_is_lent() -> None:
    server = Server()
    with open_(server.submit) as reader:
        reader.expect_once(announces=False, rows=[RowSpan(100, 100 + 60 * 300, 300)])
        assert list(reader.seams[:4]) == [0, 1000, 1900, 2800]
        assert borrow(reader, 1000, 900) == DATA[1000:1900]
        assert borrow(reader, 1900, 901) is None
        assert take(reader, 1900, 901) == DATA[1900:2801]


def test_blocks_that_were_fetched_stay_as_they_are() -> None:
    server = Server()
    with open_(server.submit) as reader:
        take(reader, 5, 5)
        reader.expect_once(announces=False, rows=[RowSpan(100, 100 + 60 * 300, 300)])
        read_blocks(reader, *range(10))
    assert sorted(numbers(server)) == sorted(set(numbers(server)))


@pytest.mark.parametrize("flipped", [None, 1, 2])
def test_what_is_fetched_again_against_the_promise_counts_once_two_fetches_agree(flipped: int | None) -> None:
    server = Server()

    def submit(start: int, view: memoryview) -> Future[None]:
        server.flips = {0: 1} if server.starts.count(0) == flipped else {}
        return server.submit(start, view)

    with open_(submit, blocks=2) as reader:
        reader.expect_once(announces=True)
        if flipped is None:
            assert read_far_and_back(reader) == DATA[:BLOCK]
        else:
            with pytest.raises(TransferDamaged):
                read_far_and_back(reader)
    assert server.starts.count(0) == 3


@pytest.mark.parametrize("part", [(0, BLOCK - 1), (1, BLOCK - 1)])
def test_a_block_that_goes_before_all_of_it_was_read_never_differs(part: tuple[int, int]) -> None:
    server = Server()
    with open_(server.submit, blocks=2) as reader:
        reader.expect_once(announces=True)
        take(reader, *part)
        read_blocks(reader, 10, 20, 30)
        server.flips = {0: 2}
        with pytest.raises(TransferDamaged):
            take(reader, 0, BLOCK)


def test_what_was_announced_and_not_kept_never_differs() -> None:
    server = Server()
    with open_(server.submit, blocks=2, room=KeptRoom(10 * BLOCK)) as reader:
        reader.expect_once(announces=True)
        assert reader.announce([span(0, 30)])
        read_blocks(reader, *range(30))
        server.flips = {20 * BLOCK: 2}
        with pytest.raises(TransferDamaged):
            read_blocks(reader, *range(30))


# ---- the end ----------------------------------------------------------------------------------------------------


def read_ahead_held(server: Held, reader: BlockReader) -> list[int]:
    """Read blocks 0 and 1, so that later ones are on their way; tells which."""
    with ThreadPoolExecutor(1) as other:
        for index in range(2):
            task = other.submit(take, reader, index * BLOCK, BLOCK)
            while not task.done():
                if server.arrived.acquire(timeout=0.01) and index * BLOCK in server.waiting:
                    server.release(index * BLOCK)
            assert task.result() == DATA[index * BLOCK :][:BLOCK]
    return sorted(server.waiting)


def test_leaving_gives_up_what_did_not_start() -> None:
    server, closed = Held(), list[bool]()
    reader = open_(server.submit, on_close=lambda: closed.append(True))
    with reader:
        pending = read_ahead_held(server, reader)
        assert pending
    assert all(server.waiting[start][1].cancelled() for start in pending)
    assert closed == [True]


def test_leaving_waits_for_what_runs() -> None:
    server, order = Held(), list[str]()
    reader = open_(server.submit, on_close=lambda: order.append("closed"))
    pending = read_ahead_held(server, reader)
    futures = [server.waiting[start][1] for start in pending]
    for future in futures:
        assert future.set_running_or_notify_cancel()
    with ThreadPoolExecutor(1) as other:
        leaving = other.submit(reader.__exit__, None, None, None)
        time.sleep(0.02)
        assert not leaving.done()
        for start, future in zip(pending, futures, strict=True):
            view, _ = server.waiting[start]
            server.fill(start, view)
            order.append("written")
            future.set_exception(StorageUnavailable(errno.EIO, "late"))
        leaving.result()
    assert order == ["written"] * len(pending) + ["closed"]


def test_leaving_twice_closes_once_and_then_nothing_can_be_read() -> None:
    server, closed = Server(), list[bool]()
    with open_(server.submit, on_close=lambda: closed.append(True)) as reader:
        take(reader, 0, 1)
    reader.__exit__(None, None, None)
    assert closed == [True]
    with pytest.raises(ValueError, match="closed"):
        take(reader, 0, 1)


def test_what_nobody_wants_any_more_is_given_up_for_what_is_asked_for() -> None:
    server = Held()
    reader = open_(server.submit, blocks=2)
    with reader, ThreadPoolExecutor(1) as other:
        [ahead] = read_ahead_held(server, reader)
        _, forgotten = server.waiting[ahead]
        for index in (30, 40):
            task = other.submit(take, reader, index * BLOCK, BLOCK)
            while index * BLOCK not in server.waiting:
                time.sleep(0.001)
            server.release(index * BLOCK)
            assert task.result() == DATA[index * BLOCK :][:BLOCK]
        assert not forgotten.done() or forgotten.cancelled()
