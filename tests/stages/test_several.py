"""Several schemes of one checkpoint from one read: the bytes of single runs, and none of their failures shared."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

import checkpoints
from shardmill.core.recipe import Recipe, parse_recipe
from shardmill.errors import DestinationInvalid, Interrupted, Refused, ShardFailures, StorageFailed
from shardmill.stages import pipeline
from shardmill.stages import quantize as quantize_module
from shardmill.stages.pipeline import RunOptions, RunResult, Watcher, run
from shardmill.stages.plan import Locations
from shardmill.stages.several import prepare_several, run_several
from shardmill.storage import shared
from shardmill.storage import source as source_module
from shardmill.storage.local import RangeReader

OPTIONS = RunOptions(device="cpu", workers=2)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoints.write(tmp_path / "source", checkpoints.deal(checkpoints.llama(3), 5))


def places(source: Path, home: Path, schemes: Sequence[str]) -> list[tuple[Locations, Recipe]]:
    return [
        (Locations(source=str(source), destination=str(home / scheme)), parse_recipe({"scheme": scheme}))
        for scheme in schemes
    ]


def convert(source: Path, home: Path, *schemes: str, watch: Watcher | None = None) -> list[RunResult | Exception]:
    prepared = prepare_several(places(source, home, schemes), OPTIONS)
    return run_several(prepared, OPTIONS, lambda _number: watch or Watcher())


def alone(source: Path, home: Path, scheme: str) -> Path:
    [(locations, recipe)] = places(source, home, [scheme])
    run(locations, recipe, OPTIONS)
    return home / scheme


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def data_start(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


class Reads:
    """Bytes of tensors that are read from the shards of a source, by file; headers are left out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
        self.bytes: Counter[str] = Counter()
        self._lock = threading.Lock()
        starts = {str(path): data_start(path) for path in source.glob("*.safetensors")}
        read_into = RangeReader.read_into

        def counted(reader: RangeReader, offset: int, view: memoryview) -> None:
            read_into(reader, offset, view)
            if reader.identity.url in starts:
                with self._lock:
                    begin = max(offset, starts[reader.identity.url])
                    self.bytes[Path(reader.identity.url).name] += max(0, offset + len(view) - begin)

        monkeypatch.setattr(RangeReader, "read_into", counted)
        monkeypatch.setattr(source_module, "_HEADER_GUESS", 8)  # tensors of small shards would come with the header


@pytest.mark.parametrize("block", [512, 4 << 20])
@pytest.mark.parametrize(
    "schemes", [("FP8_DYNAMIC", "W4A16"), ("NVFP4A16", "FP8_BLOCK", "MXFP4A16"), ("NVFP4A16", "W4A16_ASYM")]
)
def test_bytes_are_those_of_single_runs(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, schemes: tuple[str, ...]
) -> None:
    monkeypatch.setattr(shared, "BLOCK_BYTES", block)
    monkeypatch.setattr(shared, "ROOM_BYTES", 64 * block)
    monkeypatch.setattr(shared, "LEAD_BYTES", 8 * block)

    results = convert(source, tmp_path / "together", *schemes)

    assert [type(result) for result in results] == [RunResult] * len(schemes)
    for scheme in schemes:
        assert files(tmp_path / "together" / scheme) == files(alone(source, tmp_path / "alone", scheme))


@pytest.mark.parametrize("schemes", [("FP8_DYNAMIC", "W4A16"), ("FP8_DYNAMIC", "W4A16", "W8A8", "MXFP4A16")])
def test_each_source_byte_is_read_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schemes: tuple[str, ...]
) -> None:
    reads = Reads(monkeypatch, source)

    results = convert(source, tmp_path / "together", *schemes)

    shards = {path.name: path for path in source.glob("*.safetensors")}
    assert reads.bytes == {name: path.stat().st_size - data_start(path) for name, path in shards.items()}
    told = [outcome.bytes_read for result in results if isinstance(result, RunResult) for outcome in result.outcomes]
    assert sum(told) == sum(path.stat().st_size for path in shards.values())


def test_a_single_run_reads_as_much_as_all_of_them(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes twice, for a global scale, comes from memory the second time, from disk in a single run."""
    single = Reads(monkeypatch, source)
    alone(source, tmp_path / "alone", "NVFP4A16")
    once = sum(single.bytes.values())
    together = Reads(monkeypatch, source)
    convert(source, tmp_path / "together", "NVFP4A16", "FP8_DYNAMIC")
    assert sum(together.bytes.values()) <= once


def test_finished_shards_are_hits_and_their_bytes_are_not_waited_for(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "LEAD_BYTES", 1)
    home = tmp_path / "together"
    alone(source, home, "W4A16")
    for path in sorted((home / ".shardmill" / "receipts").iterdir())[:2]:
        path.unlink()
    for path in (home / "W4A16").iterdir():
        path.unlink()
    (home / "W4A16").rmdir()

    w4, fp8 = convert(source, home, "W4A16", "FP8_DYNAMIC")

    assert isinstance(w4, RunResult)
    assert isinstance(fp8, RunResult)
    assert sum(outcome.is_hit for outcome in w4.outcomes) == 3
    assert not any(outcome.is_hit for outcome in fp8.outcomes)
    again = convert(source, home, "W4A16", "FP8_DYNAMIC")
    done = [r.outcomes if isinstance(r, RunResult) else r for r in again]
    assert done == [(), ()]  # both results are there, and no shard is looked at


@pytest.mark.parametrize("lead", [1, 64 << 20])
def test_a_failure_in_one_does_not_lose_the_other(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lead: int
) -> None:
    monkeypatch.setattr(shared, "LEAD_BYTES", lead)
    quantize = quantize_module.quantize_shard

    def fail(shard, source, store, controls):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        if shard.number == 2 and any(scheme.preset == "W4A16" for scheme in shard.schemes):
            source.open(shard.name).read_into(0, memoryview(bytearray(8)))
            raise StorageFailed(5, "the disk is on fire")
        return quantize(shard, source, store, controls)

    monkeypatch.setattr(pipeline, "quantize_shard", fail)

    bad, good = convert(source, tmp_path / "together", "W4A16", "FP8_DYNAMIC")

    assert isinstance(bad, ShardFailures)
    assert isinstance(good, RunResult)
    monkeypatch.undo()
    assert files(tmp_path / "together" / "FP8_DYNAMIC") == files(alone(source, tmp_path / "alone", "FP8_DYNAMIC"))
    assert not (tmp_path / "together" / "W4A16").exists()
    mended, _ = convert(source, tmp_path / "together", "W4A16", "FP8_DYNAMIC")
    assert isinstance(mended, RunResult)
    assert sum(outcome.is_hit for outcome in mended.outcomes) == 4


def test_a_run_that_ends_at_once_lets_the_other_go_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "LEAD_BYTES", 1)
    prepared = prepare_several(places(source, tmp_path / "together", ["W4A16", "FP8_DYNAMIC"]), OPTIONS)
    (tmp_path / "together" / "W4A16").mkdir(parents=True)
    (tmp_path / "together" / "W4A16" / "foreign").write_text("x")

    bad, good = run_several(prepared, OPTIONS)

    assert isinstance(bad, DestinationInvalid)
    assert isinstance(good, RunResult)


def test_a_stop_stops_all(source: Path, tmp_path: Path) -> None:
    prepared = prepare_several(places(source, tmp_path / "together", ["W4A16", "FP8_DYNAMIC"]), OPTIONS)
    stop = threading.Event()
    results = run_several(prepared, OPTIONS, lambda _number: Watcher(on_shard=lambda _outcome: stop.set()), stop)
    assert all(isinstance(result, Interrupted) for result in results)


def test_nothing_begins_before_everything_may(source: Path, tmp_path: Path) -> None:
    """The width of 128 is no multiple of 96."""
    requests = places(source, tmp_path / "together", ["FP8_DYNAMIC", "W4A16"])
    requests[1] = (requests[1][0], parse_recipe({"scheme": "W4A16", "group_size": 96}))
    with pytest.raises(Refused) as raised:
        prepare_several(requests, OPTIONS)
    assert {problem.kind for problem in raised.value.problems} == {"group-indivisible"}
    assert not (tmp_path / "together").exists()


@pytest.mark.parametrize(("first", "second"), [("x", "x"), ("x", "x/y")])
def test_two_results_at_one_place_are_refused(source: Path, tmp_path: Path, first: str, second: str) -> None:
    requests = [
        (Locations(source=str(source), destination=str(tmp_path / place)), parse_recipe({"scheme": scheme}))
        for place, scheme in ((first, "W4A16"), (second, "W8A8"))
    ]
    with pytest.raises(DestinationInvalid, match="two results would be written there"):
        prepare_several(requests, OPTIONS)
