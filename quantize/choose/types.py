"""The type of every tensor: a type mixture's, or the best under a budget; and larger ones if a gate is not met."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ..convert.ftypes import FTYPES, UNQUANTIZED
from ..convert.writer import Conversion, Importance, Types, plan
from .allocate import Choice, Item, promoted, solve, target_bytes
from .sensitivity import refine
from .workbench import Workbench

_ALIGNMENT = 32  # bytes; the padding of a tensor is less
_STEP = 0.03  # each promotion adds this share of a file's bytes
_FIRST = 0.75  # the share of a budget to start with, if a gate decides how much of it is needed


class Chooser:
    """Chooses the types of a file. `source_dir` is the checkpoint of the file: the student, or the healed one."""

    def __init__(self, workbench: Workbench, size_of: Callable[[Conversion], int]) -> None:
        """Take a workbench to measure with, and a function that returns the exact file size of a plan."""
        self._bench, self._settings, self._size_of = workbench, workbench.settings, size_of
        self.source_dir: Path = workbench.student_dir
        self.chosen: list[Choice] | None = None
        self.types: Types = {}

    def choose(self) -> None:
        """Choose the mixture's types, or those with the least damage under the budget.

        Raises:
            UsageError: `code` "budget-too-small" or "no-traces".
        """
        if not self._settings.has_budget:
            self.types = {one.tensor.name: one.got for one in self._mixture.tensors}
            return
        n_bytes = self.tensor_budget()
        if self._settings.promote:
            n_bytes = max(int(_FIRST * n_bytes), sum(i.choices[0].n_bytes for i in self._bench.sensitivity.items))
        self._take(self._measured(lambda items: solve(items, n_bytes)))

    def promote(self) -> bool:
        """Raise the tensors that gain the most per byte; return False if the budget or the types are exhausted."""
        if self.chosen is None:
            sizes = {one.tensor.name: one.n_bytes for one in self._mixture.tensors}
            self._take(self._measured(lambda items: [_nearest(item, sizes[item.name]) for item in items]))
        before = self.chosen or []
        now = sum(choice.n_bytes for choice in before)
        most = sum(item.choices[-1].n_bytes for item in self._bench.sensitivity.items)
        most = min(most, self.tensor_budget()) if self._settings.has_budget else most
        if now >= most:
            return False
        # Its new types are measured first: the one with the least error alone may do the most damage in all tensors.
        raised = self._measured(lambda items: promoted(items, before, n_more=int(_STEP * now) + 1, most=most - now))
        n_bytes = sum(choice.n_bytes for choice in raised)
        if not now < n_bytes <= most:
            return False
        self._take(raised)
        return True

    def _measured(self, choose: Callable[[list[Item]], list[Choice]]) -> list[Choice]:
        with self._bench.open_meter() as meter:
            return refine(self._bench.sensitivity, meter.damage, choose=choose, report=self._bench.report)

    def _take(self, chosen: list[Choice]) -> None:
        types = {item.name: one.type for item, one in zip(self._bench.sensitivity.items, chosen, strict=True)}
        self.types = {one.tensor.name: one.got for one in self._bench.f16.tensors} | types
        self.chosen = chosen

    def describe(self) -> tuple[dict[str, Any], ...]:
        """Return the choices as JSON objects: tensor, type, bytes, and damage in nats; none for a mixture."""
        if self.chosen is None:
            return ()
        return tuple(
            {"tensor": item.name, "type": one.type.name, "bytes": one.n_bytes, "nats": one.damage}
            for item, one in zip(self._bench.sensitivity.items, self.chosen, strict=True)
        )

    def tensor_budget(self) -> int:
        """Return the bytes that the tensors with a choice may take together.

        Raises:
            UsageError: `code` "budget-too-small".
        """
        f16, items = self._bench.f16, self._bench.sensitivity.items
        names = {item.name for item in items}
        n_weights = sum(one.n_weights for one in f16.tensors)
        if self._settings.bpw is not None:
            wanted = int(self._settings.bpw * n_weights / 8)
            others = sum(one.n_bytes for one in f16.tensors if one.tensor.name not in names)
        else:
            target = self._settings.target
            wanted = target_bytes(target, n_weights) if target else self._settings.size or 0
            # A header has a type's number, not its name, so the F16 file's header is as long as this file's.
            in_f16 = sum(one.n_bytes for one in f16.tensors if one.tensor.name in names)
            others = self._size_of(f16) - in_f16 + _ALIGNMENT * len(items)
        least = sum(item.choices[0].n_bytes for item in items)
        if wanted < others + least:
            raise UsageError(
                f"the file does not fit {wanted / 1e6:.2f} MB: it takes at least {(others + least) / 1e6:.2f} MB",
                "give a larger --size or --bpw, or a smaller student",
                code="budget-too-small",
            )
        return wanted - others

    @cached_property
    def _mixture(self) -> Conversion:
        """The plan of the student with a type mixture."""
        return self._bench.plan(self._settings.type.upper(), importance=self._bench.importance)

    def plan(self) -> Conversion:
        """Return the plan of a file with the chosen types."""
        is_student = self.source_dir == self._bench.student_dir
        if self.chosen is None and is_student:
            return self._mixture  # which also knows the types asked for where a row has no whole blocks
        ftype = self._nearest_ftype() if self.chosen else self._mixture.ftype
        importance: Importance = self._bench.importance
        if is_student:
            return self._bench.plan(ftype, types=self.types, importance=importance)
        return plan(self.source_dir, ftype, types=self.types, importance=importance)

    def _nearest_ftype(self) -> str:
        """Return the file type to write into the file: the mixture whose base type most weights have."""
        weights: Counter[str] = Counter()
        bases = {base.name: ftype for ftype, (_, base) in reversed(FTYPES.items())}
        for one in self._bench.f16.tensors:
            type_ = self.types.get(one.tensor.name, one.got)
            if type_.name in bases and type_.name not in UNQUANTIZED:
                weights[type_.name] += one.n_weights
        return bases[weights.most_common(1)[0][0]] if weights else "F16"


def _nearest(item: Item, n_bytes: int) -> Choice:
    """Return the largest choice of at most so many bytes, or the smallest one."""
    fitting = [choice for choice in item.choices if choice.n_bytes <= n_bytes]
    return fitting[-1] if fitting else item.choices[0]
