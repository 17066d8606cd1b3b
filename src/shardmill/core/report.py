"""What a report of a finished result shows, in figures: sizes by part, errors by layer and module, worst weights.

Everything follows from the manifest, but for the sizes of parts, which the headers of the output tell, and histograms,
which take the values of source and result. How it looks is decided in `shardmill.pages`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Final, NamedTuple, TypeVar

from shardmill.core.layout import GENERATED_PARAMS
from shardmill.core.manifest import Manifest
from shardmill.core.matching import split_name
from shardmill.core.parts import part_of, place_of
from shardmill.core.receipt import WeightRecord
from shardmill.core.statistics import Statistics
from shardmill.core.summary import Summary, by_error, summarize_manifest

WORST_SHOWN: Final = 20
_Key = TypeVar("_Key", bound=Hashable)
_PARAMS: Final = frozenset({"weight", *GENERATED_PARAMS})


class WrittenTensor(NamedTuple):
    """A tensor of the output, without its values."""

    name: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Histograms:
    """How the values of a weight and of its errors are spread, in bins of equal width from `-reach` to `reach`."""

    weight: tuple[int, ...]
    error: tuple[int, ...]
    weight_reach: float
    error_reach: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the model: what it takes in the output, and what was measured about its quantized weights."""

    name: str
    tensors: int
    """Of the source."""
    quantized: int
    """Quantized weights."""
    elements: int | None
    """Elements of all its tensors; None where headers were not read."""
    nbytes: int | None
    """In the output, scales included."""
    statistics: Statistics

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits per element, scales included."""
        return 8 * self.nbytes / self.elements if self.nbytes is not None and self.elements else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Numbered layers that have quantized weights."""

    name: str
    layers: tuple[int, ...]
    modules: tuple[str, ...]
    """In the order of the checkpoint; all experts of one projection are one module."""
    cells: Mapping[tuple[int, str], Statistics]
    """By layer and module."""
    experts: tuple[int, ...]
    expert_cells: Mapping[tuple[int, int], Statistics]
    """By layer and expert, all projections together."""
    totals: Mapping[int, Statistics]
    """Of all weights of a layer."""
    worst: Mapping[int, float]
    """Largest relative error of a single weight, by layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a report is told beside the manifest; empty where it is not known."""

    destination: str = ""
    source: str = ""
    """Location of the source; manifests name none."""
    base_model: str = ""
    """Of the source on the Hub."""
    architecture: str = ""
    seconds: float | None = None
    """Wall time of the run."""
    notes: tuple[str, ...] = ()
    """What could not be told, and why."""

    @property
    def title(self) -> str:
        """Name of the result: the last component of its location.

        >>> Origin(destination="s3://bucket/models/a-W4A16/").title
        'a-W4A16'
        """
        return self.destination.rstrip("/").rpartition("/")[2] or "result"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A finished result in figures."""

    origin: Origin
    manifest: Manifest
    summary: Summary
    schemes: tuple[str, ...]
    """Labels of the schemes that were used, most weights first."""
    statistics: Statistics
    """Of all quantized weights."""
    parts: tuple[Part, ...]
    """Largest first."""
    stacks: tuple[Stack, ...]
    """Most layers first."""
    worst: tuple[WeightRecord, ...]
    """Largest relative error first."""
    histograms: Mapping[str, Histograms] = field(default_factory=dict)
    """By module; of the worst weights, where the source was at hand."""


def build_report(
    manifest: Manifest,
    origin: Origin = Origin(),
    written: Iterable[WrittenTensor] | None = None,
    histograms: Mapping[str, Histograms] | None = None,
) -> Report:
    """Put the figures of a report together.

    Args:
        written: all tensors of the output, where they are known.
        histograms: by module.
    """
    weights = [weight for shard in manifest.shards for weight in shard.weights]
    labels: dict[str, int] = {}
    for weight in weights:
        labels[weight.scheme] = labels.get(weight.scheme, 0) + weight.statistics.count
    return Report(
        origin=origin,
        manifest=manifest,
        summary=summarize_manifest(manifest),
        schemes=tuple(sorted(labels, key=lambda label: (-labels[label], label))),
        statistics=_total(weight.statistics for weight in weights),
        parts=_parts(manifest, weights, written),
        stacks=_stacks(weights),
        worst=tuple(by_error(weights)[:WORST_SHOWN]),
        histograms=histograms or {},
    )


class _Sums:
    """Statistics in the making: adding millions of frozen values would take minutes."""

    __slots__ = ("amax", "clipped", "count", "max_error", "nonzero", "squared_error", "squared_weight", "zeroed")

    def __init__(self) -> None:
        self.count = self.clipped = self.zeroed = self.nonzero = 0
        self.squared_error = self.squared_weight = self.max_error = self.amax = 0.0

    def add(self, found: Statistics) -> None:
        self.count += found.count
        self.clipped += found.clipped
        self.zeroed += found.zeroed
        self.nonzero += found.nonzero
        self.squared_error += found.squared_error
        self.squared_weight += found.squared_weight
        self.max_error = found.max_error if not found.max_error <= self.max_error else self.max_error
        self.amax = found.amax if not found.amax <= self.amax else self.amax

    def done(self) -> Statistics:
        return Statistics(**{name: getattr(self, name) for name in self.__slots__})


def _total(statistics: Iterable[Statistics]) -> Statistics:
    sums = _Sums()
    for found in statistics:
        sums.add(found)
    return sums.done()


def _grouped(entries: Iterable[tuple[_Key, Statistics]]) -> dict[_Key, Statistics]:
    """Statistics by key, in the order in which keys appear."""
    found: dict[_Key, _Sums] = {}
    for key, statistics in entries:
        if key not in found:
            found[key] = _Sums()
        found[key].add(statistics)
    return {key: sums.done() for key, sums in found.items()}


def _parts(
    manifest: Manifest, weights: Sequence[WeightRecord], written: Iterable[WrittenTensor] | None
) -> tuple[Part, ...]:
    by_module = {weight.module: weight.statistics for weight in weights}
    named = {module: part_of(module) for module in by_module}
    measured = _grouped((named[module], found) for module, found in by_module.items())
    quantized: dict[str, int] = {}
    for part in named.values():
        quantized[part] = quantized.get(part, 0) + 1
    tensors: dict[str, int] = {}
    for shard in manifest.shards:
        for tensor in shard.tensors:
            part = part_of(split_name(tensor.name)[0])
            tensors[part] = tensors.get(part, 0) + 1
    sizes = None if written is None else _sizes(written, by_module)
    names = dict.fromkeys([*tensors, *measured, *(sizes or {})])
    parts = [
        Part(
            name=name,
            tensors=tensors.get(name, 0),
            quantized=quantized.get(name, 0),
            elements=None if sizes is None else sizes.get(name, (0, 0))[0],
            nbytes=None if sizes is None else sizes.get(name, (0, 0))[1],
            statistics=measured.get(name, Statistics()),
        )
        for name in names
    ]
    return tuple(sorted(parts, key=lambda part: (-(part.nbytes or 0), -part.statistics.count, part.name)))


def _sizes(written: Iterable[WrittenTensor], quantized: Mapping[str, Statistics]) -> dict[str, tuple[int, int]]:
    """Elements and bytes by part; a scale has no elements of its own."""
    found: dict[str, tuple[int, int]] = {}
    counted: set[str] = set()
    for name, shape, nbytes in written:
        module, param = split_name(name)
        part = part_of(module)
        elements, size = found.get(part, (0, 0))
        if module in quantized and param in _PARAMS:
            fresh = 0 if module in counted else quantized[module].count
            counted.add(module)
        else:
            fresh = prod(shape)
        found[part] = elements + fresh, size + nbytes
    return found


def _stacks(weights: Iterable[WeightRecord]) -> tuple[Stack, ...]:
    rows: dict[str, list[tuple[int, str, int | None, Statistics]]] = {}
    for weight in weights:
        place = place_of(weight.module)
        if place is not None:
            rows.setdefault(place.stack, []).append((place.layer, place.module, place.expert, weight.statistics))
    stacks = [_stack(name, entries) for name, entries in rows.items()]
    return tuple(sorted(stacks, key=lambda stack: (-len(stack.layers), stack.name)))


def _stack(name: str, rows: Sequence[tuple[int, str, int | None, Statistics]]) -> Stack:
    worst: dict[int, float] = {}
    for layer, _, _, found in rows:
        error = found.relative_error
        worst[layer] = max(worst.get(layer, 0.0), math.inf if math.isnan(error) else error)
    return Stack(
        name=name,
        layers=tuple(sorted(worst)),
        modules=tuple(dict.fromkeys(module for _, module, _, _ in rows)),
        cells=_grouped(((layer, module), found) for layer, module, _, found in rows),
        experts=tuple(sorted({expert for _, _, expert, _ in rows if expert is not None})),
        expert_cells=_grouped(((layer, expert), found) for layer, _, expert, found in rows if expert is not None),
        totals=_grouped((layer, found) for layer, _, _, found in rows),
        worst=worst,
    )


def tensor_rows(report: Report) -> Iterator[dict[str, Any]]:
    """One row for every quantized weight and every other tensor of the source, for tables of machines.

    What is not known or not finite is None.
    """
    for shard in report.manifest.shards:
        for weight in shard.weights:
            yield _row(shard.name, weight.module, "quantize", weight.scheme, "", weight.statistics)
        for tensor in shard.tensors:
            if not tensor.scheme:
                yield _row(shard.name, tensor.name, tensor.action, None, tensor.reason, None)


def _row(
    shard: str, name: str, action: str, scheme: str | None, reason: str, found: Statistics | None
) -> dict[str, Any]:
    module = name if found is not None else split_name(name)[0]
    place = place_of(module)
    numbers: dict[str, Any] = dict.fromkeys(_MEASURED) if found is None else _numbers(found)
    return {
        "shard": shard,
        "name": name,
        "part": part_of(module),
        "layer": place.layer if place else None,
        "expert": place.expert if place else None,
        "action": action,
        "scheme": scheme,
        "reason": reason or None,
        **numbers,
    }


_MEASURED: Final = ("count", "relative_error", "sqnr_db", "max_error", "amax", "clipped", "zeroed", "nonzero")


def _numbers(found: Statistics) -> dict[str, Any]:
    values = {name: getattr(found, name) for name in _MEASURED}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def share(part: int, whole: int) -> float:
    """A share, and 0 of nothing.

    >>> share(1, 4), share(0, 0)
    (0.25, 0.0)
    """
    return part / whole if whole else 0.0
