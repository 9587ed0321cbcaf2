"""The records that the rooms hand to each other: problems, requests, verdicts and traces.

A record is a frozen dataclass without behaviour: the rooms read, ask, grade and store it.
"""

from __future__ import annotations

import hashlib
import json
from binascii import unhexlify
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from ..localrun.core.generation import Completion, FinishReason, Message, Sampling

NONE = "none"  # the grader of a problem that has no answer


@dataclass(frozen=True)
class Problem:
    """One question. `grader` is KIND or KIND:ARGUMENT (see graders/); `id` depends on the question alone.

    `messages` is the conversation that asks it, if that is more than the question: a system message, earlier turns.
    `question` has the text of the user's turns.
    """

    id: str
    question: str
    answer: str | None
    source: str
    grader: str
    metadata: dict[str, Any] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)


def messages_of(problem: Problem) -> list[Message]:
    """Return the conversation that asks a problem: the same for teacher, student and base model."""
    return list(problem.messages) or [{"role": "user", "content": problem.question}]


def question_in(messages: Sequence[Message]) -> str:
    """Return the text of the user's turns of a conversation, which is the `question` of its problem."""
    return "\n".join(turn["content"] or "" for turn in messages if turn["role"] == "user")


Backend = Literal["pocket", "endpoint", "transformers", "gguf", "imported", "worked"]


@dataclass(frozen=True)
class TeacherInfo:
    """The teacher of a trace.

    `revision` is a commit or a hash of the weights, `vocabulary` the fingerprint of its tokens, if known.
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
    """A verdict on one answer, and the reason if it is `unknown`.

    `score` is the grader's, in [0, 1]; `right` means exactly 1.0.
    """

    answer: str | None
    verdict: Verdict
    verdict_by: VerdictBy
    score: float | None
    reason: str = ""


@dataclass(frozen=True)
class Usage:
    """Token counts; `completion` includes `reasoning`."""

    prompt: int
    completion: int
    reasoning: int


@dataclass(frozen=True)
class Trace:
    """A teacher's answer to one problem, and whether it was right. Reasoning and content are apart, without tags.

    >>> from pathlib import Path
    >>> from deepdistill import TraceStore
    >>> trace = next(TraceStore.read(Path("traces.jsonl")))
    >>> trace.verdict, trace.content == trace.answer, trace.teacher.name
    ('right', True, 'pocket')
    """

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
    sampling: dict[str, int | float]
    """The fields of `Sampling` that were asked for; a server's may lack some, which it does not take."""
    seconds: float
    cost_usd: float | None = None
    source: str = ""
    """The problem's source."""
    sample: int = 0
    """Which sample of its problem, from 0."""
    n_logprobs: int = 0
    """How many log-probabilities a token has in the sidecar; 0 if there are none."""
    agreement: float | None = None
    """The share of the samples that gave this answer, or the judge's score as a share."""
    created: float | None = None
    """When it ended, in Unix seconds."""
    reason: str = ""
    """Why the grader could not tell, if it could not."""
    grader: str = ""
    """The problem's grader; empty in traces that were stored before it was kept."""
    score: float | None = None
    """The grader's score, such as the share of a JSON value's fields that are right."""

    @classmethod
    def make(
        cls,
        problem: Problem,
        completion: Completion,
        *,
        grade: Grade,
        info: TeacherInfo,
        teacher: str,
        sampling: Sampling,
        sample: int = 0,
    ) -> Trace:
        """Return the trace of an answer to a problem. `teacher` is the string that the user gave (see `trace_id`)."""
        return cls(
            id=trace_id(problem.id, teacher, sampling=sampling, sample=sample),
            problem_id=problem.id,
            messages=messages_of(problem),
            reasoning_content=completion.reasoning_content,
            content=completion.content,
            answer=grade.answer,
            verdict=grade.verdict,
            verdict_by=grade.verdict_by,
            finish_reason=completion.finish_reason,
            usage=Usage(completion.prompt_tokens, completion.completion_tokens, completion.reasoning_tokens),
            teacher=info,
            sampling={name: value for name, value in vars(sampling).items() if name not in completion.not_sent},
            seconds=completion.seconds,
            source=problem.source,
            sample=sample,
            reason=grade.reason,
            grader=problem.grader,
            score=grade.score,
        )


def trace_id(problem_id: str, teacher: str, *, sampling: Sampling, sample: int) -> str:
    """Return the hash that names one sample of one problem: the same request has the same id in every run.

    `teacher` is the string that the user gave, so that a resumed run knows its traces before it opens the teacher.
    """
    key = [problem_id, teacher, asdict(sampling), sample]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def sample_seed(trace_id: str) -> int:
    """Return the seed of a sample, so that a resumed run samples as the interrupted one would have."""
    return int(trace_id[:7], 16)


@dataclass(frozen=True)
class Judgement:
    """A later verdict on a stored trace, by vote or by a judge; `none` takes an earlier one back."""

    id: str
    verdict_by: Literal["vote", "judge", "none"]
    agreement: float | None = None


CURVE_FILE = "curve.jsonl"  # of `CurvePoint`s, in the run folder


@dataclass(frozen=True)
class CurvePoint:
    """One line of a training's curve: what a step came to, or what a validation found after it."""

    step: int | None = None
    """None: a validation of an older version, which belongs to the step before it."""
    seconds: float | None = None
    """Of training so far."""
    loss: float | None = None
    lr: float | None = None
    tokens_per_s: float | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None


class GradesAnswers(Protocol):
    """The part of a `Grader` that grades one answer."""

    def grade(self, problem: Problem, content: str) -> Grade:
        """Return the verdict on a content."""
        ...


def has_answer(problem: Problem) -> bool:
    """Say whether a grader can tell right answers to this problem from wrong ones."""
    return problem.grader != NONE


def id_key(id_: str) -> bytes:
    """Return an id as 16 bytes: its 32 hex digits, or a hash of an id of another form."""
    try:
        key = unhexlify(id_)
    except ValueError:
        key = b""
    return key if len(key) == 16 else hashlib.sha256(id_.encode()).digest()[:16]
