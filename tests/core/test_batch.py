"""What a batch is asked for, and where its results go."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmill.core.batch import (
    Entry,
    Found,
    check_distinct,
    check_template,
    destination_of,
    listed,
    parse_entries,
    split_pattern,
)
from shardmill.errors import Refused


@pytest.mark.parametrize("wrap", [list, lambda entries: {"checkpoints": entries}])
def test_a_manifest_is_a_list_or_names_one(wrap: Any) -> None:
    data = wrap(["/models/a", {"source": "/models/b", "scheme": "W4A16"}])
    assert parse_entries(data) == (
        Entry(source="/models/a"),
        Entry(source="/models/b", choices={"scheme": "W4A16"}),
    )


@pytest.mark.parametrize(
    "data", [None, "text", 3, {"models": []}, {"checkpoints": "a"}, {"checkpoints": [], "more": 1}]
)
def test_anything_else_is_refused(data: Any) -> None:
    with pytest.raises(Refused, match="expected a list of checkpoints"):
        parse_entries(data)


def test_every_bad_entry_is_named() -> None:
    with pytest.raises(Refused) as caught:
        parse_entries([1, "/a", {"scheme": "W4A16"}, {"source": "/a", 5: 6}, {"source": None}, None])
    assert [problem.message.partition(":")[0] for problem in caught.value.problems] == [
        f"entry {number}" for number in (1, 3, 4, 5, 6)
    ]


@pytest.mark.parametrize(
    ("source", "fixed", "parts"),
    [
        ("s3://bucket/*", "s3://bucket", ("*",)),
        ("s3://bucket/in/*/v?/", "s3://bucket/in", ("*", "v?")),
        ("/*", "/", ("*",)),
        ("/a/b[12]/c", "/a", ("b[12]", "c")),
        ("memory://m/a//b", "memory://m/a//b", ()),
        ("hf://org/model@v1", "hf://org/model@v1", ()),
    ],
)
def test_a_pattern_begins_at_the_first_part_with_a_wildcard(source: str, fixed: str, parts: tuple[str, ...]) -> None:
    assert split_pattern(source) == (fixed, parts)


@pytest.mark.parametrize(
    ("source", "name"),
    [("hf://org/model@refs/pr/1", "1"), ("hf://org/model@v1", "model"), ("/models/a@b/", "a@b"), ("s3://b/x", "x")],
)
def test_a_checkpoint_is_called_by_the_last_part_of_its_location(source: str, name: str) -> None:
    assert listed(source).name == name


@pytest.mark.parametrize(
    ("template", "message"),
    [("/out/{nam}", "unknown parts"), ("/out/{name!r}", "unknown"), ("/out/{name:>9}", "unknown"), ("/o/{", "read")],
)
def test_a_template_that_cannot_be_filled_in_is_told(template: str, message: str) -> None:
    (problem,) = check_template(template)
    assert message in problem.message
    assert "{version}" in problem.way_out


def test_a_template_is_filled_in_and_its_braces_stay() -> None:
    template = "s3://out/{path}/{{x}}-{scheme}-{version}"
    assert check_template(template) == []
    found = Found(source="s3://in/team/a", name="a", path="team/a", is_scanned=True)
    assert destination_of(template, found, "W4A16", "0123456789abcdef") == "s3://out/team/a/{x}-W4A16-0123456789ab"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz")), unique=True))
def test_destinations_that_are_asked_for_twice_are_told(requests: list[tuple[str, str]]) -> None:
    destinations = [destination for _, destination in requests]
    twice = {destination for destination in destinations if destinations.count(destination) > 1}
    assert {problem.file for problem in check_distinct(requests)} == twice
