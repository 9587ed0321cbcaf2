"""The whole of `teach`: problems -> traces -> a trained student -> scores, each stage from the artifact before it.

A stage that finds its artifact in the run folder is done, so the same command goes on where the last one stopped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import ArtifactError, UsageError
from ..localrun.generation import Sampling
from ..localrun.progress import Progress, no_progress
from .budget import Limits
from .collect import CollectSettings, collect
from .curate import curate
from .evaluate import Score, evaluate
from .grade import Grader
from .problems import Problem, load_problems
from .report import write_report
from .run import Run
from .student import student_dir, teach_template
from .teachers import Teacher, open_teacher
from .traces import Trace, TraceStore


@dataclass(frozen=True)
class TeachSettings:
    """Every setting of a run, saved as recipe.json. Sampling None: greedy for pocket, else what R1's card advises."""

    problems: str
    teacher: str = "pocket"
    student: str = "smollm2"
    n_traces: int = 2000
    samples: int = 1
    keep: int = 1
    logprobs: int = 0
    n_eval: int = 200
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    eval_max_tokens: int = 512
    teacher_model: str | None = None
    seed: int = 0
    traces: str | None = None
    training: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_run(cls, folder: Path) -> TeachSettings:
        """Return the settings that a run folder was made with."""
        try:
            return cls(**json.loads((folder / "recipe.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ArtifactError(f"{folder}/recipe.json is broken: {error}") from error

    def teacher_sampling(self) -> Sampling:
        """Return how the teacher is sampled.

        Raises:
            UsageError: several samples of each problem, and all of them greedy.
        """
        is_pocket = self.teacher == "pocket"
        greedy = is_pocket and self.samples == 1
        temperature = self.temperature if self.temperature is not None else (0.0 if greedy else 0.6)
        if self.samples > 1 and temperature == 0:
            raise UsageError("at temperature 0 all samples of a problem are the same", "give --temperature 0.6")
        top_p = self.top_p if self.top_p is not None else (1.0 if greedy else 0.95)
        limit = self.max_tokens if self.max_tokens is not None else (512 if is_pocket else 4096)
        return Sampling(temperature=temperature, top_p=top_p, seed=self.seed, max_tokens=limit)


@dataclass(frozen=True)
class Work:
    """How to work, not what to make: this may change when a run goes on."""

    concurrency: int | None = None
    batch_size: int | None = None
    timeout_s: float = 600.0
    limits: Limits = field(default_factory=Limits)
    offline: bool = False
    say: Callable[[str], None] = lambda _: None
    """Told what a user should know and no number shows."""

    def open_teacher(self, settings: TeachSettings) -> Teacher:
        """Open the teacher of a run."""
        return open_teacher(
            settings.teacher,
            concurrency=self.concurrency or 8,
            batch_size=self.batch_size,
            timeout_s=self.timeout_s,
            model=settings.teacher_model,
            offline=self.offline,
        )


@dataclass(frozen=True)
class TeachResult:
    """What a run has come to: the student's folder and the score of each hop, where they were made."""

    folder: Path
    student_dir: Path | None
    curation: dict[str, Any]
    scores: dict[str, dict[str, Any]]
    training: dict[str, Any] | None


def teach(
    settings: TeachSettings,
    folder: Path,
    *,
    work: Work | None = None,
    stop_after: Literal["traces", "training"] | None = None,
    on_progress: Progress = no_progress,
) -> TeachResult:
    """Run every stage that the folder does not hold yet and return what it holds then.

    Raises:
        DeepDistillError: see each stage; what was done so far stays in the folder.
    """
    work = work or Work()
    with Run(folder, dataclasses.asdict(settings)) as run:
        base = (
            student_dir(settings.student, work.offline) if stop_after != "traces" else None
        )  # before anything is paid for
        if settings.traces is None:
            problems = load_problems(settings.problems, "train", settings.n_traces, settings.seed)
            _collect_traces(run, problems, settings, work, on_progress)
        traces_path = Path(settings.traces) if settings.traces else run.traces_path
        kept, record = curate(TraceStore.read(traces_path))
        run.save("curation.json", record)
        if not kept:
            raise ArtifactError(f"no trace to train on in {traces_path}", _why_none(record))
        if base is not None:
            _train(run, base, kept, settings, on_progress)
            if stop_after != "training":
                held_out = load_problems(settings.problems, "test", settings.n_eval, settings.seed)
                _score(run, "base", base, held_out, settings, work.batch_size, on_progress)
                _score(run, "student", run.student_dir, held_out, settings, work.batch_size, on_progress)
        result = TeachResult(
            folder=folder,
            student_dir=run.student_dir if run.student_dir.exists() else None,
            curation=record,
            scores=run.load("scores.json") or {},
            training=run.load("training.json"),
        )
        write_report(run, kept)
        return result


def _collect_traces(
    run: Run, problems: list[Problem], settings: TeachSettings, work: Work, on_progress: Progress
) -> None:
    """Ask the teacher for every trace that is still wanted; say why it ended early, if it did."""
    with TraceStore(run.traces_path) as store, Grader() as grader:
        collected = collect(
            problems,
            store,
            CollectSettings(
                settings.teacher, settings.teacher_sampling(), settings.samples, settings.keep, settings.logprobs
            ),
            open_teacher=lambda: work.open_teacher(settings),
            open_grader=lambda: grader,
            failures_path=run.folder / "failures.jsonl",
            limits=work.limits,
            on_progress=on_progress,
        )
    if collected.n_failed:
        work.say(f"{collected.n_failed} requests failed for good: see {run.folder}/failures.jsonl")
    if collected.stopped:
        work.say(f"no more traces: {collected.stopped}")


def _why_none(record: dict[str, Any]) -> str:
    reasons = [f"{count} {name.replace('_', ' ')}" for name, count in record["dropped"].items() if count]
    return f"of {record['traces']} traces: {', '.join(reasons) or 'none at all'}"


def _train(run: Run, base: Path, traces: list[Trace], settings: TeachSettings, on_progress: Progress) -> None:
    """Train the student on the kept traces unless the folder holds it already."""
    if run.student_dir.exists():
        return
    from .rows import make_row
    from .teachers.transformers_model import load_tokenizer
    from .train import TrainSettings, train

    training = TrainSettings(**settings.training, seed=settings.seed)
    tokenizer = load_tokenizer(base)
    teach_template(tokenizer)
    rows = [make_row(tokenizer, t.messages, t.reasoning_content or "", t.content) for t in traces]
    short = [row for row in rows if len(row.input_ids) <= training.max_length]
    if not short:
        raise ArtifactError(f"every trace is longer than {training.max_length} tokens", "raise --max-length")
    record = run.load("curation.json")
    record["dropped"]["too_long"] = len(rows) - len(short)
    record["kept"] = len(short)
    run.save("curation.json", record)
    report = train(base, short, tokenizer, training, run.checkpoints_dir, run.student_dir, on_progress)
    run.save("training.json", dataclasses.asdict(report))


def _score(
    run: Run,
    hop: str,
    model: Path,
    problems: list[Problem],
    settings: TeachSettings,
    batch_size: int | None,
    on_progress: Progress,
) -> Score | None:
    """Score one hop and add it to scores.json, unless it stands there already."""
    scores = run.load("scores.json") or {}
    if hop in scores:
        return None
    with open_teacher(str(model), batch_size=batch_size) as teacher, Grader() as grader:
        score = evaluate(
            teacher,
            problems,
            grader,
            Sampling(max_tokens=settings.eval_max_tokens),
            lambda done, right: on_progress(f"scoring the {hop}", done, len(problems), f"{right} right"),
            run.folder / "answers" / f"{hop}.jsonl",
        )
    run.save("scores.json", scores | {hop: score.to_json() | {"problems": settings.problems, "seed": settings.seed}})
    return score
