"""`teach --method grpo`: no teacher and no traces, the student improves by what the graders say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ....errors import UsageError
from ....localrun.core.reporter import Progress
from ...graders.pool import Grader
from ...recipe import TeachSettings, Work
from ...records import NONE, Problem
from ...run import Run
from ..pass_rate import own_pass_rates
from ..report import TrainSettings
from ..student import teach_template

_GROUP, _PROBLEMS = 8, 16  # answers of a problem, problems of a step
_FEW = 256  # problems; docs/experiments.md has what a model learned from 36


def reinforce(
    run: Run, base: Path, problems: Sequence[Problem], settings: TeachSettings, work: Work, on_progress: Progress
) -> None:
    """Train the student by reward unless the folder holds it already; `training.json` gets the curve.

    With `pass_samples` it tries each problem so often before, and those that it solves now and then train.

    Raises:
        UsageError: no problem has an answer to be graded by, or several processes were started.
        ModelError: TRL is not installed, or the weights cannot be loaded.
    """
    if unused := _unused(settings):
        raise UsageError(f"--method grpo makes no use of {', '.join(unused)}", "leave them out: all weights train")
    if run.student_dir.exists():
        return
    from ...teachers.huggingface.loading import load_tokenizer
    from ..distributed import processes
    from .grpo import GrpoSettings, grpo

    graded = [problem for problem in problems if problem.grader != NONE]
    if not graded:
        raise UsageError("--method grpo needs problems with an answer", "give another --problems, or a teacher")
    if processes() > 1:
        raise UsageError("--method grpo trains in one process", "start it without torchrun or accelerate launch")
    rates = own_pass_rates(run, base, graded, settings, work, on_progress)
    if rates is not None:
        n_given, graded = len(graded), sometimes_solved(graded, rates)
        if len(graded) < n_given:
            work.say(f"{len(graded)} of {n_given} problems train: the student solves them now and then")
    if len(graded) < _FEW:
        work.say(f"{len(graded)} problems are soon learned by heart, which helps with no others: --n-traces takes more")
    training = settings.training
    per_step = min(_PROBLEMS, len(graded))
    options = GrpoSettings(
        steps=training.get("steps") or _steps(training, len(graded), per_step),
        minutes=training.get("minutes"),
        group_size=settings.samples if settings.samples > 1 else _GROUP,
        problems_per_step=per_step,
        max_tokens=settings.max_tokens or settings.eval_max_tokens,
        temperature=1.0 if settings.temperature is None else settings.temperature,
        lr=training.get("lr"),
        save_every_s=training.get("save_every_s", GrpoSettings.save_every_s),
        seed=settings.seed,
    )
    tokenizer = load_tokenizer(base)
    teach_template(tokenizer)
    with Grader() as grader:
        report = grpo(
            base,
            graded,
            tokenizer,
            grader,
            options,
            run.checkpoints_dir,
            run.student_dir,
            device=work.device,
            on_progress=on_progress,
        )
    run.save("training.json", {"method": "grpo", **dataclasses.asdict(options), **dataclasses.asdict(report)})


def _unused(settings: TeachSettings) -> list[str]:
    """Return the flags that were given, by their difference from the default, and say nothing to reinforcement."""
    of_traces = ("traces", "logprobs", "loss", "curriculum", "expand")
    plain = TeachSettings(settings.problems)
    given = [name for name in of_traces if getattr(settings, name) != getattr(plain, name)]
    of_training = (
        "batch_size",
        "lora_targets",
        "lora_first_layer",
        "lora_plus",
        "dora",
        "rslora",
        "qlora",
        "micro_batch",
        "dtype",
    )
    default = TrainSettings()
    for name in (*of_training, "lora_rank", "lora_alpha", "threads", "report_to"):
        if settings.training.get(name, getattr(default, name)) != getattr(default, name):
            given.append({"dtype": "train_dtype", "batch_size": "train_batch_size"}.get(name, name))
    return [f"--{name.replace('_', '-')}" for name in given]


def _steps(training: dict[str, Any], n_problems: int, per_step: int) -> int:
    """Return how many steps the passes over the problems take; with `minutes` the clock says when it is enough."""
    return 10**6 if training.get("minutes") else max(1, training.get("epochs", 1) * n_problems // per_step)


def sometimes_solved(problems: Sequence[Problem], rates: Mapping[str, float]) -> list[Problem]:
    """Return the problems that teach by reward: solved now and then; all of them if there is no such problem.

    Where all answers of a group earn the same, none has an advantage, and sampling them was for nothing.

    Source: DAPO, arXiv 2503.14476, section 3.2, draws until a batch holds no such group; here it is done once, before.
    """
    return [problem for problem in problems if 0 < rates[problem.id] < 1] or list(problems)
