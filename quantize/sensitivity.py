"""What each type does to each tensor: a weighted error to sort out the hopeless, then the divergence it causes.

The error is taken on a sample of rows: sum of importance times squared change. For a type that may be chosen the whole
tensor goes through ggml's quantizer and back into an F16 model that stands in memory, the held-out replies are read,
and the tensor is put back. Nothing else changes, so even a divergence of 1e-5 is no noise.

A tied embedding is one item, its two uses measured together. An output matrix of its own never pays: stored once, in
the larger type of the two, the embedding takes fewer bytes and is nearer in both uses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from ..localrun import ggml
from ..localrun.dequantize import dequantize_rows
from ..localrun.probe import Probe
from ..localrun.progress import Progress, no_progress
from .budget import Choice, Item, efficient, scaled, solve
from .convert import Conversion, Importance, Typed
from .fidelity import Reference

TYPES = (
    *(Type.IQ2_S, Type.Q2_K, Type.IQ3_XXS, Type.IQ3_S, Type.Q3_K, Type.IQ4_XS, Type.IQ4_NL, Type.Q4_0, Type.Q4_K),
    *(Type.Q4_1, Type.Q5_0, Type.Q5_K, Type.Q5_1, Type.Q6_K, Type.Q8_0, Type.F16),
)
"""What a tensor may be stored as, where its rows are whole blocks."""

_N_SAMPLED = 64  # rows of a tensor, for the error
_SAVE_EVERY = 16
_N_FIRST, _N_LATER = 80, 16  # measurements of the first round, about, and of each later one, at most


@dataclass
class Sensitivity:
    """The items of a model with what was measured of them; what it knows is kept in a file and found there again.

    `key` names model, importance matrix and texts: measurements of others are of no use.
    """

    items: list[Item]
    key: str
    path: Path
    _n_unsaved: int = 0

    @classmethod
    def open(cls, path: Path, key: str, make: Callable[[], list[Item]]) -> Sensitivity:
        """Return what an earlier run has kept, or begin with the items that `make` returns."""
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["key"] == key:
                items = [Item(name, tuple(_choice_of(one) for one in choices)) for name, choices in kept["items"]]
                return cls([scaled(item) for item in items], key, path)
        except (OSError, ValueError, KeyError, TypeError):
            pass  # there is none, or one of another version: it is made again
        found = cls(make(), key, path)
        found.save()
        return found

    def record(self, item: Item, choice: Choice, damage: float) -> None:
        """Note a measured divergence, in nats a token."""
        at = next(i for i, one in enumerate(self.items) if one.name == item.name)
        known = replace(choice, damage=max(damage, 0.0), is_measured=True)
        choices = tuple(known if one.type == choice.type else one for one in self.items[at].choices)
        self.items[at] = scaled(replace(item, choices=choices))
        self._n_unsaved += 1
        if self._n_unsaved >= _SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write what is known beside its place, and rename it."""
        items = [
            [i.name, [[c.type.name, c.n_bytes, c.error, c.damage if c.is_measured else None] for c in i.choices]]
            for i in self.items
        ]
        temporary = self.path.with_name(f".{self.path.name}.part")
        temporary.write_text(json.dumps({"key": self.key, "items": items}), encoding="utf-8")
        temporary.replace(self.path)
        self._n_unsaved = 0


def _choice_of(kept: list[Any]) -> Choice:
    name, n_bytes, error, damage = kept
    return Choice(Type[name], int(n_bytes), float(error), float(damage or 0.0), damage is not None)


def items_of(
    conversion: Conversion, importance: Importance, n_threads: int, on_progress: Progress = no_progress
) -> list[Item]:
    """Return what may be chosen for each tensor that can be quantized; `conversion` is a plan for F16.

    Vectors and whatever else stays F32 in every recipe is no item.
    """
    typed = [one for one in conversion.tensors if one.got != Type.F32]
    items = []
    with ThreadPoolExecutor(n_threads) as pool:
        for i, (one, choices) in enumerate(zip(typed, pool.map(lambda t: _choices(t, importance), typed), strict=True)):
            items.append(Item(one.tensor.name, choices))
            on_progress("errors", i + 1, len(typed), one.tensor.name)
    return items


def _choices(typed: Typed, importance: Importance) -> tuple[Choice, ...]:
    name = typed.tensor.name
    weights = importance.get(name)
    n_per_row = typed.tensor.shape[-1]
    rows, columns = _sample(typed, weights)
    found = []
    for type_ in TYPES:
        if n_per_row % ggml.block_size(type_) or (weights is None and type_ in ggml.NEED_IMATRIX):
            continue
        changed = np.concatenate([_through(part, type_, row) for part, row in zip(rows, columns, strict=True)])
        weight = np.concatenate(
            [np.broadcast_to(1.0 if row is None else row, part.shape) for part, row in zip(rows, columns, strict=True)]
        )
        delta = (changed - np.concatenate(rows)).astype(np.float64)
        error = float((weight * delta**2).sum()) * typed.n_weights / delta.size
        found.append(Choice(type_, replace(typed, got=type_).n_bytes, error))
    return efficient(found)


def _sample(
    typed: Typed, weights: npt.NDArray[np.float32] | None
) -> tuple[list[npt.NDArray[np.float32]], list[npt.NDArray[np.float32] | None]]:
    """Return some rows of a tensor, evenly spaced, each group with the weights of its columns."""
    n_rows = typed.n_weights // typed.tensor.shape[-1]
    step = max(1, n_rows // _N_SAMPLED)
    n_of_one = math.prod(typed.tensor.shape[-2:-1])
    rows, columns, at = list[npt.NDArray[np.float32]](), list[npt.NDArray[np.float32] | None](), 0
    for part in typed.tensor.read():
        for i in range(-at % step, len(part), step):
            rows.append(np.ascontiguousarray(part[i : i + 1]))
            columns.append(weights[(at + i) // n_of_one] if weights is not None and weights.ndim == 2 else weights)
        at += len(part)
    if weights is None or weights.ndim == 1:
        return [np.concatenate(rows)], [weights]
    return rows, columns


def _through(
    rows: npt.NDArray[np.float32], type_: Type, weights: npt.NDArray[np.float32] | None
) -> npt.NDArray[np.float32]:
    """Return rows as they are after a type has held them."""
    return dequantize_rows(ggml.quantize_rows(rows, type_, weights), type_, rows.shape[1])


class Bench:
    """Measures single choices: an F16 model in memory, the plan that it was written by, and the reference's words."""

    def __init__(
        self, probe: Probe, conversion: Conversion, importance: Importance, reference: Reference, n_threads: int
    ) -> None:
        """Take a probe of a file that was written from `conversion`."""
        self._probe, self._reference, self._importance = probe, reference, importance
        self._typed = {one.tensor.name: one for one in conversion.tensors}
        self._n_threads = n_threads

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._probe.close()

    def damage(self, item: Item, choice: Choice) -> float:
        """Return the divergence that storing one item so causes, in nats a token."""
        try:
            self._set(item.name, choice.type)
            return self._reference.measure(self._probe).kl_mean
        finally:
            self._set(item.name, None)

    def _set(self, name: str, type_: Type | None) -> None:
        typed, weights = self._typed[name], self._importance.get(name)
        with ThreadPoolExecutor(self._n_threads) as pool:
            parts = []
            for rows, row_weights in parts_of(typed, weights):
                if type_ is None:
                    parts.append(rows)
                    continue
                data = ggml.quantize_rows(rows, type_, row_weights, pool)
                parts.append(dequantize_rows(data, type_, rows.shape[1]))
        self._probe.set(name, np.concatenate(parts))


def parts_of(
    typed: Typed, weights: npt.NDArray[np.float32] | None
) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]]:
    """Yield a tensor's rows in parts of one matrix each, with the weights of their columns."""
    n_of_one, at = math.prod(typed.tensor.shape[-2:-1]), 0
    for rows in typed.tensor.read():
        if weights is None or weights.ndim == 1:
            yield rows, weights
            continue
        start = 0
        while start < len(rows):
            matrix = (at + start) // n_of_one
            stop = min(len(rows), (matrix + 1) * n_of_one - at)
            yield rows[start:stop], weights[matrix]
            start = stop
        at += len(rows)


def refine(
    sensitivity: Sensitivity,
    damage_of: Callable[[Item, Choice], float],
    n_bytes: int,
    *,
    n_rounds: int = 1,
    on_progress: Progress = no_progress,
) -> list[Choice]:
    """Measure what is likely to be chosen, choose, measure what was chosen, and choose again.

    First some layers of each role are measured, all where there are few, at the choice nearest to the budget's average;
    the layers between take what a unit of error costs from their neighbours. Each later round measures the chosen types
    that are thought to do most damage and were not measured yet, then chooses again.
    """
    items = sensitivity.items
    average = n_bytes / sum(item.choices[-1].n_bytes for item in items)
    first = [min(i.choices, key=lambda c: abs(c.n_bytes / i.choices[-1].n_bytes - average)) for i in items]
    step = max(1, round(len(items) / _N_FIRST))
    todo = [
        (item, choice)
        for item, choice in zip(items, first, strict=True)
        if not any(one.is_measured for one in item.choices) and _layer(item.name) % step == 0
    ]
    _measure(sensitivity, damage_of, todo, "measuring types", on_progress)
    chosen = solve(between(sensitivity.items), n_bytes)
    for n in range(n_rounds):
        unknown = [pair for pair in zip(sensitivity.items, chosen, strict=True) if not pair[1].is_measured]
        unknown.sort(key=lambda pair: -pair[1].damage)
        if not unknown:
            break
        _measure(sensitivity, damage_of, unknown[:_N_LATER], f"measuring, round {n + 2}", on_progress)
        chosen = solve(between(sensitivity.items), n_bytes)
    sensitivity.items = between(sensitivity.items)
    return chosen


def between(items: Sequence[Item]) -> list[Item]:
    """Return the items with those that were never measured scaled as their neighbours of the same role are.

    What a unit of error costs is interpolated between the nearest measured layers below and above, on a logarithmic
    scale; a tensor without any measured relative keeps its error as it is.
    """
    known: dict[str, dict[int, float]] = {}
    for item in items:
        costs = [math.log(max(c.damage, 1e-12) / max(c.error, 1e-30)) for c in item.choices if c.is_measured]
        if costs:
            known.setdefault(_role(item.name), {})[_layer(item.name)] = float(np.mean(costs))
    filled = []
    for item in items:
        near = known.get(_role(item.name))
        if near is None or any(choice.is_measured for choice in item.choices):
            filled.append(item)
            continue
        layers = sorted(near)
        cost = math.exp(float(np.interp(_layer(item.name), layers, [near[layer] for layer in layers])))
        filled.append(replace(item, choices=tuple(replace(c, damage=cost * c.error) for c in item.choices)))
    return filled


def _layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blk" else 0


def _role(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdigit())


def _measure(
    sensitivity: Sensitivity,
    damage_of: Callable[[Item, Choice], float],
    todo: Sequence[tuple[Item, Choice]],
    stage: str,
    on_progress: Progress,
) -> None:
    try:
        for i, (item, choice) in enumerate(todo):
            damage = damage_of(item, choice)
            sensitivity.record(item, choice, damage)
            on_progress(stage, i + 1, len(todo), f"{item.name} {choice.type.name}: {damage:.2g} nats")
    finally:
        sensitivity.save()


def describe(items: Sequence[Item], chosen: Sequence[Choice]) -> list[dict[str, Any]]:
    """Return what was chosen for each item, for the report: its types, bytes and damage."""
    return [
        {"tensor": i.name, "type": c.type.name, "bytes": c.n_bytes, "nats": c.damage, "measured": c.is_measured}
        for i, c in zip(items, chosen, strict=True)
    ]
