"""Locations as people write them: what is understood, what is refused, and that no key is ever repeated."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmill.errors import CheckpointInvalid, DestinationInvalid
from shardmill.storage.location import HUB, LOCAL, MEMORY, S3, Location, open_location, parse_location
from shardmill.storage.publish import open_destination

UNDERSTOOD = [
    ("s3://models", Location(S3, "models", "")),
    ("s3://models/", Location(S3, "models", "")),
    ("s3://models//base///v1/", Location(S3, "models", "base/v1")),
    ("s3://models/a@b/c d", Location(S3, "models", "a@b/c d")),
    ("s3://models/.hidden/...", Location(S3, "models", ".hidden/...")),
    ("memory://m/x", Location(MEMORY, "m", "x")),
    ("hf://org/name", Location(HUB, "org/name", "")),
    ("hf://org/name@main", Location(HUB, "org/name", "", "main")),
    ("hf://org/name@main/original", Location(HUB, "org/name", "original", "main")),
    ("hf://org/na.me-1_b@refs%2Fpr%2F1", Location(HUB, "org/na.me-1_b", "", "refs/pr/1")),
    ("file:///data/model", Location(LOCAL, "", "/data/model")),
    ("/data//model/", Location(LOCAL, "", "/data/model")),
    ("/data/s3:/model", Location(LOCAL, "", "/data/s3:/model")),
]


@pytest.mark.parametrize(("url", "location"), UNDERSTOOD)
def test_a_location_is_taken_apart(url: str, location: Location) -> None:
    assert parse_location(url) == location


def test_paths_are_relative_to_where_one_is_and_know_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert parse_location("a/b") == Location(LOCAL, "", str(tmp_path / "a" / "b"))
    assert parse_location("~/b") == Location(LOCAL, "", "/home/somebody/b")
    assert open_location(parse_location("a")).path == tmp_path / "a"


REFUSED = [
    "gs://bucket/model",
    "S3://bucket/model",
    "://bucket",
    "s3://",
    "s3:///model",
    "s3://-bucket/model",
    "s3://buck et/model",
    "s3://bucket:9000/model",
    "s3://bucket/a/../b",
    "s3://bucket/..",
    "s3://bucket/./a",
    "s3://bucket/a\nb",
    "s3://bucket/a\0b",
    "memory://",
    "hf://",
    "hf://name",
    "hf://org/",
    "hf://org/name@",
    "hf://org/name/../other",
    "hf://org/name//file",
    "hf://../name",
    "hf://org/name@a b",
    "hf://org/name@main@other",
    "~nobody-of-that-name/model",
    "a\0b",
    "file:///a\0b",
]


@pytest.mark.parametrize("url", REFUSED)
def test_what_is_no_location_is_refused(url: str) -> None:
    with pytest.raises(CheckpointInvalid) as caught:
        parse_location(url)
    assert [problem.kind for problem in caught.value.problems] == ["location"]
    assert str(caught.value).isprintable()


SECRET = "wJalr-canary"  # noqa: S105 - of nothing
WITH_KEYS = [
    f"s3://AKIA:{SECRET}@bucket/model",
    f"s3://AKIA:ab/{SECRET}@bucket/model",
    f"s3://AKIA:{SECRET}/cd@bucket/model",
    f"s3://AKIA:{SECRET}?cd@bucket/model",
    f"s3://AKIA:{SECRET}#cd@bucket/model",
    f"s3://{SECRET}@bucket",
    f"s3://bucket?secret={SECRET}",
    f"s3://bucket/model?X-Amz-Signature={SECRET}",
    f"s3://bucket/model#{SECRET}",
    f"memory://user:{SECRET}@place/model",
    f"https://user:{SECRET}@host/model",
    f"https://host/model?token={SECRET}",
    f"hf://{SECRET}@huggingface.co/org/name",
    f"hf://user:{SECRET}@huggingface.co/org/name",
    f"hf://org/name?token={SECRET}",
    f"hf://org/name@main?token={SECRET}",
    f"hf://org/name/file?token={SECRET}",
]


@pytest.mark.parametrize("url", WITH_KEYS)
def test_a_key_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(CheckpointInvalid) as caught:
        parse_location(url)
    told = f"{caught.value!s} {caught.value!r} {caught.value.problems!r}"
    assert SECRET not in told
    assert "AKIA" not in told


segments = st.text(st.characters(exclude_characters="/?#", categories=["L", "N", "P", "S"]), min_size=1).filter(
    lambda text: text not in (".", "..")
)
paths = st.lists(segments, max_size=4).map("/".join)
buckets = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{2,60}", fullmatch=True)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}/[A-Za-z0-9_-]{1,20}", fullmatch=True)
revisions = st.from_regex(r"([a-z0-9]([a-z0-9._/-]{0,10}[a-z0-9])?)?", fullmatch=True)
locations = st.one_of(
    st.builds(Location, st.sampled_from([S3, MEMORY]), buckets, paths),
    st.builds(Location, st.just(HUB), names, paths, revisions),
    st.builds(Location, st.just(LOCAL), st.just(""), paths.map(lambda path: str(Path("/", path)))),
)


@given(locations)
def test_what_is_written_is_read_again(location: Location) -> None:
    assert parse_location(str(location)) == location


@given(st.text(max_size=40), st.sampled_from(["", "s3://", "hf://", "memory://", "file://", "gs://"]))
def test_any_text_is_a_location_or_refused(text: str, kind: str) -> None:
    try:
        location = parse_location(kind + text)
    except CheckpointInvalid:
        return
    assert parse_location(str(location)) == location


BESIDE = [
    ("s3://models/base", "s3://models/.shardmill"),
    ("s3://models/a/b/c", "s3://models/a/b/.shardmill"),
    ("memory://m/x", "memory://m/.shardmill"),
    ("/data/result", "/data/.shardmill"),
    ("/", "/.shardmill"),
]


@pytest.mark.parametrize(("url", "expected"), BESIDE)
def test_a_neighbour_has_the_same_parent(url: str, expected: str) -> None:
    assert str(parse_location(url).beside(".shardmill")) == expected


@pytest.mark.parametrize("url", ["s3://models", "memory://models", "hf://org/name"])
def test_a_whole_bucket_has_no_neighbour(url: str) -> None:
    with pytest.raises(CheckpointInvalid, match=r"no parent.*set --store"):
        parse_location(url).beside(".shardmill")


CONTAINED = [
    ("s3://models/a", "s3://models/a", True),
    ("s3://models/a", "s3://models/a/b", True),
    ("s3://models", "s3://models/a", True),
    ("s3://models/a", "s3://models/ab", False),
    ("s3://models/a/b", "s3://models/a", False),
    ("s3://models/a", "s3://other/a", False),
    ("s3://models/a", "memory://models/a", False),
    ("/a", "/a/b", True),
    ("/a", "/ab", False),
    ("/a/b/..", "/a/c", True),
    ("hf://org/name", "hf://org/name@main/sub", True),
]


@pytest.mark.parametrize(("outer", "inner", "expected"), CONTAINED)
def test_what_lies_in_what(outer: str, inner: str, expected: bool) -> None:  # noqa: FBT001 - a row of a table
    assert parse_location(outer).contains(parse_location(inner)) is expected


def test_links_on_disk_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    real, link = parse_location(str(tmp_path / "real")), parse_location(str(tmp_path / "link" / "sub"))
    assert real.contains(link)
    assert not link.contains(real)


def test_nothing_is_written_to_the_hub() -> None:
    with pytest.raises(DestinationInvalid, match="the Hub is a source only"):
        open_destination(parse_location("hf://org/name"))
