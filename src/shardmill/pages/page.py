"""The page of a report: one HTML file without scripts, which fetches nothing.

The template escapes every value; what is not printable is written as an escape, and a policy in the page forbids
scripts and requests, should a name of the checkpoint get through all the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from shardmill.core.markdown import plain
from shardmill.core.recipe import recipe_to_json
from shardmill.core.report import Report, Stack, share
from shardmill.core.reproduce import RECIPE_FILE, run_command
from shardmill.core.shell import command_line
from shardmill.core.statistics import Statistics
from shardmill.core.summary import PROXY, human_bytes
from shardmill.pages.pictures import (
    CHART_WIDTH,
    MOST_COLUMNS,
    MOST_ROWS,
    STYLE,
    Grid,
    Picture,
    expert_grid,
    heat_map,
    layer_picture,
    module_grid,
    spark_pictures,
    spread_picture,
)

STACKS_SHOWN: Final = 4
DECISIONS_SHOWN: Final = 60
NAMES_SHOWN: Final = 6
WARNINGS_SHOWN: Final = 100
FILES_SHOWN: Final = 2000
_TABLE_CELLS: Final = 1500
"""Cells of a heat map that are also given as a table."""
_LONGEST: Final = 600
"""Characters of a foreign text that are shown."""


def render_page(report: Report) -> str:
    """Write a report as one HTML document."""
    return _environment().get_template("report.html").render(_values(report))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_tame,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": human_bytes,
        "percent": percent,
        "decibels": decibels,
        "sig": lambda number: f"{number:.4g}",
    }
    return environment


def _tame(value: Any) -> Any:
    """Foreign text without control characters, cut; what the page itself made stays as it is."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return plain(value, _LONGEST)


def percent(value: float) -> str:
    """Write a share; one that is small and not nothing does not look like nothing.

    >>> percent(0.5), percent(0.0000012), percent(0.0)
    ('50.0%', '0.00012%', '0%')
    """
    if not value:
        return "0%"
    return f"{value:.1%}" if value >= 0.001 else f"{100 * value:.2g}%"


def decibels(found: Statistics) -> str:
    """Write the SQNR of some weights.

    >>> decibels(Statistics(count=1, squared_error=0.04, squared_weight=4.0)), decibels(Statistics())
    ('20.0 dB', 'no error')
    """
    value = found.sqnr_db
    return f"{value:.1f} dB" if math.isfinite(value) else ("no error" if value > 0 else "unknown")


def _values(report: Report) -> dict[str, Any]:
    manifest, summary = report.manifest, report.summary
    weights = [weight.statistics for shard in manifest.shards for weight in shard.weights]
    source = report.origin.source or "SRC"
    spread = spread_picture((found.sqnr_db for found in weights), "the SQNR of all quantized weights")
    return {
        "origin": report.origin,
        "report": report,
        "summary": summary,
        "totals": summary.totals,
        "statistics": report.statistics,
        "clipped": share(report.statistics.clipped, report.statistics.count),
        "zeroed": share(report.statistics.zeroed, report.statistics.nonzero),
        "share": share,
        "weights": len(weights),
        "picture_style": Markup(STYLE),  # noqa: S704 - our own literal
        "spread": _shown(spread) if spread else None,
        "stacks": [_stack(stack) for stack in report.stacks[:STACKS_SHOWN]],
        "more_stacks": len(report.stacks) - STACKS_SHOWN,
        "largest_part": max((part.nbytes or 0 for part in report.parts), default=0),
        "worst": [
            {"weight": weight, "found": weight.statistics, "sparks": _sparks(report, weight.module)}
            for weight in report.worst
        ],
        "decisions": summary.decisions[:DECISIONS_SHOWN],
        "more_decisions": len(summary.decisions) - DECISIONS_SHOWN,
        "names_shown": NAMES_SHOWN,
        "warnings": [str(warning) for warning in summary.warnings[:WARNINGS_SHOWN]],
        "more_warnings": len(summary.warnings) - WARNINGS_SHOWN,
        "files_shown": FILES_SHOWN,
        "recipe": _block(json.dumps(recipe_to_json(manifest.recipe), indent=2)),
        "recipe_file": RECIPE_FILE,
        "command": run_command(manifest.recipe, source, "DST"),
        "checks": [
            command_line("shardmill", "verify", report.origin.destination or "DST", "--against", source),
            command_line("shardmill", "verify", report.origin.destination or "DST", "--sha256", "SHA256SUMS"),
        ],
        "histograms_command": command_line(
            "shardmill", "report", report.origin.destination or "DST", "--against", source, "--html", "report.html"
        ),
        "proxy": PROXY,
    }


def _block(text: str) -> Markup:
    """Lines that stay lines."""
    lines = [plain(line, _LONGEST) for line in text.split("\n")]
    return Markup("\n").join(map(escape, lines))


def _shown(picture: Picture) -> dict[str, Any]:
    svg = Markup(picture.inline())  # noqa: S704 - ElementTree escaped it
    return {"svg": svg, "fits": picture.width <= CHART_WIDTH}


def _sparks(report: Report, module: str) -> list[dict[str, Any]]:
    found = report.histograms.get(module)
    if found is None:
        return []
    labels = ("weight", "error")
    return [_shown(p) | {"label": label} for label, p in zip(labels, spark_pictures(found), strict=True)]


def _stack(stack: Stack) -> dict[str, Any]:
    grid = module_grid(stack)
    experts = expert_grid(stack) if stack.experts else None
    return {
        "name": stack.name,
        "layers": len(stack.layers),
        "bars": _shown(layer_picture(stack)),
        "map": _shown(heat_map(grid)),
        "table": _table(grid),
        "cut": _cut(len(stack.layers), len(stack.modules), "modules"),
        "experts": _shown(heat_map(experts)) if experts else None,
        "expert_count": len(stack.experts),
        "experts_cut": _cut(len(stack.layers), len(stack.experts), "experts"),
    }


def _cut(rows: int, columns: int, what: str) -> str:
    """Say what of a heat map is not shown."""
    cut = [f"the first {most:,} of {count:,} {name}" for count, most, name in
           ((rows, MOST_ROWS, "layers"), (columns, MOST_COLUMNS, what)) if count > most]  # fmt: skip
    return f"Shown are {' and '.join(cut)}." if cut else ""


def _table(grid: Grid) -> dict[str, Iterable[Any]] | None:
    """The numbers of a small heat map, for who does not see it."""
    if len(grid.values) > _TABLE_CELLS or len(grid.rows) * len(grid.columns) > 2 * _TABLE_CELLS:
        return None
    rows = [
        (label, [f"{value:.1f}" if (value := grid.values.get((row, column))) is not None else ""
                 for column in range(len(grid.columns))])
        for row, label in enumerate(grid.rows)
    ]  # fmt: skip
    return {"columns": grid.columns, "rows": rows}
