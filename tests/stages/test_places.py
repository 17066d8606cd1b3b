"""Where a run works: several runs at one destination, what killed ones leave, the order of writes, full disks."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints
from shardmill.core.recipe import Recipe, uniform
from shardmill.errors import DestinationInvalid
from shardmill.stages.pipeline import RunOptions, RunResult, Watcher, run
from shardmill.stages.plan import Locations, make_plan
from shardmill.stages.validate import validate_locations
from shardmill.storage.local import LocalFolder
from shardmill.storage.memory import MemoryFolder
from shardmill.storage.operations import Faults, watched
from shardmill.storage.publish import LocalDestination, ObjectDestination, Release
from shardmill.storage.store import Store

CPU = RunOptions(device="cpu", workers=1)
FP8, W8A8 = uniform("FP8_DYNAMIC"), uniform("W8A8")


@pytest.fixture
def locations(tmp_path: Path) -> Locations:
    source = checkpoints.write(
        tmp_path / "source", checkpoints.deal(checkpoints.llama(), 3), checkpoints.LLAMA, **{"tokenizer.json": "{}"}
    )
    return Locations(source=str(source), destination=str(tmp_path / "work" / "result"))


def beside(locations: Locations) -> list[str]:
    """What lies where destination and store do."""
    return sorted(path.name for path in Path(locations.destination).parent.iterdir())


def temporaries(locations: Locations) -> list[Path]:
    return list(Path(locations.destination).parent.rglob(".shardmill-*.tmp"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- several runs -----------------------------------------------------------------------------------------------


def at_once(runs: list[Callable[[], RunResult]]) -> list[RunResult | BaseException]:
    found: list[RunResult | BaseException] = []

    def start(one: Callable[[], RunResult]) -> None:
        try:
            found.append(one())
        except BaseException as error:  # noqa: BLE001 - told to the test
            found.append(error)

    threads = [threading.Thread(target=start, args=(one,)) for one in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_runs_of_one_plan_that_publish_at_once_all_succeed(
    locations: Locations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each finds the destination free and fills a folder of its own; one rename comes first."""
    together, publish = threading.Barrier(3), LocalDestination.publish

    def wait_and_publish(self: LocalDestination, *arguments: object) -> None:
        together.wait(60)
        publish(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalDestination, "publish", wait_and_publish)
    results = at_once([lambda: run(locations, FP8, CPU)] * 3)
    assert [type(result) for result in results] == [RunResult] * 3
    manifests = [result.manifest for result in results if isinstance(result, RunResult)]
    assert manifests == [LocalDestination(Path(locations.destination)).manifest()] * 3
    assert beside(locations) == [".shardmill", "result"]
    assert temporaries(locations) == []


def test_a_result_that_appears_right_before_publishing_is_ours_if_it_is_of_our_plan(
    locations: Locations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run publishes between any two looks that this one takes at the destination."""
    looks: list[str] = []
    is_free, manifest = LocalDestination.is_free, LocalDestination.manifest
    other = Locations(source=locations.source, destination=locations.destination)

    def rival(before: str) -> None:
        looks.append(before)
        if len(looks) == at:
            with monkeypatch.context() as patch:
                patch.setattr(LocalDestination, "is_free", is_free)
                patch.setattr(LocalDestination, "manifest", manifest)
                run(other, FP8, CPU)

    def look(self: LocalDestination) -> bool:
        rival("is_free")
        return is_free(self)

    def read(self: LocalDestination) -> object:
        rival("manifest")
        return manifest(self)

    for at in range(1, 12):
        looks.clear()
        destination = Path(locations.destination)
        if destination.exists():
            destination.rename(destination.with_name(f"result-{at}"))
        with monkeypatch.context() as patch:
            patch.setattr(LocalDestination, "is_free", look)
            patch.setattr(LocalDestination, "manifest", read)
            found = run(locations, FP8, CPU)
        assert found.manifest == LocalDestination(destination).manifest()
        if len(looks) < at:
            break
    assert 2 < at < 11


def test_a_run_of_another_plan_is_refused_while_one_is_at_work_and_nothing_is_lost(locations: Locations) -> None:
    refusals: list[DestinationInvalid] = []

    def rival(_outcome: object) -> None:
        with pytest.raises(DestinationInvalid) as caught:
            run(locations, W8A8, CPU)
        refusals.append(caught.value)

    result = run(locations, FP8, CPU, watcher=Watcher(on_shard=rival))
    assert [problem.kind for error in refusals for problem in error.problems] == ["destination-claimed"] * 3
    assert LocalDestination(Path(locations.destination)).manifest() == result.manifest
    assert len(list((Path(locations.destination).parent / ".shardmill" / "receipts").iterdir())) == 3
    with pytest.raises(DestinationInvalid, match="the result of another plan"):
        run(locations, W8A8, CPU)
    assert beside(locations) == [".shardmill", "result"]


# ---- killed runs ------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from shardmill.core.recipe import uniform
from shardmill.stages.pipeline import RunOptions, run
from shardmill.stages.plan import Locations
from shardmill.storage import publish

publish._rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
locations = Locations(source=sys.argv[1], destination=sys.argv[2])
run(locations, uniform("FP8_DYNAMIC"), RunOptions(device="cpu", workers=1))
"""


@pytest.mark.parametrize(("recipe", "hits"), [(FP8, 3), (W8A8, 0)], ids=["the same plan", "another plan"])
def test_what_a_run_leaves_that_was_killed_before_its_last_step_is_cleared_away(
    locations: Locations, recipe: Recipe, hits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardmill.storage.store._FRESH_NS", 0)
    command = [sys.executable, "-P", "-c", KILLED, locations.source, locations.destination]
    killed = subprocess.run(command, check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = beside(locations)
    assert [name.partition("-")[0] for name in left] == [".result.shardmill", ".shardmill", "result.partial"]
    assert sum(outcome.is_hit for outcome in run(locations, recipe, CPU).outcomes) == hits
    assert beside(locations) == [".shardmill", "result"]
    assert temporaries(locations) == []


# ---- the order of writes ----------------------------------------------------------------------------------------


def test_nothing_is_promised_before_it_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardmill.storage.store._FRESH_NS", 0)
    source = checkpoints.write(
        tmp_path / "source", [checkpoints.llama()], checkpoints.LLAMA, **{"tokenizer.json": "{}"}
    )
    with watched(Faults()) as seen:
        run(Locations(source=str(source), destination=str(tmp_path / "result")), FP8, CPU)
    log = [(name, where.removeprefix(f"{tmp_path}/")) for name, where in seen.log]
    named = [place for place, (name, _) in enumerate(log) if name == "rename"]
    parts = [log[place][1].removeprefix(".shardmill/").partition("/")[0] for place in named]
    partial = next(part for part in parts if part.startswith("result.partial-"))
    assert parts == [
        "digests",
        "blobs",
        "shapes",
        "receipts",
        "verified",
        "published",
        *[partial] * 3,
        "result",
    ]
    hints = {"shapes", "verified", "published"}
    for place, part in zip(named[:-1], parts[:-1], strict=True):
        folder = log[place][1].rpartition("/")[0]
        synced = [log[place - 1][0] == "sync", log[place + 1] == ("sync", folder)]
        assert synced == [part not in hints] * 2, log[place]
        if part not in hints:
            assert log[place - 1][1].startswith(f"{folder}/.shardmill-")
    assert [log[place][1].rpartition("/")[2] for place in named[-4:-1]] == [
        "tokenizer.json",
        "shardmill.json",
        "config.json",
    ]
    last = named[-1]
    assert log[last - 1] == ("sync", partial)
    assert log[last + 1] == ("sync", str(tmp_path))


# ---- places that cannot be used ---------------------------------------------------------------------------------


@contextmanager
def mounted(path: Path, options: str) -> Iterator[Path]:
    """A small file system in memory."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "shardmill-test", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        pytest.skip(f"this system does not let us mount a small disk: {reason}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)  # noqa: S607 - wherever the system has it


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "small", "size=8m") as disk:
        yield disk


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A checkpoint of 20 MB, 10 MB when it is quantized."""
    weights = {f"m.{n}.o_proj.weight": torch.full((1000, 2500), n + 0.5, dtype=torch.bfloat16) for n in range(4)}
    return checkpoints.write(
        tmp_path / "source", checkpoints.deal(weights, 2), checkpoints.LLAMA, **{"tokenizer.json": "{}" * 5000}
    )


def refused_for_space(locations: Locations) -> tuple[int, int]:
    """Needed and free bytes of the refusal, which comes before any work."""
    before = {path for path in Path(locations.source).parent.rglob("*") if ".shardmill" not in path.parts}
    with pytest.raises(DestinationInvalid) as caught:
        run(locations, FP8, CPU)
    (problem,) = caught.value.problems
    assert problem.kind == "no-space"
    assert {path for path in Path(locations.source).parent.rglob("*") if ".shardmill" not in path.parts} == before
    found = re.match(r"(\d+) bytes are needed for the output, (\d+) are free at ", problem.message)
    assert found is not None
    return int(found[1]), int(found[2])


PLACES = [
    ("both", "small/result", "", True),
    ("the store", "result", "small/store", False),
    ("the destination", "small/result", "store", True),
]


@pytest.mark.parametrize(
    ("destination", "store", "with_files"), [row[1:] for row in PLACES], ids=[r[0] for r in PLACES]
)
def test_a_disk_that_is_too_small_is_told_before_any_work(
    small_disk: Path,
    large: Path,
    tmp_path: Path,
    destination: str,
    store: str,
    with_files: bool,  # noqa: FBT001
) -> None:
    locations = Locations(
        source=str(large), destination=str(tmp_path / destination), store=str(tmp_path / store) if store else ""
    )
    plan = make_plan(locations.open_source(), FP8)
    output = sum(shard.sizes().output_bytes for shard in plan.shards)
    needed, free = refused_for_space(locations)
    assert needed == output + (10_000 if with_files else 0)
    assert 7 << 20 < free <= 8 << 20
    assert list(small_disk.iterdir()) == []
    assert not (tmp_path / "store").exists()


def test_shards_that_the_store_holds_need_no_space(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardmill.storage.store._FRESH_NS", 0)
    run(Locations(source=str(large), destination=str(tmp_path / "first")), FP8, CPU)
    again = Locations(source=str(large), destination=str(tmp_path / "second"))
    monkeypatch.setattr(LocalFolder, "free_bytes", lambda _self: 9_999)
    assert refused_for_space(again) == (10_000, 9_999)
    monkeypatch.setattr(LocalFolder, "free_bytes", lambda _self: 10_000)
    assert all(outcome.is_hit for outcome in run(again, FP8, CPU).outcomes)


def test_a_slow_source_is_looked_up_many_shards_at_a_time(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = threading.Barrier(2)
    monkeypatch.setattr(LocalFolder, "traits", replace(LocalFolder.traits, is_remote=True))
    monkeypatch.setattr(Store, "seems_to_hold", lambda *_: pair.wait(20) >= 0)
    locations = Locations(source=str(large), destination=str(tmp_path / "result"))
    plan = make_plan(locations.open_source(), FP8)
    assert validate_locations(plan, locations, locations.open_store()) == []
    assert not pair.broken


def test_where_space_has_no_limit_no_shard_is_looked_up_for_it(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(*_: Any) -> bool:
        raise AssertionError("looked up")

    monkeypatch.setattr(LocalFolder, "free_bytes", lambda _self: None)
    monkeypatch.setattr(Store, "seems_to_hold", look)
    run(Locations(source=str(large), destination=str(tmp_path / "result")), FP8, CPU)
    assert (tmp_path / "result" / "config.json").exists()


def test_a_disk_that_is_just_large_enough_is_used(small_disk: Path, tmp_path: Path) -> None:
    weights = {f"m.{n}.o_proj.weight": torch.full((1000, 2500), n + 0.5, dtype=torch.bfloat16) for n in range(3)}
    source = checkpoints.write(tmp_path / "source", [weights])
    run(Locations(source=str(source), destination=str(small_disk / "result")), FP8, CPU)
    assert (small_disk / "result" / "config.json").exists()


@pytest.mark.parametrize("place", ["destination", "store"])
def test_a_disk_that_cannot_be_written_is_told_before_any_work(
    locations: Locations, tmp_path: Path, place: str
) -> None:
    with mounted(tmp_path / "fixed", "ro,size=1m") as disk:
        good = replace(locations, destination=str(tmp_path / "a" / "result"), store=str(tmp_path / "a" / "store"))
        places: dict[str, Any] = {place: str(disk / "new")}
        with pytest.raises(DestinationInvalid) as caught:
            run(replace(good, **places), FP8, CPU)
        assert [problem.kind for problem in caught.value.problems] == ["destination-unwritable"]
        assert "Read-only file system" in str(caught.value)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("place", ["destination", "store"])
def test_a_place_below_a_file_is_told_before_any_work(locations: Locations, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    good = replace(locations, destination=str(tmp_path / "a" / "result"), store=str(tmp_path / "a" / "store"))
    places: dict[str, Any] = {place: str(tmp_path / "file" / "new")}
    with pytest.raises(DestinationInvalid, match="cannot be written: Not a directory"):
        run(replace(good, **places), FP8, CPU)
    assert not (tmp_path / "a").exists()


# ---- in an object storage ---------------------------------------------------------------------------------------


def test_a_run_from_disk_to_an_object_storage_gives_the_files_of_one_on_disk(
    locations: Locations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(locations, FP8, CPU)
    releases: list[Release] = []
    publish = ObjectDestination.publish

    def note(self: ObjectDestination, release: Release, claim: object) -> None:
        releases.append(release)
        publish(self, release, claim)  # type: ignore[arg-type]

    monkeypatch.setattr(ObjectDestination, "publish", note)
    place = f"memory://places{tmp_path}"
    run(Locations(source=locations.source, destination=f"{place}/result", store=f"{place}/store"), FP8, CPU)
    found = MemoryFolder(f"places{tmp_path}/result")
    assert {name: found.read(name, 1 << 30) for name in found.listing()} == contents(Path(locations.destination))
    assert len(releases) == 1
