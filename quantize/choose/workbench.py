"""Everything that a student's files are measured against: its F16 file, its texts, the inputs of its weights.

Each part is made when it is first needed. Whatever took long is kept beside the file for the next run: the importance
matrix, and what every type does to every tensor.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ...errors import UsageError
from ...localrun.core.reporter import SILENT, Reporter
from ...localrun.machine.hardware import default_threads
from ...localrun.weights.swap import LogitReader, Probe
from ..convert.writer import Conversion, Importance, Types, plan, write
from ..measure.fidelity import Fidelity, Reference
from ..measure.texts import Texts, read_texts
from ..provenance.metadata import source_key, source_of
from ..recipe import QuantizeRecipe
from .imatrix import Imatrix, collect_imatrix, read_imatrix, write_imatrix
from .sensitivity import DamageMeter, Sensitivity, items_of


@dataclass
class Workbench:
    """A student to be quantized. `scratch_dir` is for temporary files, `kept_dir` for those that the next run uses."""

    student_dir: Path
    scratch_dir: Path
    kept_dir: Path
    settings: QuantizeRecipe
    n_threads: int = field(default_factory=default_threads)
    report: Reporter = SILENT
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The student's name, with which the names of kept files start."""
        return self.student_dir.resolve().name

    @cached_property
    def source(self) -> dict[str, object]:
        """The hashes of the student's files."""
        return source_of(self.student_dir, self.settings.base)

    def plan(self, ftype: str, *, types: Types | None = None, importance: Importance | None = None) -> Conversion:
        """Return the plan of a file of the student."""
        return plan(self.student_dir, ftype, base=self.settings.base, types=types, importance=importance)

    @cached_property
    def f16(self) -> Conversion:
        """The plan of the F16 file, which stands for the unquantized model."""
        return self.plan("F16")

    @cached_property
    def f16_path(self) -> Path:
        """The F16 file."""
        path = self.scratch_dir / "f16.gguf"
        write(self.f16, path, report=self.report, n_threads=self.n_threads)
        return path

    @cached_property
    def texts(self) -> Texts:
        """The student's traces in three parts.

        Raises:
            UsageError: `code` "no-traces" or "too-few-traces".
        """
        if self.settings.traces is None:
            raise UsageError(
                f"there are no traces to measure {self.name} with",
                "give a run folder or --traces FILE; --type with --imatrix none and --no-fidelity needs none",
                code="no-traces",
            )
        return read_texts(self.settings.traces, self.f16_path, self.settings.calibration)

    @cached_property
    def imatrix(self) -> Imatrix | None:
        """The importance matrix: read from a file, kept by an earlier run, or collected now; None if there is none."""
        if self.settings.imatrix_path == "none":
            return None
        if self.settings.imatrix_path is not None:
            return read_imatrix(Path(self.settings.imatrix_path))
        if self.settings.traces is None:
            if not self.notes:
                self.notes.append("no importance matrix: there are no traces to make one from")
            return None
        texts, dataset = [text.tokens for text in self.texts.calibrate], self._dataset
        if self.kept_imatrix_path.is_file() and read_imatrix(self.kept_imatrix_path).datasets == (dataset,):
            return read_imatrix(self.kept_imatrix_path)
        imatrix = collect_imatrix(
            self.f16_path,
            texts,
            dataset=dataset,
            n_threads=self.n_threads,
            report=self.report,
        )
        write_imatrix(imatrix, self.kept_imatrix_path)
        return imatrix

    @property
    def _dataset(self) -> str:
        assert self.settings.traces is not None
        return f"{self.settings.traces.name} sha256:{self.texts.sha256} model:{source_key(self.source)}"

    @property
    def kept_imatrix_path(self) -> Path:
        """Where a collected importance matrix is kept, one for each student and set of traces: files refer to it."""
        key = hashlib.sha256(self._dataset.encode()).hexdigest()[:8]
        return self.kept_dir / f"{self.name}-{key}.imatrix.gguf"

    @property
    def imatrix_file(self) -> Path:
        """The file of the importance matrix in use."""
        return Path(self.settings.imatrix_path or self.kept_imatrix_path)

    @cached_property
    def importance(self) -> Importance:
        """The columns' weights by tensor; empty without an importance matrix."""
        if self.imatrix is None:
            return {}
        return self.imatrix.importance({one.tensor.name: one.tensor.shape for one in self.f16.tensors})

    @cached_property
    def reference(self) -> Reference:
        """The F16 file's probabilities on the texts that measure."""
        with LogitReader(self.f16_path, n_threads=self.n_threads) as reader:
            return Reference.of(reader, self.texts.measure, self.report)

    def fidelity(self, path: Path) -> Fidelity:
        """Return how far a file is from the F16 file on held-out traces."""
        with LogitReader(path, n_threads=self.n_threads) as reader:
            return self.reference.measure(reader, self.report, note=path.name)

    @cached_property
    def sensitivity(self) -> Sensitivity:
        """The choices for every tensor, with the measurements of earlier runs."""
        matrix = self.imatrix.hash() if self.imatrix else "none"
        key = f"{source_key(self.source)} {matrix} {self.texts.sha256} {self.settings.calibration.n_choose}"
        return Sensitivity.open(
            self.kept_dir / f"{self.name}.sensitivity.json",
            key,
            lambda: items_of(self.f16, self.importance, n_threads=self.n_threads, report=self.report),
        )

    def open_meter(self) -> DamageMeter:
        """Return a meter of single choices on the texts that choose; close it."""
        probe = Probe(self.f16_path, n_threads=self.n_threads)
        try:
            reference = Reference.of(probe, self.texts.choose)
        except BaseException:
            probe.close()
            raise
        return DamageMeter(probe, self.f16, importance=self.importance, reference=reference, n_threads=self.n_threads)
