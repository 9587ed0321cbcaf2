"""What each type does to each tensor, from three measurements that each see what the others cannot.

The *error*, importance times squared change summed over a sample of rows, tells the types of one tensor apart and sorts
out the hopeless. The *cost* of a unit of error tells the tensors apart: a tensor goes through ggml's quantizer and back
into an F16 model that stands in memory, the held-out replies are read, and it is put back; nothing else changes, so
even 1e-5 nats are no noise. The *level* of a type says what single tensors cannot: all tensors take the type at once,
and the divergence is set against the sum of what each was thought to do. Errors that point the same way in every layer
add up to far more than that. A LoRA-trained student whose base was stored as Q4_1 is the extreme: Q4_1 errs least on
each of its tensors, since it rounds back to the base, and in all of them at once it undoes the training.

A tied embedding is one item, its two uses measured together. An output matrix of its own never pays: stored once, in
the larger type of the two, the embedding takes fewer bytes and is nearer in both uses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from ...localrun.core.reporter import Progress, no_progress
from ...localrun.gguf import ggml
from ...localrun.gguf.ggml import dequantize_rows
from ...localrun.weights.swap import Probe
from ..convert.writer import Conversion, Importance, Typed
from ..measure.fidelity import Reference
from .allocate import Choice, Item, efficient

TYPES = (
    *(Type.IQ2_S, Type.Q2_K, Type.IQ3_XXS, Type.IQ3_S, Type.Q3_K, Type.IQ4_XS, Type.IQ4_NL, Type.Q4_0, Type.Q4_K),
    *(Type.Q4_1, Type.Q5_0, Type.Q5_K, Type.Q5_1, Type.Q6_K, Type.Q8_0, Type.F16),
)
"""What a tensor may be stored as, where its rows are whole blocks."""

_N_SAMPLED = 64  # rows of a tensor, for the error
_SAVE_EVERY = 16
_N_MEASURED = 60  # tensors, about
_TYPICAL = (Type.IQ4_NL, Type.Q4_0, Type.IQ4_XS, Type.Q4_K)


@dataclass
class Sensitivity:
    """The items of a model with what was measured: what a unit of error costs each, in nats, and each type's level.

    It is kept in a file and found there again. `key` names model, importance matrix and texts: measurements of others
    are of no use.
    """

    items: list[Item]
    key: str
    path: Path
    costs: dict[str, float] = field(default_factory=dict)
    levels: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, key: str, make: Callable[[], list[Item]]) -> Sensitivity:
        """Return what an earlier run has kept, or begin with the items that `make` returns."""
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["key"] == key:
                items = [
                    Item(name, tuple(Choice(Type[t], int(n), float(error)) for t, n, error, *_ in choices))
                    for name, choices in kept["items"]
                ]
                return cls(items, key, path, kept["costs"], kept["levels"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # there is none, or one of another version: it is made again
        found = cls(make(), key, path)
        found.save()
        return found

    def save(self) -> None:
        """Write what is known beside its place, and rename it."""
        items = [[i.name, [[c.type.name, c.n_bytes, c.error] for c in i.choices]] for i in self.items]
        text = json.dumps({"key": self.key, "costs": self.costs, "levels": self.levels, "items": items})
        temporary = self.path.with_name(f".{self.path.name}.part")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path)

    def weighed(self) -> list[Item]:
        """Return the items with the damage of every choice: its error, at the tensor's cost and the type's level.

        A tensor that was not measured costs what its neighbours of the same role do, interpolated over the layers on a
        logarithmic scale; without any measured relative, the average.
        """
        known: dict[str, dict[int, float]] = {}
        for name, cost in self.costs.items():
            known.setdefault(_role(name), {})[_layer(name)] = math.log(max(cost, 1e-12))
        average = float(np.mean([c for role in known.values() for c in role.values()])) if known else 0.0
        weighed = []
        for item in self.items:
            near = known.get(_role(item.name), {0: average})
            layers = sorted(near)
            cost = math.exp(float(np.interp(_layer(item.name), layers, [near[layer] for layer in layers])))
            choices = (replace(c, damage=cost * c.error * self.levels.get(c.type.name, 1.0)) for c in item.choices)
            weighed.append(replace(item, choices=tuple(choices)))
        return weighed


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
    return dequantize_rows(ggml.quantize_rows(rows, type_, imatrix=weights), type_, rows.shape[1])


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

    def damage(self, changes: Mapping[str, Type]) -> float:
        """Return the divergence that storing these tensors so causes, in nats a token; they are put back after it."""
        try:
            for name, type_ in changes.items():
                self._set(name, type_)
            return self._reference.measure(self._probe).kl_mean
        finally:
            for name in changes:
                self._set(name, None)

    def _set(self, name: str, type_: Type | None) -> None:
        typed, weights = self._typed[name], self._importance.get(name)
        with ThreadPoolExecutor(self._n_threads) as pool:
            parts = []
            for rows, row_weights in parts_of(typed, weights):
                if type_ is None:
                    parts.append(rows)
                    continue
                data = ggml.quantize_rows(rows, type_, imatrix=row_weights, pool=pool)
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


Damage = Callable[[Mapping[str, Type]], float]
"""Tells the divergence that some tensors' types cause together."""


def refine(
    sensitivity: Sensitivity,
    damage_of: Damage,
    choose: Callable[[list[Item]], list[Choice]],
    *,
    on_progress: Progress = no_progress,
) -> list[Choice]:
    """Return what `choose` takes of the weighed items, after measuring what it takes and was not measured yet.

    First some layers of each role are measured, all where there are few, at the choice that takes about 4.5 bits. Then
    the types are levelled that the choices use, and the choices made again, until all that they use are levelled.
    """
    _measure_costs(sensitivity, damage_of, on_progress)
    for _ in range(len(TYPES)):
        chosen = choose(sensitivity.weighed())
        unknown = {choice.type for choice in chosen} - {Type.F16} - {Type[name] for name in sensitivity.levels}
        if not unknown:
            return chosen
        _measure_levels(sensitivity, damage_of, sorted(unknown), on_progress)
    return choose(sensitivity.weighed())


def _measure_costs(sensitivity: Sensitivity, damage_of: Damage, on_progress: Progress) -> None:
    items = [item for item in sensitivity.items if item.choices[0].error > 0]
    step = max(1, round(len(items) / _N_MEASURED))
    todo = [item for item in items if item.name not in sensitivity.costs and _layer(item.name) % step == 0]
    try:
        for i, item in enumerate(todo):
            choice = _typical(item)
            damage = damage_of({item.name: choice.type})
            sensitivity.costs[item.name] = max(damage, 0.0) / choice.error
            on_progress("measuring tensors", i + 1, len(todo), f"{item.name} {choice.type.name}: {damage:.2g} nats")
            if i % _SAVE_EVERY == 0:
                sensitivity.save()
    finally:
        sensitivity.save()


def _typical(item: Item) -> Choice:
    """Return the choice to measure a tensor's cost by: one of the same kind for all, or what is nearest in size."""
    preferred = [c for wanted in _TYPICAL for c in item.choices if c.type == wanted and c.error > 0]
    inexact = [choice for choice in item.choices if choice.error > 0]
    return preferred[0] if preferred else inexact[len(inexact) // 2]


def _measure_levels(sensitivity: Sensitivity, damage_of: Damage, types: Sequence[Type], on_progress: Progress) -> None:
    for i, type_ in enumerate(types):
        sensitivity.levels[type_.name] = 1.0
        pairs = [(item, c) for item in sensitivity.weighed() for c in item.choices if c.type == type_]
        apart = sum(choice.damage for _, choice in pairs)
        together = damage_of({item.name: type_ for item, _ in pairs})
        sensitivity.levels[type_.name] = max(together, 1e-9) / max(apart, 1e-9)
        note = f"{type_.name} in {len(pairs)} tensors: {together:.2g} nats, {apart:.2g} one by one"
        on_progress("measuring types", i + 1, len(types), note)
        sensitivity.save()


def _layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blk" else 0


def _role(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdigit())


def describe(items: Sequence[Item], chosen: Sequence[Choice]) -> list[dict[str, Any]]:
    """Return what was chosen for each item, for the report: its types, bytes and damage."""
    return [
        {"tensor": i.name, "type": c.type.name, "bytes": c.n_bytes, "nats": c.damage}
        for i, c in zip(items, chosen, strict=True)
    ]
