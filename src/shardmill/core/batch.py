"""What a batch is asked to convert: entries of a manifest, and where each checkpoint goes.

Pure: it neither looks whether a checkpoint is there nor what it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, Final

from shardmill.errors import Problem, Refused, show

FIELDS: Final = ("name", "path", "scheme", "version")
"""What a destination may be made of: last part of the source, its path below the scanned prefix, scheme, state."""
VERSION_DIGITS: Final = 12
WILDCARDS: Final = frozenset("*?[")
"""A part of a source that holds one of these is a pattern."""
_LISTS: Final = "checkpoints"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of a manifest: a checkpoint or a pattern, and what is different for it."""

    source: str
    choices: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the request that replace those of the batch; `destination` may be among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A checkpoint that a batch is to look at."""

    source: str
    name: str
    """Last part of its location, without revision."""
    path: str
    """Below what was scanned; the name where nothing was."""
    is_scanned: bool = False
    """Whether it was found by a pattern, and may be in the making."""


def parse_entries(data: Any) -> tuple[Entry, ...]:
    """Read a manifest: a list of locations and of mappings with `source`, or a mapping with `checkpoints`.

    Raises:
        Refused: something else; names every entry that is.

    >>> parse_entries(["/models/a", {"source": "/models/b", "scheme": "W4A16"}])[1].choices
    {'scheme': 'W4A16'}
    """
    if isinstance(data, Mapping) and set(data) == {_LISTS}:
        data = data[_LISTS]
    if not isinstance(data, Sequence) or isinstance(data, str):
        raise Refused([_invalid(f"expected a list of checkpoints, found {type(data).__name__}")])
    problems = [
        _invalid(f"entry {number}: expected a location, or a mapping with `source`, found {show(repr(entry), 80)}")
        for number, entry in enumerate(data, 1)
        if not _is_entry(entry)
    ]
    if problems:
        raise Refused(problems)
    return tuple(_entry(entry) for entry in data)


def _is_entry(entry: Any) -> bool:
    if isinstance(entry, str):
        return True
    is_named = isinstance(entry, Mapping) and all(isinstance(name, str) for name in entry)
    return is_named and isinstance(entry.get("source"), str)


def _entry(entry: str | Mapping[str, Any]) -> Entry:
    if isinstance(entry, str):
        return Entry(source=entry)
    return Entry(source=entry["source"], choices={name: value for name, value in entry.items() if name != "source"})


def _invalid(message: str, way_out: str = "see docs/batch.md") -> Problem:
    return Problem(kind="batch-manifest", message=message, way_out=way_out)


def split_pattern(source: str) -> tuple[str, tuple[str, ...]]:
    """The fixed part of a source, and the parts from the first that holds a wildcard on.

    >>> split_pattern("s3://models/incoming/*")
    ('s3://models/incoming', ('*',))
    >>> split_pattern("/models/base")
    ('/models/base', ())
    """
    scheme, separator, rest = source.rpartition("://")
    parts = rest.split("/")
    first = next((number for number, part in enumerate(parts) if WILDCARDS & {*part}), len(parts))
    fixed = "/".join(parts[:first]) or "/"
    return f"{scheme}{separator}{fixed}", tuple(part for part in parts[first:] if part)


def listed(source: str) -> Found:
    """A checkpoint that was named.

    >>> listed("hf://org/model@v1").name, listed("/models/base/").name
    ('model', 'base')
    """
    trimmed = source.rstrip("/")
    name = trimmed.rpartition("/")[2].partition("@")[0] if trimmed.startswith("hf://") else trimmed.rpartition("/")[2]
    return Found(source=trimmed, name=name, path=name)


def check_template(template: str) -> list[Problem]:
    """Problems of a destination's template.

    >>> check_template("s3://out/{name}-{scheme}"), check_template("/out/{nam}")[0].kind
    ([], 'batch-destination')
    """
    known = ", ".join(f"{{{name}}}" for name in FIELDS)
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        return [_bad_template(template, f"cannot be read: {error}", f"write {{{{ and }}}} for braces; known: {known}")]
    used = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
    unknown = sorted({name for name, spec, conversion in used if name not in FIELDS or spec or conversion})
    if unknown:
        return [_bad_template(template, f"unknown parts {', '.join(map(show, unknown))}", f"known: {known}")]
    return []


def _bad_template(template: str, message: str, way_out: str) -> Problem:
    return Problem(file=template, kind="batch-destination", message=f"destination {message}", way_out=way_out)


def destination_of(template: str, found: Found, scheme: str, made_of: str) -> str:
    """Fill in a template that was checked.

    Args:
        made_of: names source and recipe, see `core.plan.made_of`.

    >>> destination_of("/out/{name}-{scheme}", listed("/in/a"), "FP8_DYNAMIC", "")
    '/out/a-FP8_DYNAMIC'
    """
    return template.format(name=found.name, path=found.path, scheme=scheme, version=made_of[:VERSION_DIGITS])


def check_distinct(requests: Iterable[tuple[str, str]]) -> list[Problem]:
    """Problems of sources and destinations of different requests: two of them at one destination.

    >>> [problem.kind for problem in check_distinct([("/a", "/x"), ("/b", "/x"), ("/b", "/y")])]
    ['batch-destination']
    """
    by_destination: dict[str, list[str]] = {}
    for source, destination in requests:
        by_destination.setdefault(destination, []).append(source)
    return [
        Problem(
            file=destination,
            kind="batch-destination",
            message=f"two checkpoints would be written there: {show(sources[0])} and {show(sources[1])}",
            way_out="put {name}, {path} or {scheme} into the destination",
        )
        for destination, sources in by_destination.items()
        if len(sources) > 1
    ]
