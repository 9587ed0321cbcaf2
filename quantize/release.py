"""A student to a file that may be handed out: types chosen, written, measured, held to a gate, signed.

Nothing appears under the asked name before it has passed. The order is: importance matrix, types (a standard recipe, or
the best ones under a size), healing, the file, its fidelity and its answers, the gate, then name and model card.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import GateError, ModelError, UsageError
from ..localrun.core.reporter import Progress, no_progress
from ..localrun.machine.hardware import default_threads
from ..localrun.machine.memory import Footprint
from .choose.types import Chooser
from .choose.workbench import Desk
from .convert.licence import write_card
from .convert.lora_adapter import is_adapter
from .convert.writer import Conversion, Value, write
from .heal.heal import Divergence, HealSettings, heal
from .measure.fidelity import Fidelity
from .measure.gate import Metrics
from .measure.paired import Answers, Paired, compare
from .provenance import comparison as card_files
from .provenance.comparison import Row
from .provenance.metadata import file_bytes, fill_in, source_key
from .recipe import ReleaseSettings
from .report import QuantizeReport, report_of
from .sign import as_metadata, sign

Evaluate = Callable[[Path], Answers]
"""Asks a GGUF the test problems; the same ones each time."""

_SHOWN = ("base_model", "teacher", "licences", "quantization", "sampling", "think_budget", "tools")
_MEMORY_CTX = 2048  # tokens


@dataclass(frozen=True)
class Measured:
    """What was measured of a file, as far as it was."""

    fidelity: Fidelity | None = None
    answers: Answers | None = None
    paired: Paired | None = None

    def metrics(self, n_bytes: int) -> Metrics:
        """Return what a gate may ask for."""
        found: dict[str, float | None] = {"bytes": float(n_bytes)}
        if kl := self.fidelity:
            found |= {"kl": kl.kl_mean, "kl_p99": kl.kl_p99, "same_top": kl.same_top, "perplexity": kl.perplexity}
        if said := self.answers:
            found |= {"accuracy": said.accuracy, "closed": said.closed, "loops": said.loops}
        return found

    def to_json(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None, dict[str, Any] | None]:
        """Return the three parts as a row of the table holds them."""
        said = self.answers
        return (
            self.fidelity.to_json() if self.fidelity else None,
            {"accuracy": said.accuracy, "closed": said.closed, "loops": said.loops} if said else None,
            self.paired.to_json() if self.paired else None,
        )


@dataclass(frozen=True)
class Release:
    """What was handed out: the file's report, how it compares, which types were chosen and why, and its rows."""

    report: QuantizeReport
    rows: tuple[Row, ...]
    choices: tuple[dict[str, Any], ...] = ()
    fidelity: Fidelity | None = None
    answers: Answers | None = None
    paired: Paired | None = None
    n_promotions: int = 0
    healed: Mapping[str, Any] | None = None

    def summary(self) -> list[str]:
        """Return the lines that a person wants to read."""
        lines = []
        if kl := self.fidelity:
            lines.append(
                f"fidelity on {kl.n_tokens:,} held-out tokens: KL {kl.kl_mean:.4f} ± {kl.kl_error:.4f} nats, 99 % "
                f"{kl.kl_p99:.3f}, same top {100 * kl.same_top:.2f} %, perplexity {kl.perplexity:.4f} "
                f"(unquantized {kl.reference_perplexity:.4f})"
            )
        if self.answers and self.paired:
            low, high = self.paired.interval
            lines.append(
                f"answers: {100 * self.answers.accuracy:.1f} % of {self.paired.n}, {self.paired.lost} lost and "
                f"{self.paired.gained} gained against unquantized: {100 * self.paired.difference:+.1f} points "
                f"({100 * low:+.1f} to {100 * high:+.1f}), p {self.paired.p_value:.3f}"
            )
        if self.healed:
            lines.append("healed: " + ", ".join(f"{key} {value}" for key, value in self.healed.items()))
        if self.n_promotions:
            lines.append(f"raised {self.n_promotions} times until the gate was met")
        return lines + ["note: " + note for note in self.report.notes]


def release(
    student_dir: Path,
    out: Path,
    settings: ReleaseSettings,
    *,
    recipe: Mapping[str, Any] | None = None,
    evaluate: Evaluate | None = None,
    divergence: Divergence | None = None,
    metadata: Mapping[str, Value] | None = None,
    asked: str = "",
    on_progress: Progress = no_progress,
    n_threads: int | None = None,
) -> Release:
    """Write a GGUF of a checkpoint folder once it is chosen, measured and let through.

    Args:
        student_dir: a folder that `save_pretrained` wrote.
        out: the file.
        settings: how.
        recipe: the run's settings, for the file's provenance.
        evaluate: what asks a GGUF the test problems, if answers are wanted.
        divergence: the loss of healing, if that is wanted.
        metadata: more strings for the file.
        asked: which problems `evaluate` asks, for the record; figures of other problems leave the table.
        on_progress: told how far it is.
        n_threads: the machine's cores if not given.

    Raises:
        GateError: the gate was not met; nothing stands under the asked name that did not before.
        UsageError: settings that do not go together, or ask for what was not measured.
        ArtifactError, ModelError: see `quantize.quantize`.
    """
    settings.check()
    if out.is_dir():
        raise UsageError(f"{out} is a folder", f"name the file: {out / student_dir.resolve().name}.gguf")
    if out.suffix != ".gguf":
        raise UsageError(f"{out.name} is no name of a GGUF", f"such as {out.name}.gguf")
    if settings.heal and is_adapter(student_dir):
        raise UsageError(
            f"--heal trains whole checkpoints, and {student_dir} is an adapter",
            "give the merged student: a run folder, or its student/",
        )
    if settings.gate and settings.gate.needs_answers and evaluate is None:
        raise UsageError("the gate asks for answers, and there are no problems to ask", "give --problems and --n")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=out.parent) as scratch:
        desk = Desk(
            student_dir,
            Path(scratch),
            out.parent,
            settings.traces,
            settings.imatrix_path,
            replace(settings.calibration, n_heal=settings.heal * HealSettings.batch_tokens),
            n_threads or default_threads(),
            on_progress,
            settings.base,
        )
        settings = _measurable(desk, settings)
        return _Work(desk, out, settings, dict(recipe or {}), evaluate, divergence, dict(metadata or {}), asked).run()


def _measurable(desk: Desk, settings: ReleaseSettings) -> ReleaseSettings:
    """Return the settings without measurements where the traces are too few, and nothing that was asked needs them."""
    needs = settings.has_budget or settings.gate or settings.heal
    if needs or not settings.reads_traces:
        return settings
    try:
        assert desk.texts
    except (UsageError, ModelError) as error:
        desk.notes.append(f"not measured, and no importance matrix: {error.message}")
        desk.traces_path = None
        settings = replace(settings, traces=None)
        settings.check()  # a type may need the matrix
    return settings


class _Work:
    """One release under way."""

    def __init__(
        self,
        desk: Desk,
        out: Path,
        settings: ReleaseSettings,
        recipe: dict[str, Any],
        evaluate: Evaluate | None,
        divergence: Divergence | None,
        metadata: dict[str, Value],
        asked: str,
    ) -> None:
        self.asked = asked
        self.desk, self.out, self.settings, self.recipe = desk, out, settings, recipe
        self.evaluate, self.divergence, self.extra = evaluate, divergence, metadata
        self.chooser = Chooser(desk, settings, lambda one: file_bytes(one, self._metadata(one)))
        self.healed: Mapping[str, Any] | None = None
        self.reference_answers: Answers | None = None
        self._facts: dict[str, Any] = {}  # of the metadata, what the card shows

    def run(self) -> Release:
        """Choose, heal, then write and measure until the gate is met."""
        self.chooser.choose()
        if self.settings.heal:
            self._heal()
        n_promotions = 0
        while True:
            conversion = self.chooser.plan()
            paths = self._write(conversion)
            measured = self._measure(paths[0])
            failures = self._failures(measured, sum(path.stat().st_size for path in paths))
            if not failures:
                return self._hand_out(conversion, paths, measured, n_promotions)
            if not self.settings.promote or not self.chooser.promote():
                more = "" if self.settings.heal else "; --heal 200 keeps more in the same size"
                raise GateError(f"the gate was not met: {'; '.join(failures)}", f"{self.out} was not written{more}")
            n_promotions += 1

    def _write(self, conversion: Conversion) -> list[Path]:
        metadata, desk = self._metadata(conversion), self.desk
        path = desk.scratch / self.out.name
        paths = write(conversion, path, metadata, desk.on_progress, desk.n_threads, self.settings.split)
        if self.settings.has_budget and len(paths) == 1:
            assert path.stat().st_size == file_bytes(conversion, metadata), "the size is known before"
        return paths

    def _heal(self) -> None:
        assert self.divergence is not None, "healing needs a loss"
        folder = self.out.with_name(f"{self.out.stem}-healed")  # the file's own: it is what made its blocks
        report = heal(
            self.desk.student_dir,
            folder,
            self.chooser.types,
            self.desk.importance,
            self.desk.texts.heal,
            self.divergence,
            HealSettings(steps=self.settings.heal),
            on_progress=self.desk.on_progress,
            n_threads=self.desk.n_threads,
        )
        if report["loss_after"] >= report["loss_before"]:
            self.desk.notes.append("healing did not lower the divergence: give --heal more steps, or leave it out")
        self.chooser.source_dir, self.healed = folder, report

    def _metadata(self, conversion: Conversion) -> dict[str, Value]:
        """Return what the file says of itself; what is measured later has its room."""
        source_dir = self.chooser.source_dir
        own = sign(self.desk, conversion, self.settings, source_dir, self.out.parent, self.recipe)
        self._facts = {key: own[key] for key in _SHOWN if key in own}
        return self.extra | as_metadata(own)

    def _measure(self, path: Path) -> Measured:
        fidelity = self.desk.fidelity(path) if self.settings.fidelity and self.settings.traces else None
        if self.evaluate is None:
            return Measured(fidelity)
        if self.reference_answers is None:
            self.reference_answers = self.evaluate(self.desk.twin_path)
        answers = self.evaluate(path)
        return Measured(fidelity, answers, compare(self.reference_answers.right, answers.right))

    def _failures(self, measured: Measured, n_bytes: int) -> Sequence[str]:
        if not self.settings.gate:
            return []
        kl = measured.fidelity
        unquantized = Fidelity(0, 0.0, 0.0, 0.0, 1.0, kl.reference_perplexity, kl.reference_perplexity) if kl else None
        twin = Measured(unquantized, self.reference_answers)
        reference = twin.metrics(sum(one.n_bytes for one in self.desk.twin.tensors))
        return self.settings.gate.failures(measured.metrics(n_bytes), reference)

    def _hand_out(
        self,
        conversion: Conversion,
        paths: Sequence[Path],
        measured: Measured,
        n_promotions: int,
    ) -> Release:
        report = report_of(conversion, self.chooser.source_dir, self.out, paths, tuple(self.desk.notes))
        is_ours = self.settings.has_budget or n_promotions > 0 or self.healed is not None
        row = self._row(report.path.name, report.n_bytes, report.bits_per_weight, is_ours, measured)
        others = self._others()
        footprint = Footprint.of(paths[0])
        memory = footprint.total_bytes(min(_MEMORY_CTX, footprint.n_ctx_train or _MEMORY_CTX))
        fill_in(paths[0], {"memory_bytes": memory} | {k: v for k, v in vars(row).items() if v is not None})
        for path in reversed(paths):
            os.replace(path, self.out.with_name(path.name))
        rows = [*others, row]
        kept = card_files.keep_rows(self.out.parent, rows, source_key(self.desk.source))
        write_card(report.path, conversion.provenance, card_files.markdown(kept), card_files.plot(kept), self._facts)
        card_files.update_report(self.out.parent, kept)
        choices = tuple(self.chooser.describe())
        return Release(
            report,
            tuple(kept),
            choices,
            measured.fidelity,
            measured.answers,
            measured.paired,
            n_promotions,
            self.healed,
        )

    def _row(self, name: str, n_bytes: int, bits: float, is_ours: bool, measured: Measured) -> Row:
        texts = self.desk.texts.sha256 if measured.fidelity else ""
        return Row(name, n_bytes, bits, is_ours, *measured.to_json(), texts, self.asked if measured.answers else "")

    def _others(self) -> list[Row]:
        """Return the rows of the unquantized twin, if it was asked, and of the recipes that are compared with."""
        rows = []
        if self.reference_answers:
            twin = self.desk.plan("F16")
            n_bytes = sum(one.n_bytes for one in twin.tensors)
            rows.append(self._row("unquantized (F16)", n_bytes, 16.0, False, Measured(None, self.reference_answers)))
        for ftype in self.settings.compare:
            conversion = self.desk.plan(ftype.upper(), importance=self.desk.importance)
            path = self.desk.scratch / f"{ftype.upper()}.gguf"
            write(conversion, path, {}, self.desk.on_progress, self.desk.n_threads)
            report = report_of(conversion, self.desk.student_dir, path, [path], ())
            rows.append(self._row(ftype.upper(), report.n_bytes, report.bits_per_weight, False, self._measure(path)))
            path.unlink()
        return rows
