"""The picture of docs/benchmarks.md; needs matplotlib, from the extra `bench`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench import targets
from bench.measure import middle
from bench.results import PlanRow, Results, SpeedRow

_COLOURS: Final = ("#0072B2", "#E69F00")
"""Two of Okabe and Ito's, which colour-blind people tell apart; labels say the same again."""
_TARGET: Final = "#000000"
_NAMES: Final = {"llama": "dense", "experts": "mixture of experts"}
_BAR: Final = 0.38
_SETTINGS: Final[Mapping[str, Any]] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "figure.dpi": 150,
    "font.size": 9,
    "grid.color": "#DDDDDD",
    "svg.hashsalt": "shardmill",
}


def draw(results: Results, path: Path) -> bool:
    """Draw what there is; returns whether there is anything to draw.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    panels = _panels(results)
    if not panels:
        return False
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    with pyplot.rc_context(_SETTINGS):
        figure, axes = pyplot.subplots(
            1, len(panels), figsize=(4.6 * len(panels), 4.4), layout="constrained", squeeze=False
        )
        for axis, panel in zip(axes[0], panels, strict=True):
            panel(axis)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)
    return True


def _panels(results: Results) -> list[Callable[[Any], None]]:
    speed = [row for row in results.rows.get("speed", ()) if isinstance(row, SpeedRow)]
    shown = [row for row in speed if row.place == speed[0].place]
    plans = [row for row in results.rows.get("plan", ()) if isinstance(row, PlanRow)]
    panels: list[Callable[[Any], None]] = []
    if compared := [row for row in shown if row.speedup is not None]:
        panels.append(lambda axis: _draw_speedup(axis, compared))
    if shown:
        panels.append(lambda axis: _draw_floor(axis, shown))
    if plans:
        panels.append(lambda axis: _draw_plan(axis, plans))
    return panels


def _draw_speedup(axis: Any, rows: Sequence[SpeedRow]) -> None:
    _bars(axis, rows, {_key(row): row.speedup or 0.0 for row in rows}, targets.SPEEDUP)
    axis.set_xscale("log")
    axis.set_xlim(left=1)
    axis.set_xticks([1, 2, 5, 10, 20, 50, 100], labels=["1", "2", "5", "10", "20", "50", "100"])
    axis.minorticks_off()
    axis.set_title("Times as fast as llm-compressor")
    axis.set_xlabel(f"its wall time over ours\n{rows[0].place}; line: target, at least")


def _draw_floor(axis: Any, rows: Sequence[SpeedRow]) -> None:
    most = {row.preset: targets.over_floor(row.preset) for row in rows}
    _bars(axis, rows, {_key(row): row.over_floor for row in rows}, most)
    axis.set_title("Processing over the copy floor")
    axis.set_xlabel(f"processing over copying the bytes\n{rows[0].place}; line: target, at most")


def _key(row: SpeedRow) -> tuple[str, str]:
    return row.checkpoint, row.preset


def _bars(
    axis: Any, rows: Sequence[SpeedRow], values: Mapping[tuple[str, str], float], limits: Mapping[str, float]
) -> None:
    """One group of bars per preset, one bar per checkpoint, and a line where the target is."""
    presets = [preset for preset in targets.PRESETS if any(row.preset == preset for row in rows)]
    kinds = [kind for kind in _NAMES if any(row.checkpoint == kind for row in rows)]
    for number, kind in enumerate(kinds):
        places = [line + (number - (len(kinds) - 1) / 2) * _BAR for line in range(len(presets))]
        widths = [values.get((kind, preset), 0.0) for preset in presets]
        bars = axis.barh(places, widths, _BAR, color=_COLOURS[number], label=_NAMES[kind])
        axis.bar_label(bars, [f"{width:.1f}" if width else "" for width in widths], padding=2, fontsize=7)
    for line, preset in enumerate(presets):
        if preset in limits:
            axis.vlines(limits[preset], line - 0.46, line + 0.46, colors=_TARGET, linewidth=1.6)
    axis.set_yticks(range(len(presets)), labels=presets)
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.margins(x=0.14)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False, fontsize=8)


def _draw_plan(axis: Any, rows: Sequence[PlanRow]) -> None:
    for number, preset in enumerate(sorted({row.preset for row in rows})):
        line = sorted((row.tensors, middle(row.runs)) for row in rows if row.preset == preset)
        xs, ys = zip(*line, strict=True)
        axis.plot(xs, ys, marker="os"[number % 2], color=_COLOURS[number % 2], label=preset)
    if max(row.tensors for row in rows) >= targets.PLAN_TENSORS:
        axis.plot(targets.PLAN_TENSORS, targets.PLAN_SECONDS, marker="_", markersize=16, color=_TARGET, linestyle="")
        axis.annotate(
            "target", (targets.PLAN_TENSORS, targets.PLAN_SECONDS), (0, 5), textcoords="offset points", ha="center"
        )
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
    axis.set_title("Planning")
    axis.set_xlabel("tensors")
    axis.set_ylabel("seconds of `shardmill plan`")
    axis.legend(loc="upper left", fontsize=8)
