"""What each type does to each tensor, from three measurements, each of which sees what the others cannot.

The *error*, importance times squared change summed over a sample of rows, compares the types of one tensor and discards
the hopeless ones. The *cost* of a unit of error compares the tensors: a tensor goes through ggml's quantizer and back
into an F16 model in memory, the held-out replies are read, and the tensor is restored; nothing else changes, so even
1e-5 nats are not noise. The *level* of a type shows what single tensors cannot: all tensors take the type at once, and
the divergence is divided by the sum of what each was expected to do. Errors that point the same way in every layer add
up to far more than that sum. The extreme is a LoRA-trained student whose base was stored as Q4_1: Q4_1 has the least
error on each of its tensors, since it rounds back to the base, and in all of them at once it undoes the training.

A tied embedding is one item, and its two uses are measured together. A separate output matrix never pays: stored once,
in the larger type of the two, the embedding takes fewer bytes and is more exact in both uses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from ...localrun.core.atomic import write_text
from ...localrun.core.closes import Closes
from ...localrun.core.reporter import SILENT, Reporter
from ...localrun.gguf import ggml
from ...localrun.weights.swap import Probe
from ..convert.writer import Conversion, Importance, TypedTensor, round_trip, weighted_rows
from ..measure.fidelity import Reference
from .allocate import Choice, Item, efficient

TYPES = (
    *(Type.IQ2_S, Type.Q2_K, Type.IQ3_XXS, Type.IQ3_S, Type.Q3_K, Type.IQ4_XS, Type.IQ4_NL, Type.Q4_0, Type.Q4_K),
    *(Type.Q4_1, Type.Q5_0, Type.Q5_K, Type.Q5_1, Type.Q6_K, Type.Q8_0, Type.F16),
)
"""The types that a tensor can have, if its rows are whole blocks."""

_N_SAMPLED = 64  # rows of a tensor, for the error
_SAVE_EVERY = 16
_N_MEASURED = 60  # tensors, roughly
_TYPICAL = (Type.IQ4_NL, Type.Q4_0, Type.IQ4_XS, Type.Q4_K)


@dataclass
class Sensitivity:
    """The items of a model with their measurements: what a unit of error costs each, in nats, and each type's level.

    A file keeps them for the next run. `key` identifies model, importance matrix and texts; measurements with another
    key are of no use.
    """

    items: list[Item]
    key: str
    path: Path
    costs: dict[str, float] = field(default_factory=dict)
    levels: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, key: str, make: Callable[[], list[Item]]) -> Sensitivity:
        """Return the measurements of an earlier run, or start with the items that `make` returns.

        Raises:
            ArtifactError: `code` "write-failed".
        """
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["key"] == key:
                items = [
                    Item(name, tuple(Choice(Type[t], int(n), float(error)) for t, n, error, *_ in choices))
                    for name, choices in kept["items"]
                ]
                return cls(items, key, path, kept["costs"], kept["levels"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # there is none, or another version wrote it
        found = cls(make(), key, path)
        found.save()
        return found

    def save(self) -> None:
        """Write the measurements so far to the file."""
        items = [[i.name, [[c.type.name, c.n_bytes, c.error] for c in i.choices]] for i in self.items]
        text = json.dumps({"key": self.key, "costs": self.costs, "levels": self.levels, "items": items})
        write_text(self.path, text)

    def weighed(self) -> list[Item]:
        """Return the items with the damage of every choice: its error times the tensor's cost and the type's level.

        The cost of a tensor that was not measured is interpolated between the layers of the same role, on a logarithmic
        scale; if no tensor of that role was measured, it is the average.
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
    conversion: Conversion, importance: Importance, *, n_threads: int, report: Reporter = SILENT
) -> list[Item]:
    """Return the choices for each tensor that can be quantized; `conversion` is a plan for F16.

    Vectors and everything else that is F32 in every mixture are not items.
    """
    tensors = [one for one in conversion.tensors if one.got != Type.F32]
    items = []
    with ThreadPoolExecutor(n_threads) as pool:
        for typed, choices in zip(tensors, pool.map(lambda t: _choices(t, importance), tensors), strict=True):
            items.append(Item(typed.tensor.name, choices))
            report.progress("errors", len(items), total=len(tensors), note=typed.tensor.name)
    return items


def _choices(typed: TypedTensor, importance: Importance) -> tuple[Choice, ...]:
    weights, n_per_row = importance.get(typed.tensor.name), typed.tensor.shape[-1]
    samples = list(_sample(typed, weights))
    share = sum(rows.size for rows, _ in samples) / typed.n_weights
    found = []
    for type_ in TYPES:
        if n_per_row % ggml.block_size(type_) or (weights is None and type_ in ggml.NEED_IMATRIX):
            continue
        error = 0.0
        for rows, columns in samples:
            squares = (round_trip(rows, type_, weights=columns) - rows).astype(np.float64) ** 2
            error += float((squares if columns is None else columns * squares).sum())
        found.append(Choice(type_, replace(typed, got=type_).n_bytes, error / share))
    return efficient(found)


def _sample(
    typed: TypedTensor, weights: npt.NDArray[np.float32] | None
) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]]:
    """Yield some rows of a tensor, evenly spaced, in groups with the weights of their columns."""
    step = max(1, typed.n_weights // typed.tensor.shape[-1] // _N_SAMPLED)
    at = 0
    for rows, columns in weighted_rows(typed, weights):
        if len(sample := rows[-at % step :: step]):
            yield np.ascontiguousarray(sample), columns
        at += len(rows)


class DamageMeter(Closes):
    """Measures choices: an F16 model in memory, the plan that it was written by, and the reference's probabilities."""

    def __init__(
        self, probe: Probe, conversion: Conversion, *, importance: Importance, reference: Reference, n_threads: int
    ) -> None:
        """Take a probe of a file that was written from `conversion`."""
        self._probe, self._reference, self._importance = probe, reference, importance
        self._typed = {one.tensor.name: one for one in conversion.tensors}
        self._n_threads = n_threads

    def close(self) -> None:
        """Free the model."""
        self._probe.close()

    def damage(self, types: Mapping[str, Type]) -> float:
        """Return the divergence that these tensors' types cause, in nats a token; the tensors are restored after it."""
        try:
            for name, type_ in types.items():
                self._set(name, type_)
            return self._reference.measure(self._probe).kl_mean
        finally:
            for name in types:
                self._set(name, None)

    def _set(self, name: str, type_: Type | None) -> None:
        """Put a tensor into the model: as a type stores it, or as it is."""
        parts = weighted_rows(self._typed[name], self._importance.get(name))
        with ThreadPoolExecutor(self._n_threads) as pool:
            rows = [
                plain if type_ is None else round_trip(plain, type_, weights=weights, pool=pool)
                for plain, weights in parts
            ]
        self._probe.set(name, np.concatenate(rows))


Damage = Callable[[Mapping[str, Type]], float]
"""Returns the divergence that some tensors' types cause together."""


def refine(
    sensitivity: Sensitivity,
    damage_of: Damage,
    *,
    choose: Callable[[list[Item]], list[Choice]],
    report: Reporter = SILENT,
) -> list[Choice]:
    """Return the choices that `choose` makes among the weighed items, after measuring whatever they need.

    First the costs of some layers of each role are measured (of all, if they are few), at a choice of about 4.5 bits.
    Then the levels of the types chosen are measured and the choice is repeated, until all of its types have a level.
    """
    _measure_costs(sensitivity, damage_of, report)
    for _ in range(len(TYPES)):
        chosen = choose(sensitivity.weighed())
        unknown = {choice.type for choice in chosen} - {Type.F16} - {Type[name] for name in sensitivity.levels}
        if not unknown:
            return chosen
        _measure_levels(sensitivity, damage_of, types=sorted(unknown), report=report)
    return choose(sensitivity.weighed())


def _measure_costs(sensitivity: Sensitivity, damage_of: Damage, report: Reporter) -> None:
    items = [item for item in sensitivity.items if item.choices[0].error > 0]
    step = max(1, round(len(items) / _N_MEASURED))
    todo = [item for item in items if item.name not in sensitivity.costs and _layer(item.name) % step == 0]
    try:
        for i, item in enumerate(todo):
            choice = _typical(item)
            damage = damage_of({item.name: choice.type})
            sensitivity.costs[item.name] = max(damage, 0.0) / choice.error
            note = f"{item.name} {choice.type.name}: {damage:.2g} nats"
            report.progress("measuring tensors", i + 1, total=len(todo), note=note)
            if i % _SAVE_EVERY == 0:
                sensitivity.save()
    finally:
        sensitivity.save()


def _typical(item: Item) -> Choice:
    """Return the choice to measure a tensor's cost with: of a type common to all, or of a middle size."""
    preferred = [c for wanted in _TYPICAL for c in item.choices if c.type == wanted and c.error > 0]
    inexact = [choice for choice in item.choices if choice.error > 0]
    return preferred[0] if preferred else inexact[len(inexact) // 2]


def _measure_levels(sensitivity: Sensitivity, damage_of: Damage, *, types: Sequence[Type], report: Reporter) -> None:
    for i, type_ in enumerate(types):
        sensitivity.levels[type_.name] = 1.0
        pairs = [(item, c) for item in sensitivity.weighed() for c in item.choices if c.type == type_]
        apart = sum(choice.damage for _, choice in pairs)
        together = damage_of({item.name: type_ for item, _ in pairs})
        sensitivity.levels[type_.name] = max(together, 1e-9) / max(apart, 1e-9)
        note = f"{type_.name} in {len(pairs)} tensors: {together:.2g} nats, {apart:.2g} one by one"
        report.progress("measuring types", i + 1, total=len(types), note=note)
        sensitivity.save()


def _layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blk" else 0


def _role(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdigit())
