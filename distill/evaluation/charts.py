"""Bar charts for the report, already laid out in a square of 100 by 100, so that the page only draws them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ...localrun.core.text import format_duration
from ..records import CurvePoint

_BINS = 40
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


def curve(points: Iterable[CurvePoint], name: Literal["loss", "validation_accuracy"]) -> Chart | None:
    """Return how a value of the training changed with its steps, in up to 40 means; None with fewer than two values."""
    steps, values, step = [], [], 0
    for point in points:
        step, value = step if point.step is None else point.step, getattr(point, name)
        if value is not None and math.isfinite(value):
            steps.append(step)
            values.append(float(value))
    if len(values) < 2:
        return None
    parts = np.array_split(np.array(values), min(_BINS, len(values)))
    means = np.array([float(part.mean()) for part in parts])
    share = name.endswith("accuracy")
    shown = [f"{100 * mean:.1f} %" if share else f"{mean:.3g}" for mean in means]
    top = 1.0 if share else float(means.max()) or 1.0
    summary = f"From {shown[0]} to {shown[-1]} in {steps[-1]:,} steps."
    ticks = [f"step {steps[0]:,}", f"step {steps[-1]:,}"]
    bars = _stack({"speed": means}, shown, top)
    return Chart(bars, ticks, summary, "100 %" if share else f"{top:.3g}", ["speed"])


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
