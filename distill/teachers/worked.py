"""Worked solutions as the teacher: solutions that come with the problems become traces, graded like any other.

A solution is in the problem's metadata: `answer_cot` (some of reasoning-gym's data sets), or `worked`, which comes from
a file's column (`problems.jsonl?worked=COLUMN`; a solution before GSM8K's `####` is found automatically). The steps are
the reasoning, and their result is the answer: where that is not the problem's answer, the grader says so.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence

from ...errors import TeacherError
from ...localrun.core.generation import Completion, Sampling
from ..graders.answer import final_answer, is_number
from ..records import Problem, Request, question_in
from .base import Teacher

WORKED = "worked"
"""The string that names this teacher."""

_KEYS = ("worked", "answer_cot")
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")  # GSM8K's marks for a calculator: `<<48/2=24>>`


def worked_solution(problem: Problem) -> tuple[str, str] | None:
    """Return (steps, final answer) of the solution that comes with a problem; None without one."""
    text = next((problem.metadata[key] for key in _KEYS if isinstance(problem.metadata.get(key), str)), "")
    text = _CALCULATOR.sub("", text).strip()
    if not text:
        return None
    if "####" in text:
        steps, _, answer = text.rpartition("####")
        return steps.strip(), answer.strip()
    numeric = problem.answer is not None and is_number(problem.answer)
    return text, final_answer(text, numeric=numeric) or ""


class WorkedTeacher(Teacher):
    """Answers each of its problems with the solution that comes with it."""

    backend = "worked"
    name = WORKED

    def __init__(self, problems: Sequence[Problem]) -> None:
        """Read the solutions.

        Raises:
            TeacherError: `code` "no-worked-solutions".
        """
        found = {problem.question: worked_solution(problem) for problem in problems}
        self._solutions = {question: solution for question, solution in found.items() if solution}
        if not self._solutions:
            raise TeacherError(
                f"none of {len(problems)} problems has a worked solution",
                "gym:gsm_symbolic has; for a file, name the column: 'problems.jsonl?worked=COLUMN'",
                code="no-worked-solutions",
            )
        digest = hashlib.sha256(repr(sorted(self._solutions.items())).encode())
        self.revision = digest.hexdigest()[:16]

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, *, top_logprobs: int = 0
    ) -> Iterator[tuple[int, Completion]]:
        """Yield the solution of each problem; one without comes back as an error."""
        for index, request in enumerate(requests):
            solution = self._solutions.get(question_in(request.messages))
            if solution is None:
                error = "the problem has no worked solution"
                yield index, Completion("", None, None, "error", 0, 0, 0, 0.0, error=error)
            else:
                steps, answer = solution
                yield index, Completion(answer, steps, True, "stop", 0, 0, 0, 0.0)
