"""Reading `shardmill.json` back: what a finished result says of itself, parsed once and trusted afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, TypeVar

from shardmill.core.assemble import MANIFEST_NAME, MANIFEST_SCHEMA
from shardmill.core.digest import Digest
from shardmill.core.index import is_shard_name
from shardmill.core.plan import PART
from shardmill.core.receipt import WeightRecord
from shardmill.core.recipe import Recipe, parse_recipe
from shardmill.core.statistics import Statistics
from shardmill.errors import CheckpointInvalid, Problem, Refused, refuse

_T = TypeVar("_T")
_NOT_STATISTICS: Final = ("module", "scheme")


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over all shards, as `assemble.totals` makes them; sizes in bytes, weights in elements."""

    source_bytes: int
    output_bytes: int
    quantized_weights: int
    quantized_bytes: int
    copied_weights: int
    copied_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDecision:
    """What was done to one source tensor, and why."""

    name: str
    action: str
    reason: str
    scheme: str = ""
    """Label of its scheme; empty for none."""
    outputs: tuple[str, ...] = ()
    """What it became, where that is neither a copy nor a quantized weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestShard:
    """What the manifest says of one shard."""

    name: str
    key: str
    size: int
    """In bytes."""
    digest: Digest
    tensors: tuple[TensorDecision, ...]
    """Of the source shard."""
    weights: tuple[WeightRecord, ...]
    """Quantized weights in the output shard."""

    @property
    def is_empty(self) -> bool:
        """Whether its tensors are all parts of weights in other shards, so that no index names it."""
        return bool(self.tensors) and all(tensor.action == PART for tensor in self.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A parsed manifest."""

    plan: str
    """Digest of plan, job keys, other files and config.json together."""
    recipe: Recipe
    files: tuple[tuple[str, Digest], ...]
    """Other files that were copied."""
    warnings: tuple[Problem, ...]
    totals: Totals
    shards: tuple[ManifestShard, ...]
    sources: tuple[tuple[str, Digest], ...] = ()
    """Digests of the source shards that were read."""
    versions: tuple[tuple[str, str], ...] = ()
    """Of what wrote it."""

    @property
    def source_digests(self) -> dict[str, str]:
        """Digests of the source shards as job keys are made of them."""
        return {name: str(digest) for name, digest in self.sources}


def parse_manifest(document: Any) -> Manifest:
    """Read a manifest as `assemble.manifest` writes it.

    Raises:
        CheckpointInvalid: another schema, or a field is missing or of the wrong type.

    >>> parse_manifest({"schema": 0})
    Traceback (most recent call last):
    shardmill.errors.CheckpointInvalid: `shardmill.json`: expected a manifest of schema 1, found schema 0
    """
    schema = document.get("schema") if isinstance(document, Mapping) else None
    if schema != MANIFEST_SCHEMA or isinstance(schema, bool):
        message = f"expected a manifest of schema {MANIFEST_SCHEMA}, found schema {schema!r}"
        raise refuse("manifest-invalid", message[:200], file=MANIFEST_NAME)
    try:
        return Manifest(
            plan=_text(document["plan"]),
            recipe=parse_recipe(document["recipe"]),
            files=_digests(document["files"]),
            warnings=_each(document["warnings"], _warning),
            totals=Totals(**{field.name: _count(document["totals"][field.name]) for field in fields(Totals)}),
            shards=_each(document["shards"], _shard),
            sources=_digests(document["sources"]),
            versions=tuple((_text(name), _text(value)) for name, value in document["versions"].items()),
        )
    except Refused as error:
        raise CheckpointInvalid(
            Problem(file=MANIFEST_NAME, kind="manifest-invalid", message=problem.message, way_out=problem.way_out)
            for problem in error.problems
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        message = f"malformed: {type(error).__name__} {error}"
        raise refuse("manifest-invalid", message[:200], file=MANIFEST_NAME) from error


def _each(value: Any, parse: Callable[[Any], _T]) -> tuple[_T, ...]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, found {type(value).__name__}")
    return tuple(map(parse, value))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, found {type(value).__name__}")
    return value


def _digests(raw: Any) -> tuple[tuple[str, Digest], ...]:
    return tuple((_file_name(name), Digest.parse(_text(value))) for name, value in raw.items())


def _file_name(value: Any) -> str:
    if not value or not _text(value).isprintable():
        raise ValueError("a file name is empty or holds control characters")
    return _text(value)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"expected a non-negative integer, found {type(value).__name__}")
    return value


def _warning(raw: Any) -> Problem:
    return Problem(
        file=_text(raw["file"]),
        tensor=_text(raw["tensor"]),
        kind=_text(raw["code"]),
        message=_text(raw["message"]),
    )


def _shard(raw: Any) -> ManifestShard:
    name = _text(raw["name"])
    if not is_shard_name(name):
        raise ValueError("a shard name is not a plain relative path")
    return ManifestShard(
        name=name,
        key=_text(raw["key"]),
        size=_count(raw["size"]),
        digest=Digest.parse(_text(raw["digest"])),
        tensors=_each(raw["tensors"], _decision),
        weights=_each(raw["weights"], _weight),
    )


def _decision(raw: Any) -> TensorDecision:
    return TensorDecision(
        name=_text(raw["name"]),
        action=_text(raw["action"]),
        reason=_text(raw["reason"]),
        scheme=_text(raw.get("scheme", "")),
        outputs=_each(raw.get("outputs", []), _text),
    )


def _weight(raw: Any) -> WeightRecord:
    numbers = {name: value for name, value in raw.items() if name not in _NOT_STATISTICS}
    if any(isinstance(value, int | float) and value < 0 for value in numbers.values()):
        raise ValueError("statistics are never negative")
    return WeightRecord(_text(raw["module"]), _text(raw["scheme"]), Statistics.from_json(numbers))
