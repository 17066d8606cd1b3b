"""Single files go to disks and buckets whole, and never over what somebody else wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardmill.errors import CheckpointInvalid, DestinationInvalid
from shardmill.storage.documents import check_document, write_document
from shardmill.storage.location import open_folder


@pytest.mark.parametrize("place", ["disk", "memory://documents/reports"])
def test_a_file_is_written_and_replaced(tmp_path: Path, place: str) -> None:
    folder = str(tmp_path) if place == "disk" else place
    check_document(f"{folder}/page.html")
    for data in (b"first", b"second"):
        write_document(f"{folder}/page.html", data)
        assert open_folder(folder).read("page.html", 100) == data
    check_document(f"{folder}/page.html")
    check_document(f"{folder}/page.html", replaces=b"sec")
    with pytest.raises(DestinationInvalid, match="a file that shardmill did not write"):
        check_document(f"{folder}/page.html", replaces=b"first")
    check_document(f"{folder}/other.html", replaces=b"first")


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("{home}", "expected a file, found a folder"),
        ("{home}/absent/page.html", "found no folder that it could lie in"),
        ("hf://org/repo/page.html", "no file can be written there"),
        ("memory://documents", "no file can be written there"),
    ],
)
def test_a_place_that_takes_no_file_is_refused(tmp_path: Path, location: str, message: str) -> None:
    for act in (check_document, lambda place: write_document(place, b"x")):
        with pytest.raises(DestinationInvalid, match=message):
            act(location.format(home=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_key_in_the_url_is_refused_as_everywhere() -> None:
    with pytest.raises(CheckpointInvalid, match="expected no user, key or option"):
        check_document("s3://key:secret@bucket/page.html")
