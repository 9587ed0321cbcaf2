"""Score any model on held-out problems: accuracy, closed thinking, loops, tokens.

An answer counts as looped if `localrun.core.loops` finds a loop, or if it reached its token limit while thinking.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ModelError
from ...localrun.core.atomic import write_text
from ...localrun.core.generation import GREEDY, Completion, Sampling
from ...localrun.core.loops import find_loop
from ...localrun.core.reporter import SILENT, Reporter
from ..graders.pool import Grader, grade_answer
from ..records import Grade, Problem, Request, messages_of
from ..teachers import open_teacher
from ..teachers.base import Teacher

_UNCLEAR = 0.2  # share of unknown answers above which a score says little


@dataclass(frozen=True)
class Score:
    """The score of one model on one set of problems.

    `accuracy`, `closed` and `looped` are shares; `interval` is accuracy's 95 % Wilson interval; `closed` counts only
    answers that opened their thinking, and is None if none did. `tokens_per_s` is output tokens over wall time. An
    answer that no grader could tell is one of `n_unknown`; `unknown` counts the three commonest reasons.
    """

    accuracy: float
    n: int
    interval: tuple[float, float]
    closed: float | None
    looped: float
    tokens_per_answer: float
    tokens_per_s: float
    n_failed: int = 0
    n_unknown: int = 0
    unknown: dict[str, int] = field(default_factory=dict)


def evaluate(
    model: Teacher,
    problems: Sequence[Problem],
    *,
    grader: Grader | None = None,
    sampling: Sampling = GREEDY,
    answers_path: Path | None = None,
    report: Reporter = SILENT,
    stage: str = "answers",
) -> Score:
    """Ask the model every problem and grade its answers; each one goes to `answers_path`, with its verdict.

    Without a grader one is opened for this call. `stage` is the name under which progress is reported.

    >>> from deepdistill import evaluate, load_problems, open_teacher
    >>> problems = load_problems("gym:chain_sum?max_terms=2&max_digits=1", "test", n=4)
    >>> with open_teacher("pocket") as model:
    ...     evaluate(model, problems).accuracy
    1.0

    Raises:
        ModelError: `code` "no-answers": every request failed, so there is nothing to score.
    """
    started, n_right, completions, lines = time.monotonic(), 0, list[Completion](), dict[int, str]()
    unknown = Counter[str]()
    requests = (Request(messages_of(p), sampling.seed + i) for i, p in enumerate(problems))
    with nullcontext(grader) if grader else Grader() as open_grader:
        for index, completion in model.generate(requests, sampling):
            grade = grade_answer(open_grader, problems[index], completion)
            n_right += grade.verdict == "right"
            unknown.update([_reason(grade)] if grade.verdict == "unknown" else [])
            completions.append(completion)
            lines[index] = _answer_line(problems[index], completion, grade)
            report.progress(stage, len(completions), total=len(problems), note=f"{n_right} right")
    seconds = time.monotonic() - started
    if answers_path:
        answers_path.parent.mkdir(parents=True, exist_ok=True)
        write_text(answers_path, "".join(lines[i] for i in sorted(lines)))
    answered = [c for c in completions if c.finish_reason != "error"]
    if not answered:
        raise ModelError(
            f"{model.name} answered none of {len(problems)} problems: {completions[-1].error}",
            "check that it answers a single question",
            code="no-answers",
        )
    return sum_up(answered, n_right, seconds=seconds, n_failed=len(completions) - len(answered), unknown=unknown)


def score_file(
    path: Path, problems: Sequence[Problem], *, max_tokens: int, answers_path: Path, report: Reporter = SILENT
) -> Score:
    """Ask a GGUF the problems, greedily, and write every answer with its verdict to `answers_path`."""
    with open_teacher(str(path)) as model:
        return evaluate(
            model,
            problems,
            sampling=Sampling(max_tokens=max_tokens),
            answers_path=answers_path,
            report=report,
            stage=f"asking {path.name}",
        )


def sum_up(
    completions: Sequence[Completion],
    n_right: int,
    *,
    seconds: float,
    n_failed: int = 0,
    unknown: Counter[str] | None = None,
) -> Score:
    """Return the score of graded completions, of which some are unknown for these reasons.

    A failed request counts as a wrong answer.
    """
    unknown = unknown or Counter()
    n = len(completions) + n_failed
    opened = [c for c in completions if c.closed is not None]
    tokens = sum(c.completion_tokens for c in completions)
    return Score(
        accuracy=n_right / n,
        n=n,
        interval=wilson_interval(n_right, n),
        closed=sum(bool(c.closed) for c in opened) / len(opened) if opened else None,
        looped=sum(is_loop(c) for c in completions) / n,
        tokens_per_answer=tokens / len(completions),
        tokens_per_s=tokens / seconds if seconds else 0.0,
        n_failed=n_failed,
        n_unknown=unknown.total(),
        unknown=dict(unknown.most_common(3)),
    )


def unclear(score: Mapping[str, Any]) -> str:
    """Return a warning about a score of whose answers more than a fifth are unknown; empty for any other."""
    n_unknown, n = score.get("n_unknown") or 0, score["n"]
    if n_unknown <= _UNCLEAR * n:
        return ""
    reasons = "; ".join(f"{reason} ({count})" for reason, count in score["unknown"].items())
    return f"{100 * n_unknown / n:.0f} % of {n:,} answers are unknown, neither right nor wrong: {reasons}"


def _reason(grade: Grade) -> str:
    """Return why a grader could not tell, without what is special to one answer, so that equal reasons add up."""
    return re.sub(r"(['\"]).*\1", "…", grade.reason) or "the problem has no grader"


def wilson_interval(n_right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of a share, 95 % by default.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    share, spread = n_right / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def is_loop(completion: Completion) -> bool:
    """Say whether an answer ends in a loop, or reached its token limit while thinking."""
    if completion.finish_reason == "length" and not completion.content.strip():
        return True
    tokens: Sequence[Any]
    tokens = completion.token_ids or f"{completion.reasoning_content or ''} {completion.content}".split()
    return find_loop(tokens) is not None


def format_score(scores: Iterable[float]) -> str:
    """Return shares as per cent, joined by a dash: `61.5–74.3`."""
    return "–".join(f"{100 * share:.1f}" for share in scores)


def _answer_line(problem: Problem, completion: Completion, grade: Grade) -> str:
    record = {
        "problem_id": problem.id,
        "question": problem.question,
        "expected": problem.answer,
        "answer": grade.answer,
        "verdict": grade.verdict,
        "score": grade.score,
        "reason": grade.reason,
        "reasoning_content": completion.reasoning_content,
        "content": completion.content,
        "finish_reason": completion.finish_reason,
        "error": completion.error,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"
