"""`teach --method grpo`: no teacher and no traces; the graders' verdicts alone improve the student."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ....errors import UsageError
from ....localrun.core.settings import fields_of, get
from ...context import Context
from ...graders.pool import Grader
from ...problems.instruction import shared_system
from ...recipe.teach import TeachRecipe
from ...records import NONE, Problem, messages_of
from ..distributed import processes
from ..pass_rate import own_pass_rates
from ..stage import tokenizer_of

if TYPE_CHECKING:
    from .grpo import GrpoSettings

_FEW = 256  # problems; docs/experiments.md shows what a model learned from 36


def reinforce(context: Context, base: Path, problems: Sequence[Problem]) -> None:
    """Train the student by reward unless the folder holds it already; `training.json` gets the curve.

    With `training.pass_samples` the student first tries each problem that often, and only problems that it solves now
    and then train.

    Raises:
        UsageError: `code` "settings-unused": the method ignores some of them; or see `_graded`.
        ModelError: TRL is not installed, or the weights cannot be loaded.
    """
    run, recipe = context.run, context.recipe
    if unused := unused_settings(recipe):
        hint = "leave them out: all weights train"
        raise UsageError(f"--method grpo makes no use of {', '.join(unused)}", hint, code="settings-unused")
    if run.student_dir.exists():
        return
    from ..train import TrainPaths
    from .grpo import grpo

    graded = _chosen(context, base, _graded(problems))
    options = _options(recipe, len(graded))
    with Grader() as grader:
        result = grpo(
            TrainPaths(base, run.checkpoints_dir, run.student_dir),
            graded,
            tokenizer=tokenizer_of(base, shared_system(map(messages_of, graded))),
            grader=grader,
            settings=options,
            device=context.resources.device,
            report=context.report,
        )
    run.save("training.json", {"method": "grpo", **dataclasses.asdict(options), **dataclasses.asdict(result)})


def _graded(problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems whose answers can be graded.

    Raises:
        UsageError: `code` "no-answers": there are none; "one-process": several processes were started.
    """
    graded = [problem for problem in problems if problem.grader != NONE]
    if not graded:
        hint = "give other --problems, or a teacher"
        raise UsageError("--method grpo needs problems with an answer", hint, code="no-answers")
    if processes() > 1:
        hint = "start it without torchrun or accelerate launch"
        raise UsageError("--method grpo trains in one process", hint, code="one-process")
    return graded


def unused_settings(recipe: TeachRecipe) -> list[str]:
    """Return the settings that differ from their defaults although the method ignores them."""
    return [
        leaf.key
        for leaf in fields_of(TeachRecipe)
        if recipe.training.method in leaf.flag.unused_by and get(recipe, leaf.path) != leaf.default
    ]


def _chosen(context: Context, base: Path, graded: list[Problem]) -> list[Problem]:
    """Return the problems that train, and tell the user if they are few."""
    rates = own_pass_rates(context, base, graded)
    if rates is not None:
        n_given, graded = len(graded), sometimes_solved(graded, rates)
        if len(graded) < n_given:
            context.report.say(f"{len(graded)} of {n_given} problems train: the student solves them now and then")
    if len(graded) < _FEW:
        context.report.say(
            f"the student soon learns {len(graded)} problems by heart, which helps with no others: "
            "give more with --n-traces"
        )
    return graded


def _options(recipe: TeachRecipe, n_problems: int) -> GrpoSettings:
    from .grpo import GrpoSettings

    training, grpo, samples = recipe.training, recipe.grpo, recipe.traces.samples
    per_step = min(grpo.problems_per_step, n_problems)
    # With `minutes` the clock ends the training.
    n_steps = 10**6 if training.minutes else max(1, training.epochs * n_problems // per_step)
    chosen = {
        "steps": training.steps or n_steps,
        "minutes": training.minutes,
        "group_size": grpo.group_size or (samples if samples > 1 else GrpoSettings.group_size),
        "problems_per_step": per_step,
        "max_tokens": recipe.teacher.max_tokens or recipe.scores.max_tokens,
        "temperature": grpo.temperature if recipe.teacher.temperature is None else recipe.teacher.temperature,
        "lr": training.learning_rate,
        "save_every_s": training.save_every_s,
        "seed": recipe.seed,
    }
    return GrpoSettings(**vars(grpo) | chosen)


def sometimes_solved(problems: Sequence[Problem], rates: Mapping[str, float]) -> list[Problem]:
    """Return the problems that the student solves now and then, or all of them if there is no such problem.

    If all answers of a group earn the same, none has an advantage, and sampling them was wasted.

    Source: DAPO, arXiv 2503.14476, section 3.2, which draws until a batch has no such group. Here problems are chosen
    once, before the training.
    """
    return [problem for problem in problems if 0 < rates[problem.id] < 1] or list(problems)
