"""Every setting of `quantize`, declared once: a type mixture or a budget, what to measure, and what has to hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import UsageError
from ..localrun.core.settings import setting

_FILE, _MEASURED = "File", "Measurements"
_PLAIN = frozenset({"F32", "F16", "BF16", "Q8_0"})  # an importance matrix changes nothing in them


def _bytes(text: str) -> int:
    from ..localrun.core.text import parse_size

    return parse_size(text)


@dataclass(frozen=True)
class HealRecipe:
    """Training under the types of the file. The learning rate rises over a tenth of the steps and then falls to 0."""

    steps: int = setting(
        0, "Steps of distillation under the file's types; needs torch. 0: none.", min=0, name="heal", heading=_FILE
    )
    lr: float = setting(5e-5, "Peak learning rate.", min=0)
    batch_tokens: int = setting(1_024, "Tokens per step.", min=1)
    refresh: int = setting(8, "Steps between two quantizations of the weights.", min=1)
    top_k: int = setting(128, "The unquantized model's likeliest tokens that are learned per position.", min=1)
    seed: int = setting(0, "Seed of the order of the texts.", min=0)
    save_every_s: float = setting(120.0, "Seconds between two savings of what is done.", min=0)


@dataclass(frozen=True)
class CalibrationRecipe:
    """How many tokens of the traces are read, at most; of `choose` and `measure` the replies' alone are counted."""

    n_calibrate: int = setting(8_192, "Tokens for the importance matrix.", min=1)
    n_heal: int = setting(
        0, "Tokens for healing, those of the importance matrix among them. 0: as many as its steps take.", min=0
    )
    n_choose: int = setting(256, "Tokens that choose the types.", min=1)
    n_measure: int = setting(2_048, "Tokens that the file is measured on.", min=1)
    max_length: int = setting(2_048, "Tokens of a trace; longer ones are cut.", min=1)


@dataclass(frozen=True)
class QuantizeRecipe:
    """How a student becomes a GGUF. At most one of `size`, `bpw` and `target` chooses types by measurement."""

    type: str = setting(
        "Q8_0",
        "The type mixture: F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q4_K_M Q4_0 IQ4_XS Q3_K_M Q2_K …",
        heading=_FILE,
        metavar="TYPE",
        parse=str.upper,
    )
    size: int | None = setting(
        None,
        "Choose the best types for a file of at most this size, such as 90MB.",
        min=1,
        heading=_FILE,
        metavar="SIZE",
        parse=_bytes,
    )
    bpw: float | None = setting(
        None, "Choose the best types for at most so many bits per weight, such as 4.5.", min=1, max=16, heading=_FILE
    )
    target: Literal["phone", "laptop"] | None = setting(
        None, "Choose the best types for such a machine's memory and speed.", heading=_FILE
    )
    split: int | None = setting(
        None,
        "Write parts of at most so many bytes of tensors, such as 500MB.",
        min=1,
        heading=_FILE,
        metavar="SIZE",
        parse=_bytes,
    )
    base: Path | None = setting(
        None, "The base of an adapter. The one that it names, unless given.", heading=_FILE, metavar="FOLDER"
    )
    heal: HealRecipe = field(default_factory=HealRecipe)
    imatrix: str | None = setting(
        None,
        "An importance matrix (a GGUF), or none. Made from the traces, unless given.",
        heading=_MEASURED,
        metavar="FILE",
    )
    traces: Path | None = setting(
        None, "The traces to measure with. The run's own, unless given.", heading=_MEASURED, metavar="FILE"
    )
    fidelity: bool = setting(True, "Measure the file against the unquantized model.", heading=_MEASURED)
    proofs: bool = setting(True, "Prove the file against the checkpoint after writing it.", heading=_MEASURED)
    problems: str | None = setting(
        None,
        "Ask the test questions of these problems. The run's own, unless given.",
        heading=_MEASURED,
        metavar="SPEC",
    )
    n: int = setting(
        0, "Test problems to ask the file and the unquantized model; 200 for a gate.", min=0, heading=_MEASURED
    )
    gate: str | None = setting(
        None,
        "Write the file only if this holds, else exit with 3: 'accuracy >= 0.98 of bf16, loops <= 1%'.",
        heading=_MEASURED,
        metavar="GATE",
    )
    promote: bool = setting(
        False, "Raise the worst tensors until the gate is met or --size is reached.", heading=_MEASURED
    )
    compare: tuple[str, ...] = setting(
        (),
        "Type mixtures to measure beside the file, such as Q4_K_M,Q4_0, for the table and the plot.",
        heading=_MEASURED,
        metavar="TYPES",
        parse=str.upper,
    )
    calibration: CalibrationRecipe = field(default_factory=CalibrationRecipe)

    def __post_init__(self) -> None:
        """Check what does not go together.

        Raises:
            UsageError: `code` "settings-conflict" or "gate-missing".
        """
        if sum(one is not None for one in (self.size, self.bpw, self.target)) > 1:
            message, hint = "--size, --bpw and --target are three ways to say one thing", "give one of them"
            raise UsageError(message, hint, code="settings-conflict")
        if self.promote and not self.gate:
            message, hint = "--promote raises tensors until a gate is met", "give one with --gate"
            raise UsageError(message, hint, code="gate-missing")
        if self.promote and self.heal.steps:
            message = "--heal trains under one choice of types, and --promote makes others"
            raise UsageError(message, "heal at a larger --size", code="settings-conflict")

    @property
    def has_budget(self) -> bool:
        """Whether types are chosen by measurement."""
        return self.size is not None or self.bpw is not None or self.target is not None

    @property
    def reads_traces(self) -> bool:
        """Whether anything is measured, or made, with the traces."""
        wanted = self.fidelity or self.has_budget or self.promote or self.heal.steps or self.imatrix_path is None
        return self.traces is not None and bool(wanted)

    @property
    def imatrix_path(self) -> str | None:
        """The file to read, "none", or None where one is to be made: types that make no use of it need none."""
        types = {name.upper() for name in (self.type, *self.compare)}
        is_plain = not self.has_budget and not self.promote and types <= _PLAIN
        return "none" if self.imatrix is None and is_plain else self.imatrix
