"""Finding checkpoints by a pattern of their path, in every storage that can be searched."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardmill.errors import CheckpointInvalid
from shardmill.storage.scan import find_checkpoints
from storage.places import LocalPlace, MemoryPlace, Place, S3Place
from storage.servers import S3Server

CHECKPOINTS = ("alpha", "beta", "team/gamma", "team/deep/delta")


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Checkpoints at several depths, and folders that are none."""
    found: Place
    if request.param == "local":
        found = LocalPlace(tmp_path)
    elif request.param == "memory":
        found = MemoryPlace()
    else:
        moto: S3Server = request.getfixturevalue("moto")
        found = S3Place(moto, monkeypatch)
    for name in CHECKPOINTS:
        found.plant(f"{name}/config.json", b"{}")
        found.plant(f"{name}/model.safetensors", b"")
    found.plant("no-shards/config.json", b"{}")
    found.plant("no-config/model.safetensors", b"")
    found.plant("ours/config.json", b"{}")
    found.plant("ours/model.safetensors", b"")
    found.plant("ours/shardmill.json", b"{}")
    found.plant(".hidden/config.json", b"{}")
    found.plant(".hidden/model.safetensors", b"")
    found.plant("a-file", b"")
    return found


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", ["alpha", "beta"]),
        ("*/", ["alpha", "beta"]),
        ("[a-b]*", ["alpha", "beta"]),
        ("?eta", ["beta"]),
        ("team/*", ["team/gamma"]),
        ("*/gamma", ["team/gamma"]),
        ("*/*/*", ["team/deep/delta"]),
        ("*x", []),
    ],
)
def test_a_pattern_finds_whole_checkpoints_only(place: Place, pattern: str, expected: list[str]) -> None:
    found = find_checkpoints(f"{place.url}/{pattern}")
    assert [one.source for one in found] == [f"{place.url}/{name}" for name in expected]
    assert [one.name for one in found] == [name.rpartition("/")[2] for name in expected]
    assert all(one.source.endswith(one.path) and one.is_scanned for one in found)


def test_what_lies_below_the_fixed_part_is_the_path(place: Place) -> None:
    assert [one.path for one in find_checkpoints(f"{place.url}/t*/*")] == ["team/gamma"]
    assert [one.path for one in find_checkpoints(f"{place.url}/team/*")] == ["gamma"]


def test_links_to_folders_are_followed_on_disk(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path)
    place.plant("elsewhere/real/config.json", b"{}")
    place.plant("elsewhere/real/model.safetensors", b"")
    (place.root / "incoming").mkdir()
    (place.root / "incoming" / "linked").symlink_to(place.root / "elsewhere" / "real")
    assert [one.name for one in find_checkpoints(f"{place.url}/incoming/*")] == ["linked"]


def test_a_folder_that_is_not_there_cannot_be_searched(tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match="no such folder"):
        find_checkpoints(f"{tmp_path}/absent/*")


def test_the_hub_cannot_be_searched() -> None:
    with pytest.raises(CheckpointInvalid, match="the Hub cannot be searched"):
        find_checkpoints("hf://org/*")
