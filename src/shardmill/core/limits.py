"""How much of a foreign checkpoint is taken in: one named limit per quantity, each with an option that raises it.

A limit bounds time and memory before they are spent: what is above one is refused by size or count, unparsed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Final, Self

from shardmill.errors import CheckpointInvalid, Problem, RecipeInvalid, show

_MOST: Final = 10**15


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Every limit, with its default."""

    header_bytes: int = 16_000_000
    """JSON head of one shard; the format itself ends at 100 MB."""
    header_tensors: int = 200_000
    """Tensors in one shard."""
    metadata_bytes: int = 65_536
    """`__metadata__` of one shard; above it is passed over with a warning, since it is never written anyway."""
    index_bytes: int = 64_000_000
    index_tensors: int = 1_000_000
    index_shards: int = 10_000
    json_bytes: int = 4_000_000
    """config.json and any other JSON that is parsed."""
    json_depth: int = 64
    json_digits: int = 100
    """Digits of one number."""
    json_string_bytes: int = 65_536
    name_bytes: int = 4096
    """Of one tensor name."""
    rank: int = 8
    """Dimensions of one tensor."""
    stack_experts: int = 10_000
    """Experts in one fused stack."""

    @classmethod
    def parse(cls, changes: Mapping[str, int] | Iterable[str]) -> Self:
        """The defaults with changes, given as a mapping or as `NAME=VALUE`; `16MB` and `16kB` are decimal.

        Raises:
            RecipeInvalid: no such limit, no number, or out of the limit's own range.

        >>> Limits.parse(["header_bytes=50MB"]).header_bytes
        50000000
        >>> Limits.parse({"rank": 12}).rank
        12
        """
        pairs = changes.items() if isinstance(changes, Mapping) else (_split(text) for text in changes)
        return replace(cls(), **{name: _checked(name, value) for name, value in pairs})


_CEILINGS: Final[Mapping[str, int]] = {
    "header_bytes": 100_000_000,  # of the format
    "json_depth": 400,  # of Python's parser
    "json_digits": 4000,  # of Python's integers
    "rank": 64,
}
DEFAULTS: Final = Limits()
RESULT: Final = Limits(
    header_bytes=100_000_000, header_tensors=2_000_000, index_bytes=512_000_000, index_tensors=8_000_000
)
"""For results, which hold up to four tensors for each one of the source."""
NAMES: Final = tuple(field.name for field in fields(Limits))
_UNITS: Final = {"kB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True, slots=True, kw_only=True)
class Intake:
    """What a run takes in of a foreign checkpoint."""

    limits: Limits = DEFAULTS
    allow_code: bool = False
    """Whether code, pickles and dot files are copied, and references to code kept."""


def _split(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    unit = value[-2:]
    number = value[:-2] if unit in _UNITS else value
    is_number = number.isascii() and number.isdigit() and len(number) <= 15
    return name, int(number) * _UNITS.get(unit, 1) if is_number else -1


def _checked(name: str, value: int) -> int:
    if name not in NAMES:
        raise _invalid(f"there is no limit {show(name)}", f"known: {', '.join(NAMES)}")
    most = _CEILINGS.get(name, _MOST)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise _invalid(f"limit {show(name)} takes a whole number from 1 to {most}")
    return value


def _invalid(message: str, way_out: str = "") -> RecipeInvalid:
    return RecipeInvalid([Problem(kind="limit", message=message, way_out=way_out)])


def above(limit: str, what: str, limits: Limits, *, file: str = "", tensor: str = "") -> Problem:
    """The problem of what is above a limit; names the limit, its value and the way to raise it.

    >>> str(above("rank", "9 dimensions", DEFAULTS, tensor="w"))
    'tensor `w`: 9 dimensions, the limit `rank` is 8; raise this limit if you trust the source'
    """
    message = f"{what}, the limit `{limit}` is {getattr(limits, limit)}"
    way_out = "raise this limit if you trust the source"
    return Problem(file=file, tensor=tensor, kind="limit-exceeded", message=message, way_out=way_out)


def refuse_above(limit: str, what: str, limits: Limits, *, file: str = "") -> CheckpointInvalid:
    """The refusal of what is above a limit."""
    return CheckpointInvalid([above(limit, what, limits, file=file)])
