"""JSON of strangers: bounded before it is parsed, and nothing that two readers could understand differently.

Refused are: another encoding than UTF-8, a byte order mark, a key that stands twice at any depth, NaN, Infinity and
numbers that no float holds, strings that are no text, and whatever is above a limit.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any, Final, NoReturn

from shardmill.core.limits import DEFAULTS, Limits, refuse_above
from shardmill.errors import refuse, show

_STRING: Final = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\Z)', re.DOTALL)
"""A string, or the rest of a text that ends within one; possessive, so that it takes linear time."""
_BRACKET: Final = re.compile(r"[\[\]{}]")
_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(
    data: bytes, *, file: str, kind: str, limits: Limits = DEFAULTS, most: tuple[str, int, int] | None = None
) -> Any:
    """Parse UTF-8 JSON strictly.

    Args:
        most: a limit by name, and how many values and how many objects it allows in the whole text.

    Raises:
        CheckpointInvalid: of the given `kind`, or above a limit.

    >>> parse_json(b'{"a": 1}', file="config.json", kind="config")
    {'a': 1}
    """
    if data.startswith(b"\xef\xbb\xbf"):
        message = "expected JSON in UTF-8, found a byte order mark before it"
        raise refuse(kind, message, file=file, way_out="save the file as UTF-8 without one")
    try:
        text = data.decode("utf-8")
        _check_bounds(text, file, limits, most)
        found = json.loads(
            text, object_pairs_hook=_no_duplicates, parse_constant=_no_constants, parse_float=_finite_number
        )
        if _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is no character
    except (ValueError, RecursionError) as error:
        if isinstance(error, _Bounded):
            raise error.refusal from None
        raise refuse(kind, f"not valid JSON: {error or type(error).__name__}"[:200], file=file) from error
    return found


class _Bounded(ValueError):
    """Carries the refusal of what is above a limit past the handler of malformed text."""

    def __init__(self, refusal: Exception) -> None:
        super().__init__()
        self.refusal = refusal


def _stop(limit: str, what: str, limits: Limits, file: str) -> NoReturn:
    raise _Bounded(refuse_above(limit, what, limits, file=file))


def _check_bounds(text: str, file: str, limits: Limits, most: tuple[str, int, int] | None) -> None:
    longest = max((found.end() - found.start() for found in _STRING.finditer(text)), default=0)
    if longest > limits.json_string_bytes + 2:
        _stop("json_string_bytes", f"a string of {longest - 2} characters", limits, file)
    skeleton = _STRING.sub("", text)
    if most is not None:
        limit, most_values, most_objects = most
        values, objects = sum(map(skeleton.count, ",[{")), skeleton.count("{")
        if values > most_values or objects > most_objects:
            _stop(limit, f"{values} values, {objects} of them objects", limits, file)
    if re.search(rf"[0-9]{{{limits.json_digits + 1}}}", skeleton):
        _stop("json_digits", f"a number of more than {limits.json_digits} digits", limits, file)
    depth = 0
    for bracket in _BRACKET.finditer(skeleton):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > limits.json_depth:
            _stop("json_depth", f"nested more than {limits.json_depth} deep", limits, file)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"key {show(twice)} stands twice")
    return found


def _no_constants(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _finite_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"no float holds the number {show(text, 40)}")
    return number
