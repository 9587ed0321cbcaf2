"""Quality against size as one SVG: a point for each file, with divergence on a logarithmic axis.

It is drawn in `currentColor` and two hues that are visible on light and dark paper, needs no script and no font, and
its title tells a reader who cannot see it what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

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
    scale = _Scale.of(points)
    parts = [*_axes(scale), *(_mark(point, scale) for point in points)]
    label = "Divergence from the unquantized model against size; down and left is better. Circles: types chosen by "
    label += "measurement. Squares: standard type mixtures."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" font-size="12" '
        f'font-family="sans-serif" fill="currentColor" color="#777"><title>{label}</title>{"".join(parts)}</svg>'
    )


@dataclass(frozen=True)
class _Scale:
    """The ranges of the axes, MB and powers of ten, and where their values are in the picture."""

    x0: float
    x1: float
    y0: float
    y1: float

    @classmethod
    def of(cls, points: Sequence[Point]) -> _Scale:
        sizes, kls = [point.n_bytes / 1e6 for point in points], [math.log10(point.kl) for point in points]
        y0, y1 = math.floor(min(kls) * 2) / 2, math.ceil(max(kls) * 2) / 2
        return cls(min(sizes) * 0.95, max(sizes) * 1.08, y0, y1 if y1 > y0 else y0 + 0.5)

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x0) / (self.x1 - self.x0) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (_HEIGHT - _TOP - _BOTTOM)


def _mark(point: Point, scale: _Scale) -> str:
    """Return a file's circle or square, with its name on the side that has space."""
    x, y = scale.x(point.n_bytes / 1e6), scale.y(math.log10(point.kl))
    if point.is_ours:
        shape = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{_OURS}"/>'
    else:
        shape = f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" fill="{_STANDARD}"/>'
    is_right = x > _WIDTH - 120
    at = f'x="{x + (-9 if is_right else 9):.1f}" y="{y + 4:.1f}"'
    anchor = ' text-anchor="end"' if is_right else ""
    title = escape(f"{point.name}: {point.n_bytes / 1e6:.1f} MB, {point.kl:.3g} nats")
    return f"<g><title>{title}</title>{shape}<text {at}{anchor}>{escape(point.name)}</text></g>"


def _axes(scale: _Scale) -> list[str]:
    parts, bottom, right = list[str](), _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    step = _step(scale.x1 - scale.x0)
    for tick in np.arange(math.ceil(scale.x0 / step), math.floor(scale.x1 / step) + 1) * step:
        x = scale.x(tick)
        parts.append(_line((x, bottom), (x, bottom + 5)))
        parts.append(f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{tick:g}</text>')
    for level in np.arange(2 * scale.y0, 2 * scale.y1 + 1) / 2:
        y = scale.y(level)
        parts.append(_line((_LEFT, y), (right, y), 0.25))
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{10**level:.2g}</text>')
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">MB</text>')
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">mean KL, nats</text>'
    )
    return parts


def _line(start: tuple[float, float], end: tuple[float, float], opacity: float = 1.0) -> str:
    ends = f'x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"'
    return f'<line {ends} stroke="currentColor" stroke-opacity="{opacity}"/>'


def _step(span: float) -> float:
    """Return a round distance between ticks that gives about six of them."""
    power = 10.0 ** math.floor(math.log10(span / 6))
    return next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 7)
