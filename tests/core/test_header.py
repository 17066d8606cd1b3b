from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmill.core.dtypes import BITS, size_in_bytes
from shardmill.core.header import (
    ShardHeader,
    _parse_any,
    _parse_plain,
    encode_header,
    header_length,
    parse_header,
)
from shardmill.errors import CheckpointInvalid


def parse(table: object, data_bytes: int, *, raw: bytes | None = None) -> ShardHeader:
    body = raw if raw is not None else json.dumps(table).encode()
    return parse_header(body, 8 + len(body) + data_bytes, file="m.safetensors")


def refusal(table: object, data_bytes: int, *, raw: bytes | None = None) -> str:
    with pytest.raises(CheckpointInvalid) as caught:
        parse(table, data_bytes, raw=raw)
    return str(caught.value)


def entry(dtype: str = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_tensors_come_in_order_of_their_data() -> None:
    header = parse({"b": entry(offsets=(4, 8)), "a": entry(), "__metadata__": {"format": "pt"}}, 8)
    assert [spec.name for spec in header.tensors] == ["a", "b"]
    assert header.metadata == (("format", "pt"),)


def test_legal_oddities_pass() -> None:
    header = parse({"empty": entry(shape=(0, 3), offsets=(0, 0)), "scalar": entry(shape=(), offsets=(0, 1))}, 1)
    assert {spec.shape for spec in header.tensors} == {(0, 3), ()}


@pytest.mark.parametrize(
    ("table", "data_bytes", "says"),
    [
        ({"a": entry()}, 3, "found"),
        ({"a": entry()}, 5, "found"),
        ({"a": entry(), "b": entry(offsets=(5, 9))}, 9, "hole"),
        ({"a": entry(), "b": entry(offsets=(2, 6))}, 6, "overlap"),
        ({"a": entry(dtype="Q4")}, 4, "unknown dtype"),
        ({"a": entry(shape=(-4,))}, 4, "non-negative"),
        ({"a": entry(shape=(True, 4))}, 4, "non-negative"),
        ({"a": entry(shape=[1] * 9)}, 1, "9 dimensions, the limit `rank` is 8"),
        ({"a": entry(shape=(5,))}, 4, "takes 5 bytes"),
        ({"a": entry(offsets=(4, 0))}, 4, "span"),
        ({"a": entry() | {"extra": 1}}, 4, "exactly dtype"),
        ({"a": 3}, 4, "exactly dtype"),
        ({"": entry()}, 4, "empty name"),
        ({"a\u202eb": entry()}, 4, "invisible"),
        ({"a": entry(), "__metadata__": {"x": 1}}, 4, "__metadata__"),
        ({"f4": entry(dtype="F4", shape=(3,), offsets=(0, 2))}, 2, "takes None bytes"),
    ],
)
def test_every_defect_is_refused_and_named(table: object, data_bytes: int, says: str) -> None:
    assert says in refusal(table, data_bytes)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            "twice",
        ),
        (b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', "twice"),
        (b"[]", "start with"),
        (b'{"a": NaN}', "not JSON"),
        (b'{"a": ' + b"[" * 100_000, "the limit `json_depth` is 64"),
        (b'{"\xff": 1}', "not valid JSON"),
    ],
)
def test_json_is_parsed_strictly(raw: bytes, says: str) -> None:
    assert says in refusal(None, 1, raw=raw)


def test_all_defects_of_a_header_are_told_at_once() -> None:
    text = refusal({"a": entry(dtype="Q4"), "b": entry(shape=(5,)), "c": entry()}, 4)
    assert text.count("\n") == 1
    assert "`a`" in text
    assert "`b`" in text


@pytest.mark.parametrize("length", [0, 1, 100_000_001, 2**63])
def test_an_impossible_header_length_is_refused_unread(length: int) -> None:
    with pytest.raises(CheckpointInvalid):
        header_length(length.to_bytes(8, "little"), 50)


@given(st.binary(max_size=300))
def test_any_bytes_parse_or_are_refused(raw: bytes) -> None:
    with suppress(CheckpointInvalid):
        assert parse_header(raw, 8 + len(raw)).size == 8 + len(raw)


@given(st.lists(st.tuples(st.sampled_from(sorted(BITS)), st.lists(st.integers(0, 5), max_size=4)), max_size=6))
def test_what_is_encoded_parses_to_itself(rows: list[tuple[str, list[int]]]) -> None:
    placed = []
    begin = 0
    for number, (dtype, shape) in enumerate(rows):
        size = size_in_bytes(dtype, tuple(shape))
        if size is not None:
            placed.append((f"t{number:02d}", dtype, tuple(shape), begin, begin + size))
            begin += size
    head = encode_header(placed, [("format", "pt")])
    header = parse_header(head[8:], len(head) + begin)
    assert len(head) % 8 == 0
    assert sorted((s.name, s.dtype, s.shape, s.begin, s.end) for s in header.tensors) == sorted(placed)


NAMES = st.text(st.sampled_from('ab.0 é\\"\t'), min_size=1, max_size=4) | st.just("__metadata__")
PIECES = ['"', ",", "{", "}", "[", "]", ":", " ", "0", "1", "01", "-", "1.0", "\\u0061", "\n", "null", '"a":', "é"]
SEPARATORS = [(",", ":"), (", ", ": "), (",\n", ":")]


@st.composite
def headers(draw: st.DrawFn) -> tuple[bytes, int]:
    """A header and the size of its file: sound, or a little wrong."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}} if draw(st.booleans()) else {}
    begin = 0
    for name in draw(st.lists(NAMES, min_size=1, max_size=4)):
        dtype, shape = draw(st.sampled_from(sorted(BITS))), draw(st.lists(st.integers(0, 9), max_size=2))
        end = begin + (size_in_bytes(dtype, tuple(shape)) or 0)
        table[name] = entry(dtype, shape, (begin, end))
        begin = end
    if draw(st.booleans()):
        table = dict(draw(st.permutations(list(table.items()))))
    text = json.dumps(table, separators=draw(st.sampled_from(SEPARATORS))) + draw(st.sampled_from(["", "  ", "\n"]))
    for _ in range(draw(st.integers(0, 2))):
        first, last = sorted(draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
        middle = draw(st.sampled_from(["", text[first:last] * 2, *PIECES]))
        text = text[:first] + middle + text[min(last, first + draw(st.integers(0, 3))) :]
    body = text.encode()
    return body, 8 + len(body) + begin


@given(headers())
@settings(max_examples=1000)
def test_a_header_in_plain_form_says_what_the_json_parser_finds(case: tuple[bytes, int]) -> None:
    plain = _parse_plain(*case)
    if plain is not None:
        assert plain == _parse_any(*case, "m.safetensors")


@pytest.mark.parametrize("separators", SEPARATORS[:2])
def test_what_writers_write_is_plain_form(separators: tuple[str, str]) -> None:
    table = {"__metadata__": {"format": "pt"}, "a.0.weight": entry(), "b c": entry("BF16", (2, 3), (4, 16))}
    body = json.dumps(table, separators=separators).encode() + b"   "
    plain = _parse_plain(body, 8 + len(body) + 16)
    assert plain == _parse_any(body, 8 + len(body) + 16, "")
    assert plain is not None


EMPTY = b'"e":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
PLAIN = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"[4]", b"[04]"),
        (b"[4]", b"[4,]"),
        (b"[4]", b"[5]"),
        (b"[4]", b"[4 ]]"),
        (b"}}", b"},}"),
        (b"}}", b"}"),
        (b"}}", b"}}}"),
        (b'{"a"', b'{,"a"'),
        (b'{"a"', b"{" + EMPTY + EMPTY + b'"a"'),
        (b'{"a"', b'{"__metadata__":{"x":1},"a"'),
        (b'{"a"', b'{"__metadata__":{"x":"1","x":"1"},"a"'),
        (b'"a"', b'"__metadata__"'),
        (b'"a"', b'"\\u0061"'),
        (b"U8", b"Q8"),
        (b"[0,4]", b"[00,4]"),
        (PLAIN, PLAIN[:-1] + b"," + PLAIN[1:]),
        (PLAIN, PLAIN[:-1] + b"," + PLAIN[1:-1] + b"," + PLAIN[1:]),
    ],
)
def test_everything_else_is_left_to_the_json_parser(old: bytes, new: bytes) -> None:
    body = PLAIN.replace(old, new, 1)
    assert body != PLAIN
    assert _parse_plain(body, 8 + len(body) + 4) is None
