"""The type of every tensor: by a recipe, or the best under a budget; and larger ones when a gate is not met."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ..convert.ftypes import FTYPES, UNQUANTIZED
from ..convert.writer import Conversion, Importance, Types, plan
from ..recipe import ReleaseSettings
from .allocate import Choice, Item, promoted, solve, target_bytes
from .sensitivity import describe, refine
from .workbench import Desk

_ALIGNMENT = 32  # bytes; a tensor may be padded by less
_STEP = 0.03  # of a file's bytes, added by each promotion
_FIRST = 0.75  # of a budget, where a gate decides how much of it is needed


class Chooser:
    """The types under way. `source_dir` is what the file is made from: the student, or the healed one."""

    def __init__(self, desk: Desk, settings: ReleaseSettings, size_of: Callable[[Conversion], int]) -> None:
        """Begin with a desk to measure at, and with what tells a plan's exact file size."""
        self._desk, self._settings, self._size_of = desk, settings, size_of
        self.source_dir: Path = desk.student_dir
        self.chosen: list[Choice] | None = None
        self.types: Types = {}

    def choose(self) -> None:
        """Choose types: the recipe's, or those that do the least damage under the budget.

        Raises:
            UsageError: the budget is less than the smallest types take, or there are no traces to measure with.
        """
        if not self._settings.has_budget:
            self.types = {one.tensor.name: one.got for one in self._recipe.tensors}
            return
        n_bytes = self.tensor_budget()
        if self._settings.promote:
            n_bytes = max(int(_FIRST * n_bytes), sum(i.choices[0].n_bytes for i in self._desk.sensitivity.items))
        self._take(self._measured(lambda items: solve(items, n_bytes)))

    def promote(self) -> bool:
        """Raise the tensors that gain most for a byte; return False where the budget, or every type, is spent."""
        if self.chosen is None:
            sizes = {one.tensor.name: one.n_bytes for one in self._recipe.tensors}
            self._take(self._measured(lambda items: [_nearest(item, sizes[item.name]) for item in items]))
        before = self.chosen or []
        now = sum(choice.n_bytes for choice in before)
        most = sum(item.choices[-1].n_bytes for item in self._desk.sensitivity.items)
        most = min(most, self.tensor_budget()) if self._settings.has_budget else most
        if now >= most:
            return False
        # The types that it raises to are measured first: what errs least alone may do the most damage in all tensors.
        raised = self._measured(lambda items: promoted(items, before, int(_STEP * now) + 1, most - now))
        n_bytes = sum(choice.n_bytes for choice in raised)
        if not now < n_bytes <= most:
            return False
        self._take(raised)
        return True

    def _measured(self, choose: Callable[[list[Item]], list[Choice]]) -> list[Choice]:
        with self._desk.open_bench() as bench:
            return refine(self._desk.sensitivity, bench.damage, choose, on_progress=self._desk.on_progress)

    def _take(self, chosen: list[Choice]) -> None:
        types = {item.name: one.type for item, one in zip(self._desk.sensitivity.items, chosen, strict=True)}
        self.types = {one.tensor.name: one.got for one in self._desk.twin.tensors} | types
        self.chosen = chosen

    def describe(self) -> Sequence[dict[str, Any]]:
        """Return what was chosen and why; nothing for a recipe."""
        return describe(self._desk.sensitivity.items, self.chosen) if self.chosen else ()

    def tensor_budget(self) -> int:
        """Return the bytes that the tensors which have a choice may take together.

        Raises:
            UsageError: less than their smallest types take.
        """
        twin, items = self._desk.twin, self._desk.sensitivity.items
        names = {item.name for item in items}
        n_weights = sum(one.n_weights for one in twin.tensors)
        if self._settings.bpw is not None:
            wanted = int(self._settings.bpw * n_weights / 8)
            others = sum(one.n_bytes for one in twin.tensors if one.tensor.name not in names)
        else:
            wanted = self._settings.size or target_bytes(self._settings.target or "", n_weights)
            # A type's name is no part of the header's length: the twin's header is as long as the file's.
            in_twin = sum(one.n_bytes for one in twin.tensors if one.tensor.name in names)
            others = self._size_of(twin) - in_twin + _ALIGNMENT * len(items)
        least = sum(item.choices[0].n_bytes for item in items)
        if wanted < others + least:
            raise UsageError(
                f"{wanted / 1e6:.2f} MB are too few: {(others + least) / 1e6:.2f} MB are the least",
                "give a larger --size or --bpw, or a smaller student",
            )
        return wanted - others

    @cached_property
    def _recipe(self) -> Conversion:
        """The plan of the student by a standard recipe."""
        return self._desk.plan(self._settings.type.upper(), importance=self._desk.importance)

    def plan(self) -> Conversion:
        """Return the plan of a file with the chosen types."""
        is_student = self.source_dir == self._desk.student_dir
        if self.chosen is None and is_student:
            return self._recipe  # it knows what was asked for where a row has no whole blocks
        ftype = self._nearest_ftype() if self.chosen else self._recipe.ftype
        importance: Importance = self._desk.importance
        if is_student:
            return self._desk.plan(ftype, types=self.types, importance=importance)
        return plan(self.source_dir, ftype, types=self.types, importance=importance)

    def _nearest_ftype(self) -> str:
        """Return the recipe that a file's number names: the one whose base type most weights have."""
        weights: Counter[str] = Counter()
        bases = {base.name: ftype for ftype, (_, base) in reversed(FTYPES.items())}
        for one in self._desk.twin.tensors:
            type_ = self.types.get(one.tensor.name, one.got)
            if type_.name in bases and type_.name not in UNQUANTIZED:
                weights[type_.name] += one.n_weights
        return bases[weights.most_common(1)[0][0]] if weights else "F16"


def _nearest(item: Item, n_bytes: int) -> Choice:
    """Return the largest choice of at most so many bytes, or the smallest there is."""
    fitting = [choice for choice in item.choices if choice.n_bytes <= n_bytes]
    return fitting[-1] if fitting else item.choices[0]
