"""Everything that is measured against while a student is quantized: its F16 twin, its texts, what its weights see.

Each part is made when it is first asked for, and what took long is kept beside the file: the importance matrix, and
what every type does to every tensor.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ...errors import UsageError
from ...localrun.core.reporter import Progress
from ...localrun.weights.swap import LogitReader, Probe
from ..convert.writer import Conversion, Importance, Types, plan, write
from ..measure.fidelity import Fidelity, Reference
from ..measure.texts import CalibrationSettings, Texts, read_texts
from ..provenance.metadata import source_key, source_of
from .imatrix import Imatrix, collect_imatrix, read_imatrix, write_imatrix
from .sensitivity import Bench, Sensitivity, items_of


@dataclass
class Desk:
    """A student to be quantized. `scratch` is a folder for what is thrown away, `kept` for what is not.

    `imatrix_path` "none" does without; None collects one from `traces_path`, if there are traces.
    """

    student_dir: Path
    scratch: Path
    kept: Path
    traces_path: Path | None
    imatrix_path: Path | str | None
    settings: CalibrationSettings
    n_threads: int
    on_progress: Progress
    base: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What the files beside are called after."""
        return self.student_dir.resolve().name

    @cached_property
    def source(self) -> dict[str, object]:
        """The hashes of the student's files."""
        return source_of(self.student_dir, self.base)

    def plan(self, ftype: str, *, types: Types | None = None, importance: Importance | None = None) -> Conversion:
        """Return the plan of a file of the student."""
        return plan(self.student_dir, ftype, base=self.base, types=types, importance=importance)

    @cached_property
    def twin(self) -> Conversion:
        """The plan of the F16 twin."""
        return self.plan("F16")

    @cached_property
    def twin_path(self) -> Path:
        """The F16 twin as a file."""
        path = self.scratch / "twin.gguf"
        write(self.twin, path, {}, self.on_progress, self.n_threads)
        return path

    @cached_property
    def texts(self) -> Texts:
        """The student's traces in three parts.

        Raises:
            UsageError: there are none.
        """
        if self.traces_path is None:
            raise UsageError(
                f"there are no traces to measure {self.name} with",
                "give a run folder or --traces FILE; --type with --imatrix none and --no-fidelity needs none",
            )
        return read_texts(self.traces_path, self.twin_path, self.settings)

    @cached_property
    def imatrix(self) -> Imatrix | None:
        """The importance matrix, read, found beside the file, or collected; None if there is to be none."""
        if self.imatrix_path == "none":
            return None
        if self.imatrix_path is not None:
            return read_imatrix(Path(self.imatrix_path))
        if self.traces_path is None:
            if not self.notes:
                self.notes.append("no importance matrix: there are no traces to make one from")
            return None
        texts, dataset = [text.tokens for text in self.texts.calibrate], self._dataset
        if self.kept_imatrix.is_file() and read_imatrix(self.kept_imatrix).datasets == (dataset,):
            return read_imatrix(self.kept_imatrix)
        made = collect_imatrix(
            self.twin_path,
            texts,
            dataset,
            n_threads=self.n_threads,
            on_text=lambda n: self.on_progress("importance", n, len(texts), ""),
        )
        write_imatrix(made, self.kept_imatrix)
        return made

    @property
    def _dataset(self) -> str:
        assert self.traces_path is not None
        return f"{self.traces_path.name} sha256:{self.texts.sha256} model:{source_key(self.source)}"

    @property
    def kept_imatrix(self) -> Path:
        """Where a collected importance matrix is kept, one for each student and set of traces: files name it."""
        key = hashlib.sha256(self._dataset.encode()).hexdigest()[:8]
        return self.kept / f"{self.name}-{key}.imatrix.gguf"

    @property
    def imatrix_file(self) -> Path:
        """Where the importance matrix in use stands."""
        return Path(self.imatrix_path) if self.imatrix_path else self.kept_imatrix

    @cached_property
    def importance(self) -> Importance:
        """The columns' weights by tensor; empty without an importance matrix."""
        if self.imatrix is None:
            return {}
        return self.imatrix.importance({one.tensor.name: one.tensor.shape for one in self.twin.tensors})

    @cached_property
    def reference(self) -> Reference:
        """What the F16 twin says on the texts that measure."""
        with LogitReader(self.twin_path, n_threads=self.n_threads) as reader:
            texts = self.texts.measure
            return Reference.of(reader, texts, lambda n: self.on_progress("reading unquantized", n, len(texts), ""))

    def fidelity(self, path: Path) -> Fidelity:
        """Return how far a file is from the twin on held-out traces."""
        with LogitReader(path, n_threads=self.n_threads) as reader:
            n = len(self.reference.texts)
            return self.reference.measure(reader, lambda i: self.on_progress("measuring", i, n, path.name))

    @cached_property
    def sensitivity(self) -> Sensitivity:
        """The choices for every tensor, with what earlier runs have measured of them."""
        matrix = self.imatrix.hash() if self.imatrix else "none"
        key = f"{source_key(self.source)} {matrix} {self.texts.sha256} {self.settings.n_choose}"
        return Sensitivity.open(
            self.kept / f"{self.name}.sensitivity.json",
            key,
            lambda: items_of(self.twin, self.importance, self.n_threads, self.on_progress),
        )

    def open_bench(self) -> Bench:
        """Return what measures single choices on the texts that choose; close it."""
        probe = Probe(self.twin_path, n_threads=self.n_threads)
        try:
            reference = Reference.of(probe, self.texts.choose)
        except BaseException:
            probe.close()
            raise
        return Bench(probe, self.twin, self.importance, reference, self.n_threads)
