"""Charts for the report, already laid out, so that the page only draws them: bars, and lines."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ...localrun.core.text import format_duration
from ..records import CurvePoint

_BINS = 40
_N_POINTS = 120
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 410, 26, 180  # the plot inside a line chart's drawing
_PAUSE_S = 60.0  # after a longer gap the teacher was not working, but waiting to be asked


@dataclass(frozen=True)
class Bar:
    """A rectangle in a plot of 100 by 100, its origin at the top left; `name` is its series."""

    name: str
    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Chart:
    """Bars, the labels under them from left to right, and a sentence that says what they show."""

    bars: list[Bar]
    ticks: list[str]
    summary: str
    top: str  # what the full height means
    series: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LineChart:
    """A line in a drawing of 420 by 220, the places of its ticks with their labels, and a sentence that says it all."""

    points: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    y_label: str
    summary: str


def histogram(values: dict[str, npt.NDArray[Any]], unit: str) -> Chart | None:
    """Return a histogram of at most 40 ranges, the series stacked; None without values.

    The last range also counts the highest half per cent, however high they are.
    """
    everything = np.concatenate([np.zeros(0), *values.values()])
    if not len(everything):
        return None
    low, high = float(everything.min()), float(np.quantile(everything, 0.995))
    low = 0.0 if low < high / 2 else low
    width = _round_up((high - low) / _BINS, least=1.0 if unit == "tokens" else 1e-6)
    start = math.floor(low / width) * width
    n_bins = 4 * math.ceil((math.floor((high - start) / width) + 1) / 4)  # so that four ticks fall on edges
    edges = start + width * np.arange(n_bins + 1)
    counts = {
        name: np.histogram(np.clip(part, start, edges[-1]), edges)[0] for name, part in values.items() if len(part)
    }
    is_open = everything.max() > edges[-1]
    labels = [f"{_amount(a, unit)} to {_amount(b, unit)}" for a, b in itertools.pairwise(edges.tolist())]
    if is_open:
        labels[-1] = f"{_amount(edges[-2], unit)} or more"
    ticks = [_amount(float(edge), unit) for edge in edges[:: n_bins // 4]]
    ticks[-1] += " or more" if is_open else ""
    middle, ninth = (_amount(float(np.quantile(everything, share)), unit) for share in (0.5, 0.9))
    summary = (
        f"Half of them have at most {middle}, nine in ten at most {ninth}, the most {_amount(everything.max(), unit)}."
    )
    top = int(sum(counts.values()).max())  # type: ignore[union-attr]
    return Chart(_stack(counts, labels, top), ticks, summary, f"{top:,} traces", list(counts))


def over_time(ends: npt.NDArray[Any] | None, values: npt.NDArray[Any]) -> Chart | None:
    """Return a rate over time in up to 40 bars: tokens that ended in a bar's time by its seconds, without pauses.

    Without `ends` the values are rates already, one per trace, and each bar is the median of a part of the file.
    """
    if len(values) < 2:
        return None
    if ends is None:
        parts = np.array_split(values, min(_BINS, len(values)))
        rates = np.array([float(np.median(part)) for part in parts])
        ticks = ["first trace", f"trace {len(values):,}"]
        each, what = "a request", "median"
    else:
        order = np.argsort(ends, kind="stable")
        gaps = np.diff(ends[order], prepend=ends[order[0]])
        worked = np.cumsum(np.where(gaps > _PAUSE_S, 0.0, gaps))
        if worked[-1] <= 0:
            return None
        totals, _ = np.histogram(worked, _BINS, weights=values[order])
        rates = totals / (worked[-1] / _BINS)
        ticks = ["start", format_duration(worked[-1] / 2), format_duration(worked[-1])]
        each, what = "all requests", "mean"
    top = float(rates.max()) or 1.0
    labels = [f"{rate:,.0f} tokens/s" for rate in rates]
    middle = float(np.median(values) if ends is None else rates.mean())
    summary = f"Output of {each}: {what} {middle:,.0f} tokens/s, between {rates.min():,.0f} and {rates.max():,.0f}."
    return Chart(_stack({"speed": rates}, labels, top), ticks, summary, f"{top:,.0f} tokens/s", ["speed"])


def curve(points: Iterable[CurvePoint], name: Literal["loss", "validation_accuracy"]) -> LineChart | None:
    """Return how a value of the training changed with its steps; None with fewer than two values."""
    steps, values, step = [], [], 0
    for point in points:
        step, value = step if point.step is None else point.step, getattr(point, name)
        if value is not None:
            steps.append(step)
            values.append(float(value))
    return line(steps, values, is_share=name.endswith("accuracy"))


def line(steps: Sequence[float], values: Sequence[float], *, is_share: bool) -> LineChart | None:
    """Return a line through at most 120 means of the values; None with fewer than two that are finite.

    A share is drawn from 0 to 100 %, anything else from 0 or, if that is far away, from its lowest value.
    """
    known = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    if len(known) < 2:
        return None
    parts = np.array_split(np.array(known, float), min(_N_POINTS, len(known)))
    means = [(float(part[:, 0].max()), float(part[:, 1].mean())) for part in parts]
    last, highest, lowest = known[-1][0], max(y for _, y in means), min(y for _, y in means)
    low, high = (0.0, 1.0) if is_share else (0.0 if lowest < highest / 2 else lowest, highest)
    low, high = (low, high) if high > low else (low - 1, low + 1)
    first = 0 if known[0][0] < last / 2 else known[0][0]
    across, up = (last - first) or 1.0, high - low

    def x_of(step: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * (step - first) / across, 1)

    def y_of(value: float) -> float:
        return round(_BOTTOM - (_BOTTOM - _TOP) * (value - low) / up, 1)

    shown = [f"{100 * y:.1f} %" if is_share else f"{y:.3g}" for _, y in (means[0], means[-1])]
    return LineChart(
        points=" ".join(f"{x_of(x)},{y_of(y)}" for x, y in means),
        x_ticks=[(x_of(tick), f"{tick:,.0f}") for tick in ticks(first, last, least=1.0)],
        y_ticks=[(y_of(tick), f"{100 * tick:.0f} %" if is_share else f"{tick:.4g}") for tick in ticks(low, high)],
        y_label="share" if is_share else "loss",
        summary=f"From {shown[0]} to {shown[1]} in {last:,.0f} steps.",
    )


def ticks(low: float, high: float, *, n: int = 5, least: float = 0.0) -> list[float]:
    """Return up to n + 1 round values from low to high, 1, 2 or 5 times a power of ten apart, and at least `least`."""
    step = _round_up((high - low) / n, least=least) if high > low else 0.0
    if step <= 0:
        return [low]
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _stack(counts: dict[str, npt.NDArray[Any]], labels: list[str], top: float) -> list[Bar]:
    bars, below = [], np.zeros(len(labels))
    step = 100 / len(labels)
    for name, series in counts.items():
        for i in np.flatnonzero(series).tolist():
            height = 100 * float(series[i]) / top
            title = labels[i] if name == "speed" else f"{labels[i]}: {int(series[i]):,} {name}"
            y = 100 - 100 * below[i] / top - height
            bars.append(
                Bar(name, round(i * step, 3), round(float(y), 3), round(0.9 * step, 3), round(height, 3), title)
            )
        below += series
    return bars


def _round_up(width: float, least: float) -> float:
    """Return the next 1, 2 or 5 times a power of ten."""
    if width <= least:
        return least
    power = 10.0 ** math.floor(math.log10(width))
    return next(power * factor for factor in (1, 2, 5, 10) if width <= power * factor * (1 + 1e-9))


def _amount(value: float, unit: str) -> str:
    if unit == "$" and value < 100:
        return f"${np.format_float_positional(value, precision=2, fractional=False, trim='-')}"
    return f"{value:,.0f} {unit}"
