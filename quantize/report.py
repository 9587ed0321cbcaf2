"""The report of a written file: the type that every tensor really got, provenance, notes and proofs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..localrun.core.reporter import SILENT, Reporter
from .convert.writer import Conversion
from .measure.proofs import Proofs, prove


@dataclass(frozen=True)
class Fallback:
    """A tensor whose rows are not whole blocks of the type asked for, and the type that it got instead."""

    name: str
    asked: str
    got: str


@dataclass(frozen=True)
class QuantizeReport:
    """A written file. `bits_per_weight` counts the bytes of all tensors over all weights; `tensors` has every type."""

    student_dir: Path
    path: Path
    ftype: str
    n_bytes: int
    n_weights: int
    bits_per_weight: float
    tensors: dict[str, str]
    fallbacks: tuple[Fallback, ...]
    pre_tokenizer: str
    licence: str | None
    base_models: tuple[str, ...]
    notes: tuple[str, ...]
    proofs: Proofs | None = None

    def summary(self) -> list[str]:
        """Return the report's lines for people: types, fallbacks, provenance, notes, proofs."""
        types = Counter(self.tensors.values())
        lines = ["tensors: " + ", ".join(f"{count} {name}" for name, count in types.most_common())]
        if self.fallbacks:
            kinds = Counter((fallback.asked, fallback.got) for fallback in self.fallbacks)
            detail = ", ".join(f"{count} {asked} -> {got}" for (asked, got), count in kinds.most_common())
            lines.append(
                f"{len(self.fallbacks)} of {len(self.tensors)} tensors cannot have their {self.ftype} type, because "
                f"their rows are not whole blocks: {detail}"
            )
        if self.licence:
            origin = f", from {', '.join(self.base_models)}" if self.base_models else ""
            lines.append(f"licence: {self.licence}{origin}")
        else:
            lines.append("licence: none found; a README.md with 'license:' in the checkpoint puts it into the file")
        lines += [f"note: {note}" for note in self.notes]
        return lines + (self.proofs.summary() if self.proofs else [])

    def proved(self, questions: Sequence[str], *, n_tokens: int = 64, report: Reporter = SILENT) -> QuantizeReport:
        """Return the report with proofs of the file against its checkpoint; questions are the first turn of a chat."""
        proofs = prove(self.student_dir, self.path, questions=questions, n_tokens=n_tokens, report=report)
        return dataclasses.replace(self, proofs=proofs)


def report_of(
    conversion: Conversion, student_dir: Path, *, path: Path, parts: Sequence[Path], notes: tuple[str, ...] = ()
) -> QuantizeReport:
    """Return the report of a file that was written to one or several parts, and whose final place is `path`."""
    n_weights = sum(t.n_weights for t in conversion.tensors)
    n_tensor_bytes = sum(t.n_bytes for t in conversion.tensors)
    return QuantizeReport(
        student_dir=student_dir,
        path=path.with_name(parts[0].name),
        ftype=conversion.ftype,
        n_bytes=sum(part.stat().st_size for part in parts),
        n_weights=n_weights,
        bits_per_weight=8 * n_tensor_bytes / n_weights,
        tensors={t.tensor.name: t.got.name for t in conversion.tensors},
        fallbacks=tuple(
            Fallback(t.tensor.name, t.asked.name, t.got.name) for t in conversion.tensors if t.asked != t.got
        ),
        pre_tokenizer=conversion.tokenizer.pre,
        licence=conversion.provenance.licence,
        base_models=conversion.provenance.base_models,
        notes=conversion.tokenizer.notes + notes,
    )
