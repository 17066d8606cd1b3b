"""One source that several runs read side by side, each of its bytes once.

Runs with other recipes want the same shards, in the same order. Whoever comes to a range first reads it, in blocks; the
others find the blocks, which are kept until all have passed. Memory is bounded: who is far ahead of another run is told
to come back later (`announce`), but never the one that is behind all others, so nobody waits for ever. What is not kept
any more, because a run reads in another order, is read again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import Final, Self

from shardmill.core.layout import RowSpan
from shardmill.errors import SourceChanged, show
from shardmill.storage.folder import FileIdentity, Loan, Reader
from shardmill.storage.source import SourceFolder

BLOCK_BYTES: Final = 4 << 20
ROOM_BYTES: Final = 128 << 20
"""Of blocks that are kept of one shard."""
LEAD_BYTES: Final = 64 << 20
"""How far a run may be ahead of another one in a shard."""
_WAKE_SECONDS: Final = 0.5
"""A thread that waits without end hears no signal."""


class _Share:
    """An open shard and the runs that read it; every run has a position, also before it has come."""

    def __init__(self, source: SourceFolder, name: str, runs: set[int]) -> None:
        self.runs = runs
        self._source = source
        self._name = name
        self._stack = ExitStack()
        self._reader: Reader | None = None
        self._blocks: dict[int, memoryview] = {}
        self._loading: set[int] = set()
        self._positions = dict.fromkeys(runs, 0)
        self._kept_from: dict[int, int] = {}
        """First byte of what a run is reading for the first of two times."""
        self._changed = threading.Condition()
        self._disk = threading.Lock()

    @property
    def reader(self) -> Reader:
        """The file, opened when the first run comes."""
        with self._disk:
            if self._reader is None:
                self._reader = self._stack.enter_context(self._source.open(self._name))
            return self._reader

    def join(self, run: int) -> None:
        with self._changed:
            self.runs.add(run)
            self._positions.setdefault(run, 0)

    def leave(self, run: int) -> None:
        """Wait for a run no longer; the last one closes the file."""
        with self._changed:
            self.runs.discard(run)
            self._positions.pop(run, None)
            self._kept_from.pop(run, None)
            self._drop_passed()
            is_last = not self.runs
            self._changed.notify_all()
        if is_last:
            self._blocks.clear()
            with suppress(SourceChanged):  # every run has looked for itself, and told so
                self._stack.close()

    def may_read(self, run: int) -> bool:
        """Whether a run is not far ahead of another one."""
        with self._changed:
            least = min(self._positions.values(), default=0)
            return self._positions.get(run, 0) - least < LEAD_BYTES

    def announce(self, run: int, begin: int) -> None:
        with self._changed:
            self._kept_from[run] = begin

    def read_into(self, run: int, offset: int, view: memoryview) -> int:
        """Fill the view; returns the bytes that were fetched for it."""
        target, done, fetched = view.cast("B"), 0, 0
        while done < len(target):
            index, begin = divmod(offset + done, BLOCK_BYTES)
            block, size = self._block(index)
            part = block[begin : begin + len(target) - done]
            if not len(part):
                where = show(self.reader.identity.url, 200)
                raise SourceChanged(f"{where} ends at byte {offset + done}; it was longer when planned")
            target[done : done + len(part)] = part
            done, fetched = done + len(part), fetched + size
        self._advance(run, offset, offset + done)
        return fetched

    def _advance(self, run: int, begin: int, end: int) -> None:
        with self._changed:
            if run in self._kept_from and begin < self._positions[run]:
                del self._kept_from[run]  # it reads what it announced for the second time
            self._positions[run] = end
            self._drop_passed()
            self._changed.notify_all()

    def _drop_passed(self) -> None:
        """Forget what all runs have passed, and the first of what is too much."""
        needed = min(
            (min(position, self._kept_from.get(run, position)) for run, position in self._positions.items()), default=0
        )
        for index in [index for index in self._blocks if (index + 1) * BLOCK_BYTES <= needed]:
            del self._blocks[index]
        while len(self._blocks) * BLOCK_BYTES > ROOM_BYTES:
            del self._blocks[min(self._blocks)]

    def _block(self, index: int) -> tuple[memoryview, int]:
        """A block, and the bytes that were fetched for it now."""
        with self._changed:
            while True:
                if index in self._blocks:
                    return self._blocks[index], 0
                if index not in self._loading:
                    self._loading.add(index)
                    break
                self._changed.wait(_WAKE_SECONDS)
        try:
            block = self._fetch(index)
            with self._changed:
                self._blocks[index] = block
                self._drop_passed()
        finally:
            with self._changed:
                self._loading.discard(index)
                self._changed.notify_all()
        return block, len(block)

    def _fetch(self, index: int) -> memoryview:
        reader, begin = self.reader, index * BLOCK_BYTES
        block = memoryview(bytearray(max(0, min(BLOCK_BYTES, reader.identity.size - begin))))
        if block:
            with self._disk:
                reader.read_into(begin, block)
        return block


class _SharedReader:
    """What one run sees of a shard that it shares; see `Reader`."""

    seams: Sequence[int] = ()

    def __init__(self, share: _Share, source: SourceFolder, name: str, run: int) -> None:
        self.identity: FileIdentity = share.reader.identity
        self.bytes_read = 0
        self._share, self._source, self._name, self._run = share, source, name, run

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Make sure that the file is still the one that was opened; others may read on."""
        if error is None and self._source.identity(self._name) != self.identity:
            raise SourceChanged(f"{show(self._name)} changed while it was read; run again")

    def read_into(self, offset: int, view: memoryview) -> None:
        """As `Reader.read_into`."""
        self.bytes_read += self._share.read_into(self._run, offset, view)

    def expect_once(self, *, announces: bool, rows: Sequence[RowSpan] = ()) -> None:
        """As `Reader.expect_once`; other runs may read the same again."""

    def lend(self, offset: int, nbytes: int) -> Loan | None:  # noqa: ARG002
        """As `Reader.lend`; what a run is given here is dropped when the others have it."""
        return None

    def announce(self, ranges: Sequence[tuple[int, int]]) -> bool:
        """As `Reader.announce`: what fits is kept; who is far ahead of another run is to come back later."""
        if not ranges:
            return self._share.may_read(self._run)
        self._share.announce(self._run, min(begin for begin, _ in ranges))
        return True


class _View(SourceFolder):
    """The source as one run sees it while it works on a shard: that shard is shared, all else is not."""

    def __init__(self, source: SourceFolder, share: _Share, name: str, run: int) -> None:
        super().__init__(source.folder, source.intake)
        self._source, self._share, self._name, self._run = source, share, name, run

    def open(self, name: str) -> Reader:
        """Open a file for range reads, through the others' blocks where it is the shared one."""
        if name != self._name:
            return self._source.open(name)
        return _SharedReader(self._share, self._source, name, self._run)


class Companions:
    """A source, and the runs that read it together."""

    def __init__(self, source: SourceFolder, runs: int) -> None:
        self._source = source
        self._shares: dict[str, _Share] = {}
        self._runs = set(range(runs))
        self._passed: set[tuple[int, str]] = set()
        self._lock = threading.Lock()

    def companion(self, run: int) -> Companion:
        """What one of the runs holds."""
        return Companion(self, run)

    def take(self, run: int, name: str) -> _Share:
        """Begin to read a shard."""
        with self._lock:
            if name not in self._shares:
                expected = {other for other in self._runs if (other, name) not in self._passed}
                self._shares[name] = _Share(self._source, name, expected)
            share = self._shares[name]
            share.join(run)
            return share

    def view(self, share: _Share, name: str, run: int) -> SourceFolder:
        """The source with that shard in it."""
        return _View(self._source, share, name, run)

    def leave(self, run: int, name: str) -> None:
        """Never read a shard, or never again."""
        with self._lock:
            self._passed.add((run, name))
            share = self._shares.get(name)
            if share is not None and share.runs <= {run}:
                del self._shares[name]
        if share is not None:
            share.leave(run)

    def leave_all(self, run: int) -> None:
        """Read nothing any more."""
        with self._lock:
            self._runs.discard(run)
            names = [name for name, share in self._shares.items() if run in share.runs]
        for name in names:
            self.leave(run, name)


class Companion:
    """One of several runs that read a source together."""

    def __init__(self, companions: Companions, run: int) -> None:
        self._companions, self._run = companions, run

    @contextmanager
    def taking(self, name: str) -> Iterator[SourceFolder]:
        """Work on a shard: gives the source to read it from."""
        share = self._companions.take(self._run, name)
        try:
            yield self._companions.view(share, name, self._run)
        finally:
            self._companions.leave(self._run, name)

    def pass_over(self, name: str) -> None:
        """Tell the others not to wait: this run has the result of a shard."""
        self._companions.leave(self._run, name)

    def leave(self) -> None:
        """Tell the others not to wait for this run any more."""
        self._companions.leave_all(self._run)
