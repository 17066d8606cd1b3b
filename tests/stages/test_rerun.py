"""A run that has nothing to do: it reads headers, names each job once, and computes nothing."""

from __future__ import annotations

import os
import shutil
import threading
from collections import Counter
from pathlib import Path

import pytest

import checkpoints
from shardmill.core import plan as core_plan
from shardmill.core.plan import Plan, ShardPlan
from shardmill.core.recipe import uniform
from shardmill.errors import DestinationInvalid
from shardmill.stages.finalize import claim_of, finalize
from shardmill.stages.pipeline import RunOptions, RunResult, Watcher, quantize_all, run
from shardmill.stages.plan import Locations, make_plan
from shardmill.storage import hashing, store
from shardmill.storage import source as source_module
from shardmill.storage.folder import Folder
from shardmill.storage.local import RangeReader
from shardmill.storage.store import FAST, FULL

SHARDS = 4
RESTS = ["published", "removed"]
"""What became of the destination of the first run."""


@pytest.fixture
def locations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Locations:
    """A finished run whose source's digests are remembered."""
    monkeypatch.setattr(store, "_FRESH_NS", 0)
    monkeypatch.setattr(source_module, "_HEADER_GUESS", 8)  # these shards are not longer than what is asked for first
    source = checkpoints.write(tmp_path / "source", checkpoints.deal(checkpoints.llama(), SHARDS))
    found = Locations(source=str(source), destination=str(tmp_path / "result"))
    assert sum(outcome.is_hit for outcome in again(found).outcomes) == 0
    return found


def again(locations: Locations, verify: str = FAST) -> RunResult:
    return run(locations, uniform("NVFP4A16"), RunOptions(device="cpu", workers=1, verify=verify))


def store_path(locations: Locations) -> Path:
    return Path(locations.store_location.path)


def leave(locations: Locations, rest: str) -> None:
    if rest == "removed":
        shutil.rmtree(Path(locations.destination))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, int]]:
    """Path and last byte of every range that is read."""
    found: list[tuple[Path, int]] = []
    read_into = RangeReader.read_into

    def note(self: RangeReader, offset: int, view: memoryview) -> None:
        found.append((self.path, offset + len(view)))
        read_into(self, offset, view)

    monkeypatch.setattr(RangeReader, "read_into", note)
    return found


def tensor_reads(locations: Locations, reads: list[tuple[Path, int]]) -> set[str]:
    """Names of the source shards and blobs of which more than the header was read."""
    source = locations.open_source()
    return {
        path.name
        for path, end in reads
        if path.suffix == ".safetensors"
        and (path.parent != source.folder.path or end > source.read_header(path.name).header.data_start)
    }


@pytest.mark.parametrize("rest", RESTS)
def test_nothing_to_do_reads_no_tensor(locations: Locations, rest: str, reads: list[tuple[Path, int]]) -> None:
    leave(locations, rest)
    result = again(locations)
    assert sum(outcome.is_hit for outcome in result.outcomes) == SHARDS
    assert len(reads) > 0
    assert tensor_reads(locations, list(reads)) == set()
    assert (Path(locations.destination) / "config.json").exists()


def test_a_finished_run_is_remembered_however_young_its_blobs_are(
    locations: Locations, reads: list[tuple[Path, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(Path(locations.destination))
    shutil.rmtree(store_path(locations) / "blobs")
    monkeypatch.setattr(store, "_FRESH_NS", 2_000_000_000)
    assert sum(outcome.is_hit for outcome in again(locations).outcomes) == 0
    reads.clear()
    assert sum(outcome.is_hit for outcome in again(locations).outcomes) == SHARDS
    assert tensor_reads(locations, list(reads)) == set()


@pytest.mark.parametrize("rest", RESTS)
def test_full_verification_reads_every_blob(locations: Locations, rest: str, reads: list[tuple[Path, int]]) -> None:
    leave(locations, rest)
    again(locations, FULL)
    blobs = {path.name for path in (store_path(locations) / "blobs").iterdir()}
    assert len(blobs) == SHARDS
    assert blobs <= tensor_reads(locations, list(reads))


def test_a_blob_that_was_edited_is_done_again(locations: Locations) -> None:
    shutil.rmtree(Path(locations.destination))
    blob = next((store_path(locations) / "blobs").iterdir())
    whole = blob.read_bytes()
    blob.chmod(0o600)
    blob.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    result = again(locations)
    assert sum(outcome.is_hit for outcome in result.outcomes) == SHARDS - 1
    assert blob.read_bytes() == whole


@pytest.mark.parametrize("rest", RESTS)
def test_a_run_names_each_job_once(locations: Locations, rest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[str] = []
    describe = ShardPlan._tensors_text

    def note(self: ShardPlan) -> str:
        named.append(self.name)
        return describe(self)

    monkeypatch.setattr(ShardPlan, "_tensors_text", note)
    leave(locations, rest)
    again(locations)
    assert Counter(named) == dict.fromkeys(named, 1)
    assert len(named) == SHARDS


def test_a_damaged_blob_of_a_published_result_is_warned_of(
    locations: Locations, caplog: pytest.LogCaptureFixture
) -> None:
    """Blob and result are one file: whoever truncates one loses both, and the size tells."""
    blob = next((store_path(locations) / "blobs").iterdir())
    blob.chmod(0o600)
    with blob.open("r+b") as file:
        file.seek(0)
        file.write(b"\xff")
    result = again(locations)
    assert len(result.outcomes) == SHARDS - 1
    assert "set aside" in caplog.text


def test_a_run_that_finds_its_destination_taken_leaves_the_note_of_the_other_plan(locations: Locations) -> None:
    """`store gc` keeps what the notes name, so a refused run must not replace one."""
    kept = locations.open_store()
    before = list(kept.publications())
    plan = make_plan(locations.open_source(), uniform("FP8_DYNAMIC"))
    outcomes = quantize_all(
        plan, locations.open_source(), kept, RunOptions(device="cpu", workers=1), Watcher(), threading.Event()
    )
    with pytest.raises(DestinationInvalid, match="the result of another plan"):
        finalize(plan, outcomes, locations, kept, claim_of(plan, locations.open_source()))
    assert list(kept.publications()) == before
    assert len(before) == 1


def test_edges_are_read_once_per_state(locations: Locations, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not remembered is verified once, and then remembered."""
    read: list[Path] = []
    hash_edges = hashing.hash_edges

    def note(folder: Folder, name: str) -> tuple[object, object]:
        read.append(store_path(locations) / name)
        return hash_edges(folder, name)

    monkeypatch.setattr(store, "hash_edges", note)
    blobs = sorted((store_path(locations) / "blobs").iterdir())
    os.utime(blobs[0])  # as a restored backup has
    again(locations)
    again(locations)
    assert read == [blobs[0]]


def made_of(locations: Locations) -> str:
    note = locations.open_store().publication(locations.destination)
    assert note is not None
    return note.made_of


def test_the_store_knows_what_a_result_is_made_of_as_long_as_nothing_was_written(
    locations: Locations, tmp_path: Path
) -> None:
    source, fp8, nvfp4 = locations.open_source(), uniform("FP8_DYNAMIC"), uniform("NVFP4A16")
    first = made_of(locations)
    assert first == core_plan.made_of(store.listing_state(source.listing()), nvfp4) != ""
    assert first != core_plan.made_of(store.listing_state(source.listing()), fp8)
    os.link(tmp_path / "source" / "config.json", tmp_path / "other-name")  # changes its ctime
    assert first == make_plan(source, nvfp4).made_of
    (tmp_path / "source" / "README.md").write_text("new")
    assert first != make_plan(source, nvfp4).made_of


def test_a_file_that_arrives_during_a_run_is_no_part_of_what_its_result_is_made_of(
    locations: Locations, tmp_path: Path
) -> None:
    shutil.rmtree(Path(locations.destination))
    before = make_plan(locations.open_source(), uniform("NVFP4A16")).made_of

    def arrive(_plan: Plan) -> None:
        (tmp_path / "source" / "README.md").write_text("late")

    late = Watcher(on_plan=arrive)
    run(locations, uniform("NVFP4A16"), RunOptions(device="cpu", workers=1), watcher=late)
    assert made_of(locations) == before


def test_a_run_that_finds_its_result_finished_notes_what_it_is_made_of(locations: Locations) -> None:
    first = made_of(locations)
    locations.open_store().forget_publication(locations.destination)
    again(locations)
    assert made_of(locations) == first


def test_the_state_of_young_files_has_no_name(locations: Locations, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write within the same tick of the clock may leave size and times as they are."""
    monkeypatch.setattr(store, "_FRESH_NS", 3600 * 10**9)
    assert make_plan(locations.open_source(), uniform("NVFP4A16")).made_of == ""
