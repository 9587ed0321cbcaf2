"""Which problems teach by reward: those that the model solves now and then.

Where all answers of a group earn the same, none has an advantage, and sampling them was for nothing.

Source: DAPO, arXiv 2503.14476, section 3.2, draws until a batch holds no such group; here it is done once, before.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...localrun.generation import Sampling
from ..collect import GradesAnswers
from ..evaluate import messages_of
from ..problems import Problem
from ..teachers.base import Request, Teacher


def sometimes_solved(
    model: Teacher, problems: Sequence[Problem], grader: GradesAnswers, sampling: Sampling, n_tries: int = 4
) -> list[Problem]:
    """Return the problems that n_tries sampled answers solve, but not each of them; all if there is no such problem."""
    n_right = [0] * len(problems)
    requests = (
        Request(messages_of(problem), sampling.seed + n_tries * i + j)
        for i, problem in enumerate(problems)
        for j in range(n_tries)
    )
    for index, completion in model.generate(requests, sampling):
        place = index // n_tries
        n_right[place] += grader.grade(problems[place], completion.content).verdict == "right"
    kept = [problem for problem, n in zip(problems, n_right, strict=True) if 0 < n < n_tries]
    return kept or list(problems)
