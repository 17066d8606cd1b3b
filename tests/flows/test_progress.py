"""Progress in bytes: what is counted, what is said, and that it moves and ends with the run."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.sorting import FlowRunSort

from served import Ask, artifacts, run_id
from shardmill.core.outcome import ShardOutcome
from shardmill.errors import Interrupted
from shardmill.flows.quantize_checkpoint import quantize_checkpoint
from shardmill.orchestration import progress
from shardmill.orchestration.bench import Meter
from shardmill.orchestration.progress import Progress, Tally
from shardmill.stages import quantize
from workers import wait_until

GB = 10**9


def outcome(*, is_hit: bool) -> ShardOutcome:
    receipt: Any = SimpleNamespace()
    return ShardOutcome(shard="s", receipt=receipt, is_hit=is_hit, sources=(), bytes_read=0, seconds=0.0)


def test_hits_count_as_done_and_give_no_rate() -> None:
    tally = Tally({"a": GB, "b": 3 * GB}, {"a"}, 0.0)

    tally.settle("a", outcome(is_hit=True))

    assert tally.share({}) == 25.0
    assert tally.say({}, 2.0) == "1.0 GB of 4.0 GB; 1 of 2 shards done, 1 hit"


def test_the_rate_and_what_is_left_are_of_computed_bytes() -> None:
    tally = Tally({"hit": GB, "late hit": 5 * GB, "b": 3 * GB, "c": 4 * GB}, {"hit", "late hit"}, 0.0)
    tally.settle("hit", outcome(is_hit=True))

    first = tally.say({"b": GB, "c": GB}, 4.0)  # 2 GB in 4 s; 5 GB of b and c are left
    tally.settle("b", outcome(is_hit=False))
    second = tally.say({"b": 3 * GB, "c": GB}, 6.0)  # 4 GB in 6 s

    assert first == "3.0 GB of 13.0 GB, 0.50 GB/s, ETA 0:10; 1 of 4 shards done, 1 hit"
    assert second == "5.0 GB of 13.0 GB, 0.67 GB/s, ETA 0:04; 2 of 4 shards done, 1 hit"


def test_a_shard_counts_at_most_its_size_and_a_failed_one_nothing() -> None:
    tally = Tally({"a": GB, "b": GB}, (), 0.0)

    assert tally.share({"a": 7 * GB}) == 50.0
    tally.settle("a", OSError("gone"))
    assert tally.share({"a": 7 * GB}) == 0.0
    tally.settle("b", outcome(is_hit=False))
    assert tally.share({}) == 50.0
    assert (
        tally.say_end({}, 4.0) == "1.0 GB of 2.0 GB in 0:04, 0.25 GB/s computed; 1 of 2 shards done, 0 hits, 1 failed"
    )


def test_nothing_to_do_is_all_done() -> None:
    assert Tally({}, (), 0.0).share({}) == 100.0


def test_a_shard_that_is_tried_again_begins_with_nothing() -> None:
    meter = Meter()
    first = meter.begin("a")
    first(3)
    first(4)
    assert meter.counts() == {"a": 7}

    meter.begin("a")(1)

    assert meter.counts() == {"a": 1}


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, str]]:
    """`(percentage, description)` of every update, of a progress that ticks quickly."""
    found: list[tuple[float, str]] = []

    def create(share: float, **_: object) -> UUID:
        found.append((share, "created"))
        return uuid4()

    monkeypatch.setattr(progress, "PROGRESS_SECONDS", 0.01)
    monkeypatch.setattr(progress, "create_progress_artifact", create)
    monkeypatch.setattr(progress, "update_progress_artifact", lambda _id, share, text: found.append((share, text)))
    return found


def tickers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_it_moves_while_a_shard_is_in_work_and_ends_with_the_block(
    updates: list[tuple[float, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    meter, moved = Meter(), threading.Event()
    shown = vars(progress)["update_progress_artifact"]

    def note(artifact: UUID, share: float, text: str) -> None:
        shown(artifact, share, text)
        moved.set()

    monkeypatch.setattr(progress, "update_progress_artifact", note)

    def work() -> None:
        with Progress(Tally({"a": 100}, (), 0.0), meter.counts, prefix="Attempt 2: "):
            meter.begin("a")(40)
            assert moved.wait(30)
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        work()

    assert tickers() == []
    assert updates[0][0] == 0.0
    assert updates[1][0] == 40.0
    assert updates[1][1].startswith("Attempt 2: 40 bytes of 100 bytes, ")
    assert "0 bytes of 100 bytes in " in updates[-1][1]


def test_what_cannot_be_written_costs_one_warning(
    updates: list[tuple[float, str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = threading.Semaphore(0)

    def fail(*_: object) -> None:
        tried.release()
        raise ConnectionError("no server")

    monkeypatch.setattr(progress, "update_progress_artifact", fail)
    moving = itertools.count()
    with Progress(Tally({"a": 10**9}, (), 0.0), lambda: {"a": next(moving)}):
        for _ in range(3):
            assert tried.acquire(timeout=30)

    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert len(updates) == 1


def progress_of_newest_run() -> tuple[float, str] | None:
    """Percentage and description, once something is done."""
    with get_client(sync_client=True) as client:
        [run] = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)
        chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
        found = [artifact for artifact in client.read_artifacts(artifact_filter=chosen) if artifact.key == "progress"]
    share = float(str(found[0].data))
    return (share, found[0].description or "") if share else None


def test_a_run_tells_bytes_rate_and_hits_while_it_works(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard waits in the middle of its bytes until the server has seen them."""
    monkeypatch.setattr(progress, "PROGRESS_SECONDS", 0.05)
    seen: list[tuple[float, str]] = []
    compute = quantize._compute

    def wait_for_update(sources: quantize.Sources, *rest: Any) -> Any:
        sources.on_bytes(sources.shard.size // 2)
        seen.append(wait_until("the server has seen bytes", progress_of_newest_run))
        sources.on_bytes(-(sources.shard.size // 2))
        return compute(sources, *rest)

    monkeypatch.setattr(quantize, "_compute", wait_for_update)

    state = quantize_checkpoint(ask(workers=1), return_state=True)

    assert state.is_completed()
    assert 0 < seen[0][0] < 25
    assert "/s, ETA " in seen[0][1]
    assert float(artifacts(run_id(state))["progress"]) == 100
    assert tickers() == []
