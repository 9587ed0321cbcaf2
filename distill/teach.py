"""The whole of `teach`: problems -> traces -> a trained student -> scores, each stage from the artifact before it.

A stage that finds its artifact in the run folder is done, so the same command goes on where the last one stopped.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ArtifactError
from ..localrun.generation import Sampling
from ..localrun.progress import Progress, no_progress
from .curate import curate
from .evaluate import Score, evaluate, messages_of
from .filters import LONG_SHARE_SMALL
from .gather import gather, is_traces_file, take_in
from .grade import Grader
from .graders import NONE
from .problems import Problem, load_problems
from .recipe import MAY_CHANGE, TeachSettings, Work
from .report import write_report
from .run import Run
from .settle import check_judged
from .student import student_dir, teach_template
from .teachers import Request, open_teacher
from .traces import Trace, TraceStore

if TYPE_CHECKING:
    from .rows import Row

Stage = Literal["traces", "samples", "teacher", "training"]
_CURRICULUM_SAMPLES = 4  # tries of the untrained student at each problem, if --pass-samples does not say


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
        if base and "long_share" not in settings.curation and _is_small(base):
            filters = dataclasses.replace(filters, long_share=LONG_SHARE_SMALL)
        problems, held_out = draw_problems(settings, work.offline)
        if settings.traces is None:
            if stop_after != "traces":
                check_judged(problems, settings)
            gather(run, problems, [problem.question for problem in held_out], settings, work, on_progress)
            traces_path = run.traces_path
        elif is_traces_file(traces_path := Path(settings.traces)):
            pass  # read where they are
        else:
            take_in(run, traces_path, settings, work, on_progress)
            traces_path = run.traces_path
        rates = _pass_rates(run, base, problems, settings, work.batch_size, on_progress) if base else None
        kept, record = curate(
            lambda: TraceStore.read(traces_path),
            filters,
            evaluation=[problem.question for problem in held_out],
            pass_rate=rates,
        )
        run.save("curation.json", record)
        if not kept and stop_after != "traces":
            write_report(run, kept)
            raise ArtifactError(f"no trace to train on in {traces_path}", _why_none(record))
        if base is not None:
            rows = _train(run, base, kept, traces_path, rates or {}, settings, work, on_progress)
            done = _go_rounds(run, base, rows, settings, work, stop_after, on_progress)
            graded = [problem for problem in held_out if problem.grader != NONE]
            if done and stop_after != "training" and graded:
                for hop, model in _hops(run, base, settings).items():
                    _score(run, hop, model, graded, settings, work.batch_size, on_progress)
            elif done and stop_after != "training":
                work.say("nothing is scored: no held-out problem has an answer")
        result = TeachResult(
            folder=folder,
            student_dir=run.student_dir if run.student_dir.exists() else None,
            curation=record,
            scores=run.load("scores.json") or {},
            training=run.load("training.json"),
        )
        write_report(run, kept)
        return result


def _is_small(base: Path) -> bool:
    """Say whether a checkpoint has less than 3 B parameters, taking two bytes for each."""
    return sum(path.stat().st_size for path in base.glob("*.safetensors")) < 6e9


def draw_problems(settings: TeachSettings, offline: bool) -> tuple[list[Problem], list[Problem]]:
    """Return the problems to ask and the held-out ones; of problems without an answer none need be held out."""
    asked = load_problems(settings.problems, "train", settings.n_traces, settings.seed, offline=offline)
    try:
        return asked, load_problems(settings.problems, "test", settings.n_eval, settings.seed, offline=offline)
    except ArtifactError:
        if all(problem.grader == NONE for problem in asked):
            return asked, []
        raise


def _pass_rates(
    run: Run,
    base: Path,
    problems: list[Problem],
    settings: TeachSettings,
    batch_size: int | None,
    on_progress: Progress,
) -> dict[str, float] | None:
    """Return how often the untrained student solves each problem, of `pass_samples` tries; None if not asked for."""
    n_samples = settings.pass_samples or (_CURRICULUM_SAMPLES if settings.curriculum else 0)
    if not n_samples:
        return None
    known = run.load("pass_rate.json")
    if known and known["samples"] == n_samples:
        return dict(known["rates"])
    graded = [problem for problem in problems if problem.grader != NONE] * n_samples
    right = dict.fromkeys((problem.id for problem in graded), 0)
    sampling = Sampling(temperature=0.7 if n_samples > 1 else 0.0, max_tokens=settings.eval_max_tokens)
    requests = (Request(messages_of(problem), settings.seed + i) for i, problem in enumerate(graded))
    with open_teacher(str(base), batch_size=batch_size) as student, Grader() as grader:
        for done, (index, completion) in enumerate(student.generate(requests, sampling), 1):
            problem = graded[index]
            right[problem.id] += grader.grade(problem, completion.content).verdict == "right"
            on_progress("the student's own", done, len(graded), f"{sum(right.values())} right")
    rates = {problem_id: n / n_samples for problem_id, n in right.items()}
    run.save("pass_rate.json", {"samples": n_samples, "rates": rates})
    return rates


def _why_none(record: dict[str, Any]) -> str:
    reasons = [f"{count} {name.replace('_', ' ')}" for name, count in record["dropped"].items() if count]
    return f"of {record['traces']} traces: {', '.join(reasons) or 'none at all'}"


def _hops(run: Run, base: Path, settings: TeachSettings) -> dict[str, Path]:
    """Return the models to score: with rounds also the student that only imitated."""
    imitated = {"imitation": _first_student(run, settings)} if settings.rounds else {}
    return {"base": base, **imitated, "student": run.student_dir}


def _first_student(run: Run, settings: TeachSettings) -> Path:
    """Return where the student of the first training stands."""
    return run.folder / "rounds" / "0" / "student" if settings.rounds else run.student_dir


def _train(
    run: Run,
    base: Path,
    traces: list[Trace],
    traces_path: Path,
    rates: dict[str, float],
    settings: TeachSettings,
    work: Work,
    on_progress: Progress,
) -> list[Row]:
    """Train the student on the kept traces unless the folder holds it already; return the rows, for rounds."""
    out = _first_student(run, settings)
    if out.exists() and not settings.rounds:
        return []
    from .lessons import by_level, lessons
    from .train import TrainSettings, train

    training = TrainSettings(**settings.stage_training(0), seed=settings.seed)
    tokenizer = _tokenizer(base)
    rows, kept = lessons(
        traces,
        traces_path,
        tokenizer,
        max_length=training.max_length,
        loss=settings.loss,
        logit_share=settings.logit_share,
        work=work,
    )
    if out.exists():
        return rows
    record = run.load("curation.json")
    record["dropped"]["too_long"] = len(traces) - len(rows)
    record["kept"] = len(rows)
    run.save("curation.json", record)
    out.parent.mkdir(parents=True, exist_ok=True)
    ordered = rows
    if settings.curriculum:
        ordered = by_level(rows, kept, rates, training.batch_size, training.epochs, settings.seed)
    report = train(
        base, ordered, tokenizer, training, run.checkpoints_dir, out, on_progress, is_ordered=settings.curriculum
    )
    run.save("training.json", dataclasses.asdict(report))
    return rows


def _tokenizer(base: Path) -> Any:
    from .teachers.loading import load_tokenizer

    tokenizer = load_tokenizer(base)
    teach_template(tokenizer)
    return tokenizer


def _go_rounds(
    run: Run,
    base: Path,
    earlier: list[Row],
    settings: TeachSettings,
    work: Work,
    stop_after: Stage | None,
    on_progress: Progress,
) -> bool:
    """Go through the rounds that are not done; say whether all are, or `stop_after` ended it before."""
    if not settings.rounds:
        return True
    from .rounds import RoundSettings, go_round, problems_of, rounds_of
    from .train import TrainSettings

    options = RoundSettings(settings.round_problems, settings.round_samples, settings.on_policy_loss)
    n_problems = settings.n_traces + settings.rounds * options.n_problems
    problems = load_problems(settings.problems, "train", n_problems, settings.seed, offline=work.offline)
    for round_ in rounds_of(run, settings.rounds):
        if round_.out.exists():
            continue
        first = TrainSettings(**settings.stage_training(round_.number), seed=settings.seed + round_.number)
        training = dataclasses.replace(
            first,
            lr=first.peak_lr * options.lr_scale,
            epochs=first.epochs if first.minutes is not None else options.epochs,
        )
        asked = problems_of(round_, problems, options.n_problems, settings.n_traces)
        until = stop_after if stop_after in ("samples", "teacher") else None
        if not go_round(
            run, round_, asked, _tokenizer(base), earlier, settings, options, training, work, until, on_progress
        ):
            return False
    return True


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
