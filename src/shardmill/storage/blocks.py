"""A remote file as a `Reader`: aligned blocks, fetched ahead, kept while there is room, the same at every read."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Final, Self

from blake3 import blake3

from shardmill.errors import SourceChanged, TransferDamaged, show
from shardmill.storage.folder import FileIdentity

_TRIES: Final = 2
"""Fetches of a block that must differ from the first one before the difference is believed."""


def _nothing() -> None:
    """Do nothing."""


class _Block:
    """One block of the file in memory, or on its way there."""

    def __init__(self, index: int, buffer: bytearray, future: Future[None], tick: int) -> None:
        self.index = index
        self.buffer = buffer
        self.future = future
        self.tick = tick
        """When it was last wanted."""
        self.pins = 0
        """Reads that wait for it or copy out of it."""
        self.is_checked = False
        """Whether it is known to be what an earlier fetch brought."""

    @property
    def is_idle(self) -> bool:
        return not self.pins and self.future.done()

    @property
    def has_failed(self) -> bool:
        return self.future.done() and (self.future.cancelled() or self.future.exception() is not None)


class BlockReader:
    """A remote file read in aligned blocks that are fetched ahead, kept while there is room, and never differ.

    How far it fetches ahead follows the reads: the first one fetches the blocks it needs, and each one that goes
    forward into new blocks doubles the distance. Blocks that were read stay until their room is needed; once one of
    them had to be fetched again, half of the room is left to such blocks.
    """

    def __init__(
        self,
        identity: FileIdentity,
        submit: Callable[[int, memoryview], Future[None]],
        *,
        block_bytes: int = 8 << 20,
        blocks: int = 8,
        on_close: Callable[[], None] = _nothing,
    ) -> None:
        """Take a file without reading it.

        Args:
            identity: of the state that `submit` reads.
            submit: starts to fill a view with the bytes from an offset on, all of them; repeats what fails in passing,
                and fails with `SourceChanged` when the file is another one by now. Once the future is done, nothing
                writes into the view; one that could be cancelled may still do.
            block_bytes: bytes fetched by one request.
            blocks: most blocks in memory.
            on_close: called once, when nothing is in flight any more.
        """
        self.identity = identity
        self.bytes_read = 0
        self._submit = submit
        self._block_bytes = max(1, min(block_bytes, identity.size))
        self._most = max(1, blocks)
        self._on_close = on_close
        self._changed = threading.Condition()
        """Guards what follows; notified when a block arrives or is let go."""
        self._held: dict[int, _Block] = {}
        self._free: list[bytearray] = []
        self._allocated = 0
        self._digests: dict[int, bytes] = {}
        self._tick = 0
        self._reach = 0
        """How many blocks behind the last one that is asked for are fetched ahead."""
        self._reach_limit = self._most
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
            flying = [block.future for block in self._held.values()]
            self._held.clear()
            self._changed.notify_all()
        try:
            wait([future for future in flying if not future.cancel()])
        finally:
            self._free.clear()
            self._on_close()

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
        first, last = offset // self._block_bytes, (end - 1) // self._block_bytes
        with self._changed:
            self.bytes_read += len(view)
            self._follow(first, last)
        for index in range(first, last + 1):
            start = index * self._block_bytes
            begin, stop = max(offset, start), min(end, start + self._block_bytes)
            self._copy(index, last, begin - start, view[begin - offset : stop - offset])

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
                    view[:] = memoryview(block.buffer)[skip : skip + len(view)]
                    return
            finally:
                self._unpin(block)
        start = index * self._block_bytes
        raise TransferDamaged(
            errno.EIO,
            f"{show(self.identity.url, 200)}: bytes {start} to {start + self._length(index)} differ from what was read "
            "before; check the connection and run again",
        )

    def _is_same(self, block: _Block) -> bool:
        """Whether a block that arrived is what it was before; takes note of it at the first time."""
        if not block.is_checked:
            digest = blake3(memoryview(block.buffer)[: self._length(block.index)]).digest()
            with self._changed:
                block.is_checked = self._digests.setdefault(block.index, digest) == digest
                if not block.is_checked and self._held.get(block.index) is block:
                    del self._held[block.index]
        return block.is_checked

    def _length(self, index: int) -> int:
        return min(self._block_bytes, self.identity.size - index * self._block_bytes)

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
            self._changed.notify_all()

    def _look_ahead(self, index: int, last: int) -> None:
        end = min(last + self._reach + 1, index + self._most, -(-self.identity.size // self._block_bytes))
        for ahead in range(index + 1, end):
            if ahead not in self._held:
                if not self._make_room(index, ahead):
                    return
                self._start(ahead)

    def _start(self, index: int) -> _Block:
        if self._free:
            buffer = self._free.pop()
        else:
            buffer = bytearray(self._block_bytes)
            self._allocated += 1
        if index in self._digests:
            self._reach_limit = max(1, self._most // 2)
            self._reach = min(self._reach, self._reach_limit)
        try:
            future = self._submit(index * self._block_bytes, memoryview(buffer)[: self._length(index)])
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
        if self._free or self._allocated < self._most:
            return True
        idle = [block for block in self._held.values() if block.is_idle and not first <= block.index <= last]
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
        del self._held[block.index]
        self._recycle(block)

    def _recycle(self, block: _Block) -> None:
        """Use the buffer of a block again that is neither held nor pinned."""
        if block.future.cancelled():
            self._allocated -= 1
        else:
            self._free.append(block.buffer)
