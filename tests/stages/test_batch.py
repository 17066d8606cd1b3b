"""What a batch learns of checkpoints before it converts any."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import checkpoints
from shardmill.core.batch import Found, listed
from shardmill.core.recipe import uniform
from shardmill.errors import CheckpointInvalid, Refused
from shardmill.stages.batch import find_sources, is_done, look_at, read_entries
from shardmill.stages.pipeline import RunOptions, run
from shardmill.stages.plan import Locations
from shardmill.storage import store
from shardmill.storage.location import open_folder
from storage.fake_hub import REPO, FakeHub, run_hub

CPU = RunOptions(device="cpu", workers=1)
FP8, W8A8 = uniform("FP8_DYNAMIC"), uniform("W8A8")


@pytest.fixture(autouse=True)
def _remember_young_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_FRESH_NS", 0)


@pytest.fixture(params=["disk", "memory"])
def locations(request: pytest.FixtureRequest, tmp_path: Path) -> Locations:
    source = checkpoints.write(tmp_path / "source", checkpoints.deal(checkpoints.llama(), 2))
    if request.param == "disk":
        return Locations(source=str(source), destination=str(tmp_path / "out" / "result"))
    base = f"memory://{secrets.token_hex(6)}"
    folder = open_folder(f"{base}/in/model")
    for path in source.iterdir():
        folder.put(path.name, path.read_bytes())
    return Locations(source=f"{base}/in/model", destination=f"{base}/out/result")


def state_of(locations: Locations) -> str:
    return look_at(listed(locations.source)).state


def test_a_result_is_done_for_its_source_and_recipe_only(locations: Locations) -> None:
    assert not is_done(locations, FP8, state_of(locations))
    run(locations, FP8, CPU)
    assert is_done(locations, FP8, state_of(locations))
    assert not is_done(locations, W8A8, state_of(locations))
    open_folder(locations.source).put("README.md", b"new")
    assert not is_done(locations, FP8, state_of(locations))


def test_a_result_that_is_gone_is_not_done(locations: Locations) -> None:
    run(locations, FP8, CPU)
    open_folder(locations.destination).remove("config.json")
    assert not is_done(locations, FP8, state_of(locations))


def test_nothing_is_done_of_files_too_young_to_tell(locations: Locations) -> None:
    run(locations, FP8, CPU)
    assert not is_done(locations, FP8, "")


def test_looking_waits_until_young_files_can_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoints.write(tmp_path / "source", checkpoints.deal(checkpoints.llama(), 2))
    monkeypatch.setattr(store, "_FRESH_NS", 3600 * 10**9)
    waited: list[float] = []

    def settle(seconds: float) -> None:
        waited.append(seconds)
        monkeypatch.setattr(store, "_FRESH_NS", 0)

    monkeypatch.setattr(time, "sleep", settle)
    found = look_at(listed(str(source)))
    assert (found.waits_for, len(waited)) == ("", 1)
    assert found.state == store.listing_state(open_folder(str(source)).listing())


def test_files_that_are_being_written_all_the_time_are_left_for_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoints.write(tmp_path / "source", checkpoints.deal(checkpoints.llama(), 2))
    monkeypatch.setattr(store, "_FRESH_NS", 3600 * 10**9)
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    assert look_at(listed(str(source))).waits_for == "it is being written"


@pytest.mark.parametrize("is_scanned", [True, False])
def test_a_missing_shard_is_waited_for_where_nobody_named_the_checkpoint(tmp_path: Path, *, is_scanned: bool) -> None:
    source = checkpoints.write(tmp_path / "source", checkpoints.deal(checkpoints.llama(), 2))
    min(source.glob("*.safetensors")).unlink()
    found = look_at(Found(source=str(source), name="source", path="source", is_scanned=is_scanned))
    assert ("1 of 2 shards are not there yet" in found.waits_for) is is_scanned


def test_a_broken_index_is_for_the_conversion_to_tell(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "source", checkpoints.deal(checkpoints.llama(), 2))
    (source / "model.safetensors.index.json").write_text("{")
    assert look_at(Found(source=str(source), name="s", path="s", is_scanned=True)).waits_for == ""


@pytest.mark.parametrize("encode", [json.dumps, lambda data: f"# nightly\n- {data[0]}\n"])
def test_a_manifest_is_read_from_any_storage(encode: object, tmp_path: Path) -> None:
    assert callable(encode)
    text = encode(["/models/a"]).encode()
    (tmp_path / "list.yaml").write_bytes(text)
    base = f"memory://{secrets.token_hex(6)}"
    open_folder(base).put("list.yaml", text)
    assert [entry.source for entry in read_entries(str(tmp_path / "list.yaml"))] == ["/models/a"]
    assert [entry.source for entry in read_entries(f"{base}/list.yaml")] == ["/models/a"]


def test_a_manifest_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match="no such file"):
        read_entries(str(tmp_path / "absent.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(CheckpointInvalid, match="neither YAML nor JSON"):
        read_entries(str(tmp_path / "bad.yaml"))
    (tmp_path / "large.yaml").write_text(f"- {'a' * 4_000_000}")
    with pytest.raises(Refused, match="larger than"):
        read_entries(str(tmp_path / "large.yaml"))


def test_a_source_without_wildcards_is_taken_as_it_is(tmp_path: Path) -> None:
    assert [found.source for found in find_sources(str(tmp_path / "absent"))] == [str(tmp_path / "absent")]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with run_hub(monkeypatch, tmp_path / "cache") as made:
        yield made


def test_a_branch_of_the_hub_is_in_the_state_of_its_commit(hub: FakeHub) -> None:
    """A run pins the branch to its commit before it plans."""
    assert hub.hub
    asked = Locations(source=f"hf://{REPO}@main", destination="/out/result")
    found = look_at(listed(asked.source))
    assert found.state == store.listing_state(asked.pinned().open_source().listing()) != ""
