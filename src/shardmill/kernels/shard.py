"""One shard plan through the arithmetic into a stream of output bytes, by all threads of a crew.

Knows no paths: source bytes come from a `ReadRange`, output bytes go to a `WriteChunk` in exactly the planned order.
Pieces are read one after another, in order; worked on side by side; and written one after another, in order again. The
threads that read and write are the same that compute, so none waits for another kind, and a slow disk slows them all.

Memory is what the crew's window allows, plus the scales of the weight in hand up to `HELD_BYTES`; more of them wait in
a scratch file.
"""

from __future__ import annotations

import struct
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Final, Protocol

from shardmill.core.dtypes import BITS, COMPUTABLE
from shardmill.core.input_scale import PARAM as INPUT_SCALE
from shardmill.core.layout import OutputSpec, ShardLayout, Unit
from shardmill.core.plan import ShardPlan
from shardmill.core.receipt import NonFinite, WeightRecord
from shardmill.core.statistics import Extent, Statistics
from shardmill.errors import Interrupted, NonFiniteWeight
from shardmill.kernels.crew import Crew, crew_of
from shardmill.kernels.decode import Stored
from shardmill.kernels.decoding import Decoding, Gauge, SlabBlock
from shardmill.kernels.lanes import EncodedBlock, ImportanceOf, Lane, alike, needs_torch
from shardmill.kernels.pieces import Copies, Copy, Encode, Measure, Piece, Slab, Twice, cut
from shardmill.kernels.recode import Traits
from shardmill.kernels.scan import index_of

WriteChunk = Callable[[memoryview], None]
"""Appends bytes to the data section of the output shard."""
ReadRange = Callable[[str, int, memoryview], None]
"""Fills the view with bytes of the named shard, from an offset counted from the start of its file."""
Lend = Callable[[str, int, int], "Loan | None"]
"""Gives bytes of the named shard, from an offset on, where they lie in memory; None where they have to be read."""
Announce = Callable[[Sequence[tuple[int, int]]], bool]
"""Hears of ranges of the shard's own file, begin and end, that are read twice from now on; False to be asked later.

Without ranges it is asked whether to read on just now.
"""
NewScratch = Callable[[], IO[bytes]]
"""Makes a nameless file for what does not fit into memory."""
OnNonFinite = Callable[[NonFinite], None]
"""Hears of a copied tensor that holds NaN or Inf."""

HELD_BYTES: Final = 8 << 20
"""Scales of a weight that are held in memory until its codes are written."""
_COPY_OUT_BYTES: Final = 4 << 20


class Loan(Protocol):
    """Bytes that somebody else holds; `give_back` follows, once, when they are not needed any more."""

    @property
    def view(self) -> memoryview:
        """Read-only."""

    @property
    def give_back(self) -> Callable[[], None]:
        """Ends the loan."""


def _lend_nothing(_shard: str, _offset: int, _nbytes: int) -> Loan | None:
    return None


def _at_once(_ranges: Sequence[tuple[int, int]]) -> bool:
    return True


def encode_shard(  # noqa: PLR0913 - what comes from outside, each with a default
    shard: ShardPlan,
    read: ReadRange,
    write: WriteChunk,
    *,
    device: str = "cpu",
    announce: Announce = _at_once,
    should_stop: Callable[[], bool] = bool,
    new_scratch: NewScratch = tempfile.TemporaryFile,
    on_nonfinite: OnNonFinite = lambda _found: None,
    layout: ShardLayout | None = None,
    importance_of: ImportanceOf = alike,
    peek: ReadRange | None = None,
    lend: Lend = _lend_nothing,
    seams: Sequence[int] = (),
) -> tuple[WeightRecord, ...]:
    """Compute one output shard and hand its data section to `write`, in the planned order and without the header.

    `read` and `write` are called from several threads, each from one at a time. Where `announce` puts the shard off,
    other shards are worked on until it agrees. `on_nonfinite` is called at the end, once for every tensor that was
    copied and holds NaN or Inf.

    Args:
        layout: of the shard, where it is known already.
        importance_of: how much errors in each input feature of a module count, where scales are searched.
        peek: reads what lies out of turn, such as scales; `read` where there is none.
        lend: asked first, in place of `read`, for what is not needed any more when the arithmetic is done.
        seams: offsets in the shard's own file, in order, that nothing which `lend` gives reaches across.

    Raises:
        NonFiniteWeight: NaN or Inf in a weight that is to be quantized; the first in the order of the output.
        DeviceExhausted: the device has no room for the smallest row block.
        Interrupted: `should_stop` said so between two row blocks.
    """
    is_torch = needs_torch(shard, device)
    crew = crew_of(device, is_torch=is_torch)
    layout = layout or shard.layout()
    output = _Output(layout, write, new_scratch, shard.input_scale_finder())
    encoding = _Encoding(
        crew,
        cut(shard, layout.units, crew.block, () if is_torch else seams),
        read,
        peek or read,
        lend,
        announce,
        output,
        should_stop,
        importance_of,
    )
    try:
        crew.work_on(encoding)
    finally:
        encoding.close()
        output.close()
    records = output.finish()
    for found in output.nonfinite():
        on_nonfinite(found)
    return records


class _Held:
    """Bytes that wait for their place; in memory while they are few."""

    def __init__(self, new_scratch: NewScratch) -> None:
        self._new_scratch = new_scratch
        self._views: list[bytes] = []
        self._file: IO[bytes] | None = None
        self.nbytes = 0

    def append(self, view: memoryview) -> None:
        """Add a copy of some bytes."""
        self.nbytes += len(view)
        if self._file is None and self.nbytes > HELD_BYTES:
            self._file = self._new_scratch()
            self._file.writelines(self._views)
            self._views.clear()
        if self._file is None:
            self._views.append(bytes(view))
        else:
            self._file.write(view)

    def drain(self) -> Iterator[memoryview]:
        """Give everything in order; what was given is gone."""
        if self._file is None:
            yield memoryview(b"".join(self._views))
            return
        with self._file as file:
            file.seek(0)
            buffer = memoryview(bytearray(_COPY_OUT_BYTES))
            while count := file.readinto(buffer):  # type: ignore[attr-defined]  # every binary file has it
                yield buffer[:count]

    def close(self) -> None:
        """Drop the file, if there is one."""
        if self._file is not None:
            self._file.close()


def _nowhere(_data: memoryview) -> None:
    raise AssertionError("bytes of no unit")


@dataclass(slots=True)
class _Output:
    """Puts results, which come in the order of units and row blocks, into the planned order of bytes."""

    layout: ShardLayout
    write: WriteChunk
    new_scratch: NewScratch
    input_scale_of: Callable[[Unit], float]
    """Gives the global scale of the activations of a weight, where one is stored."""
    held: dict[str, _Held] = field(default_factory=dict)
    """Outputs that are computed and wait for their place, by name."""
    records: list[WeightRecord] = field(default_factory=list)
    found: dict[int, tuple[int, int]] = field(default_factory=dict)
    """NaN and Inf in copied units, by number: how many, and the place of the first among all elements."""
    _done: int = 0
    """Bytes of the copied unit in hand that came before."""
    _written: int = 0
    """Outputs that are written."""
    _unit: int = -1
    """The unit in hand."""
    _sink: WriteChunk = field(default_factory=lambda: _nowhere)
    """Takes its codes."""
    _parts: dict[str, _Held] = field(default_factory=dict)
    """Its other outputs so far, by param name."""
    _statistics: Statistics | None = None

    def put(self, number: int, data: memoryview, found: tuple[int, int] | None, *, is_last: bool) -> None:
        """Take bytes of a unit that is copied, and how many NaN and Inf are in them from which on."""
        unit = self._begin(number)
        if found is not None:
            before = self._done * 8 // BITS[unit.tensor.dtype]
            count, first = self.found.get(number, (0, before + found[1]))
            self.found[number] = count + found[0], first
        self._done += data.nbytes
        self._sink(data)
        if is_last:
            self._end()

    def put_block(self, number: int, block: EncodedBlock, whole: Callable[[], memoryview], *, is_last: bool) -> None:
        """Take a row block of a weight; `whole` makes its global scale."""
        unit = self._begin(number)
        codes, *rest = unit.outputs
        self._sink(block.tensors[codes.param])
        has_one_scale = unit.scheme is not None and unit.scheme.weights.strategy == "tensor"
        for param, data in block.tensors.items():
            if param != codes.param and not (has_one_scale and param in self._parts):
                self._parts.setdefault(param, _Held(self.new_scratch)).append(data)
        statistics = self._statistics
        self._statistics = block.statistics if statistics is None else statistics.merge(block.statistics)
        if is_last:
            own = block.global_scale
            shared = whole if own is None else lambda: own
            for spec in rest:
                self.held[spec.name] = self._finished(spec, unit, shared)
            self._record(unit)
            self._end()

    def finish(self) -> tuple[WeightRecord, ...]:
        """Give the records of all weights once everything is written."""
        if self._written < len(self.layout.placed):
            raise AssertionError(f"output {self.layout.placed[self._written].spec.name} was planned and never computed")
        return tuple(self.records)

    def nonfinite(self) -> Iterator[NonFinite]:
        """What was found in copied tensors, in the order of units."""
        for number, (count, place) in sorted(self.found.items()):
            spec = self.layout.units[number].outputs[0]
            yield NonFinite(spec.name, count, index_of(place, spec.shape))

    def close(self) -> None:
        """Drop what waits, which is something only where the shard failed."""
        for held in (*self.held.values(), *self._parts.values()):
            held.close()

    def _begin(self, number: int) -> Unit:
        unit = self.layout.units[number]
        if number == self._unit:
            return unit
        self._unit, self._parts, self._statistics, self._done = number, {}, None, 0
        codes = unit.outputs[0]
        if self._is_next(codes):
            self._written += 1
            self._sink = self.write
        else:
            self.held[codes.name] = _Held(self.new_scratch)
            self._sink = self.held[codes.name].append
        return unit

    def _is_next(self, spec: OutputSpec) -> bool:
        placed = self.layout.placed
        return self._written < len(placed) and placed[self._written].spec is spec

    def _end(self) -> None:
        """Write what waits and is next in order."""
        placed = self.layout.placed
        while self._written < len(placed) and (name := placed[self._written].spec.name) in self.held:
            for chunk in self.held.pop(name).drain():
                self.write(chunk)
            self._written += 1

    def _record(self, unit: Unit) -> None:
        if unit.scheme is None or self._statistics is None:
            raise AssertionError(f"no row block in {unit!r}")
        self.records.append(WeightRecord(unit.module, unit.scheme.label, self._statistics))

    def _finished(self, spec: OutputSpec, unit: Unit, whole: Callable[[], memoryview]) -> _Held:
        """Complete an output with what belongs to the whole tensor."""
        held = self._parts.get(spec.param) or _Held(self.new_scratch)
        if spec.param == "weight_shape":
            held.append(memoryview(struct.pack("<2q", unit.rows, unit.cols)))
        elif spec.param == "weight_global_scale":
            held.append(whole())
        elif spec.param == INPUT_SCALE:
            held.append(memoryview(struct.pack("<f", self.input_scale_of(unit))))
        if held.nbytes != spec.nbytes:
            raise AssertionError(f"{spec}: computed {held.nbytes} bytes")
        return held


@dataclass(slots=True)
class _Result:
    """A piece that is worked on, and what it holds until it is written."""

    write: Callable[[], None]
    lane: Lane
    booked: int


@dataclass(slots=True)
class _Encoding:
    """The job of one shard: `step` takes the next piece, works on it, and writes what is next in order."""

    crew: Crew
    pieces: Iterator[Piece | Twice]
    read: ReadRange
    peek: ReadRange
    lend: Lend
    announce: Announce
    output: _Output
    should_stop: Callable[[], bool]
    importance_of: ImportanceOf
    taken: int = 0
    put_off: Twice | None = None
    """What was announced and put off; no piece is taken until it is heard."""
    written: int = 0
    is_over: bool = False
    """Whether no more pieces are to be taken, because one failed."""
    waiting: dict[int, _Result] = field(default_factory=dict)
    """Finished pieces whose turn to be written has not come, by number."""
    extents: dict[str, Extent] = field(default_factory=dict)
    traits: dict[str, Traits] = field(default_factory=dict)
    """What of scales decides whether codes can stay, by the same key."""
    missing: dict[str, int] = field(default_factory=dict)
    """Pieces that an extent still lacks."""
    is_writing: bool = False
    taking: threading.Lock = field(default_factory=threading.Lock)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def is_ready(self) -> bool:
        """Whether there is no need to wait: for room that other shards hold, or for who reads the same shard."""
        if self.put_off is not None and (self.is_over or self.should_stop() or self._announce(self.put_off)):
            self.put_off = None
        return self.put_off is None and (self.announce(()) or self.is_over or self.should_stop())

    def _announce(self, twice: Twice) -> bool:
        return self.announce([(span.begin, span.begin + span.length) for span in twice.spans])

    def step(self) -> bool:
        """Take a piece and finish it; False when none was left to take."""
        lane = self.crew.take_lane()
        try:
            with self.taking:
                taken = self._take_or_give_up(lane)
            if taken is None:
                self.crew.give_lane(lane)
                return self.put_off is not None
            number, piece, data, give_back = taken
            with self._booked_until_failure(piece):
                try:
                    write = self._work(piece, lane, data)
                finally:
                    give_back()
            self._hand_in(number, _Result(write, lane, piece.held_bytes))
        except BaseException:
            self._give_up()
            raise
        return True

    def _give_up(self) -> None:
        """Let no thread take or wait any more."""
        with self.changed:
            self.is_over = True
            self.changed.notify_all()

    def _take_or_give_up(self, lane: Lane) -> tuple[int, Piece, memoryview | Stored, Callable[[], None]] | None:
        """As `_take`; where that fails nobody takes a piece after it."""
        try:
            return self._take(lane)
        except BaseException:
            self._give_up()
            raise

    def _take(self, lane: Lane) -> tuple[int, Piece, memoryview | Stored, Callable[[], None]] | None:
        """The next piece, its source bytes, and what ends their loan; reading is in order because the lock is held."""
        if self.is_over or self.put_off is not None:
            return None
        if self.should_stop():
            raise Interrupted("stopped on request; finished shards stay in the store, run again to go on")
        piece = self._next_piece()
        if piece is None or not self.crew.window.book(piece.held_bytes, lambda: self.is_over):
            return None
        with self._booked_until_failure(piece):
            if isinstance(piece, Measure | Gauge):
                with self.changed:
                    self.missing[piece.key] = self.missing.get(piece.key, 0) + 1
            data, give_back = self._fetch(piece, lane)
        number = self.taken
        self.taken += 1
        return number, piece, data, give_back

    def _fetch(self, piece: Piece, lane: Lane) -> tuple[memoryview | Stored, Callable[[], None]]:
        """What a piece is made of, and what is to be called when it is not needed any more."""
        if isinstance(piece, Gauge | Decoding):
            return piece.fetch(self.read, self.peek), _nothing
        span = piece.span
        if isinstance(piece, Measure | Encode) and not lane.needs_staging:
            loan = self.lend(span.shard, span.begin, span.length)
            if loan is not None:
                return loan.view, loan.give_back
        data = lane.staging(span.length)
        if span.length:
            self.read(span.shard, span.begin, data)
        return data, _nothing

    def _next_piece(self) -> Piece | None:
        """The next piece; None when there is none, or while what comes twice is put off."""
        for piece in self.pieces:
            if not isinstance(piece, Twice):
                return piece
            if not self._announce(piece):
                self.put_off = piece
                return None
        return None

    @contextmanager
    def _booked_until_failure(self, piece: Piece) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.crew.window.give_back(piece.held_bytes)
            raise

    def _copy_all(self, piece: Copies, lane: Lane, data: memoryview) -> Callable[[], None]:
        looked = [
            self._look_at(number, lane, memoryview(bytearray(data[begin:end])))  # where it lies, it may not be aligned
            for number, begin, end in piece.parts
        ]

        def write() -> None:
            for (number, begin, end), found in zip(piece.parts, looked, strict=True):
                self.output.put(number, data[begin:end], found, is_last=True)

        return write

    def _work(self, piece: Piece, lane: Lane, data: memoryview | Stored) -> Callable[[], None]:
        """Do the arithmetic of a piece; returns what writes its result. A bad weight raises there, in its turn."""
        try:
            if isinstance(data, Stored):
                return self._decode(piece, lane, data)
            return self._work_on_bytes(piece, lane, data)
        except NonFiniteWeight as error:
            self._give_up()
            return _raiser(error)

    def _work_on_bytes(self, piece: Piece, lane: Lane, data: memoryview) -> Callable[[], None]:
        if isinstance(piece, Copy):
            found = self._look_at(piece.unit, lane, data)
            return lambda: self.output.put(piece.unit, data, found, is_last=piece.is_last)
        if isinstance(piece, Copies):
            return self._copy_all(piece, lane, data)
        if isinstance(piece, Measure):
            self._merge(piece.key, piece.work(lane, data))
            return _nothing
        if isinstance(piece, Encode):
            return self._encode(piece, lane, data)
        if isinstance(piece, Slab):
            return self._encode_slab(piece, lane, data)
        raise TypeError(f"{piece} reads more than bytes")

    def _decode(self, piece: Piece, lane: Lane, stored: Stored) -> Callable[[], None]:
        if isinstance(piece, Gauge):
            extent = piece.work(lane, stored, self.crew.block)
            traits = Traits.of(piece.decode, stored, piece.rows)
            with self.changed:
                self.traits[piece.key] = self.traits.get(piece.key, Traits()).merge(traits)
            self._merge(piece.key, extent)
            return _nothing
        if not isinstance(piece, Decoding):
            raise TypeError(f"{piece} reads plain bytes")
        whole = None if piece.key is None else self._extent(piece.key)
        if piece.key is not None and whole is None:
            return _nothing  # a piece before this one fails the job
        traits = self.traits.get(piece.key or "", Traits())
        blocks = piece.work(lane, stored, whole, traits, self.crew.block, self.importance_of)
        return self._writes(blocks, {}, lane, whole or Extent())

    def _look_at(self, number: int, lane: Lane, data: memoryview) -> tuple[int, int] | None:
        """NaN and Inf in bytes that are copied; they are told and kept."""
        dtype = self.output.layout.units[number].tensor.dtype
        return lane.count_nonfinite(data, dtype) if dtype in COMPUTABLE and data.nbytes else None

    def _merge(self, key: str, extent: Extent) -> None:
        with self.changed:
            self.extents[key] = self.extents.get(key, Extent()).merge(extent)
            self.missing[key] -= 1
            self.changed.notify_all()

    def _extent(self, key: str) -> Extent | None:
        """The extent under a key once every piece of it is measured; None when the job is over before."""
        with self.changed:
            while self.missing[key]:
                if self.is_over:
                    return None
                self.changed.wait()
            return self.extents[key]

    def _encode(self, piece: Encode, lane: Lane, data: memoryview) -> Callable[[], None]:
        whole = None if piece.key is None else self._extent(piece.key)
        if piece.key is not None and whole is None:
            return _nothing  # a piece before this one fails the job
        block = piece.work(lane, data, whole, self.importance_of)
        scale = lambda: lane.global_scale(whole or Extent())  # noqa: E731 - made where it is needed
        return lambda: self.output.put_block(piece.unit, block, scale, is_last=piece.is_last)

    def _encode_slab(self, piece: Slab, lane: Lane, data: memoryview) -> Callable[[], None]:
        whole, blocks = piece.work(lane, data, self.crew.block, self.importance_of)
        copied = {n: self._look_at(n, lane, block) for n, _, block in blocks if not isinstance(block, EncodedBlock)}
        return self._writes(blocks, copied, lane, whole)

    def _writes(
        self, blocks: Sequence[SlabBlock], looked: Mapping[int, tuple[int, int] | None], lane: Lane, whole: Extent
    ) -> Callable[[], None]:
        def write() -> None:
            for number, is_last, block in blocks:
                if isinstance(block, EncodedBlock):
                    self.output.put_block(number, block, lambda: lane.global_scale(whole), is_last=is_last)
                else:
                    self.output.put(number, block, looked.get(number), is_last=is_last)

        return write

    def _hand_in(self, number: int, result: _Result) -> None:
        """Write a result if it is its turn, and those that waited for it; leave it to another thread if not."""
        with self.changed:
            self.waiting[number] = result
            if self.is_writing or self.written not in self.waiting:
                return
            self.is_writing = True
        while True:
            with self.changed:
                following = self.waiting.pop(self.written, None)
                if following is None:
                    self.is_writing = False
                    return
                self.written += 1
            try:
                following.write()
            finally:
                self._release(following)

    def _release(self, result: _Result) -> None:
        self.crew.window.give_back(result.booked)
        self.crew.give_lane(result.lane)

    def close(self) -> None:
        """Give back what pieces hold that were never written."""
        for result in self.waiting.values():
            self._release(result)
        self.waiting.clear()


def _nothing() -> None:
    """Write nothing."""


def _raiser(error: NonFiniteWeight) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail
