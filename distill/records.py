"""What the rooms hand to each other: problems, requests, verdicts and traces.

A record is a frozen dataclass without behaviour of its own room: how it is read, asked, graded or stored stands there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from ..localrun.core.generation import Completion, FinishReason, Message, Sampling

NONE = "none"  # problems without an answer: nothing to grade by


@dataclass(frozen=True)
class Problem:
    """One question. `grader` is KIND or KIND:ARGUMENT (see graders/); `id` depends on the question alone."""

    id: str
    question: str
    answer: str | None
    source: str
    grader: str
    metadata: dict[str, Any] = field(default_factory=dict)


def messages_of(problem: Problem) -> list[dict[str, str]]:
    """Return the conversation that asks a problem: the question alone, to teacher, student and base model alike."""
    return [{"role": "user", "content": problem.question}]


Backend = Literal["pocket", "endpoint", "transformers", "gguf", "imported", "worked"]


@dataclass(frozen=True)
class TeacherInfo:
    """Who answered: what a trace keeps of its teacher.

    `revision` is a commit or a hash of the weights, `vocabulary` the fingerprint of its tokens, where they are known.
    """

    name: str
    backend: Backend
    revision: str | None = None
    vocabulary: str | None = None


@dataclass(frozen=True)
class Request:
    """A conversation to answer, and the seed of its sampling."""

    messages: Sequence[Message]
    seed: int = 0


Verdict = Literal["right", "wrong", "unknown"]


VerdictBy = Literal["grader", "vote", "judge", "none"]


@dataclass(frozen=True)
class Grade:
    """A verdict on one answer, and the reason where it is `unknown`.

    `score` is the grader's own, in [0, 1]; `right` takes exactly 1.0.
    """

    answer: str | None
    verdict: Verdict
    verdict_by: VerdictBy
    score: float | None
    reason: str = ""


@dataclass(frozen=True)
class Usage:
    """Counts in tokens; `reasoning` is a part of `completion`."""

    prompt: int
    completion: int
    reasoning: int


@dataclass(frozen=True)
class Trace:
    """What a teacher said to one problem, and whether it was right. Reasoning and content stand apart, without tags."""

    id: str
    problem_id: str
    messages: list[Message]
    reasoning_content: str | None
    content: str
    answer: str | None
    verdict: Verdict
    verdict_by: VerdictBy
    finish_reason: FinishReason
    usage: Usage
    teacher: TeacherInfo
    sampling: Sampling
    seconds: float
    cost_usd: float | None = None
    source: str = ""
    """The problem's source."""
    sample: int = 0
    """Which sample of its problem, from 0."""
    n_logprobs: int = 0
    """The k of its log-probabilities in the sidecar; 0: there are none."""
    agreement: float | None = None
    """The share of the samples that gave this answer, or the judge's."""
    created: float | None = None
    """When it ended, in seconds since 1970 (UTC)."""

    @classmethod
    def make(
        cls,
        problem: Problem,
        completion: Completion,
        grade: Grade,
        info: TeacherInfo,
        teacher: str,
        sampling: Sampling,
        sample_index: int = 0,
        *,
        messages: Sequence[Message] | None = None,
        cost_usd: float | None = None,
        created: float | None = None,
    ) -> Trace:
        """Put together what was asked (by default the question alone), what came back and the verdict."""
        return cls(
            id=trace_id(problem.id, teacher, sampling, sample_index),
            problem_id=problem.id,
            messages=list(messages) if messages else [{"role": "user", "content": problem.question}],
            reasoning_content=completion.reasoning_content,
            content=completion.content,
            answer=grade.answer,
            verdict=grade.verdict,
            verdict_by=grade.verdict_by,
            finish_reason=completion.finish_reason,
            usage=Usage(completion.prompt_tokens, completion.completion_tokens, completion.reasoning_tokens),
            teacher=info,
            sampling=sampling,
            seconds=completion.seconds,
            cost_usd=cost_usd,
            source=problem.source,
            sample=sample_index,
            created=created,
        )


def trace_id(problem_id: str, teacher: str, sampling: Sampling, sample_index: int) -> str:
    """Return the hash that names one sample of one problem: the same request has the same id in every run.

    `teacher` is the string that the user gave, so that a resumed run knows what it has before it opens the teacher.
    """
    key = [problem_id, teacher, asdict(sampling), sample_index]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def sample_seed(trace_id: str) -> int:
    """Return the seed of a sample: a resumed run samples what the interrupted one would have."""
    return int(trace_id[:7], 16)


@dataclass(frozen=True)
class Judgement:
    """What samples of one problem, or a judge, say of a trace once it is stored: `none` takes an earlier one back."""

    id: str
    verdict_by: Literal["vote", "judge", "none"]
    agreement: float | None = None


class GradesAnswers(Protocol):
    """What is needed of a `Grader`."""

    def grade(self, problem: Problem, content: str) -> Grade:
        """Return the verdict on a content."""
        ...


def has_answer(problem: Problem) -> bool:
    """Say whether a grader can tell right from wrong answers to this problem."""
    return problem.grader != NONE
