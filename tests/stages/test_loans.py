"""Shards that are quantized where they lie in blocks of a remote file: same bytes, and nobody waits for ever."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from shardmill.core.layout import row_spans
from shardmill.core.plan import ShardPlan
from shardmill.core.planner import build_plan
from shardmill.core.recipe import uniform
from shardmill.kernels import shard as shard_module
from shardmill.kernels.crew import Crew
from shardmill.kernels.lanes import BlockSize, CpuLane
from shardmill.kernels.shard import encode_shard
from shardmill.stages.quantize import Sources
from shardmill.storage.blocks import BlockReader, KeptRoom
from shardmill.storage.folder import FileIdentity, Loan
from shardmill.storage.local import LocalFolder
from shardmill.storage.source import SourceFolder
from strategies import Table, checkpoint_of

KIB = 1024
ROOM = 64 * KIB


def shard_plans(count: int, scheme: str) -> tuple[ShardPlan, ...]:
    """Shards with a fused set each, a weight of its own, and something to copy."""
    tables: list[Table] = [
        {
            f"model.layers.{layer}.mlp.gate_proj.weight": ("BF16", (96, 128)),
            f"model.layers.{layer}.mlp.up_proj.weight": ("BF16", (96, 128)),
            f"model.layers.{layer}.mlp.down_proj.weight": ("BF16", (128, 96)),
            f"model.layers.{layer}.input_layernorm.weight": ("BF16", (33,)),
        }
        for layer in range(count)
    ]
    plan = build_plan(checkpoint_of(tables, {"model_type": "llama"}), uniform(scheme))
    assert not plan.problems
    return plan.shards


def content(shard: ShardPlan, seed: int) -> bytes:
    """A file for a shard, all of whose weights are finite."""
    bits = np.random.default_rng(seed).integers(0, 1 << 16, -(-shard.size // 2), dtype=np.uint16)
    if shard.data_start % 2:
        raise AssertionError("weights would not be aligned")
    return (bits & np.uint16(0xBFFF)).tobytes()[: shard.size]


def encoded(shard: ShardPlan, data: bytes) -> bytes:
    """The bytes that plain reads give."""

    def read(_name: str, offset: int, view: memoryview) -> None:
        view[:] = data[offset : offset + len(view)]

    written = bytearray()
    encode_shard(shard, read, written.extend)
    return bytes(written)


class Remote:
    """A shard that arrives in blocks from a server which takes its time."""

    def __init__(self, shard: ShardPlan, data: bytes, room: KeptRoom, blocks: int, pool: ThreadPoolExecutor) -> None:
        self.shard, self.data, self.pool = shard, data, pool
        self.times = np.random.default_rng(len(data))
        identity = FileIdentity(url=f"s3://b/{shard.name}", version="1", size=len(data))
        self.reader = BlockReader(identity, self.submit, block_bytes=18 * KIB, blocks=blocks, room=room)
        self.reader.expect_once(announces=True, rows=row_spans(shard.layout().units, shard.data_start))
        self.lent = 0

    def submit(self, start: int, view: memoryview) -> Future[None]:
        pause = self.times.random() * 2e-3

        def fill() -> None:
            time.sleep(pause)
            view[:] = self.data[start : start + len(view)]

        return self.pool.submit(fill)

    def read(self, _name: str, offset: int, view: memoryview) -> None:
        self.reader.read_into(offset, view)

    def lend(self, _name: str, offset: int, nbytes: int) -> Loan | None:
        loan = self.reader.lend(offset, nbytes)
        self.lent += loan is not None
        return loan

    def encode(self) -> bytes:
        written = bytearray()
        with self.reader as reader:
            encode_shard(
                self.shard,
                self.read,
                written.extend,
                announce=reader.announce,
                lend=self.lend,
                seams=reader.seams,
            )
        return bytes(written)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("scheme", ["NVFP4A16", "FP8_DYNAMIC"])
def test_shards_that_share_a_crew_and_a_room_give_the_same_bytes(
    threads: int, blocks: int, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = [(shard, content(shard, seed)) for seed, shard in enumerate(shard_plans(3, scheme))]
    expected = [encoded(shard, data) for shard, data in work]
    crew = Crew(threads, BlockSize(2 * KIB), CpuLane)
    monkeypatch.setattr(shard_module, "crew_of", lambda _device, is_torch: crew)  # noqa: ARG005 - given by name
    room = KeptRoom(ROOM)
    with ThreadPoolExecutor(4) as server, ThreadPoolExecutor(len(work)) as pool:
        remotes = [Remote(shard, data, room, blocks, server) for shard, data in work]
        found = [future.result(timeout=60) for future in [pool.submit(remote.encode) for remote in remotes]]
    assert found == expected
    assert all(remote.lent for remote in remotes)
    assert room.lent == 0


def test_a_loan_is_hashed_and_reported_and_ends_where_its_report_fails(tmp_path: Path) -> None:
    (shard,) = shard_plans(1, "FP8_DYNAMIC")
    (tmp_path / shard.name).write_bytes(content(shard, 0))
    data = memoryview((tmp_path / shard.name).read_bytes())
    given_back: list[int] = []
    reported: list[int] = []

    def report(nbytes: int) -> None:
        reported.append(nbytes)
        if len(reported) == 2:
            raise BrokenPipeError

    with ExitStack() as stack:
        sources = Sources(shard, SourceFolder(LocalFolder(tmp_path)), stack, report)
        lend_from(sources, data, given_back)
        loan = sources.lend(shard.name, 0, 100)
        assert loan is not None
        assert (loan.view, reported, given_back) == (data[:100], [100], [])
        with pytest.raises(BrokenPipeError):
            sources.lend(shard.name, 100, 50)
        assert given_back == [100]
        assert sources.lend("another.safetensors", 0, 10) is None


def lend_from(sources: Sources, data: memoryview, given_back: list[int]) -> None:
    """Let the open shard lend, as a remote one does."""
    reader = sources.open(sources.shard.name)

    def lend(offset: int, nbytes: int) -> Loan:
        end: Callable[[], None] = lambda: given_back.append(offset)  # noqa: E731 - one word
        return Loan(data[offset : offset + nbytes], end)

    reader.lend = lend  # type: ignore[method-assign]
