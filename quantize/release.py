"""From a student to a published file: its types are chosen, it is written, measured, checked against a gate, named.

No file gets its name before it has passed. The order is: importance matrix, types (a type mixture, or the best ones
under a size), healing, the file, its fidelity and its answers, the gate, then name and model card.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import GateError, ModelError, UsageError
from ..localrun.core.reporter import SILENT, Reporter
from ..localrun.machine.hardware import default_threads
from .choose.types import Chooser
from .choose.workbench import Workbench
from .convert.ftypes import check_ftype
from .convert.lora_adapter import is_adapter
from .convert.writer import Conversion, Value, plan, write
from .heal.heal import heal
from .heal.training import Divergence
from .measure.fidelity import Fidelity
from .measure.gate import Gate, Metrics
from .measure.paired import Answers, Paired, compare
from .provenance import comparison
from .provenance.card import write_card
from .provenance.comparison import ComparedFile
from .provenance.inspect import measured_lines, memory_bytes
from .provenance.metadata import file_bytes, fill_in, source_key
from .recipe import QuantizeRecipe
from .report import QuantizeReport, report_of
from .sign import as_metadata, sign

Evaluate = Callable[[Path], Answers]
"""Returns a GGUF's answers to the test problems, the same ones each time."""

_SHOWN = ("base_model", "teacher", "licences", "quantization", "sampling", "think_budget", "tools")


@dataclass(frozen=True)
class Measured:
    """The measurements of a file, as far as there are any."""

    fidelity: Fidelity | None = None
    answers: Answers | None = None
    paired: Paired | None = None

    def metrics(self, n_bytes: int) -> Metrics:
        """Return the metrics that a gate can ask for."""
        found: dict[str, float | None] = {"bytes": float(n_bytes)}
        if kl := self.fidelity:
            found |= {"kl": kl.kl_mean, "kl_p99": kl.kl_p99, "same_top": kl.same_top, "perplexity": kl.perplexity}
        if answers := self.answers:
            found |= answers.to_json()
        return found

    def to_json(self) -> dict[str, dict[str, Any] | None]:
        """Return the three parts as the table has them."""
        parts = ("fidelity", self.fidelity), ("answers", self.answers), ("paired", self.paired)
        return {name: part.to_json() if part else None for name, part in parts}


@dataclass(frozen=True, kw_only=True)
class Release(Measured):
    """A published file: its report, the files that it is compared with, the types chosen and why, its measurements."""

    report: QuantizeReport
    rows: tuple[ComparedFile, ...]
    choices: tuple[dict[str, Any], ...] = ()
    n_promotions: int = 0
    healed: Mapping[str, Any] | None = None

    def summary(self) -> list[str]:
        """Return the lines that a person wants to read."""
        lines = measured_lines(self.to_json())
        if self.healed:
            lines.append("healed: " + ", ".join(f"{key} {value}" for key, value in self.healed.items()))
        if self.n_promotions:
            lines.append(f"tensors were raised {self.n_promotions} times until the gate was met")
        return lines + ["note: " + note for note in self.report.notes]


@dataclass(frozen=True)
class DistillStage:
    """What a release needs from the distill stage, which quantize never imports.

    `recipe` has the run's settings, for provenance. `evaluate` asks a GGUF the test problems, and `problems` names
    them: figures of other problems leave the table. `divergence` is the loss of healing.
    """

    recipe: Mapping[str, Any] = field(default_factory=dict)
    evaluate: Evaluate | None = None
    problems: str = ""
    divergence: Divergence | None = None


def quantize(
    student_dir: Path,
    out: Path | None = None,
    *,
    ftype: str = "Q8_0",
    metadata: Mapping[str, Value] | None = None,
    report: Reporter = SILENT,
    n_threads: int | None = None,
) -> QuantizeReport:
    """Write a GGUF of a folder that `save_pretrained` wrote, tokenizer included, without measuring anything.

    `out` is the file, by default `<name>-<ftype>.gguf` beside the folder. `ftype` is a type mixture, one of
    `ftypes.FTYPES` in any case. `metadata` has more keys for the file, such as `deepdistill.recipe`. `n_threads` is the
    number of cores, by default; the bytes do not depend on it.

    >>> from pathlib import Path
    >>> from deepdistill import quantize
    >>> quantize(Path("student")).path.name
    'student-Q8_0.gguf'

    Raises:
        UsageError: `code` "no-such-type", "needs-imatrix" or "metadata-taken".
        ArtifactError: an input is missing or broken, or the file cannot be written.
        ModelError: `code` "not-convertible": this converter, or llama.cpp, would compute something else.
    """
    conversion = plan(student_dir, check_ftype(ftype))
    path = out or student_dir.resolve().parent / f"{student_dir.resolve().name}-{conversion.ftype}.gguf"
    parts = write(conversion, path, metadata=metadata, report=report, n_threads=n_threads)
    return report_of(conversion, student_dir, path=path, parts=parts)


def release(
    student_dir: Path,
    out: Path,
    *,
    settings: QuantizeRecipe,
    stage: DistillStage = DistillStage(),
    metadata: Mapping[str, Value] | None = None,
    report: Reporter = SILENT,
    n_threads: int | None = None,
) -> Release:
    """Write a GGUF of a checkpoint folder: types chosen, measured, and named only if it meets the gate.

    Args:
        student_dir: a folder that `save_pretrained` wrote.
        out: the file.
        settings: how to quantize, what to measure, and the gate.
        stage: the recipe, the evaluation and the loss of the distill stage.
        metadata: more keys for the file.
        report: is told how far the work is.
        n_threads: the machine's cores if not given.

    Raises:
        GateError: `code` "gate-not-met"; an earlier file under that name stays.
        UsageError: the settings contradict each other, or ask for something that was not measured.
        ArtifactError, ModelError: see `quantize`.
    """
    _check(student_dir, out, settings=settings, evaluates=stage.evaluate is not None)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=out.parent) as scratch:
        n_heal = settings.calibration.n_heal or settings.heal.steps * settings.heal.batch_tokens
        workbench = Workbench(
            student_dir,
            Path(scratch),
            out.parent,
            replace(settings, calibration=replace(settings.calibration, n_heal=n_heal)),
            n_threads=n_threads or default_threads(),
            report=report,
        )
        _drop_unmeasurable(workbench)
        return _Work(workbench, out, stage=stage, metadata=dict(metadata or {})).run()


def _check(student_dir: Path, out: Path, *, settings: QuantizeRecipe, evaluates: bool) -> None:
    """Raise if settings contradict each other, the student or the file's name."""
    gate = Gate.parse(settings.gate) if settings.gate else None
    _check_types(settings)
    if out.is_dir():
        hint = f"name the file: {out / student_dir.resolve().name}.gguf"
        raise UsageError(f"{out} is a folder", hint, code="is-folder")
    if out.suffix != ".gguf":
        raise UsageError(f"{out.name} does not end in .gguf", f"name it {out.name}.gguf", code="bad-name")
    if settings.heal.steps and is_adapter(student_dir):
        raise UsageError(
            f"--heal trains whole checkpoints, and {student_dir} is an adapter",
            "give the merged student: a run folder, or its student/",
            code="adapter-not-healable",
        )
    if gate and gate.needs_answers and not evaluates:
        hint = "give --problems and --n"
        raise UsageError("the gate asks for answers, and there are no problems to ask", hint, code="no-problems")


def _check_types(settings: QuantizeRecipe) -> None:
    """Raise if a type mixture is unknown, or needs an importance matrix that there is nothing to make of."""
    has_imatrix = settings.imatrix_path != "none" and bool(settings.imatrix or settings.traces)
    for name in (*(() if settings.has_budget else (settings.type,)), *settings.compare):
        check_ftype(name, has_imatrix=has_imatrix)


def _drop_unmeasurable(workbench: Workbench) -> None:
    """Take the traces out of the settings if they are too few and no setting needs measurements."""
    settings = workbench.settings
    needs = settings.has_budget or settings.gate or settings.heal.steps
    if needs or not settings.reads_traces:
        return
    try:
        assert workbench.texts
    except (UsageError, ModelError) as error:
        workbench.notes.append(f"not measured, and no importance matrix: {error.message}")
        workbench.settings = replace(settings, traces=None)
        _check_types(workbench.settings)  # a type may need the importance matrix


class _Work:
    """One release in progress."""

    def __init__(self, bench: Workbench, out: Path, *, stage: DistillStage, metadata: dict[str, Value]) -> None:
        self.bench, self.out, self.settings, self.stage, self.extra = bench, out, bench.settings, stage, metadata
        self.chooser = Chooser(bench, lambda one: file_bytes(one, self._metadata(one)))
        self.gate = Gate.parse(self.settings.gate) if self.settings.gate else None
        self.healed: Mapping[str, Any] | None = None
        self.reference_answers: Answers | None = None
        self._facts: dict[str, Any] = {}  # the part of the metadata that the card shows

    def run(self) -> Release:
        """Choose, heal, then write and measure until the gate is met."""
        self.chooser.choose()
        if self.settings.heal.steps:
            self._heal()
        n_promotions = 0
        while True:
            conversion = self.chooser.plan()
            paths = self._write(conversion)
            measured = self._measure(paths[0])
            failures = self._failures(measured, sum(path.stat().st_size for path in paths))
            if not failures:
                return self._publish(conversion, paths, measured=measured, n_promotions=n_promotions)
            if not self.settings.promote or not self.chooser.promote():
                hint = f"{self.out} was not written" + (
                    "" if self.settings.heal.steps else "; --heal 200 keeps more in the same size"
                )
                raise GateError(f"the gate was not met: {'; '.join(failures)}", hint, code="gate-not-met")
            n_promotions += 1

    def _write(self, conversion: Conversion) -> list[Path]:
        metadata, path = self._metadata(conversion), self.bench.scratch_dir / self.out.name
        paths = write(
            conversion,
            path,
            metadata=metadata,
            report=self.bench.report,
            n_threads=self.bench.n_threads,
            split_bytes=self.settings.split,
        )
        if self.settings.has_budget and len(paths) == 1:
            assert path.stat().st_size == file_bytes(conversion, metadata), "the size is known in advance"
        return paths

    def _heal(self) -> None:
        assert self.stage.divergence is not None, "healing needs a loss"
        folder = self.out.with_name(f"{self.out.stem}-healed")  # stays beside the file: it is the file's source
        healed = heal(
            self.bench.student_dir,
            folder,
            tensors=self.chooser.plan().tensors,
            texts=self.bench.texts.heal,
            divergence=self.stage.divergence,
            settings=self.settings.heal,
            report=self.bench.report,
        )
        if healed["loss_after"] >= healed["loss_before"]:
            self.bench.notes.append("healing did not lower the divergence: give --heal more steps, or leave it out")
        self.chooser.source_dir, self.healed = folder, healed

    def _metadata(self, conversion: Conversion) -> dict[str, Value]:
        """Return what the file says about itself, with space for its measurements."""
        signed = sign(
            self.bench,
            conversion,
            source_dir=self.chooser.source_dir,
            folder=self.out.parent,
            recipe=self.stage.recipe,
        )
        self._facts = {key: signed[key] for key in _SHOWN if key in signed}
        return self.extra | as_metadata(signed)

    def _measure(self, path: Path) -> Measured:
        fidelity = self.bench.fidelity(path) if self.settings.fidelity and self.settings.traces else None
        if self.stage.evaluate is None:
            return Measured(fidelity)
        if self.reference_answers is None:
            self.reference_answers = self.stage.evaluate(self.bench.f16_path)
        answers = self.stage.evaluate(path)
        return Measured(fidelity, answers, compare(self.reference_answers.right, answers.right))

    def _failures(self, measured: Measured, n_bytes: int) -> Sequence[str]:
        if self.gate is None:
            return []
        kl = measured.fidelity
        unquantized = Fidelity(0, 0.0, 0.0, 0.0, 1.0, kl.reference_perplexity, kl.reference_perplexity) if kl else None
        reference = Measured(unquantized, self.reference_answers).metrics(_n_bytes(self.bench.f16))
        return self.gate.failures(measured.metrics(n_bytes), reference)

    def _publish(
        self, conversion: Conversion, paths: Sequence[Path], *, measured: Measured, n_promotions: int
    ) -> Release:
        """Fill in the measurements, give the file its name, and write what stands beside it."""
        notes = tuple(self.bench.notes)
        file = report_of(conversion, self.chooser.source_dir, path=self.out, parts=paths, notes=notes)
        is_ours = self.settings.has_budget or n_promotions > 0 or self.healed is not None
        ours = self._compared(
            file.path.name, file.n_bytes, bits=file.bits_per_weight, is_ours=is_ours, measured=measured
        )
        others = self._others()
        known = {name: value for name, value in vars(ours).items() if value is not None}
        fill_in(paths[0], {"memory_bytes": memory_bytes(paths[0])} | known)
        for path in reversed(paths):  # the first part last, so whoever finds it finds all
            os.replace(path, self.out.with_name(path.name))
        files = comparison.keep_files(self.out.parent, [*others, ours], source_key(self.bench.source))
        table, plot = comparison.markdown(files), comparison.plot(files)
        write_card(file.path, conversion.provenance, table=table, plot=plot, facts=self._facts)
        comparison.update_report(self.out.parent, files)
        return Release(
            report=file,
            rows=tuple(files),
            choices=self.chooser.describe(),
            **vars(measured),
            n_promotions=n_promotions,
            healed=self.healed,
        )

    def _compared(self, name: str, n_bytes: int, *, bits: float, is_ours: bool, measured: Measured) -> ComparedFile:
        texts = self.bench.texts.sha256 if measured.fidelity else ""
        problems = self.stage.problems if measured.answers else ""
        return ComparedFile(name, n_bytes, bits, is_ours, texts=texts, asked=problems, **measured.to_json())

    def _others(self) -> list[ComparedFile]:
        """Return the unquantized model, if it was asked, and the files of the mixtures to compare with."""
        files = []
        if self.reference_answers:
            measured, n_bytes = Measured(None, self.reference_answers), _n_bytes(self.bench.f16)
            files.append(self._compared("unquantized (F16)", n_bytes, bits=16.0, is_ours=False, measured=measured))
        for ftype in map(str.upper, self.settings.compare):
            conversion = self.bench.plan(ftype, importance=self.bench.importance)
            path = self.bench.scratch_dir / f"{ftype}.gguf"
            write(conversion, path, report=self.bench.report, n_threads=self.bench.n_threads)
            file, measured = report_of(conversion, self.bench.student_dir, path=path, parts=[path]), self._measure(path)
            bits = file.bits_per_weight
            files.append(self._compared(ftype, file.n_bytes, bits=bits, is_ours=False, measured=measured))
            path.unlink()
        return files


def _n_bytes(conversion: Conversion) -> int:
    return sum(one.n_bytes for one in conversion.tensors)
