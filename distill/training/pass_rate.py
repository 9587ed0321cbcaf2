"""How often a model solves each problem by itself: what a curriculum orders by, and reinforcement chooses by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...localrun.core.generation import Sampling
from ...localrun.core.progress import Progress, no_progress
from ..traces.collect import GradesAnswers
from ..evaluation.evaluate import messages_of
from ..problems.load import Problem
from ..teachers.base import Request, Teacher


def measure_pass_rates(
    model: Teacher,
    problems: Sequence[Problem],
    grader: GradesAnswers,
    sampling: Sampling,
    n_tries: int,
    on_progress: Progress = no_progress,
) -> dict[str, float]:
    """Return the share of n_tries answers that are right, by the problem's id."""
    tried = [problem for problem in problems for _ in range(n_tries)]  # side by side: a prompt is computed once
    requests = (Request(messages_of(problem), sampling.seed + i) for i, problem in enumerate(tried))
    right = dict.fromkeys((problem.id for problem in problems), 0)
    for done, (index, completion) in enumerate(model.generate(requests, sampling), 1):
        problem = tried[index]
        right[problem.id] += grader.grade(problem, completion.content).verdict == "right"
        on_progress("the student's own", done, len(tried), f"{sum(right.values())} right")
    return {problem_id: n / n_tries for problem_id, n in right.items()}


def sometimes_solved(problems: Sequence[Problem], rates: Mapping[str, float]) -> list[Problem]:
    """Return the problems that teach by reward: solved now and then; all of them if there is no such problem.

    Where all answers of a group earn the same, none has an advantage, and sampling them was for nothing.

    Source: DAPO, arXiv 2503.14476, section 3.2, draws until a batch holds no such group; here it is done once, before.
    """
    return [problem for problem in problems if 0 < rates[problem.id] < 1] or list(problems)
