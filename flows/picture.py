"""A picture of errors for a report: self-made SVG, which a markdown artifact shows as an image."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

WIDTH: Final = 720
HEIGHT: Final = 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 30, 36
_LABELS: Final = 20
"""Numbers below the bars, at most."""


@dataclass(frozen=True, slots=True)
class Bar:
    """Errors of one layer."""

    layer: int
    error: float
    """Relative error of all its weights together."""
    worst: float
    """Largest relative error of one of its weights."""


def picture_of(bars: Sequence[Bar]) -> str:
    """Draw a bar for every layer, and a dot for its worst weight; there is no foreign text in it."""
    finite = [value for bar in bars for value in (bar.error, bar.worst) if math.isfinite(value)]
    top = _round_up(max(finite, default=0.0))
    inner_width, inner_height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
    step = inner_width / len(bars)
    bar_width = min(40.0, 0.7 * step)

    def x(number: int) -> float:
        return _LEFT + (number + 0.5) * step

    def y(value: float) -> float:
        return _TOP + inner_height * (1 - (min(value, top) if math.isfinite(value) else top) / top)

    parts = [_text(_LEFT, 18, "bar: relative error of the layer; dot: of its worst weight", "start")]
    for tick in range(5):
        value = top * tick / 4
        parts.append(f'<path d="M{_LEFT} {y(value):.1f}H{WIDTH - _RIGHT}" stroke="#ddd"/>')
        parts.append(_text(_LEFT - 6, y(value) + 4, f"{value:.3g}", "end"))
    floor = y(0)
    shape = "".join(
        f"M{x(n) - bar_width / 2:.1f} {floor:.1f}V{y(b.error):.1f}h{bar_width:.1f}V{floor:.1f}z"
        for n, b in enumerate(bars)
    )
    parts.append(f'<path d="{shape}" fill="#4a78b5"/>')
    parts += [f'<circle cx="{x(n):.1f}" cy="{y(bar.worst):.1f}" r="3" fill="#c2410c"/>' for n, bar in enumerate(bars)]
    every = math.ceil(len(bars) / _LABELS)
    parts += [_text(x(n), floor + 16, str(bar.layer), "middle") for n, bar in enumerate(bars) if n % every == 0]
    parts.append(_text(_LEFT + inner_width / 2, HEIGHT - 5, "layer", "middle"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>'
    )


def as_image(svg: str, alternative: str) -> str:
    """Write a picture as a markdown image that needs nothing from elsewhere.

    Args:
        alternative: What is read where no picture is seen; own words.
    """
    return f"![{alternative}](data:image/svg+xml;base64,{b64encode(svg.encode()).decode()})"


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-family="sans-serif" font-size="12" fill="#333" '
        f'text-anchor="{anchor}">{words}</text>'
    )


def _round_up(value: float) -> float:
    """The next number with one digit, so that ticks are short.

    >>> _round_up(0.113), _round_up(0.0)
    (0.2, 1.0)
    """
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return math.ceil(value / power - 1e-9) * power
