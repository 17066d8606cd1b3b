"""The report of a finished run, as markdown for Prefect's UI: totals, errors per layer, decisions, worst weights.

Names and reasons are foreign text: they stand in code, where nothing is a link, an image, HTML or the end of a cell.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, Final

from shardmill.core.manifest import Manifest
from shardmill.core.markdown import code
from shardmill.core.receipt import WeightRecord
from shardmill.core.statistics import Statistics
from shardmill.core.summary import PROXY, Decision, Summary, human_bytes
from shardmill.flows.picture import Bar, as_image, picture_of
from shardmill.orchestration.progress import clock_time, speed

NAMES_SHOWN: Final = 4
WARNINGS_SHOWN: Final = 20
PICTURES_SHOWN: Final = 4
_BARS: Final = 300
_HARMLESS: Final = re.compile(r"[A-Za-z0-9 ,;'-]*")
"""What markdown shows as it is."""
_NUMBERED: Final = re.compile(r"(.*?)\.(\d{1,6})(?=\.|$)", re.DOTALL)


def report_markdown(manifest: Manifest, summary: Summary, figures: Mapping[str, Any]) -> str:
    """Write the report of a finished run.

    Args:
        figures: Of the run itself, as `FlowSummary` has them.
    """
    weights = [weight for shard in manifest.shards for weight in shard.weights]
    sections = [
        _table(("", ""), _totals(summary, figures)),
        *_pictures(weights),
        "## Decisions",
        _table(("what", "tensors", "why", "which"), map(_decision, summary.decisions), "lrll"),
    ]
    if summary.worst:
        header = ("weight", "scheme", "relative error", "SQNR", "zeroed")
        sections += ["## Largest errors", _table(header, map(_worst, summary.worst), "llrrr"), f"{PROXY}."]
    if summary.warnings:
        shown = [f"- {code(str(warning), 400)}" for warning in summary.warnings[:WARNINGS_SHOWN]]
        rest = len(summary.warnings) - WARNINGS_SHOWN
        sections += ["## Warnings", "\n".join([*shown, *([f"- and {rest} more"] if rest > 0 else [])])]
    return "\n\n".join(sections)


def _totals(summary: Summary, figures: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    totals = summary.totals
    read, seconds = figures["bytes_read"], figures["seconds"]
    rate = f", {speed(read / seconds)}" if read and seconds else ""
    quantized = f"{summary.quantized_bits_per_weight:.2f} in {totals.quantized_weights:,} quantized ones"
    yield "destination", code(str(figures["destination"]), 300)
    yield (
        "size",
        (f"{human_bytes(totals.source_bytes)} in, **{human_bytes(totals.output_bytes)} out** ({summary.ratio:.1%})"),
    )
    yield "bits per weight", f"**{summary.bits_per_weight:.2f}**, {quantized}"
    yield "shards", f"{figures['shards']}, of which {figures['hits']} were done before"
    yield "time", f"{clock_time(seconds)}; {human_bytes(read)} read{rate}"


def _decision(decision: Decision) -> tuple[str, ...]:
    names = [code(name) for name in decision.names[:NAMES_SHOWN]]
    rest = len(decision.names) - NAMES_SHOWN
    what = f"{_words(decision.action)} {code(decision.scheme)}".strip()
    return (
        what,
        str(decision.count),
        _words(decision.reason),
        ", ".join([*names, *([f"{rest} more"] if rest > 0 else [])]),
    )


def _worst(weight: WeightRecord) -> tuple[str, ...]:
    found = weight.statistics
    zeroed = f"{found.zeroed / found.nonzero:.1%}" if found.nonzero else ""
    return code(weight.module), code(weight.scheme), f"{found.relative_error:.4f}", f"{found.sqnr_db:.1f} dB", zeroed


def _words(text: str) -> str:
    """Words as they are, and in code where they could be more than words."""
    return text if _HARMLESS.fullmatch(text) else code(text, 200)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> str:
    rules = [{"l": ":--", "r": "--:"}[letter] for letter in align or "l" * len(header)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rules, *rows))


def _pictures(weights: Iterable[WeightRecord]) -> Iterator[str]:
    """A picture for each sequence of numbered layers, the longest ones."""
    stacks: dict[str, dict[int, list[Statistics]]] = {}
    for weight in weights:
        if found := _NUMBERED.match(weight.module):
            layers = stacks.setdefault(found[1], {})
            layers.setdefault(int(found[2]), []).append(weight.statistics)
    for name in sorted(stacks, key=lambda name: (-len(stacks[name]), name))[:PICTURES_SHOWN]:
        yield f"## Error per layer of {code(name)}"
        bars = [_bar(layer, stacks[name][layer]) for layer in sorted(stacks[name])[:_BARS]]
        yield as_image(picture_of(bars), "relative error by layer")


def _bar(layer: int, statistics: Sequence[Statistics]) -> Bar:
    errors = [math.inf if math.isnan(found.relative_error) else found.relative_error for found in statistics]
    return Bar(layer, reduce(Statistics.merge, statistics).relative_error, max(errors))
