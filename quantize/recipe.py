"""How a student is quantized: a recipe or a budget, what to measure with, and what has to hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UsageError
from .convert.ftypes import check_ftype
from .measure.gate import Gate
from .measure.texts import CalibrationSettings

_PLAIN = frozenset({"F32", "F16", "BF16", "Q8_0"})  # an importance matrix changes nothing in them


@dataclass(frozen=True)
class ReleaseSettings:
    """How to quantize. At most one of `size` (bytes of the file), `bpw` (of all weights) and `target` chooses types.

    `base` is an adapter's; `imatrix` is a file, "none", or None for one from the traces; `heal` counts optimizer steps;
    `compare` names recipes that are measured beside the file.
    """

    type: str = "Q8_0"
    size: int | None = None
    bpw: float | None = None
    target: str | None = None
    base: Path | None = None
    imatrix: str | None = None
    traces: Path | None = None
    gate: Gate | None = None
    promote: bool = False
    heal: int = 0
    fidelity: bool = True
    compare: tuple[str, ...] = ()
    split: int | None = None
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)

    @property
    def has_budget(self) -> bool:
        """Whether types are chosen by measurement."""
        return self.size is not None or self.bpw is not None or self.target is not None

    def check(self) -> None:
        """Say what does not go together.

        Raises:
            UsageError: something does not.
        """
        if sum(one is not None for one in (self.size, self.bpw, self.target)) > 1:
            raise UsageError("--size, --bpw and --target are three ways to say one thing", "give one of them")
        if self.bpw is not None and not 1 <= self.bpw <= 16:
            raise UsageError(f"{self.bpw:g} bits a weight", "between 1 and 16")
        if self.promote and not self.gate:
            raise UsageError("--promote raises tensors until a gate is met", "give one with --gate")
        if self.promote and self.heal:
            raise UsageError(
                "--heal trains under one choice of types, and --promote makes others", "heal at a larger --size"
            )
        has_imatrix = self.imatrix_path != "none" and bool(self.imatrix or self.traces)
        for name in (*(() if self.has_budget else (self.type,)), *self.compare):
            check_ftype(name, has_imatrix=has_imatrix)

    @property
    def reads_traces(self) -> bool:
        """Whether anything is measured, or made, with the traces."""
        wanted = self.fidelity or self.has_budget or self.promote or self.heal or self.imatrix_path is None
        return self.traces is not None and bool(wanted)

    @property
    def imatrix_path(self) -> str | None:
        """The file to read, "none", or None where one is to be made: not for types that make no use of it."""
        types = {name.upper() for name in (self.type, *self.compare)}
        is_plain = not self.has_budget and not self.promote and types <= _PLAIN
        return "none" if self.imatrix is None and is_plain else self.imatrix
