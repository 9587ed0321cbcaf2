"""The stages of `teach` that use the student: its own pass rate, the first training, the rounds, the scores.

Each finds what it made before in the run folder and does only what is not there.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...localrun.core.generation import Sampling
from ...localrun.core.progress import Progress
from ..curation.curate import CurateSettings
from ..evaluation.evaluate import Score, evaluate
from ..graders.pool import Grader
from ..graders.base import NONE
from .pass_rate import measure_pass_rates
from ..problems.load import Problem, load_problems
from .distributed import everywhere
from ..recipe import TeachSettings, Work
from ..run import Run
from ..problems.similarity import contaminated, word_hashes
from .student import teach_template
from ..traces.store import Trace

if TYPE_CHECKING:
    from .rows import Row

Stage = Literal["traces", "samples", "teacher", "training"]
_CURRICULUM_SAMPLES = 4  # tries of the untrained student at each of the problems that stand for the rest
_CURRICULUM_PROBLEMS = 256


def check_training(base: Path, settings: TeachSettings, device: str) -> None:
    """See that the student can be taught with these settings: nothing is paid for one that cannot.

    Raises:
        UsageError: settings that do not go together, or a tracker that is not there.
        ModelError: a chat template that cannot be taught to think, or no way to 4 bits.
    """
    from ..device import choose_device
    from .lora import four_bits
    from .rows import make_row
    from .train import TrainSettings
    from .trainer import reporters

    training = TrainSettings(**settings.stage_training())
    reporters(training.report_to)
    if training.qlora:
        four_bits(choose_device(device))
    make_row(_tokenizer(base), [{"role": "user", "content": "1 + 1?"}], "1 + 1 = 2", "2")


def apart_from(
    problems: list[Problem], held_out: list[Problem], filters: CurateSettings, say: Callable[[str], None]
) -> list[Problem]:
    """Return the problems in which no held-out question stands, as the filter `contaminated` takes such traces out."""
    n = filters.contamination_ngram
    if n is None or not held_out or not problems:
        return problems
    asked, evaluation = ([word_hashes(problem.question) for problem in part] for part in (problems, held_out))
    apart = [problem for problem, found in zip(problems, contaminated(asked, evaluation, n), strict=True) if found < 0]
    if len(apart) < len(problems):
        say(f"{len(problems) - len(apart)} problems ask what held-out ones ask: left out")
    return apart


def own_pass_rates(
    run: Run,
    base: Path,
    problems: list[Problem],
    settings: TeachSettings,
    work: Work,
    on_progress: Progress,
) -> dict[str, float] | None:
    """Return how often the untrained student solves each problem that it tries; None if it need not try any.

    It tries each `pass_samples` times; a curriculum alone has it try some, which stand for the rest.
    """
    graded = [problem for problem in problems if problem.grader != NONE]
    n_samples = settings.pass_samples
    if not n_samples and settings.curriculum:
        n_samples = _CURRICULUM_SAMPLES
        graded = random.Random(settings.seed).sample(graded, min(len(graded), _CURRICULUM_PROBLEMS))
    if not n_samples:
        return None
    known = run.load("pass_rate.json")
    if known and known["samples"] == n_samples and known["rates"].keys() == {problem.id for problem in graded}:
        return dict(known["rates"])
    temperature = 0.7 if n_samples > 1 else 0.0
    sampling = Sampling(temperature, max_tokens=settings.eval_max_tokens, seed=settings.seed)
    with work.open_student(base) as student, Grader() as grader:
        rates = measure_pass_rates(student, graded, grader, sampling, n_samples, on_progress)
    run.save("pass_rate.json", {"samples": n_samples, "rates": rates})
    return rates


def train_first(
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
    if run.student_dir.exists():
        return []
    from .dataset import by_level, hold_out, lessons
    from .train import TrainSettings, train

    training = TrainSettings(**settings.stage_training(), seed=settings.seed)
    tokenizer = _tokenizer(base)
    rows, kept = lessons(
        traces,
        traces_path,
        tokenizer,
        max_length=training.max_length,
        loss=settings.loss,
        logit_share=settings.logit_share,
        work=work,
        weights={"reasoning_weight": training.reasoning_weight, "answer_weight": training.answer_weight},
        too_long=training.too_long,
    )
    trained, validation = hold_out(rows, kept, training.n_validation, settings.seed)
    if out.exists():
        return rows
    if not run.is_trained:
        record = run.load("curation.json")
        record["dropped"]["too_long"] = len(traces) - len(rows)
        record["kept"] = len(rows)
        run.save("curation.json", record)
    out.parent.mkdir(parents=True, exist_ok=True)
    ordered = [rows[i] for i in trained]
    if settings.curriculum:
        asked = [kept[i] for i in trained]
        if not any(trace.problem_id in rates for trace in asked):
            work.say("no problem of the traces could be tried: their order is the plain one, without a curriculum")
        ordered = by_level(ordered, asked, rates, training.batch_size, training.epochs, settings.seed)
    report = everywhere(
        train,
        base,
        ordered,
        tokenizer,
        training,
        run.checkpoints_dir,
        out,
        is_ordered=settings.curriculum,
        validation=validation,
        device=work.device,
        own={"on_progress": on_progress, "say": work.say},
    )
    run.save("training.json", dataclasses.asdict(report))
    return rows


def _tokenizer(base: Path) -> Any:
    from ..teachers.huggingface.loading import load_tokenizer

    tokenizer = load_tokenizer(base)
    teach_template(tokenizer)
    return tokenizer


def go_rounds(
    run: Run,
    base: Path,
    earlier: list[Row],
    held_out: list[Problem],
    filters: CurateSettings,
    settings: TeachSettings,
    work: Work,
    stop_after: Stage | None,
    on_progress: Progress,
) -> bool:
    """Go through the rounds that are not done; say whether all are, or `stop_after` ended it before."""
    if run.student_dir.exists() or not settings.rounds:
        return True
    from .on_policy.rounds import RoundSettings, go_round, problems_of, rounds_of
    from .train import TrainSettings

    options = RoundSettings(settings.round_problems, settings.round_samples, settings.on_policy_loss)
    n_problems = settings.n_traces + settings.rounds * options.n_problems
    problems = load_problems(settings.problems, "train", n_problems, settings.seed, offline=work.offline)
    problems = apart_from(problems, held_out, filters, work.say)
    for round_ in rounds_of(run, settings.rounds):
        if round_.out.exists():
            continue
        first = TrainSettings(**settings.stage_training(), seed=settings.seed + round_.number)
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
    imitated = {"imitation": _first_student(run, settings)} if settings.rounds else {}
    return {"base": base, **imitated, "student": run.student_dir}


def _first_student(run: Run, settings: TeachSettings) -> Path:
    """Return where the student of the first training stands."""
    return run.folder / "rounds" / "0" / "student" if settings.rounds else run.student_dir


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
            grader,
            Sampling(max_tokens=settings.eval_max_tokens),
            lambda done, right: on_progress(f"scoring the {hop}", done, len(problems), f"{right} right"),
            run.folder / "answers" / f"{hop}.jsonl",
        )
    run.save("scores.json", scores | {hop: score.to_json() | {"problems": settings.problems, "seed": settings.seed}})
    return score
