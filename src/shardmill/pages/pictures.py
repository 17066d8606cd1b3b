"""Pictures of errors as SVG: bars by layer, heat maps, histograms.

Elements are made by ElementTree, which escapes what it is given. Colours are classes, so that a page can be light or
dark; `as_image` gives a picture colours of its own, for markdown. The scale of colours is viridis, which people with
any kind of colour vision read, printed in grey, too.
"""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar
from xml.etree import ElementTree as ET

from shardmill.core.markdown import plain
from shardmill.core.report import Histograms, Stack
from shardmill.core.statistics import Statistics

SHADES: Final = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
"""Viridis in nine steps, worst to best."""
_LIGHT_FROM: Final = 5
"""Number of the first shade on which dark letters are read best."""
HOVER_CELLS: Final = 2500
"""Cells of a heat map that still have a text of their own; more of them are drawn in runs."""
MOST_ROWS: Final = 512
MOST_COLUMNS: Final = 1024
_BARS: Final = 300
CHART_WIDTH: Final = 500
"""Of most charts: two of them fit side by side, and one on a phone."""
_MAP_WIDTH: Final = 960
_STEPS: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Widths of a bin in decibels."""
_BINS: Final = 40
_DIGIT: Final = 6.7
"""Width of a character of a label."""
_LETTERS: Final = 44
"""Of a label."""
_Column = TypeVar("_Column", int, str)
_IMAGE_STYLE: Final = (
    "text{font:12px sans-serif;fill:#333}.soft{fill:#666}.rule{stroke:#ddd;fill:none}.bar{fill:#4a78b5}"
    ".dot{fill:#c2410c}.empty{fill:#eee}.odd{fill:#d5008f}.on-dark{fill:#fff}.on-light{fill:#111}"
)
STYLE: Final = "".join(f".k{n}{{fill:{shade}}}" for n, shade in enumerate(SHADES))
"""What the colours of a heat map are, for the page that shows it."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture, and what is read where it is not seen."""

    root: ET.Element
    alternative: str
    """Own words and numbers."""

    @property
    def width(self) -> int:
        """In pixels, as it is drawn."""
        return int(self.root.attrib["width"])

    def inline(self) -> str:
        """SVG for a page that has the classes; foreign text is escaped."""
        return ET.tostring(self.root, encoding="unicode")

    def as_image(self) -> str:
        """A markdown image that needs nothing from elsewhere."""
        root = ET.Element("svg", self.root.attrib | {"xmlns": "http://www.w3.org/2000/svg"})
        _add(root, "style").text = _IMAGE_STYLE + STYLE
        _add(root, "rect", width="100%", height="100%", fill="#fff")
        root.extend(list(self.root))
        svg = ET.tostring(root, encoding="unicode")
        return f"![{self.alternative}](data:image/svg+xml;base64,{b64encode(svg.encode()).decode()})"


def _canvas(width: float, height: float, alternative: str) -> ET.Element:
    return ET.Element(
        "svg",
        {
            "viewBox": f"0 0 {math.ceil(width)} {math.ceil(height)}",
            "width": str(math.ceil(width)),
            "height": str(math.ceil(height)),
            "role": "img",
            "aria-label": alternative,
        },
    )


def _add(parent: ET.Element, tag: str, title: str = "", **attributes: object) -> ET.Element:
    """Add an element; `title` is shown while a pointer rests on it. A trailing underscore of a name is left out."""
    named = {name.rstrip("_").replace("_", "-"): _number(value) for name, value in attributes.items()}
    element = ET.SubElement(parent, tag, named)
    if title:
        ET.SubElement(element, "title").text = title
    return element


def _number(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def _text(parent: ET.Element, x: float, y: float, words: str, anchor: str = "start", class_: str = "") -> ET.Element:
    element = _add(parent, "text", x=float(x), y=float(y), text_anchor=anchor)
    if class_:
        element.set("class", class_)
    element.text = words
    return element


# ---- bars by layer


def layer_picture(stack: Stack) -> Picture:
    """Draw a bar for the relative error of every layer, and a dot for its worst weight."""
    layers = stack.layers[:_BARS]
    bars = [(layer, stack.totals[layer].relative_error, stack.worst[layer]) for layer in layers]
    finite = [value for _, *values in bars for value in values if math.isfinite(value)]
    top = round_up(max(finite, default=0.0))
    highest = max(bars, key=lambda bar: bar[2] if math.isfinite(bar[2]) else math.inf)
    alternative = (
        f"relative error of {len(bars)} layers; the largest of one weight is {highest[2]:.3g}, in layer {highest[0]}"
    )
    left, right, upper, lower, height = 62, 8, 30, 44, 248
    total = max(CHART_WIDTH, left + right + 8 * len(bars))
    root = _canvas(total, height, alternative)
    inner, step = height - upper - lower, (total - left - right) / len(bars)

    def y(value: float) -> float:
        return upper + inner * (1 - (min(value, top) if math.isfinite(value) else top) / top)

    _text(root, left, 18, "bar: relative error of the layer; dot: of its worst weight", class_="soft")
    for tick in range(5):
        value = top * tick / 4
        _add(root, "path", class_="rule", d=f"M{left} {y(value):.1f}H{total - right}")
        _text(root, left - 6, y(value) + 4, f"{value:.3g}", "end", "soft")
    every, width = math.ceil(24 / step), min(40.0, 0.7 * step)
    for number, (layer, error, worst) in enumerate(bars):
        middle = left + (number + 0.5) * step
        told = f"layer {layer}: relative error {error:.4g}, worst weight {worst:.4g}"
        group = _add(root, "g", told)
        top_y = y(error)
        _add(group, "rect", class_="bar", x=middle - width / 2, y=top_y, width=width, height=max(0.0, y(0) - top_y))
        _add(group, "circle", class_="dot", cx=middle, cy=y(worst), r=3)
        if number % every == 0:
            _text(root, middle, y(0) + 17, str(layer), "middle", "soft")
    _text(root, left + (total - left - right) / 2, height - 6, "layer", "middle", "soft")
    return Picture(root, alternative)


def round_up(value: float) -> float:
    """The next number with one digit, so that ticks are short.

    >>> round_up(0.113), round_up(0.0)
    (0.2, 1.0)
    """
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return math.ceil(value / power - 1e-9) * power


# ---- heat maps


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Values in rows and columns; a place without value stays empty."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Mapping[tuple[int, int], float]
    """SQNR in decibels by row and column number; infinite without any error, NaN where it cannot be told."""
    what: str
    """The meaning of rows and columns, own words."""

    @property
    def finite(self) -> list[float]:
        """All values that are finite."""
        return [value for value in self.values.values() if math.isfinite(value)]

    @property
    def span(self) -> tuple[float, float]:
        """Smallest and largest finite value."""
        return min(self.finite, default=0.0), max(self.finite, default=0.0)


def module_grid(stack: Stack) -> Grid:
    """SQNR by layer and module."""
    return _grid(stack, stack.modules, stack.modules, stack.cells, "layer and module")


def expert_grid(stack: Stack) -> Grid:
    """SQNR by layer and expert."""
    return _grid(stack, stack.experts, [str(e) for e in stack.experts], stack.expert_cells, "layer and expert")


def _grid(
    stack: Stack,
    columns: Sequence[_Column],
    labels: Sequence[str],
    cells: Mapping[tuple[int, _Column], Statistics],
    what: str,
) -> Grid:
    rows = {layer: number for number, layer in enumerate(stack.layers[:MOST_ROWS])}
    places = {column: number for number, column in enumerate(columns[:MOST_COLUMNS])}
    values = {
        (rows[layer], places[column]): found.sqnr_db
        for (layer, column), found in cells.items()
        if layer in rows and column in places
    }
    shown = tuple(plain(label, _LETTERS) for label in labels[: len(places)])
    return Grid(rows=tuple(map(str, rows)), columns=shown, values=values, what=what)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """Where the cells of a heat map lie; sizes in pixels."""

    left: float
    top: float
    cell: tuple[float, float]
    """Width and height."""
    has_numbers: bool
    is_slanted: bool
    """Whether labels of columns are written at an angle."""

    @classmethod
    def of(cls, grid: Grid, *, has_numbers: bool) -> _Frame:
        rows, columns = len(grid.rows), len(grid.columns)
        left = 16 + _DIGIT * max(map(len, grid.rows), default=0)
        longest = max(map(len, grid.columns), default=0)
        if columns <= 10:
            width = max(64.0, 12 + _DIGIT * max((len(part) for c in grid.columns for part in _halves(c)), default=0))
            fits = has_numbers and rows <= 64
            return cls(left=left, top=40, cell=(width, 20.0 if rows <= 64 else _low(rows)), has_numbers=fits,
                       is_slanted=False)  # fmt: skip
        is_slanted = longest > 4 and columns <= 64
        width = min(24.0, max(2.5, (_MAP_WIDTH - left) / columns))
        top = 20 + (0.75 * _DIGIT * longest if is_slanted else 12)
        return cls(left=left, top=top, cell=(width, _low(rows)), has_numbers=False, is_slanted=is_slanted)


def _low(rows: int) -> float:
    return min(16.0, max(3.0, 560 / rows))


def heat_map(grid: Grid, *, has_titles: bool = True) -> Picture:
    """Draw values as colours: dark is worse, bright is better.

    Args:
        has_titles: whether each cell tells its value to who points at it, as far as there are few enough of them.
    """
    frame = _Frame.of(grid, has_numbers=True)
    width, height = frame.cell
    bottom = frame.top + height * len(grid.rows)
    right = frame.left + width * len(grid.columns)
    total = max(right + (70 if frame.is_slanted else 8), frame.left + 330)
    low, high = grid.span
    alternative = (
        f"heat map of SQNR by {grid.what}, {len(grid.rows)} rows and {len(grid.columns)} columns, "
        f"from {low:.1f} to {high:.1f} dB{_lowest(grid)}"
    )
    root = _canvas(total, bottom + 52, alternative)
    _add(root, "rect", class_="empty", x=frame.left, y=frame.top, width=right - frame.left, height=bottom - frame.top)
    if has_titles and len(grid.values) <= HOVER_CELLS:
        _draw_cells(root, grid, frame)
    else:
        _draw_runs(root, grid, frame)
    _label_rows(root, grid, frame)
    _label_columns(root, grid, frame)
    _legend(root, frame.left, bottom + 14, low, high)
    return Picture(root, alternative)


def _lowest(grid: Grid) -> str:
    """Where the smallest value is; labels may be foreign, so that only numbers are told."""
    finite = {place: value for place, value in grid.values.items() if math.isfinite(value)}
    if not finite:
        return ""
    row, _ = min(finite, key=lambda place: (finite[place], place))
    return f"; the lowest is in layer {grid.rows[row]}"


def _shade(value: float, low: float, high: float) -> str:
    """The class of a cell; what is not a number stands out."""
    if math.isnan(value) or value == -math.inf:
        return "odd"
    last = len(SHADES) - 1
    if value == math.inf or high <= low:
        return f"k{last}"
    return f"k{min(last, int((value - low) / (high - low) * len(SHADES)))}"


def _draw_cells(root: ET.Element, grid: Grid, frame: _Frame) -> None:
    (width, height), (low, high) = frame.cell, grid.span
    gap = 1.0 if min(width, height) >= 8 else 0.0
    for (row, column), value in sorted(grid.values.items()):
        shade = _shade(value, low, high)
        x, y = frame.left + column * width, frame.top + row * height
        told = f"layer {grid.rows[row]}, {grid.columns[column]}: {value:.2f} dB"
        cell = _add(root, "g", told)
        _add(cell, "rect", class_=shade, x=x, y=y, width=width - gap, height=height - gap)
        if frame.has_numbers:
            is_light = shade[0] == "k" and int(shade[1:]) >= _LIGHT_FROM
            _text(
                cell, x + width / 2, y + height / 2 + 4, f"{value:.1f}", "middle", "on-light" if is_light else "on-dark"
            )


def _draw_runs(root: ET.Element, grid: Grid, frame: _Frame) -> None:
    """One path for each shade, equal neighbours in a row as one: tens of thousands of cells take few bytes."""
    low, high = grid.span
    paths: dict[str, list[str]] = {}
    for row in range(len(grid.rows)):
        begin, current = 0, ""
        for column in range(len(grid.columns) + 1):
            value = grid.values.get((row, column)) if column < len(grid.columns) else None
            shade = "" if value is None else _shade(value, low, high)
            if shade != current:
                if current:
                    paths.setdefault(current, []).append(f"M{begin} {row}h{column - begin}v1h-{column - begin}z")
                begin, current = column, shade
    width, height = frame.cell
    placed = f"translate({frame.left:.1f} {frame.top:.1f}) scale({width:.3f} {height:.3f})"
    group = _add(root, "g", transform=placed, shape_rendering="crispEdges")
    for shade, runs in sorted(paths.items()):
        _add(group, "path", class_=shade, d="".join(runs))


def _label_rows(root: ET.Element, grid: Grid, frame: _Frame) -> None:
    height = frame.cell[1]
    every = math.ceil(13 / height)
    for number, label in enumerate(grid.rows):
        if number % every == 0:
            _text(root, frame.left - 6, frame.top + (number + 0.5) * height + 4, label, "end", "soft")


def _halves(label: str) -> tuple[str, str]:
    """What stands before and behind the last dot."""
    head, _, leaf = label.rpartition(".")
    return head, leaf


def _label_columns(root: ET.Element, grid: Grid, frame: _Frame) -> None:
    width = frame.cell[0]
    if len(grid.columns) <= 10:
        for number, label in enumerate(grid.columns):
            middle = frame.left + (number + 0.5) * width
            head, leaf = _halves(label)
            _text(root, middle, frame.top - 22, head, "middle", "soft")
            _text(root, middle, frame.top - 8, leaf, "middle")
        return
    longest = max(map(len, grid.columns))
    every = 1 if frame.is_slanted else max(1, math.ceil((8 + _DIGIT * longest) / width))
    for number, label in enumerate(grid.columns):
        if number % every == 0:
            x, y = frame.left + (number + 0.5) * width, frame.top - 6
            element = _text(root, x, y, label, "start" if frame.is_slanted else "middle", "soft")
            if frame.is_slanted:
                element.set("transform", f"rotate(-45 {x:.1f} {y:.1f})")


def _legend(root: ET.Element, x: float, y: float, low: float, high: float) -> None:
    """What colours mean."""
    step = 22.0
    for number in range(len(SHADES)):
        _add(root, "rect", class_=f"k{number}", x=x + number * step, y=y, width=step, height=10)
    end = x + len(SHADES) * step
    _text(root, x, y + 26, f"{low:.1f} dB, worse", class_="soft")
    _text(root, end, y + 26, f"better, {high:.1f} dB", "end", "soft")


# ---- histograms


def spread_picture(values: Iterable[float], what: str) -> Picture | None:
    """Draw how many weights have which SQNR; None without finite values.

    Args:
        what: own words.
    """
    finite = sorted(value for value in values if math.isfinite(value))
    if not finite:
        return None
    reach = finite[-1] - finite[0]
    step = next((size for size in _STEPS if reach / size <= _BINS), reach / _BINS)
    first = math.floor(finite[0] / step)
    counts = [0] * (math.floor(finite[-1] / step) - first + 1)
    for value in finite:
        counts[math.floor(value / step) - first] += 1
    median = finite[len(finite) // 2]
    alternative = (
        f"histogram of {what}: {len(finite)} values from {finite[0]:.1f} to {finite[-1]:.1f} dB, median {median:.1f}"
    )
    left, right, height, lower = 62, 14, 248, 44
    root = _canvas(CHART_WIDTH, height, alternative)
    most, width, inner = max(counts), (CHART_WIDTH - left - right) / len(counts), height - lower - 30
    for part in (0, 1, 2):
        y = 30 + inner * (1 - part / 2)
        _add(root, "path", class_="rule", d=f"M{left} {y:.1f}H{CHART_WIDTH - right}")
        _text(root, left - 6, y + 4, f"{most * part / 2:.0f}", "end", "soft")
    _text(root, left, 18, "number of weights by SQNR", class_="soft")
    every = math.ceil(len(counts) / 9)
    for number, count in enumerate(counts):
        x, tall = left + number * width, inner * count / most
        begin = (first + number) * step
        told = f"{begin:.4g} to {begin + step:.4g} dB: {count}"
        _add(root, "rect", told, class_="bar", x=x + 0.5, y=30 + inner - tall, width=max(0.5, width - 1), height=tall)
        if number % every == 0:
            _text(root, x, height - lower + 17, f"{begin:.4g}", "middle", "soft")
    _text(root, CHART_WIDTH / 2, height - 6, "SQNR in dB", "middle", "soft")
    return Picture(root, alternative)


def spark_pictures(found: Histograms) -> tuple[Picture, Picture]:
    """Draw the histogram of a weight and of its errors, small."""
    return _spark(found.weight, found.weight_reach, "weights"), _spark(found.error, found.error_reach, "errors")


def _spark(counts: Sequence[int], reach: float, what: str) -> Picture:
    total, most, width, height = sum(counts), max(counts, default=0), 180, 44
    fullest = counts.index(most) if most else 0
    middle = reach * (2 * (fullest + 0.5) / len(counts) - 1) if counts else 0.0
    alternative = (
        f"histogram of {total:,} {what} from {-reach:.3g} to {reach:.3g}; the fullest bin, around {middle:.2g}, has "
        f"{most / total if total else 0.0:.1%}"
    )
    root = _canvas(width, height + 16, alternative)
    step = width / max(1, len(counts))
    points = "".join(_steps(counts, step, height, most))
    _add(root, "path", alternative, class_="bar", d=f"M0 {height}{points}V{height}z")
    _add(root, "path", class_="rule", d=f"M0 {height + 0.5}H{width}")
    _text(root, 0, height + 13, f"{-reach:.2g}", "start", "soft")
    _text(root, width / 2, height + 13, "0", "middle", "soft")
    _text(root, width, height + 13, f"{reach:.2g}", "end", "soft")
    return Picture(root, alternative)


def _steps(counts: Sequence[int], step: float, height: int, most: int) -> Iterator[str]:
    for count in counts:
        yield f"V{height * (1 - count / most) if most else height:.1f}h{step:.2f}"
