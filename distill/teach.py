"""The whole of `teach`: problems -> traces -> a trained student -> scores, each stage from the artifact before it.

A stage that finds its artifact in the run folder is done, so the same command goes on where the last one stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, UsageError
from ..localrun.core.reporter import Progress, no_progress
from .curation.curate import apart_from, select
from .curation.filters import LONG_SHARE_SMALL, CurateSettings
from .evaluation.hops import score_hops
from .evaluation.report import write_report
from .gather import gather, is_traces_file, take_in
from .judging.judge_traces import check_judged
from .problems.load import load_problems
from .recipe import MAY_CHANGE, Stage, TeachSettings, Work
from .records import NONE, Problem, Trace
from .run import Run
from .traces.store import TraceStore
from .training.pass_rate import own_pass_rates
from .training.stage import check_training, train_first
from .training.student import student_dir


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
    stop_after: Stage | None = None,
    on_progress: Progress = no_progress,
) -> TeachResult:
    """Run every stage that the folder does not hold yet and return what it holds then.

    `stop_after` "samples" and "teacher" end before and after what a round wants of the teacher (see rounds).

    Raises:
        DeepDistillError: see each stage; what was done so far stays in the folder.
    """
    work = work or Work()
    with Run(folder, dataclasses.asdict(settings), MAY_CHANGE) as run:
        # Before anything is paid for: what is off with the student, the held-out problems or the filters ends it here.
        base = student_dir(settings.student, work.offline) if stop_after != "traces" else None
        filters = settings.curate_settings()
        problems, held_out = draw_problems(settings, work.offline)
        _check(settings, problems, base, work.device, stop_after)
        kept: Iterable[Trace] = ()
        done = True
        if settings.method == "grpo":
            if base is None or settings.rounds:
                raise UsageError("--method grpo has no teacher, so no traces and no rounds", "leave those flags out")
            from .training.rl.stage import reinforce

            apart = apart_from(problems, held_out, filters, work.say)
            reinforce(run, base, apart, settings, work, on_progress)
        else:
            kept, done = _distill(run, base, problems, held_out, filters, settings, work, stop_after, on_progress)
        if base is not None and done and stop_after != "training":
            score_hops(run, base, held_out, settings, work, on_progress)
        result = TeachResult(
            folder=folder,
            student_dir=run.student_dir if run.student_dir.exists() else None,
            curation=run.load("curation.json") or {},
            scores=run.load("scores.json") or {},
            training=run.load("training.json"),
        )
        write_report(run, kept)
        return result


def _check(
    settings: TeachSettings, problems: list[Problem], base: Path | None, device: str, stop_after: Stage | None
) -> None:
    """See that what is asked for can be had, as far as that can be told before a teacher is asked.

    Raises:
        UsageError: it cannot.
        ModelError: the student cannot be taught.
    """
    if stop_after in ("samples", "teacher") and not settings.rounds:
        raise UsageError(f"--stop-after {stop_after} ends a round, and there are none", "give --rounds")
    if base is not None and settings.method == "distill":
        check_training(base, settings, device)
    if settings.rounds and all(problem.grader == NONE for problem in problems):
        raise UsageError("--rounds needs problems with an answer to grade by", "leave --rounds out")
    if settings.loss == "logits" and settings.traces is None and not settings.logprobs:
        raise UsageError("--loss logits needs the teacher's log-probabilities", "give --logprobs 64")


def _distill(
    run: Run,
    base: Path | None,
    problems: list[Problem],
    held_out: list[Problem],
    filters: CurateSettings,
    settings: TeachSettings,
    work: Work,
    stop_after: Stage | None,
    on_progress: Progress,
) -> tuple[Iterable[Trace], bool]:
    """Gather traces, curate them and train on them; return those that train, and whether all trainings are done."""
    if base and "long_share" not in settings.curation and _is_small(base):
        filters = dataclasses.replace(filters, long_share=LONG_SHARE_SMALL)
    traces_path = _traces(run, problems, held_out, settings, work, stop_after, on_progress)
    rates = own_pass_rates(run, base, problems, settings, work, on_progress) if base else None
    selected = select(
        lambda: TraceStore.read(traces_path),
        filters,
        evaluation=[problem.question for problem in held_out],
        pass_rate=rates,
    )
    if not run.is_trained:
        run.save("curation.json", selected.record)
    if not selected and stop_after != "traces":
        write_report(run, selected)
        raise ArtifactError(f"no trace to train on in {traces_path}", _why_none(selected.record))
    if base is None:
        return selected, False  # read again where they are wanted: there may be a million
    kept = list(selected)
    rows = train_first(run, base, kept, traces_path, rates or {}, settings, work, on_progress)
    if not settings.rounds:
        return kept, True
    from .training.on_policy.rounds import go_rounds  # loads torch

    return kept, go_rounds(run, base, rows, held_out, filters, settings, work, stop_after, on_progress)


def _traces(
    run: Run,
    problems: list[Problem],
    held_out: list[Problem],
    settings: TeachSettings,
    work: Work,
    stop_after: Stage | None,
    on_progress: Progress,
) -> Path:
    """Return the file of the run's traces: asked for, taken in from another tool's file, or read where they are."""
    if run.is_trained and run.traces_path.exists():
        return run.traces_path  # with more of them the training would go on with other rows
    if settings.traces is None:
        if stop_after != "traces":
            check_judged(problems, settings)
        gather(run, problems, [problem.question for problem in held_out], settings, work, on_progress)
    elif is_traces_file(elsewhere := Path(settings.traces)):
        return elsewhere
    else:
        take_in(run, elsewhere, settings, work, on_progress)
    return run.traces_path


def _is_small(base: Path) -> bool:
    """Say whether a checkpoint has less than 3 B parameters, taking two bytes for each."""
    return sum(path.stat().st_size for path in base.glob("*.safetensors")) < 6e9


def draw_problems(settings: TeachSettings, offline: bool) -> tuple[list[Problem], list[Problem]]:
    """Return the problems to ask and the held-out ones; of problems without an answer none need be held out."""
    asked = load_problems(settings.problems, "train", n=settings.n_traces, seed=settings.seed, offline=offline)
    try:
        return asked, load_problems(settings.problems, "test", n=settings.n_eval, seed=settings.seed, offline=offline)
    except ArtifactError:
        if all(problem.grader == NONE for problem in asked):
            return asked, []
        raise


def _why_none(record: dict[str, Any]) -> str:
    reasons = [f"{count} {name.replace('_', ' ')}" for name, count in record["dropped"].items() if count]
    return f"of {record['traces']} traces: {', '.join(reasons) or 'none at all'}"
