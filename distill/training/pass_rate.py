"""How often a model solves each problem by itself: a curriculum orders by it, and reinforcement chooses by it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from ...localrun.core.generation import Sampling
from ...localrun.core.reporter import SILENT, Reporter
from ..context import Context
from ..graders.pool import Grader
from ..records import NONE, GradesAnswers, Problem, Request, messages_of
from ..teachers.base import Teacher

_CURRICULUM_SAMPLES = 4  # tries at each problem
_CURRICULUM_PROBLEMS = 256  # the others are estimated from these


def measure_pass_rates(
    model: Teacher,
    problems: Sequence[Problem],
    *,
    grader: GradesAnswers,
    sampling: Sampling,
    n_tries: int,
    report: Reporter = SILENT,
) -> dict[str, float]:
    """Return the share of n_tries answers that are right, by the problem's id."""
    tried = [
        problem for problem in problems for _ in range(n_tries)
    ]  # tries at one problem are neighbours, so that its prompt is computed once
    requests = (Request(messages_of(problem), sampling.seed + i) for i, problem in enumerate(tried))
    right = dict.fromkeys((problem.id for problem in problems), 0)
    for done, (index, completion) in enumerate(model.generate(requests, sampling), 1):
        problem = tried[index]
        right[problem.id] += grader.grade(problem, completion.content).verdict == "right"
        report.progress("the student tries", done, total=len(tried), note=f"{sum(right.values())} right")
    return {problem_id: n / n_tries for problem_id, n in right.items()}


def own_pass_rates(context: Context, base: Path, problems: list[Problem]) -> dict[str, float] | None:
    """Return how often the untrained student solves each problem that it tries; None if it need not try any.

    It tries each problem `training.pass_samples` times. If only the curriculum needs rates, it tries some problems,
    from which the others are estimated.
    """
    graded = [problem for problem in problems if problem.grader != NONE]
    recipe, run = context.recipe, context.run
    n_samples = recipe.training.pass_samples
    if not n_samples and recipe.training.curriculum.enabled:
        n_samples = _CURRICULUM_SAMPLES
        graded = random.Random(recipe.seed).sample(graded, min(len(graded), _CURRICULUM_PROBLEMS))
    if not n_samples:
        return None
    known = run.load("pass_rate.json")
    if known and known["samples"] == n_samples and known["rates"].keys() == {problem.id for problem in graded}:
        return dict(known["rates"])
    temperature = 0.7 if n_samples > 1 else 0.0
    sampling = Sampling(temperature, max_tokens=recipe.scores.max_tokens, seed=recipe.seed)
    with context.open_student(base) as student, Grader() as grader:
        rates = measure_pass_rates(
            student, graded, grader=grader, sampling=sampling, n_tries=n_samples, report=context.report
        )
    run.save("pass_rate.json", {"samples": n_samples, "rates": rates})
    return rates
