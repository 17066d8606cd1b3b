"""The index of a sharded checkpoint, as a rule `model.safetensors.index.json`: tensor name to shard name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from shardmill.core.limits import DEFAULTS, Limits, refuse_above
from shardmill.core.pretty import pretty
from shardmill.core.strict_json import parse_json
from shardmill.errors import CheckpointInvalid, Problem, refuse, show

INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"
_INDEX_SUFFIX: Final = ".safetensors.index.json"
_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_DEPTH = 4


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """Which shard holds which tensor; `weight_map` keeps the order of the file.

    >>> CheckpointIndex({"a": "1.safetensors", "b": "1.safetensors"}).shards
    ('1.safetensors',)
    """

    weight_map: Mapping[str, str]
    name: str = INDEX_NAME
    """Of its file."""

    @property
    def shards(self) -> tuple[str, ...]:
        """Shard names, sorted."""
        return tuple(sorted(set(self.weight_map.values())))


def is_index_name(name: str) -> bool:
    """Tell whether an index may stand in a file of this name, which lies in no folder.

    >>> is_index_name("diffusion_pytorch_model.safetensors.index.json"), is_index_name("a/model.safetensors.index.json")
    (True, False)
    """
    return "/" not in name and name.endswith(_INDEX_SUFFIX)


def choose_index(names: Iterable[str]) -> str | None:
    """Choose the index among the files of a checkpoint: the one of the usual name, else the only one there is.

    An index of another name says nothing where all is in one file of the usual name.

    >>> choose_index(["x.safetensors.index.json", "config.json"]), choose_index(["config.json"])
    ('x.safetensors.index.json', None)
    """
    there = set(names)
    found = sorted(filter(is_index_name, there))
    if INDEX_NAME in there:
        return INDEX_NAME
    return found[0] if len(found) == 1 and SINGLE_NAME not in there else None


def is_shard_name(name: str) -> bool:
    """Tell whether `name` is a relative shard path of up to four plain components.

    >>> (
    ...     is_shard_name("model-00001-of-00002.safetensors"),
    ...     is_shard_name("../x.safetensors"),
    ...     is_shard_name("/x.safetensors"),
    ... )
    (True, False, False)
    """
    parts = name.split("/")
    plain = all(_COMPONENT.fullmatch(part) and part != ".." for part in parts)
    return plain and len(parts) <= _DEPTH and name.endswith(".safetensors")


def parse_index(data: bytes, *, file: str = INDEX_NAME, limits: Limits = DEFAULTS) -> CheckpointIndex:
    """Parse an index file.

    Raises:
        CheckpointInvalid: not JSON, no `weight_map`, a shard name that is no plain relative path, or above a limit.

    >>> parse_index(b'{"weight_map": {"a.weight": "m.safetensors"}}').weight_map
    {'a.weight': 'm.safetensors'}
    """
    if len(data) > limits.index_bytes:
        raise refuse_above("index_bytes", f"{len(data)} bytes", limits, file=file)
    quotes = data.count(b'"')
    if quotes > 4 * limits.index_tensors + _OTHER_QUOTES:
        raise refuse_above("index_tensors", f"about {quotes // 4} tensors", limits, file=file)
    weight_map = _parse_plain(data, limits) or _parse_any(data, file, limits)
    index = CheckpointIndex(weight_map, file)
    if len(index.shards) > limits.index_shards:
        raise refuse_above("index_shards", f"{len(index.shards)} shards", limits, file=file)
    return index


_OTHER_QUOTES: Final = 4000
"""Quotes of an index beside those of its map."""


_WEIGHT_MAP: Final = re.compile(r'"weight_map"\s*:\s*(\{[^{}]*\})')
_SPACE: Final = " \t\r\n"


def _parse_plain(data: bytes, limits: Limits = DEFAULTS) -> Mapping[str, str] | None:
    """Read the map of a sound index without escapes; None for any other, about which `_parse_any` has the say.

    Where no quote is escaped, every second one ends a string: cutting the map at its quotes gives name, colon, shard,
    comma in turn. The JSON parser sees the rest of the file with an empty map in its place.
    """
    try:
        text = data.decode("utf-8")
    except ValueError:
        return None
    found = _WEIGHT_MAP.search(text) if "\\" not in text and text.count('"weight_map"') == 1 else None
    if found is None or not _is_index(text[: found.start(1)] + "{}" + text[found.end(1) :]):
        return None
    first, *pieces = text[found.start(1) + 1 : found.end(1) - 1].split('"')
    names, colons, shards, commas = pieces[0::4], pieces[1::4], pieces[2::4], pieces[3::4]
    if len(pieces) % 4 or not names or (first + commas.pop()).strip(_SPACE):
        return None
    if {text.strip(_SPACE) for text in set(colons)} != {":"} or {text.strip(_SPACE) for text in set(commas)} - {","}:
        return None
    shard_names = {shard: shard for shard in shards}
    weight_map = dict(zip(names, map(shard_names.__getitem__, shards), strict=True))
    is_sound = all(map(str.isprintable, names)) and all(map(is_shard_name, shard_names))
    is_sound = is_sound and max(map(len, names)) <= limits.json_string_bytes
    return weight_map if is_sound and len(weight_map) == len(names) else None


def _is_index(text: str) -> bool:
    try:
        raw = parse_json(text.encode(), file="", kind="")
    except CheckpointInvalid:
        return False
    return isinstance(raw, dict) and raw.get("weight_map") == {}


def _parse_any(data: bytes, file: str, limits: Limits = DEFAULTS) -> Mapping[str, str]:
    most = ("index_tensors", 2 * limits.index_tensors + _OTHER_QUOTES, _OTHER_QUOTES)
    raw = parse_json(data, file=file, kind="index-invalid", limits=limits, most=most)
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise refuse("index-invalid", "expected an object with a non-empty `weight_map`", file=file)
    problems = [
        Problem(
            file=file,
            tensor=tensor,
            kind="shard-name",
            message=f"shard name {show(str(shard)[:500])} is not a plain relative path",
        )
        for tensor, shard in weight_map.items()
        if not isinstance(shard, str) or not is_shard_name(shard)
    ]
    if problems:
        raise CheckpointInvalid(problems)
    return weight_map


def encode_index(weight_map: Mapping[str, str], total_size_bytes: int) -> bytes:
    """Write an index, names sorted.

    >>> encode_index({"b": "x", "a": "x"}, 3).count(b"total_size")
    1
    """
    document = {"metadata": {"total_size": total_size_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    return pretty(document).encode() + b"\n"
