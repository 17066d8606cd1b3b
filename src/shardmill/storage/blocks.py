"""A remote file as a `Reader`: aligned blocks, fetched ahead, kept while there is room, the same at every read.

What is about to be read twice is announced, and stays until it was: for that, all readers of a process share one room,
so that what they hold is bounded however many they are. Besides that each has a few blocks of its own, so that none of
them ever waits for another.
"""

from __future__ import annotations

import errno
import functools
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from blake3 import blake3

from shardmill.core.layout import RowSpan
from shardmill.errors import SourceChanged, TransferDamaged, show
from shardmill.storage.buffers import copy_bytes, new_buffer
from shardmill.storage.folder import FileIdentity, Loan

_TRIES: Final = 2
"""Fetches of a block that must differ from the first one before the difference is believed."""

KEPT_BYTES: Final = 240 << 20
"""What the readers of a process may keep together, beside their own blocks, for a second read."""


def _nothing() -> None:
    """Do nothing."""


def seams_of(size: int, most: int, rows: Sequence[RowSpan] = ()) -> Sequence[int]:
    """Where blocks of at most `most` bytes begin, none of them amid a step of rows unless steps are nearly as long.

    >>> [*seams_of(100, 40)], [*seams_of(100, 40, [RowSpan(10, 80, 20)])]
    ([0, 40, 80], [0, 30, 70])
    """
    if not rows:
        return range(0, size, most)
    begins = [span.begin for span in rows]
    seams = [0]
    while (end := seams[-1] + most) < size:
        at = bisect_right(begins, end) - 1
        if at >= 0 and end < rows[at].end:
            whole = end - (end - rows[at].begin) % rows[at].step
            end = whole if whole > seams[-1] + most // 2 else end
        seams.append(end)
    return seams


class KeptRoom:
    """Bytes that readers lend each other to keep what they read twice, and buffers that go from one to the next.

    Who holds a part of it never waits for more, so whoever waits is served when the others have read on.
    """

    def __init__(self, nbytes: int) -> None:
        self.limit = nbytes
        self._lent: dict[int, int] = {}
        """By reader; those that hold nothing are not in it."""
        self._spare: list[memoryview] = []
        """Buffers whose memory is in use already, which costs as much as to fill them."""
        self._spare_bytes = 0
        self._readers = 0
        self._lock = threading.Lock()

    @property
    def lent(self) -> int:
        """Bytes that are lent."""
        return sum(self._lent.values())

    def enter(self) -> None:
        """Note a reader."""
        with self._lock:
            self._readers += 1

    def leave(self, reader: int) -> None:
        """Take back all that a reader holds; the last one leaves no memory behind."""
        with self._lock:
            self._lent.pop(reader, None)
            self._readers -= 1
            if not self._readers:
                self._spare.clear()
                self._spare_bytes = 0

    def borrow(self, reader: int, nbytes: int) -> int | None:
        """Lend so many bytes, or as many as there are; None where it is worth waiting for others to give back.

        >>> room = KeptRoom(10)
        >>> room.borrow(1, 8), room.borrow(2, 4), room.borrow(1, 4), room.borrow(2, 0)
        (8, None, 2, 0)
        """
        with self._lock:
            wanted = min(nbytes, self.limit)
            free = self.limit - self.lent
            if free < wanted and reader not in self._lent:
                return None
            granted = min(free, wanted)
            if granted:
                self._lent[reader] = self._lent.get(reader, 0) + granted
            return granted

    def give_back(self, reader: int, nbytes: int) -> None:
        """Take back some of what a reader holds."""
        with self._lock:
            self._lent[reader] -= nbytes
            if not self._lent[reader]:
                del self._lent[reader]

    def buffer(self, nbytes: int) -> memoryview:
        """Memory of exactly this size."""
        with self._lock:
            for number, spare in enumerate(self._spare):
                if len(spare) == nbytes:
                    self._spare_bytes -= nbytes
                    return self._spare.pop(number)
        return new_buffer(nbytes)

    def put_by(self, buffer: memoryview) -> None:
        """Keep memory for others that nothing writes to any more, as much as is not lent at the moment."""
        with self._lock:
            if self._spare_bytes + len(buffer) <= self.limit - self.lent:
                self._spare.append(buffer)
                self._spare_bytes += len(buffer)


_room = KeptRoom(KEPT_BYTES)


def _after_fork() -> None:
    global _room  # noqa: PLW0603 - another thread may have held its lock when this process split off
    _room = KeptRoom(KEPT_BYTES)


os.register_at_fork(after_in_child=_after_fork)


@dataclass(slots=True)
class _Twice:
    """A range that is read twice: all of it, then all of it again."""

    begin: int
    end: int
    kept: int
    """End of what is kept in between, aligned to blocks; the rest is fetched again."""
    lent: int
    """Bytes of the shared room that it holds."""
    seen: int
    """How far the first read came."""
    done: int
    """How far the second one came."""

    def read(self, offset: int, end: int) -> None:
        """Take note of a read."""
        if offset >= self.end or end <= self.begin:
            return
        if self.seen < self.end:
            self.seen = max(self.seen, min(end, self.end))
        else:
            self.done = max(self.done, min(end, self.end))


class _Block:
    """One block of the file in memory, or on its way there."""

    def __init__(self, index: int, buffer: memoryview, future: Future[None], tick: int) -> None:
        self.index = index
        self.buffer = buffer
        self.future = future
        self.tick = tick
        """When it was last wanted."""
        self.pins = 0
        """Reads that wait for it or copy out of it, and loans."""
        self.loans = 0
        self.is_checked = False
        """Whether it is known to be what an earlier fetch brought."""
        self.read_to = 0
        """How far it was copied out from its beginning, without gaps."""

    @property
    def is_idle(self) -> bool:
        return not self.pins and self.future.done()

    def note(self, begin: int, end: int) -> None:
        """Take note of what was copied out."""
        if begin <= self.read_to < end:
            self.read_to = end

    @property
    def has_failed(self) -> bool:
        return self.future.done() and (self.future.cancelled() or self.future.exception() is not None)


class BlockReader:
    """A remote file read in fixed blocks that are fetched ahead, kept while there is room, and never differ.

    How far it fetches ahead follows the reads: the first one fetches the blocks it needs, and each one that goes
    forward into new blocks doubles the distance. Blocks that were read stay until their room is needed; once one of
    them had to be fetched again, half of the room is left to such blocks. What `announce` told of stays longer.
    """

    def __init__(
        self,
        identity: FileIdentity,
        submit: Callable[[int, memoryview], Future[None]],
        *,
        block_bytes: int = 8 << 20,
        blocks: int = 4,
        more_blocks: int = 0,
        on_close: Callable[[], None] = _nothing,
        room: KeptRoom | None = None,
    ) -> None:
        """Take a file without reading it.

        Args:
            identity: of the state that `submit` reads.
            submit: starts to fill a view with the bytes from an offset on, all of them; repeats what fails in passing,
                and fails with `SourceChanged` when the file is another one by now. Once the future is done, nothing
                writes into the view; one that could be cancelled may still do.
            block_bytes: most bytes fetched by one request.
            blocks: most blocks in memory, but for those that are kept in the room.
            more_blocks: beside them where all is read once and nothing is kept.
            on_close: called once, when nothing is in flight any more.
            room: for what is read twice; that of the process unless given.
        """
        self.identity = identity
        self.bytes_read = 0
        self._submit = submit
        self._block_bytes = max(1, min(block_bytes, identity.size))
        self.seams = seams_of(identity.size, self._block_bytes)
        """Where blocks begin; fixed once one is fetched."""
        self._own = max(1, blocks)
        self._more_blocks = more_blocks
        self._on_close = on_close
        self._room = room or _room
        self._room.enter()
        self._twice: list[_Twice] = []
        self._lent = 0
        """Blocks beyond its own that it may have."""
        self._changed = threading.Condition()
        """Guards what follows; notified when a block arrives or is let go."""
        self._held: dict[int, _Block] = {}
        self._free: list[memoryview] = []
        self._allocated = 0
        self._digests: dict[int, bytes] = {}
        self._is_once = False
        """Whether only what is announced is read again."""
        self._undigested: set[int] = set()
        """Blocks that were read, and let go without a digest."""
        self._tick = 0
        self._reach = 0
        """How many blocks behind the last one that is asked for are fetched ahead."""
        self._reach_limit = self._own
        self._last: int | None = None
        """Last block that the latest read asked for."""
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            blocks = list(self._held.values())
            self._held.clear()
            self._changed.notify_all()
        try:
            wait([block.future for block in blocks if not block.future.cancel()])
            with self._changed:
                quiet = [block.buffer for block in blocks if not block.pins and not block.future.cancelled()]
                for buffer in (*self._free, *quiet):
                    self._room.put_by(buffer)
        finally:
            self._free.clear()
            self._room.leave(id(self))
            self._on_close()

    def announce(self, ranges: Sequence[tuple[int, int]]) -> bool:
        """Tell of ranges, begin and end, that are about to be read twice: all of them in order, then all again.

        What finds room stays in memory meanwhile; what does not is fetched twice. False where it is better to come back
        later, because other readers will give room back; never to one that keeps something already.
        """
        spans = [(begin, end) for begin, end in ranges if begin < end]
        if not spans:
            return True
        hull = min(begin for begin, _ in spans), max(end for _, end in spans)
        if self._span(*hull) * self._block_bytes <= self._room.limit:
            spans = [hull]  # gaps are read with it by whoever takes the digest of the file
        with self._changed:
            granted = self._room.borrow(id(self), sum(self._span(*span) for span in spans) * self._block_bytes)
            if granted is None:
                return False
            for begin, end in spans:
                count = min(self._span(begin, end), granted // self._block_bytes)
                granted -= self._keep(begin, end, count)
            if granted:
                self._room.give_back(id(self), granted)
        return True

    def expect_once(self, *, announces: bool, rows: Sequence[RowSpan] = ()) -> None:
        """See `Reader.expect_once`: it fetches the beginning, and blocks get a digest if they go before their time.

        A block that is fetched again against this promise counts once two fetches of it agree.
        """
        with self._changed:
            if self._is_once or self._is_closed:
                return
            self._is_once = True
            if not self._held and not self._digests:
                self.seams = seams_of(self.identity.size, self._block_bytes, rows)
            if not announces:
                self._own += self._more_blocks
                self._reach_limit = self._own
            for index in range(min(self._own, self._span(0, self.identity.size))):
                if index not in self._held and self._make_room(index, index):
                    self._start(index)
            self._reach = self._reach_limit

    def _keep(self, begin: int, end: int, count: int) -> int:
        """Keep the first blocks of a range; returns their bytes."""
        nbytes = count * self._block_bytes
        kept = min(end, self._end(self._index(begin) + count - 1)) if count else begin
        self._twice.append(_Twice(begin, end, kept, nbytes, begin, begin))
        self._lent += count
        return nbytes

    def _index(self, offset: int) -> int:
        """The block that holds the byte at an offset."""
        return bisect_right(self.seams, offset) - 1

    def _end(self, index: int) -> int:
        """End of a block."""
        return self.seams[index + 1] if index + 1 < len(self.seams) else self.identity.size

    def _length(self, index: int) -> int:
        return self._end(index) - self.seams[index]

    def _span(self, begin: int, end: int) -> int:
        """Blocks that a range touches."""
        return self._index(end - 1) - self._index(begin) + 1 if begin < end else 0

    def _read_on(self, offset: int, end: int) -> None:
        """Give back the room of what was read twice by now."""
        for twice in self._twice:
            twice.read(offset, end)
            rest = self._span(twice.done, twice.kept) * self._block_bytes
            if rest < twice.lent:
                self._room.give_back(id(self), twice.lent - rest)
                self._lent -= (twice.lent - rest) // self._block_bytes
                twice.lent = rest
        self._twice = [twice for twice in self._twice if twice.done < twice.end]
        self._trim(self._index(end - 1))
        self._changed.notify_all()

    def _trim(self, index: int) -> None:
        """Leave buffers to others, as many as it has too many; the block that is read now stays."""
        while self._allocated > self._most and (self._free or self._drop_one(index, index)):
            if self._free:
                self._allocated -= 1
                self._room.put_by(self._free.pop())

    @property
    def _most(self) -> int:
        """Blocks that it may have at the moment."""
        return self._own + self._lent

    def _is_kept(self, index: int) -> bool:
        begin, end = self.seams[index], self._end(index)
        return any(twice.done < min(end, twice.kept) and begin < twice.kept for twice in self._twice)

    def _is_read_again(self, index: int) -> bool:
        begin, end = self.seams[index], self._end(index)
        return any(twice.done < min(end, twice.end) and begin < twice.end for twice in self._twice)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes from `offset` on.

        Raises:
            SourceChanged: the file ends before the view is full, or is another one by now.
            StorageFailed: the storage refuses.
            TransferDamaged: a block that was read before has other bytes now.
        """
        end = offset + len(view)
        if end > self.identity.size:
            raise SourceChanged(
                f"{show(self.identity.url, 200)} ends at byte {self.identity.size}, bytes up to {end} are needed; "
                "run again"
            )
        if offset == end:
            return
        first, last = self._index(offset), self._index(end - 1)
        with self._changed:
            self.bytes_read += len(view)
            self._follow(first, last)
        for index in range(first, last + 1):
            start = self.seams[index]
            begin, stop = max(offset, start), min(end, self._end(index))
            self._copy(index, last, begin - start, view[begin - offset : stop - offset])
        if self._twice:
            with self._changed:
                self._read_on(offset, end)

    def lend(self, offset: int, nbytes: int) -> Loan | None:
        """See `Reader.lend`: what lies in one block is lent, while most of its own blocks are free to be filled."""
        end = offset + nbytes
        if not nbytes or end > self.identity.size:
            return None
        index = self._index(offset)
        if end > self._end(index):
            return None
        with self._changed:
            if not self._may_lend(index):
                return None
            self._follow(index, index)
        block = self._pin(index, index)
        try:
            block.future.result()
            if not self._is_same(block):
                self._unpin(block)
                return None  # whoever reads it instead tries again, and hears of it
            skip = offset - self.seams[index]
            block.note(skip, skip + nbytes)
            with self._changed:
                self.bytes_read += nbytes
                if self._twice:
                    self._read_on(offset, end)
                block.loans += 1
        except BaseException:
            self._unpin(block)
            raise
        return Loan(block.buffer[skip : skip + nbytes].toreadonly(), functools.partial(self._end_loan, block))

    def _may_lend(self, index: int) -> bool:
        """Whether loans leave enough blocks to be filled; those that are kept are beside its own until they are not."""
        lent = [block.index for block in self._held.values() if block.loans and not self._is_kept(block.index)]
        most = self._own if self._is_kept(index) else max(1, self._own // 2)
        return index in lent or len(lent) < most

    def _end_loan(self, block: _Block) -> None:
        with self._changed:
            block.loans -= 1
        self._unpin(block)

    def _follow(self, first: int, last: int) -> None:
        """Fetch farther ahead while reads go forward, less far when they jump to what is not there."""
        if self._last is not None:
            if first not in self._held and first not in {self._last, self._last + 1}:
                self._reach //= 2
            elif last > self._last:
                self._reach = min(self._reach_limit, max(1, 2 * self._reach, last - self._last))
        self._last = last

    def _copy(self, index: int, last: int, skip: int, view: memoryview) -> None:
        """Copy a part of one block; the read it belongs to goes on up to block `last`."""
        for _ in range(_TRIES):
            block = self._pin(index, last)
            try:
                block.future.result()
                if self._is_same(block):
                    copy_bytes(view, block.buffer[skip : skip + len(view)])
                    block.note(skip, skip + len(view))
                    return
            finally:
                self._unpin(block)
        where = f"{show(self.identity.url, 200)}: bytes {self.seams[index]} to {self._end(index)}"
        raise TransferDamaged(
            errno.EIO, f"{where} differ from what was read before; check the connection and run again"
        )

    def _is_same(self, block: _Block) -> bool:
        """Whether a block that arrived is what it was before; takes note of it at the first time."""
        if block.is_checked:
            return True
        if self._is_once and block.index not in self._digests and block.index not in self._undigested:
            block.is_checked = True
            return True
        digest = self._digest(block)
        with self._changed:
            is_first = block.index in self._undigested  # of two that have to agree
            self._undigested.discard(block.index)
            is_held = self._held.get(block.index) is block  # else another thread has refused it
            is_same = self._digests.setdefault(block.index, digest) == digest
            block.is_checked = is_held and is_same and not is_first
            if is_held and not block.is_checked:
                del self._held[block.index]
            return block.is_checked

    def _digest(self, block: _Block) -> bytes:
        return blake3(block.buffer[: self._length(block.index)]).digest()

    # ---- blocks come and go; all of it under the lock

    def _pin(self, index: int, last: int) -> _Block:
        """The block, arrived or on its way; starts to fetch what will be asked for after it."""
        with self._changed:
            block = self._find(index)
            self._tick += 1
            block.tick = self._tick
            block.pins += 1
            self._look_ahead(index, last)
            return block

    def _find(self, index: int) -> _Block:
        """The block that is held, or one that starts now, as soon as there is room."""
        while not self._is_closed:
            block = self._held.get(index)
            if block is not None:
                if block.pins or not block.has_failed:
                    return block
                self._drop(block)
            if self._make_room(index, index) or self._cancel_one():
                return self._start(index)
            self._changed.wait()
        raise ValueError(f"{show(self.identity.url, 200)} is closed")

    def _unpin(self, block: _Block) -> None:
        with self._changed:
            block.pins -= 1
            if not block.pins and self._held.get(block.index) is not block:
                self._recycle(block)
            if self._last is not None:
                self._trim(self._last)  # room may have been given back while it was pinned
            self._changed.notify_all()

    def _look_ahead(self, index: int, last: int) -> None:
        """Fetch what follows; blocks that are kept are passed over, so that what comes after them is there in time."""
        left = min(last + self._reach - index, self._own - 1)
        for ahead in range(index + 1, len(self.seams)):
            if left < 1:
                return
            is_held = ahead in self._held
            if is_held and self._is_kept(ahead):
                continue
            left -= 1
            if not is_held:
                if not self._make_room(index, ahead):
                    return
                self._start(ahead)

    def _start(self, index: int) -> _Block:
        if self._free:
            buffer = self._free.pop()
        else:
            buffer = self._room.buffer(self._block_bytes)
            self._allocated += 1
        if index in self._digests:
            self._reach_limit = max(1, self._most // 2)
            self._reach = min(self._reach, self._reach_limit)
        try:
            future = self._submit(self.seams[index], buffer[: self._length(index)])
        except Exception as error:  # noqa: BLE001 - told to whoever asks for the block, as if it came later
            future = Future()
            future.set_exception(error)
        block = self._held[index] = _Block(index, buffer, future, self._tick)
        future.add_done_callback(self._arrived)
        return block

    def _arrived(self, _: Future[None]) -> None:
        with self._changed:
            self._changed.notify_all()

    def _make_room(self, first: int, last: int) -> bool:
        """Whether there is a buffer, if need be that of an idle block outside `first` to `last`."""
        return bool(self._free) or self._allocated < self._most or self._drop_one(first, last)

    def _drop_one(self, first: int, last: int) -> bool:
        """Drop an idle block outside `first` to `last`, if there is one that is not kept or has failed."""
        idle = [
            block
            for block in self._held.values()
            if block.is_idle
            and not first <= block.index <= last
            and (block.has_failed or not self._is_kept(block.index))
        ]
        if not idle:
            return False
        self._drop(min(idle, key=lambda block: self._worth(block, first)))
        return True

    @staticmethod
    def _worth(block: _Block, first: int) -> tuple[int, int]:
        """Order in which blocks make room: failed ones, those behind by last use, those ahead from the farthest on."""
        if block.has_failed:
            return 0, 0
        return (1, block.tick) if block.index < first else (2, -block.index)

    def _cancel_one(self) -> bool:
        """Give up a block that nobody waits for and that is not on its way yet."""
        flying = [block for block in self._held.values() if not block.pins and not block.future.done()]
        for block in sorted(flying, key=lambda block: -block.index):
            if block.future.cancel():
                del self._held[block.index]
                self._allocated -= 1  # who was cancelled may write once more, so the buffer is not used again
                return True
        return False

    def _drop(self, block: _Block) -> None:
        if self._is_once and block.is_checked and block.index not in self._digests:
            if block.read_to < self._length(block.index) or self._is_read_again(block.index):
                self._digests[block.index] = self._digest(block)
            else:
                self._undigested.add(block.index)
        del self._held[block.index]
        self._recycle(block)

    def _recycle(self, block: _Block) -> None:
        """Use the buffer of a block again that is neither held nor pinned."""
        if block.future.cancelled():
            self._allocated -= 1
        elif not self._is_closed:  # else whoever closes it sees to the buffer
            self._free.append(block.buffer)
