"""Score every hop of a run, base and students, once each."""

from __future__ import annotations

from pathlib import Path

from ...localrun.core.generation import Sampling
from ...localrun.core.reporter import Progress, Relay
from ..graders.pool import Grader
from ..recipe import TeachSettings, Work
from ..records import NONE, Problem
from ..run import Run
from .evaluate import Score, evaluate


def score_hops(
    run: Run, base: Path, held_out: list[Problem], settings: TeachSettings, work: Work, on_progress: Progress
) -> None:
    """Score every hop that scores.json lacks."""
    graded = [problem for problem in held_out if problem.grader != NONE]
    if not graded:
        work.say("nothing is scored: no held-out problem has an answer")
        return
    for hop, model in _hops(run, base, settings).items():
        _score(run, hop, model, graded, settings, work, on_progress)


def _hops(run: Run, base: Path, settings: TeachSettings) -> dict[str, Path]:
    """Return the models to score: with rounds also the student that only imitated."""
    imitated = {"imitation": run.first_student_dir(settings.rounds)} if settings.rounds else {}
    return {"base": base, **imitated, "student": run.student_dir}


def _score(
    run: Run,
    hop: str,
    model: Path,
    problems: list[Problem],
    settings: TeachSettings,
    work: Work,
    on_progress: Progress,
) -> Score | None:
    """Score one hop and add it to scores.json, unless it stands there already."""
    scores = run.load("scores.json") or {}
    if hop in scores:
        return None
    with work.open_student(model) as teacher, Grader() as grader:
        score = evaluate(
            teacher,
            problems,
            grader=grader,
            sampling=Sampling(max_tokens=settings.eval_max_tokens),
            answers_path=run.folder / "answers" / f"{hop}.jsonl",
            report=Relay(on_progress),
            stage=f"scoring the {hop}",
        )
    run.save("scores.json", scores | {hop: score.to_json() | {"problems": settings.problems, "seed": settings.seed}})
    return score
