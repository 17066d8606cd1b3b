"""Shards through the crew: bytes, order of reads, memory in hand, and what failures leave behind."""

from __future__ import annotations

import errno
import io
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmill.core.dtypes import BITS, scale_dtype_for
from shardmill.core.layout import Unit, row_spans
from shardmill.core.plan import ShardPlan
from shardmill.core.planner import build_plan
from shardmill.core.recipe import parse_recipe
from shardmill.core.scheme import Scheme
from shardmill.core.statistics import Extent
from shardmill.errors import Interrupted, NonFiniteWeight
from shardmill.kernels import pieces, reference
from shardmill.kernels import shard as shard_module
from shardmill.kernels.crew import Crew, Window
from shardmill.kernels.lanes import BlockSize, CpuLane, EncodedBlock, TorchLane
from shardmill.kernels.shard import Loan, encode_shard
from shardmill.storage.blocks import seams_of
from strategies import Table, checkpoint_of

KIB = 1024
LAYOUTS = {"rows": "qwen3_moe", "columns": "llama4", "interleaved": "gpt_oss"}
SCHEMES: list[dict[str, Any]] = [
    {"scheme": "FP8_DYNAMIC"},
    {"scheme": "FP8_BLOCK"},
    {"scheme": "W8A8"},
    {"scheme": "W3A16", "group_size": 32},
    {"scheme": "W4A16_ASYM", "group_size": 32},
    {"scheme": "NVFP4A16"},
    {"scheme": "MXFP4"},
    {"scheme": {"weights": {"num_bits": 4, "strategy": "tensor", "symmetric": False}}},
]


class Source:
    """Shards in memory: reproducible values under the headers of a plan, and a note of every read."""

    def __init__(self, shards: tuple[ShardPlan, ...], seed: int = 0) -> None:
        self.data = {shard.name: bytearray(shard.size) for shard in shards}
        self.reads: list[tuple[str, int, int]] = []
        self.on_read: Callable[[str, int], None] = lambda _name, _offset: None
        self._readers = threading.Lock()
        generator, noise = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        for shard in shards:
            for tensor in shard.tensors:
                spec, begin = tensor.spec, shard.data_start + tensor.spec.begin
                if spec.dtype in ("BF16", "F16", "F32"):
                    values = torch.randn(spec.shape, generator=generator).to(reference.DTYPES[spec.dtype]) * 0.05
                    self.data[shard.name][begin : begin + spec.nbytes] = bytes(reference.to_bytes(values))
                else:
                    self.data[shard.name][begin : begin + spec.nbytes] = noise.bytes(spec.nbytes)

    def read(self, name: str, offset: int, view: memoryview) -> None:
        assert self._readers.acquire(blocking=False), "two threads read at once"
        try:
            self.on_read(name, offset)
            self.reads.append((name, offset, len(view)))
            view[:] = self.data[name][offset : offset + len(view)]
        finally:
            self._readers.release()

    def spoil(self, shard: ShardPlan, tensor: str, element: int) -> None:
        """Put a NaN into a BF16 tensor."""
        spec = next(t.spec for t in shard.tensors if t.spec.name == tensor)
        struct.pack_into("<H", self.data[shard.name], shard.data_start + spec.begin + 2 * element, 0x7FC0)


def plans(
    tables: list[Table], groups: list[dict[str, Any]], config: dict[str, Any] | None = None
) -> tuple[ShardPlan, ...]:
    recipe = parse_recipe({"groups": groups} if len(groups) > 1 else groups[0])
    plan = build_plan(checkpoint_of(tables, config), recipe)
    assert not [problem for problem in plan.problems if problem.kind != "pattern-unmatched"]
    return plan.shards


def by_hand(monkeypatch: pytest.MonkeyPatch, crew: Crew) -> None:
    monkeypatch.setattr(shard_module, "crew_of", lambda _device, is_torch: crew)  # noqa: ARG005 - given by name


def new_crew(threads: int = 2, block: int = 4 * KIB, new_lane: Callable[[], Any] = CpuLane) -> Crew:
    return Crew(threads, BlockSize(block), new_lane)


def encoded(shard: ShardPlan, source: Source, **more: Any) -> bytes:
    written = bytearray()
    encode_shard(shard, source.read, written.extend, **more)
    return bytes(written)


class SlowLane(CpuLane):
    """A lane whose arithmetic takes a random time."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = np.random.default_rng(seed)

    def encode(self, *args: Any, **more: Any) -> EncodedBlock:
        time.sleep(self._random.random() * 0.002)
        return super().encode(*args, **more)

    def measure(self, *args: Any, **more: Any) -> Extent:
        time.sleep(self._random.random() * 0.002)
        return super().measure(*args, **more)


# The oracle: unit by unit, every tensor in one block


def oracle(shard: ShardPlan, source: Source) -> bytes:
    """Bytes of the data section, by the reference kernels and without any pieces."""
    layout = shard.layout()
    fused = {tensor.spec.name: tensor.fused for tensor in shard.tensors}
    found: dict[str, bytes] = {}
    for unit in layout.units:
        rows, whole = unit_rows(shard, source, unit)
        if unit.scheme is None:
            found[unit.outputs[0].name] = bytes(reference.to_bytes(rows))
            continue
        if unit.scheme.weights.strategy == "tensor":
            whole = reference.measure(rows)
        for ref in fused[unit.tensor.name]:
            data = bytearray(source.data[ref.shard])[ref.data_start + ref.spec.begin : ref.data_start + ref.spec.end]
            whole = whole.merge(reference.measure(reference.from_buffer(data, ref.spec.dtype, ref.spec.shape)))
        found |= {f"{unit.module}.{param}": data for param, data in quantized(unit, unit.scheme, rows, whole).items()}
    return b"".join(found[placed.spec.name] for placed in layout.placed)


def unit_rows(shard: ShardPlan, source: Source, unit: Unit) -> tuple[torch.Tensor, Extent]:
    """Rows of a unit, and the extent of all that is stored around them: of gate and up, for a stack."""
    begin = shard.data_start + unit.begin
    if unit.tensor.begin == unit.begin and unit.rows == unit.cols == 1 and unit.slab == (1, 1):
        data = source.data[shard.name][begin : begin + unit.tensor.nbytes]
        return reference.from_buffer(data, "U8", (len(data),)), Extent()
    height, width = unit.slab
    data = source.data[shard.name][begin : begin + height * width * BITS[unit.tensor.dtype] // 8]
    slab = reference.from_buffer(data, unit.tensor.dtype, (height, width))
    matrix = slab.t() if unit.transposed else slab
    whole = reference.measure(slab) if slab.is_floating_point() else Extent()
    return matrix[unit.first : unit.first + unit.rows * unit.step : unit.step].contiguous(), whole


def quantized(unit: Unit, scheme: Scheme, rows: torch.Tensor, whole: Extent) -> dict[str, bytes]:
    args = scheme.weights
    stored = reference.encode(
        rows, args, format=scheme.format, scale_dtype=scale_dtype_for(unit.tensor.dtype), whole=whole
    ).tensors
    found = {param: bytes(reference.to_bytes(tensor)) for param, tensor in stored.items()}
    found["weight_shape"] = struct.pack("<2q", unit.rows, unit.cols)
    found["weight_global_scale"] = bytes(reference.to_bytes(reference.global_scale(whole)))
    return {spec.param: found[spec.param] for spec in unit.outputs}


# Bytes


@st.composite
def checkpoints_of_any_kind(draw: st.DrawFn) -> tuple[list[Table], list[dict[str, Any]], dict[str, Any]]:
    """One or two shards with weights, copies, zero-size tensors, scalars, ragged sizes, fused sets and stacks."""
    groups = [dict(draw(st.sampled_from(SCHEMES)), targets=f"re:.*layers.{n}.*") for n in range(3)]
    dtype = draw(st.sampled_from(["BF16", "F16", "F32"]))
    hidden, rows = 32 * draw(st.integers(1, 4)), st.integers(1, 200)
    table: dict[str, tuple[str, tuple[int, ...]]] = {"x.scalar": ("F32", ()), "x.empty": ("BF16", (0, 3))}
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        table[f"{prefix}.self_attn.o_proj.weight"] = (dtype, (draw(rows), hidden))
        for leaf in draw(st.sets(st.sampled_from("qkv"))):
            table[f"{prefix}.self_attn.{leaf}_proj.weight"] = (dtype, (draw(rows), hidden))
        table[f"{prefix}.norm.weight"] = (dtype, (draw(rows),))
        table[f"{prefix}.codes"] = ("U8", (draw(st.integers(0, 5000)),))
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    width, experts = 32 * draw(st.integers(1, 3)), draw(st.integers(1, 3))
    shapes = {"gate_up_proj": (2 * width, 256), "down_proj": (256, width)}
    for leaf, shape in shapes.items():
        name = f"model.layers.0.mlp.experts.{leaf}"
        table[name] = (dtype, (experts, *(shape if layout == "rows" else shape[::-1])))
        if draw(st.booleans()):
            table[f"{name}_bias"] = (dtype, (experts, shape[0]))
    names = draw(st.permutations(sorted(table)))
    cut = draw(st.integers(0, len(names)))
    parts = [{name: table[name] for name in part} for part in (names[:cut], names[cut:]) if part]
    config = {"model_type": LAYOUTS[layout], "hidden_size": 256, "moe_intermediate_size": width}
    return list(parts), groups, config


@given(
    checkpoint=checkpoints_of_any_kind(),
    block=st.integers(1, 40),
    threads=st.integers(1, 8),
    is_slow=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(max_examples=30)
def test_a_shard_has_the_bytes_of_the_oracle(
    checkpoint: tuple[list[Table], list[dict[str, Any]], dict[str, Any]],
    block: int,
    threads: int,
    is_slow: bool,  # noqa: FBT001 - Hypothesis passes it by name
    seed: int,
) -> None:
    shards = plans(*checkpoint)
    source = Source(shards, seed)
    crew = new_crew(threads, block * KIB, (lambda: SlowLane(seed)) if is_slow else CpuLane)
    with pytest.MonkeyPatch.context() as patch:
        by_hand(patch, crew)
        patch.setattr(pieces, "COPY_BYTES", block * KIB)
        for shard in shards:
            assert encoded(shard, source) == oracle(shard, source)
    assert crew.window._booked == 0


def test_the_oracles_shards_are_of_every_kind() -> None:
    # What the property above promises to meet: slabs, first passes, partners elsewhere, ragged places.
    table: Table = {
        "model.layers.0.self_attn.q_proj.weight": ("BF16", (3, 32)),
        "model.layers.0.mlp.experts.gate_up_proj": ("BF16", (2, 256, 64)),
    }
    other: Table = {"model.layers.0.self_attn.k_proj.weight": ("BF16", (5, 32))}
    config = {"model_type": "gpt_oss", "hidden_size": 256, "moe_intermediate_size": 32}
    first, _ = plans([table, other], [{"scheme": "NVFP4A16"}], config)
    found = [
        piece
        for piece in pieces.cut(first, first.layout().units, BlockSize(KIB))
        if not isinstance(piece, pieces.Twice)
    ]
    assert {type(piece) for piece in found} == {pieces.Measure, pieces.Encode, pieces.Slab}
    assert {piece.span.shard for piece in found if isinstance(piece, pieces.Measure)} == set(first.sources)
    assert len(first.sources) == 2


# Reads


def weights(count: int, rows: int = 64, cols: int = 64) -> Table:
    return {f"model.layers.{n}.self_attn.o_proj.weight": ("BF16", (rows, cols)) for n in range(count)}


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_without_first_passes_every_byte_is_read_once_and_in_order(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    table: Table = {**weights(4, 96), "model.norm.weight": ("BF16", (4096,)), "x.codes": ("U8", (12_000,))}
    (shard,) = plans([table], [{"scheme": "FP8_DYNAMIC"}])
    source = Source((shard,))
    by_hand(monkeypatch, new_crew(threads, 4 * KIB, lambda: SlowLane(threads)))
    monkeypatch.setattr(pieces, "COPY_BYTES", 4 * KIB)
    assert encoded(shard, source) == oracle(shard, source)
    ends = [shard.data_start, *(offset + length for _, offset, length in source.reads)]
    assert [offset for _, offset, _ in source.reads] == ends[:-1]
    assert ends[-1] == shard.size
    assert len(source.reads) > 12


def test_a_fused_set_is_read_at_most_twice_and_measured_right_before_it_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table: Table = {
        f"model.layers.{n}.self_attn.{leaf}_proj.weight": ("BF16", (64, 64)) for n in "01" for leaf in "qkv"
    }
    (shard,) = plans([table], [{"scheme": "NVFP4A16"}])
    source = Source((shard,))
    by_hand(monkeypatch, new_crew())
    encoded(shard, source)
    begins = [(offset - shard.data_start) // (64 * 64 * 2) for _, offset, _ in source.reads]
    first, second = ([0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5])
    assert (sorted(begins[:6]), begins[6:12]) == (first, first)
    assert (sorted(begins[12:18]), begins[18:]) == (second, second)
    assert sum(length for *_, length in source.reads) == 2 * (shard.size - shard.data_start)


# Memory


class Watched(Window):
    """A window that notes the most that was booked."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        self.peak = 0
        self.bookings = 0

    def book(self, nbytes: int, is_over: Callable[[], bool]) -> bool:
        found = super().book(nbytes, is_over)
        with self._changed:
            self.peak = max(self.peak, self._booked)
            self.bookings += 1
        return found


def test_what_is_in_hand_stays_below_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    crew, limit = new_crew(6, 4 * KIB, lambda: SlowLane(1)), 40 * KIB
    crew.window = watched = Watched(limit)
    by_hand(monkeypatch, crew)
    (shard,) = plans([weights(6, 256)], [{"scheme": "NVFP4A16"}])
    source = Source((shard,))
    assert encoded(shard, source) == oracle(shard, source)
    assert 8 * KIB < watched.peak <= limit
    assert watched.bookings > 50
    assert watched._booked == 0


def test_a_slab_larger_than_the_window_is_alone_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = new_crew(4)
    crew.window = watched = Watched(10 * KIB)
    by_hand(monkeypatch, crew)
    table: Table = {"model.layers.0.mlp.experts.gate_up_proj": ("BF16", (5, 256, 64)), **weights(2)}
    config = {"model_type": "gpt_oss", "hidden_size": 256, "moe_intermediate_size": 32}
    (shard,) = plans([table], [{"scheme": "MXFP4"}], config)
    source = Source((shard,))
    assert encoded(shard, source) == oracle(shard, source)
    assert watched.peak == 2 * 256 * 64 * 2


def test_many_small_tensors_do_not_leave_many_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = new_crew(2, new_lane=lambda: SlowLane(3))
    by_hand(monkeypatch, crew)
    table = {**weights(3), **{f"x.{n}.bias": ("F32", (2,)) for n in range(300)}}
    (shard,) = plans([table], [{"scheme": "FP8_DYNAMIC"}])
    source = Source((shard,))
    assert encoded(shard, source) == oracle(shard, source)
    assert 1 <= len(crew._lanes) <= 6


@pytest.mark.parametrize("held", [0, 100, 1 << 20])
@pytest.mark.parametrize("scheme", ["W4A16_ASYM", "NVFP4A16"])
def test_scales_that_wait_in_a_file_are_the_same(monkeypatch: pytest.MonkeyPatch, held: int, scheme: str) -> None:
    monkeypatch.setattr(shard_module, "HELD_BYTES", held)
    monkeypatch.setattr(shard_module, "_COPY_OUT_BYTES", 77)
    by_hand(monkeypatch, new_crew())
    files: list[IO[bytes]] = []

    def new_scratch() -> IO[bytes]:
        files.append(tempfile.TemporaryFile())  # noqa: SIM115 - whom it is given to closes it
        return files[-1]

    # 333 rows: some scales break the alignment, so whole weights wait for their place
    (shard,) = plans([{"a.o_proj.weight": ("BF16", (333, 128)), **weights(2, 64, 128)}], [{"scheme": scheme}])
    source = Source((shard,))
    assert encoded(shard, source, new_scratch=new_scratch) == oracle(shard, source)
    assert bool(files) == (held < 1 << 20)
    assert all(file.closed for file in files)


# Failures


def check_usable(crew: Crew) -> None:
    """Nothing stays in the crew, and the next shard is worked on as if nothing had been."""
    assert crew.window._booked == 0
    assert crew._shifts == []
    (shard,) = plans([weights(2)], [{"scheme": "NVFP4A16"}])
    source = Source((shard,))
    assert encoded(shard, source) == oracle(shard, source)
    assert crew.window._booked == 0


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "NVFP4A16"])
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("after", [0, 1, 7, 20])
def test_a_failed_read_ends_the_shard_and_leaves_nothing_booked(
    monkeypatch: pytest.MonkeyPatch, scheme: str, threads: int, after: int
) -> None:
    crew = new_crew(threads, new_lane=lambda: SlowLane(after))
    by_hand(monkeypatch, crew)
    (shard,) = plans([weights(12)], [{"scheme": scheme}])
    source, error = Source((shard,)), OSError(errno.EIO, "broken disk")

    def fail(_name: str, _offset: int) -> None:
        if len(source.reads) == after:
            raise error

    source.on_read = fail
    with pytest.raises(OSError, match="broken disk") as caught:
        encoded(shard, source)
    assert caught.value is error
    assert len(source.reads) == after
    check_usable(crew)


def test_a_failed_shard_closes_its_scratch_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_module, "HELD_BYTES", 0)
    by_hand(monkeypatch, new_crew(1))
    (shard,) = plans([{"a.o_proj.weight": ("BF16", (333, 128)), **weights(2)}], [{"scheme": "NVFP4A16"}])
    source, files = Source((shard,)), list[IO[bytes]]()

    def new_scratch() -> IO[bytes]:
        files.append(tempfile.TemporaryFile())  # noqa: SIM115 - whom it is given to closes it
        return files[-1]

    def fail(_name: str, _offset: int) -> None:
        if files:
            raise OSError(errno.EIO, "broken disk")

    source.on_read = fail
    with pytest.raises(OSError, match="broken disk"):
        encoded(shard, source, new_scratch=new_scratch)
    assert files
    assert all(file.closed for file in files)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_failed_write_ends_the_shard_and_leaves_nothing_booked(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    crew = new_crew(threads, new_lane=lambda: SlowLane(2))
    by_hand(monkeypatch, crew)
    (shard,) = plans([weights(12)], [{"scheme": "FP8_DYNAMIC"}])
    sink, writes = io.BytesIO(), []

    def write(view: memoryview) -> None:
        writes.append(len(view))
        if len(writes) >= 5:
            raise OSError(errno.ENOSPC, "disk is full")
        sink.write(view)

    source = Source((shard,))
    with pytest.raises(OSError, match="disk is full"):
        encode_shard(shard, source.read, write)
    assert len(writes) == 5
    assert oracle(shard, source).startswith(sink.getvalue())
    check_usable(crew)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_request_to_stop_ends_the_shard_between_two_pieces(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    crew = new_crew(threads, new_lane=lambda: SlowLane(2))
    by_hand(monkeypatch, crew)
    (shard,) = plans([weights(12)], [{"scheme": "NVFP4A16"}])
    source = Source((shard,))
    with pytest.raises(Interrupted):
        encoded(shard, source, should_stop=lambda: len(source.reads) >= 5)
    assert len(source.reads) == 5
    check_usable(crew)


class Waiting(CpuLane):
    """A lane that is slow with bad weights, the slower the earlier they stand; others do not wait."""

    delays: tuple[float, ...] = ()
    met = 0
    lock = threading.Lock()

    def first_nonfinite(self, *args: Any) -> tuple[int, tuple[int, ...]] | None:
        with self.lock:
            number, Waiting.met = self.met, self.met + 1
        if number < len(self.delays):
            time.sleep(self.delays[number])
        return super().first_nonfinite(*args)


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "NVFP4A16"])
@pytest.mark.parametrize("delays", [(0.05, 0.0, 0.0), (0.0, 0.05, 0.0), (0.05, 0.02, 0.0)])
def test_the_first_bad_weight_is_reported_whichever_thread_is_first(
    monkeypatch: pytest.MonkeyPatch, scheme: str, delays: tuple[float, ...]
) -> None:
    monkeypatch.setattr(Waiting, "delays", delays)
    monkeypatch.setattr(Waiting, "met", 0)
    crew = new_crew(4, new_lane=Waiting)
    by_hand(monkeypatch, crew)
    (shard,) = plans([weights(8, 32)], [{"scheme": scheme}])
    source = Source((shard,))
    for layer in (3, 4, 5):
        source.spoil(shard, f"model.layers.{layer}.self_attn.o_proj.weight", 70)
    with pytest.raises(NonFiniteWeight, match=r"layers\.3\..*first at index \[1, 6\]"):
        encoded(shard, source)
    check_usable(crew)


def test_a_bad_weight_does_not_hide_what_stands_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # The later one is found while the measures that the earlier weight waits for are still in work.
    crew = new_crew(6, new_lane=lambda: SlowLane(5))
    by_hand(monkeypatch, crew)
    (shard,) = plans([weights(6, 256)], [{"scheme": "NVFP4A16"}])
    for first in range(5):
        source = Source((shard,))
        source.spoil(shard, f"model.layers.{first}.self_attn.o_proj.weight", 64 * 255)
        source.spoil(shard, f"model.layers.{first + 1}.self_attn.o_proj.weight", 0)
        with pytest.raises(NonFiniteWeight, match=rf"layers\.{first}\..*first at index \[255, 0\]"):
            encoded(shard, source)
        check_usable(crew)


def test_shards_side_by_side_share_a_small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = new_crew(3, new_lane=lambda: SlowLane(4))
    crew.window = watched = Watched(24 * KIB)
    by_hand(monkeypatch, crew)
    work = [
        *plans([weights(1, 500)], [{"scheme": "NVFP4A16"}]),
        *plans([weights(20, 32)], [{"scheme": "FP8_DYNAMIC"}]),
        *plans([weights(3, 130)], [{"scheme": "W4A16_ASYM", "group_size": 32}]),
    ]
    with ThreadPoolExecutor(len(work)) as pool:
        found = list(pool.map(lambda shard: encoded(shard, Source((shard,))), work))
    assert found == [oracle(shard, Source((shard,))) for shard in work]
    assert 0 < watched.peak <= 24 * KIB
    check_usable(crew)


# What is lent


class Lender:
    """Lends what begins where `lends` says; spoils it when it is given back."""

    def __init__(self, source: Source, lends: Callable[[int], bool]) -> None:
        self.source, self.lends = source, lends
        self.ended: list[int] = []
        self.begun: list[int] = []

    def lend(self, name: str, offset: int, nbytes: int) -> Loan | None:
        if not self.lends(offset):
            return None
        data = bytearray(nbytes)
        self.source.read(name, offset, memoryview(data))
        self.begun.append(offset)

        def give_back() -> None:
            self.ended.append(offset)
            data[:] = b"\xff" * nbytes

        return Lent(memoryview(data).toreadonly(), give_back)


@dataclass(frozen=True)
class Lent:
    view: memoryview
    give_back: Callable[[], None]


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("scheme", ["NVFP4A16", "FP8_DYNAMIC", "W8A8", "FP8_BLOCK", "W4A16"])
def test_lent_bytes_give_the_same_and_are_given_back(scheme: str, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    by_hand(monkeypatch, new_crew())
    group = {"scheme": scheme} | ({"group_size": 32} if scheme == "W4A16" else {})
    [shard] = plans([nvfp4_table()], [group], {"model_type": "llama"})
    lender = Lender(Source((shard,)), lambda offset: offset // KIB % every == 0)
    assert encoded(shard, lender.source, lend=lender.lend) == oracle(shard, Source((shard,)))
    assert sorted(lender.begun) == sorted(lender.ended)
    assert len(lender.begun) > 4


@pytest.mark.parametrize("block", [3 * KIB, 40 * KIB])
@pytest.mark.parametrize("most", [20 * KIB, 50 * KIB])
@pytest.mark.parametrize("scheme", ["NVFP4A16", "FP8_DYNAMIC", "FP8_BLOCK", "W4A16"])
def test_row_blocks_keep_to_one_side_of_seams(
    scheme: str, most: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_hand(monkeypatch, new_crew(block=block))
    group = {"scheme": scheme} | ({"group_size": 32} if scheme == "W4A16" else {})
    table = {
        f"a.{n}.weight": ("BF16", (rows, cols)) for n, (rows, cols) in enumerate([(333, 128), (512, 96), (64, 64)])
    }
    [shard] = plans([table], [group])
    rows = row_spans(shard.layout().units, shard.data_start)
    seams = seams_of(shard.size, most, rows)
    asked: list[tuple[int, int]] = []

    def lend(_name: str, begin: int, nbytes: int) -> None:
        asked.append((begin, begin + nbytes))

    source = Source((shard,))
    assert encoded(shard, source, lend=lend, seams=seams) == oracle(shard, source)
    assert any(span.begin < seam < span.end for seam in seams for span in rows)
    steps = {span.step for span in rows if 2 * span.step >= most}
    assert bool(steps) == (scheme == "FP8_BLOCK"), "steps that are too long for these blocks"
    if not steps:
        assert not [(begin, end) for begin, end in asked if any(begin < seam < end for seam in seams)]


def test_lent_bytes_are_given_back_where_a_weight_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    by_hand(monkeypatch, new_crew())
    shard = nvfp4()
    lender = Lender(Source((shard,)), lambda _offset: True)
    lender.source.spoil(shard, shard.tensors[-1].spec.name, 7)
    with pytest.raises(NonFiniteWeight):
        encoded(shard, lender.source, lend=lender.lend)
    assert sorted(lender.begun) == sorted(lender.ended)


def test_a_lane_with_memory_of_its_own_borrows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    size = BlockSize(4 * KIB)
    by_hand(monkeypatch, new_crew(new_lane=lambda: TorchLane("cpu", size)))
    shard = nvfp4()
    lender = Lender(Source((shard,)), lambda _offset: True)
    assert encoded(shard, lender.source, lend=lender.lend) == oracle(shard, Source((shard,)))
    assert lender.begun == []


# What is read twice


class Room:
    """Puts off every announcement a few times; remembers it."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.left = times
        self.heard: list[list[tuple[int, int]]] = []

    def announce(self, ranges: Sequence[tuple[int, int]]) -> bool:
        if not ranges:
            return True  # only asked whether to read on
        self.left -= 1
        if self.left >= 0:
            return False
        self.left = self.times
        self.heard.append(list(ranges))
        return True


def nvfp4_table(count: int = 2) -> Table:
    return {
        f"model.layers.{layer}.mlp.{leaf}_proj.weight": ("BF16", (64, 64))
        for layer in range(count)
        for leaf in ("down", "gate", "up")
    }


def nvfp4(count: int = 2) -> ShardPlan:
    [shard] = plans([nvfp4_table(count)], [{"scheme": "NVFP4A16"}], {"model_type": "llama"})
    return shard


@pytest.mark.parametrize("times", [0, 1, 3])
def test_what_is_read_twice_is_announced_before_and_waits_until_it_is_heard(
    times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_hand(monkeypatch, new_crew())
    shard, room = nvfp4(), Room(times)
    source = Source((shard,))
    read_before: list[int] = []
    source.on_read = lambda _name, _offset: read_before.append(len(room.heard))
    assert encoded(shard, source, announce=room.announce) == encoded(shard, Source((shard,)))
    twice = [span for ranges in room.heard for span in ranges]
    reads = [(offset, offset + length) for _, offset, length in source.reads]
    for begin, end in twice:
        inside = [read for read in reads if begin <= read[0] < end]
        assert sum(read[1] - read[0] for read in inside) == 2 * (end - begin)
    assert sum(end - begin for begin, end in twice) == sum(tensor.spec.nbytes for tensor in shard.tensors)
    assert read_before[0] == 1


def test_a_shard_that_is_put_off_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    by_hand(monkeypatch, new_crew())
    shard, asked = nvfp4(), list[int]()

    def put_off(_ranges: Sequence[tuple[int, int]]) -> bool:
        asked.append(0)
        return False

    with pytest.raises(Interrupted):
        encoded(shard, Source((shard,)), announce=put_off, should_stop=lambda: len(asked) > 2)
