"""Score any model on held-out problems with the graders and the numbers that `teach` uses.

A loop is what `localrun.core.loops` calls one, or an answer that reaches its limit of tokens within the thinking.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import ModelError
from ...localrun.core.generation import Completion, Sampling
from ...localrun.core.loops import find_loop
from ...localrun.core.reporter import Progress
from ..graders.pool import Grader
from ..records import Problem, Request, messages_of
from ..teachers import open_teacher
from ..teachers.base import Teacher


@dataclass(frozen=True)
class Score:
    """What one model did on one set of problems.

    `accuracy`, `closed` and `looped` are shares; `interval` is accuracy's 95 % Wilson interval; `closed` counts only
    the answers that opened their thinking, and is None if none did. `tokens_per_s` is output tokens over the wall time.
    """

    accuracy: float
    n: int
    interval: tuple[float, float]
    closed: float | None
    looped: float
    tokens_per_answer: float
    tokens_per_s: float
    n_failed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the score as JSON has it."""
        return asdict(self) | {"interval": list(self.interval)}


def evaluate(
    model: Teacher,
    problems: Sequence[Problem],
    grader: Grader,
    sampling: Sampling,
    on_answer: Callable[[int, int], None] | None = None,
    answers_path: Path | None = None,
) -> Score:
    """Ask the model every problem and grade what it says; `on_answer` gets the counts done and right.

    Raises:
        ModelError: every request failed, so that there is nothing to score.
    """
    right, completions = 0, []
    started = time.monotonic()
    lines: dict[int, str] = {}
    requests = (Request(messages_of(p), sampling.seed + i) for i, p in enumerate(problems))
    for index, completion in model.generate(requests, sampling):
        grade = grader.grade(problems[index], completion.content)
        right += grade.verdict == "right"
        completions.append(completion)
        lines[index] = _answer_line(problems[index], completion, grade.answer, grade.verdict)
        if on_answer:
            on_answer(len(completions), right)
    seconds = time.monotonic() - started
    if answers_path:
        answers_path.parent.mkdir(parents=True, exist_ok=True)
        answers_path.write_text("".join(lines[i] for i in sorted(lines)), encoding="utf-8")
    answered = [c for c in completions if c.finish_reason != "error"]
    if not answered:
        raise ModelError(f"{model.name} answered none of {len(problems)} problems: {completions[-1].error}")
    return score(answered, right, seconds, n_failed=len(completions) - len(answered))


def score_file(
    path: Path, problems: Sequence[Problem], max_tokens: int, progress: Progress, answers_path: Path
) -> Score:
    """Ask a GGUF the problems, greedily, and write every answer with its verdict to answers_path."""
    stage = f"asking {path.name}"
    with open_teacher(str(path)) as model, Grader() as grader:
        return evaluate(
            model,
            problems,
            grader,
            Sampling(max_tokens=max_tokens),
            lambda done, right: progress(stage, done, len(problems), f"{right} right"),
            answers_path,
        )


def score(completions: Sequence[Completion], right: int, seconds: float, n_failed: int = 0) -> Score:
    """Sum up graded completions; a failed request counts as a wrong answer."""
    n = len(completions) + n_failed
    opened = [c for c in completions if c.closed is not None]
    tokens = sum(c.completion_tokens for c in completions)
    return Score(
        accuracy=right / n,
        n=n,
        interval=wilson_interval(right, n),
        closed=sum(bool(c.closed) for c in opened) / len(opened) if opened else None,
        looped=sum(is_loop(c) for c in completions) / n,
        tokens_per_answer=tokens / len(completions),
        tokens_per_s=tokens / seconds if seconds else 0.0,
        n_failed=n_failed,
    )


def wilson_interval(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of a share, 95 % by default.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    share, spread = right / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def is_loop(completion: Completion) -> bool:
    """Say whether an answer went round in circles, or reached its limit without an answer."""
    if completion.finish_reason == "length" and not completion.content.strip():
        return True
    tokens: Sequence[Any]
    tokens = completion.token_ids or f"{completion.reasoning_content or ''} {completion.content}".split()
    return find_loop(tokens) is not None


def format_score(scores: Iterable[float]) -> str:
    """Return shares as per cent, joined by a dash: `61.5–74.3`."""
    return "–".join(f"{100 * share:.1f}" for share in scores)


def _answer_line(problem: Problem, completion: Completion, answer: str | None, verdict: str) -> str:
    record = {
        "problem_id": problem.id,
        "question": problem.question,
        "expected": problem.answer,
        "answer": answer,
        "verdict": verdict,
        "reasoning_content": completion.reasoning_content,
        "content": completion.content,
        "finish_reason": completion.finish_reason,
        "error": completion.error,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"
