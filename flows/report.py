"""The report of a finished run, as markdown for Prefect's UI: totals, errors per layer, decisions, worst weights.

Names and reasons are foreign text: they stand in code, where nothing is a link, an image, HTML or the end of a cell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from shardmill.core.manifest import Manifest
from shardmill.core.markdown import code
from shardmill.core.receipt import WeightRecord
from shardmill.core.report import Report, build_report
from shardmill.core.summary import PROXY, Decision, Summary, human_bytes
from shardmill.orchestration.progress import clock_time, speed
from shardmill.pages.pictures import expert_grid, heat_map, layer_picture, module_grid

NAMES_SHOWN: Final = 4
WARNINGS_SHOWN: Final = 20
PICTURES_SHOWN: Final = 4
_HARMLESS: Final = re.compile(r"[A-Za-z0-9 ,;'-]*")
"""What markdown shows as it is."""


def report_markdown(manifest: Manifest, summary: Summary, figures: Mapping[str, Any]) -> str:
    """Write the report of a finished run.

    Args:
        figures: Of the run itself, as `FlowSummary` has them; `page` where one was written.
    """
    sections = [
        _table(("", ""), _totals(summary, figures)),
        *_pictures(build_report(manifest)),
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
    yield from (("NVFP4", line) for line in summary.inputs)
    yield "shards", f"{figures['shards']}, of which {figures['hits']} were done before"
    if page := figures.get("page"):
        yield "page", code(str(page), 300)
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


def _pictures(report: Report) -> Iterator[str]:
    """What is known of the errors of each sequence of numbered layers, the longest ones."""
    for stack in report.stacks[:PICTURES_SHOWN]:
        name = code(stack.name)
        yield f"## Error per layer of {name}"
        yield layer_picture(stack).as_image()
        yield f"## SQNR by layer and module of {name}"
        yield heat_map(module_grid(stack), has_titles=False).as_image()
        if stack.experts:
            yield f"## SQNR by layer and expert of {name}"
            yield heat_map(expert_grid(stack), has_titles=False).as_image()
