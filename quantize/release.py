"""A student to a file that may be handed out: types chosen, written, measured, held to a gate, signed.

Nothing appears under the asked name before it has passed. The order is: importance matrix, types (a standard recipe, or
the best ones under a size), healing, the file, its fidelity and its answers, the gate, then name and model card.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import GateError, UsageError
from ..localrun.hardware import default_threads
from ..localrun.memory import Footprint
from ..localrun.progress import Progress, no_progress
from . import card_files
from .budget import Choice, Item, promoted, target_bytes
from .calibration import CalibrationSettings
from .card import write_card
from .card_files import Row
from .convert import Conversion, Importance, Types, Value, plan, write
from .desk import Desk
from .fidelity import Fidelity
from .ftypes import FTYPES, check_ftype
from .gate import Gate, Metrics
from .heal import HealSettings, heal
from .paired import Answers, Paired, compare
from .provenance import MEASURED, file_bytes, fill_in, licence_chain, placeholder, sampler_of, source_key, tools
from .quantize import QuantizeReport, report_of
from .sensitivity import describe, refine

Evaluate = Callable[[Path], Answers]
"""Asks a GGUF the test problems; the same ones each time."""

_ALIGNMENT = 32  # bytes; a tensor may be padded by less
_STEP = 0.03  # of a file's bytes, added by each round of --promote
_SHOWN = ("base_model", "teacher", "licences", "quantization", "sampling", "think_budget", "tools")
_RECORDED = ("type", "size", "bpw", "target", "heal")
_PLAIN = ("F32", "F16", "BF16", "Q8_0")  # an importance matrix changes nothing in them


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
    metadata: Mapping[str, Value] | None = None,
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
        metadata: more strings for the file.
        on_progress: told how far it is.
        n_threads: the machine's cores if not given.

    Raises:
        GateError: the gate was not met; nothing stands under the asked name that did not before.
        UsageError: settings that do not go together, or ask for what was not measured.
        ArtifactError, ModelError: see `quantize.quantize`.
    """
    settings.check()
    if settings.gate and settings.gate.needs_answers and evaluate is None:
        raise UsageError("the gate asks for answers, and there are no problems to ask", "give --problems and --n")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=out.parent) as scratch:
        desk = Desk(
            student_dir,
            Path(scratch),
            out.parent,
            settings.traces,
            "none" if settings.imatrix is None and not settings.has_budget and settings.type in _PLAIN
            else settings.imatrix,
            replace(settings.calibration, n_heal=settings.heal * HealSettings.batch_tokens),
            n_threads or default_threads(),
            on_progress,
            settings.base,
        )  # fmt: skip
        settings = _measurable(desk, settings)
        return _Work(desk, out, settings, dict(recipe or {}), evaluate, dict(metadata or {})).run()


def _measurable(desk: Desk, settings: ReleaseSettings) -> ReleaseSettings:
    """Return the settings without measurements where the traces are too few, and nothing that was asked needs them."""
    needs = settings.has_budget or settings.gate or settings.heal
    if needs or not settings.traces or not (settings.fidelity or desk.imatrix_path is None):
        return settings
    try:
        assert desk.texts
    except UsageError as error:
        desk.notes.append(f"not measured, and no importance matrix: {error.message}")
        desk.traces_path = None
        return replace(settings, traces=None)
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
        metadata: dict[str, Value],
    ) -> None:
        self.desk, self.out, self.settings, self.recipe = desk, out, settings, recipe
        self.evaluate, self.extra = evaluate, metadata
        self.source_dir = desk.student_dir  # the healed one, once there is one
        self.healed: Mapping[str, Any] | None = None
        self.reference_answers: Answers | None = None
        self._facts: dict[str, Any] = {}  # of the metadata, what the card shows

    def run(self) -> Release:
        types, chosen = self._choose()
        if self.settings.heal:
            self._heal(types)
        n_promotions = 0
        while True:
            conversion = self._plan(types)
            metadata = self._metadata(conversion)
            expected = file_bytes(conversion, metadata) if self.settings.has_budget else None
            paths = write(
                conversion,
                self.desk.scratch / self.out.name,
                metadata,
                self.desk.on_progress,
                self.desk.n_threads,
                self.settings.split,
            )
            if expected and len(paths) == 1 and paths[0].stat().st_size != expected:
                raise AssertionError(f"{paths[0].stat().st_size} bytes were written, {expected} were promised")
            fidelity, answers, paired = self._measure(paths[0])
            failures = self._failures(fidelity, answers, sum(path.stat().st_size for path in paths))
            if not failures:
                break
            types, chosen = self._promote(types, chosen, failures)
            n_promotions += 1
        return self._hand_out(conversion, paths, chosen, (fidelity, answers, paired), n_promotions)

    def _choose(self) -> tuple[Types, list[Choice] | None]:
        """Return the type of every tensor, and the choices if they were measured."""
        if not self.settings.has_budget:
            return {one.tensor.name: one.got for one in self._recipe.tensors}, None
        n_bytes = self.tensor_budget()
        with self.desk.open_bench() as bench:
            chosen = refine(self.desk.sensitivity, bench.damage, n_bytes, on_progress=self.desk.on_progress)
        return self._types_of(chosen), chosen

    @cached_property
    def _recipe(self) -> Conversion:
        """The plan of the student by a standard recipe."""
        return self._plan_of(check_ftype(self.settings.type), importance=self.desk.importance)

    def tensor_budget(self) -> int:
        """Return the bytes that the tensors which have a choice may take together.

        Raises:
            UsageError: less than their smallest types take.
        """
        twin, items = self.desk.twin, self.desk.sensitivity.items
        names = {item.name for item in items}
        n_weights = sum(one.n_weights for one in twin.tensors)
        fixed = sum(one.n_bytes for one in twin.tensors if one.tensor.name not in names)
        if self.settings.bpw is not None:
            wanted, others = int(self.settings.bpw * n_weights / 8), fixed
        else:
            wanted = self.settings.size or target_bytes(self.settings.target or "", n_weights)
            # A type's name is no part of the header's length: the twin's header is as long as the file's.
            in_twin = sum(one.n_bytes for one in twin.tensors if one.tensor.name in names)
            others = file_bytes(twin, self._metadata(twin)) - in_twin + _ALIGNMENT * len(items)
        least = sum(item.choices[0].n_bytes for item in items)
        if wanted < others + least:
            raise UsageError(
                f"{wanted / 1e6:.2f} MB are too few: {(others + least) / 1e6:.2f} MB are the least",
                "give a larger --size or --bpw, or a smaller student",
            )
        return wanted - others

    def _plan_of(self, ftype: str, types: Types | None = None, importance: Importance | None = None) -> Conversion:
        base = self.settings.base if self.source_dir == self.desk.student_dir else None
        return plan(self.source_dir, ftype, base=base, types=types, importance=importance)

    def _types_of(self, chosen: Sequence[Choice]) -> Types:
        types = {item.name: one.type for item, one in zip(self.desk.sensitivity.items, chosen, strict=True)}
        return {one.tensor.name: one.got for one in self.desk.twin.tensors} | types

    def _plan(self, types: Types) -> Conversion:
        """Return the plan of a file with these types, an untied output matrix among them if there is one."""
        if self.settings.has_budget:
            return self._plan_of(nearest_ftype(types, self.desk), types, self.desk.importance)
        recipe = self._recipe
        if self.healed is None and {one.tensor.name: one.got for one in recipe.tensors} == dict(types):
            return recipe  # it knows what was asked for where a row has no whole blocks
        return self._plan_of(recipe.ftype, types, self.desk.importance)

    def _heal(self, types: Types) -> None:
        folder = self.out.parent / f"{self.desk.name}-healed"
        report = heal(
            self.desk.student_dir,
            folder,
            types,
            self.desk.importance,
            self.desk.texts.heal,
            HealSettings(steps=self.settings.heal),
            on_progress=self.desk.on_progress,
            n_threads=self.desk.n_threads,
        )
        self.source_dir, self.healed = folder, report

    def _metadata(self, conversion: Conversion) -> dict[str, Value]:
        """Return what the file says of itself; what is measured later has its room."""
        desk, folder = self.desk, self.out.parent.resolve()
        source = dict(source_of_dir(self.source_dir, desk)) | {"folder": os.path.relpath(self.source_dir, folder)}
        if self.settings.base and self.source_dir == desk.student_dir:
            source["base"] = os.path.relpath(self.settings.base, folder)
        how = {key: value for key, value in asdict(self.settings).items() if key in _RECORDED and value is not None}
        if self.settings.has_budget:
            how.pop("type")
        how["gate"] = str(self.settings.gate) if self.settings.gate else None
        own: dict[str, Any] = {
            "quantization": {key: value for key, value in how.items() if value is not None},
            "source": source,
            "licences": licence_chain(conversion.provenance, self.recipe),
            "tools": tools(),
            "sampling": sampler_of(self.source_dir),
        }
        if conversion.provenance.base_models:
            own["base_model"] = conversion.provenance.base_models[0]
        if teacher := self.recipe.get("teacher"):
            own["teacher"] = str(teacher)
        if desk.imatrix is not None:
            own["imatrix"] = {
                "file": os.path.relpath(desk.imatrix_file, folder),
                "sha256": desk.imatrix.hash(),
                "tokens": desk.imatrix.n_tokens,
                "datasets": list(desk.imatrix.datasets),
            }
        if self.settings.traces is not None:
            lengths = sorted(text.n_thinking for text in desk.texts.calibrate)
            own["think_budget"] = str(-(-3 * lengths[int(0.99 * (len(lengths) - 1))] // 2 // 32 + 1) * 32)
        plain = {f"deepdistill.{k}": v if isinstance(v, str) else json.dumps(v) for k, v in own.items()}
        self._facts = {key: own[key] for key in _SHOWN if key in own}
        return self.extra | plain | {MEASURED: placeholder()}

    def _measure(self, path: Path) -> tuple[Fidelity | None, Answers | None, Paired | None]:
        fidelity = self.desk.fidelity(path) if self.settings.fidelity and self.settings.traces else None
        if self.evaluate is None:
            return fidelity, None, None
        if self.reference_answers is None:
            self.reference_answers = self.evaluate(self.desk.twin_path)
        answers = self.evaluate(path)
        return fidelity, answers, compare(self.reference_answers.right, answers.right)

    def _failures(self, fidelity: Fidelity | None, answers: Answers | None, n_bytes: int) -> Sequence[str]:
        if not self.settings.gate:
            return []
        unquantized = Fidelity(0, 0.0, 0.0, 0.0, 1.0, fidelity.reference_perplexity, 0.0) if fidelity else None
        reference = metrics(unquantized, self.reference_answers, self.desk.twin_path.stat().st_size)
        return self.settings.gate.failures(metrics(fidelity, answers, n_bytes), reference)

    def _promote(
        self, types: Types, chosen: list[Choice] | None, failures: Sequence[str]
    ) -> tuple[Types, list[Choice]]:
        """Return the next larger types.

        Raises:
            GateError: nothing may be raised, or nothing is left to raise.
        """
        error = GateError(f"the gate was not met: {'; '.join(failures)}", f"{self.out} was not written")
        if not self.settings.promote:
            raise error
        items = self.desk.sensitivity.items
        if chosen is None:
            sizes = {one.tensor.name: one.n_bytes for one in self._plan(types).tensors}
            with self.desk.open_bench() as bench:
                refine(self.desk.sensitivity, bench.damage, sum(sizes[i.name] for i in items), n_rounds=0,
                       on_progress=self.desk.on_progress)  # fmt: skip
            items = self.desk.sensitivity.items
            chosen = [_nearest(item, sizes[item.name]) for item in items]
        now = sum(choice.n_bytes for choice in chosen)
        most = self.tensor_budget() if self.settings.has_budget else sum(i.choices[-1].n_bytes for i in items)
        if self.settings.has_budget and self.settings.size is None:
            most = sum(item.choices[-1].n_bytes for item in items)
        after = promoted(items, chosen, min(int(_STEP * now) + 1, most - now)) if most > now else chosen
        if after == chosen or sum(choice.n_bytes for choice in after) > most:
            raise error
        return self._types_of(after), after

    def _hand_out(
        self,
        conversion: Conversion,
        paths: Sequence[Path],
        chosen: list[Choice] | None,
        measured: tuple[Fidelity | None, Answers | None, Paired | None],
        n_promotions: int,
    ) -> Release:
        fidelity, answers, paired = measured
        report = report_of(conversion, self.source_dir, self.out, paths, tuple(self.desk.notes))
        row = self._row(self.out.name, report.n_bytes, report.bits_per_weight, True, measured)
        memory = Footprint.of(paths[0]).total_bytes(min(2048, Footprint.of(paths[0]).n_ctx_train or 2048))
        fill_in(paths[0], {"memory_bytes": memory} | {k: v for k, v in vars(row).items() if v is not None})
        for path in reversed(paths):
            os.replace(path, self.out.with_name(path.name))
        rows = [*self._others(), row]
        kept = card_files.keep_rows(self.out.parent, rows, source_key(self.desk.source))
        write_card(self.out, conversion.provenance, card_files.markdown(kept), card_files.plot(kept), self._facts)
        card_files.update_report(self.out.parent, kept)
        items = self.desk.sensitivity.items if chosen else []
        choices = tuple(describe(items, chosen)) if chosen else ()
        return Release(report, tuple(kept), choices, fidelity, answers, paired, n_promotions, self.healed)

    def _row(
        self,
        name: str,
        n_bytes: int,
        bits: float,
        is_ours: bool,
        measured: tuple[Fidelity | None, Answers | None, Paired | None],
    ) -> Row:
        fidelity, answers, paired = measured
        said = {"accuracy": answers.accuracy, "closed": answers.closed, "loops": answers.loops} if answers else None
        return Row(
            name,
            n_bytes,
            bits,
            is_ours,
            fidelity.to_json() if fidelity else None,
            said,
            paired.to_json() if paired else None,
        )

    def _others(self) -> list[Row]:
        """Return the rows of the unquantized twin, if it was asked, and of the recipes that are compared with."""
        rows = []
        if self.reference_answers:
            twin = self.desk.plan("F16")
            n_bytes = sum(one.n_bytes for one in twin.tensors)
            rows.append(self._row("unquantized (F16)", n_bytes, 16.0, False, (None, self.reference_answers, None)))
        for ftype in self.settings.compare:
            conversion = self.desk.plan(check_ftype(ftype), importance=self.desk.importance)
            path = self.desk.scratch / f"{ftype}.gguf"
            write(conversion, path, {}, self.desk.on_progress, self.desk.n_threads)
            report = report_of(conversion, self.desk.student_dir, path, [path], ())
            rows.append(self._row(ftype, report.n_bytes, report.bits_per_weight, False, self._measure(path)))
            path.unlink()
        return rows


def metrics(fidelity: Fidelity | None, answers: Answers | None, n_bytes: int) -> Metrics:
    """Return what a gate may ask for, of what was measured."""
    found: dict[str, float | None] = {"bytes": float(n_bytes)}
    if fidelity:
        found |= {"kl": fidelity.kl_mean, "kl_p99": fidelity.kl_p99, "same_top": fidelity.same_top}
        found |= {"perplexity": fidelity.perplexity}
    if answers:
        found |= {"accuracy": answers.accuracy, "closed": answers.closed, "loops": answers.loops}
    return found


def source_of_dir(folder: Path, desk: Desk) -> Mapping[str, Any]:
    """Return a folder's source record, the desk's own if it is that one's."""
    from .provenance import source_of

    return desk.source if folder == desk.student_dir else source_of(folder)


def nearest_ftype(types: Types, desk: Desk) -> str:
    """Return the recipe that a file's number names: the one whose base type most weights have."""
    weights: Counter[str] = Counter()
    bases = {base.name: ftype for ftype, (_, base) in reversed(FTYPES.items())}
    for one in desk.twin.tensors:
        type_ = types.get(one.tensor.name, one.got)
        if type_.name in bases:
            weights[type_.name] += one.n_weights
    return bases[weights.most_common(1)[0][0]] if weights else "F16"


def _nearest(item: Item, n_bytes: int) -> Choice:
    """Return the largest choice of at most so many bytes, or the smallest there is."""
    fitting = [choice for choice in item.choices if choice.n_bytes <= n_bytes]
    return fitting[-1] if fitting else item.choices[0]
