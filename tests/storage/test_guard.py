"""Opening files of strangers: what is swapped between two looks leads nowhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shardmill.errors import CheckpointInvalid
from shardmill.storage import guard
from shardmill.storage.local import LocalFolder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/file").write_text("mine")
    (tmp_path / "secret").write_text("secret")
    return tmp_path / "in"


def swap_before_open(monkeypatch: pytest.MonkeyPatch, swap: object) -> None:
    """Let something happen between the look at a name and its opening."""
    look = guard.real_file

    def look_and_swap(folder: Path, name: str) -> Path:
        real = look(folder, name)
        assert callable(swap)
        swap()
        return real

    monkeypatch.setattr(guard, "real_file", look_and_swap)


def test_a_file_that_becomes_a_link_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swap() -> None:
        (folder / "file").unlink()
        (folder / "file").symlink_to("../secret")

    swap_before_open(monkeypatch, swap)
    with pytest.raises(CheckpointInvalid, match="regular file"):
        LocalFolder(folder, foreign=True).read("file", 100)


def test_a_folder_that_becomes_a_link_is_not_entered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "sub").mkdir()
    (folder / "sub/secret").write_text("mine")

    def swap() -> None:
        (folder / "sub").rename(folder / "old")
        (folder / "sub").symlink_to("..")

    swap_before_open(monkeypatch, swap)
    with pytest.raises(CheckpointInvalid, match="leads out"):
        LocalFolder(folder, foreign=True).open("sub/secret")


def test_a_file_that_becomes_a_pipe_does_not_block(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swap() -> None:
        (folder / "file").unlink()
        os.mkfifo(folder / "file")

    swap_before_open(monkeypatch, swap)
    with pytest.raises(CheckpointInvalid, match="regular file"):
        LocalFolder(folder, foreign=True).read_start("file", 8)


def test_a_folder_of_our_own_follows_links(folder: Path) -> None:
    (folder / "link").symlink_to("../secret")
    assert LocalFolder(folder).read("link", 100) == b"secret"
    with pytest.raises(CheckpointInvalid, match="leads out"):
        LocalFolder(folder, foreign=True).read("link", 100)


def test_a_survey_opens_nothing_and_enters_no_link(folder: Path) -> None:
    (folder / "again").symlink_to(".")
    (folder / "out").symlink_to("..")
    (folder / ".git").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loose").symlink_to("nowhere")
    (folder / "secret").symlink_to("../secret")
    (folder / "twin").symlink_to("file")
    found = guard.survey(folder)
    assert (found.folders_in, found.folders_out, found.hidden) == (["again"], ["out"], [".git"])
    assert found.files == {
        "pipe": "no regular file",
        "loose": "a link that leads nowhere",
        "secret": "a link that leads out of the checkpoint",
    }
