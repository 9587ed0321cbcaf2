"""Checkpoint folder -> GGUF, and the report of what every tensor really got."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ..localrun.core.reporter import Progress, no_progress
from ..localrun.machine.hardware import default_threads
from .convert.ftypes import check_ftype
from .convert.writer import Conversion, Value, plan, write
from .measure.proofs import Proofs, prove

_NO_METADATA: Mapping[str, Value] = MappingProxyType({})


@dataclass(frozen=True)
class Fallback:
    """A tensor whose rows do not fit the asked type's blocks, and what it got instead."""

    name: str
    asked: str
    got: str


@dataclass(frozen=True)
class QuantizeReport:
    """What was written. `bits_per_weight` is true: all tensors' bytes over all weights; `tensors` has every type."""

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
            kinds = Counter((one.asked, one.got) for one in self.fallbacks)
            detail = ", ".join(f"{count} {asked} -> {got}" for (asked, got), count in kinds.most_common())
            lines.append(
                f"{len(self.fallbacks)} of {len(self.tensors)} tensors cannot take their {self.ftype} type, "
                f"their rows are no multiple of its block: {detail}"
            )
        if self.licence:
            origin = f", from {', '.join(self.base_models)}" if self.base_models else ""
            lines.append(f"licence: {self.licence}{origin}")
        else:
            lines.append("licence: none found; a README.md with 'license:' in the checkpoint puts it into the file")
        lines += [f"note: {note}" for note in self.notes]
        return lines + (self.proofs.summary() if self.proofs else [])

    def proved(
        self, questions: Sequence[str], *, n_tokens: int = 64, on_progress: Progress = no_progress
    ) -> QuantizeReport:
        """Return the report with proofs of the file against its checkpoint, asked questions as a chat's first turn."""
        proofs = prove(self.student_dir, self.path, questions, n_tokens=n_tokens, on_progress=on_progress)
        return dataclasses.replace(self, proofs=proofs)


def quantize(
    student_dir: Path,
    out: Path | None = None,
    ftype: str = "Q8_0",
    *,
    metadata: Mapping[str, Value] = _NO_METADATA,
    on_progress: Progress = no_progress,
    n_threads: int | None = None,
) -> QuantizeReport:
    """Write a GGUF of a checkpoint folder; by default beside it, as `<name>-<ftype>.gguf`.

    An existing file is replaced only once the new one is whole.

    Args:
        student_dir: a folder that `save_pretrained` wrote, tokenizer included.
        out: the file.
        ftype: one of `ftypes.FTYPES`, in any case.
        metadata: more strings for the file, such as `deepdistill.recipe`.
        on_progress: called after every part of a tensor, in weights.
        n_threads: the machine's cores if not given; the bytes do not depend on it.

    Raises:
        UsageError: an unknown type.
        ArtifactError: a missing or broken input, a full disk, an output that cannot be written.
        ModelError: something that this converter, or llama.cpp, would get wrong.
    """
    ftype = check_ftype(ftype)
    conversion = plan(student_dir, ftype)
    path = out or student_dir.resolve().parent / f"{student_dir.resolve().name}-{ftype}.gguf"
    write(conversion, path, dict(metadata), on_progress, n_threads or default_threads())
    return report_of(conversion, student_dir, path, [path])


def report_of(
    conversion: Conversion, student_dir: Path, path: Path, parts: Sequence[Path], notes: tuple[str, ...] = ()
) -> QuantizeReport:
    """Return the report of a file, in one or several parts, that was written from a plan and is to stand at `path`."""
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
