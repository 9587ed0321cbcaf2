"""Quality against size as one SVG: a point a file, ours and the standard recipes, divergence on a logarithmic axis.

It is drawn with `currentColor` and two hues that stand out on light and dark paper, needs no script and no font, and
says in its title what a reader who cannot see it would miss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 20, 48
_OURS, _STANDARD = "#3b6fe0", "#c2661d"


@dataclass(frozen=True)
class Point:
    """A file: its name, bytes, mean divergence in nats, and whether we chose its types."""

    name: str
    n_bytes: int
    kl: float
    is_ours: bool


def draw(points: Sequence[Point]) -> str:
    """Return the SVG, or nothing if there is no point to draw."""
    points = [point for point in points if point.kl > 0]
    if not points:
        return ""
    sizes, kls = [point.n_bytes / 1e6 for point in points], [math.log10(point.kl) for point in points]
    x0, x1 = min(sizes) * 0.95, max(sizes) * 1.08
    y0, y1 = math.floor(min(kls) * 2) / 2, math.ceil(max(kls) * 2) / 2
    y1 = y1 if y1 > y0 else y0 + 0.5

    def x(value: float) -> float:
        return _LEFT + (value - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [*_axes(x0, x1, y0, y1, x, y)]
    for point, size, kl in zip(points, sizes, kls, strict=True):
        colour = _OURS if point.is_ours else _STANDARD
        title = f"{point.name}: {size:.1f} MB, {point.kl:.3g} nats"
        shape = f'<circle cx="{x(size):.1f}" cy="{y(kl):.1f}" r="5" fill="{colour}"/>'
        if not point.is_ours:
            shape = f'<rect x="{x(size) - 5:.1f}" y="{y(kl) - 5:.1f}" width="10" height="10" fill="{colour}"/>'
        is_right = x(size) > _WIDTH - 120
        at = f'x="{x(size) + (-9 if is_right else 9):.1f}" y="{y(kl) + 4:.1f}"'
        anchor = ' text-anchor="end"' if is_right else ""
        parts.append(f"<g><title>{escape(title)}</title>{shape}<text {at}{anchor}>{escape(point.name)}</text></g>")
    label = "Divergence from the unquantized model against size; down and left is better. Circles: types chosen by "
    label += "measurement. Squares: standard recipes."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" font-size="12" '
        f'font-family="sans-serif" fill="currentColor" color="#777"><title>{label}</title>{"".join(parts)}</svg>'
    )


def _axes(
    x0: float, x1: float, y0: float, y1: float, x: Callable[[float], float], y: Callable[[float], float]
) -> list[str]:
    parts, bottom, right = list[str](), _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    step = _step(x1 - x0)
    at = math.ceil(x0 / step) * step
    while at <= x1:
        parts.append(_line(x(at), bottom, x(at), bottom + 5))
        parts.append(f'<text x="{x(at):.1f}" y="{bottom + 20}" text-anchor="middle">{at:g}</text>')
        at += step
    level = y0
    while level <= y1 + 1e-9:
        parts.append(_line(_LEFT, y(level), right, y(level), 0.25))
        parts.append(f'<text x="{_LEFT - 8}" y="{y(level) + 4:.1f}" text-anchor="end">{10**level:.2g}</text>')
        level += 0.5
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">MB</text>')
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">mean KL, nats</text>'
    )
    return parts


def _line(x1: float, y1: float, x2: float, y2: float, opacity: float = 1.0) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="currentColor" stroke-opacity="{opacity}"/>'


def _step(span: float) -> float:
    """Return the distance of ticks that gives about six of them."""
    power = 10.0 ** math.floor(math.log10(span / 6))
    return next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 7)
