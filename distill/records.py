"""What the rooms hand to each other: problems, requests, verdicts and traces.

A record is a frozen dataclass without behaviour of its own room: how it is read, asked, graded or stored stands there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, get_args

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


_VERDICTS = get_args(Verdict)


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

    def to_json(self) -> str:
        """Return the trace as one line without its newline."""
        return json.dumps(self._record(), ensure_ascii=False)

    def _record(self) -> dict[str, Any]:
        nested = {"usage": vars(self.usage), "teacher": vars(self.teacher), "sampling": vars(self.sampling)}
        return vars(self) | nested  # asdict copies all of it first

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

    @classmethod
    def from_json(cls, line: str | bytes) -> Trace:
        """Return the trace of a line; fields that a newer version may have added are left out.

        Raises:
            ValueError: the line is no JSON, or no trace.
        """
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        known = cls.__dataclass_fields__
        record = {name: value for name, value in record.items() if name in known}
        try:
            for name, kind in (("usage", Usage), ("teacher", TeacherInfo), ("sampling", Sampling)):
                record[name] = kind(**record[name])
            trace = cls(**record)
        except KeyError as error:
            raise ValueError(f"not a trace: it has no {error.args[0]}") from error
        except TypeError as error:
            raise ValueError(f"not a trace: {error}") from error
        if trace.verdict not in _VERDICTS or not isinstance(trace.content, str):
            raise ValueError(f"not a trace: verdict {trace.verdict!r}, content {type(trace.content).__name__}")
        return trace


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

    @classmethod
    def from_json(cls, line: str | bytes) -> Judgement:
        """Return the judgement of a line.

        Raises:
            ValueError: the line is no JSON, or no judgement.
        """
        try:
            record = json.loads(line)
            judgement = cls(record["id"], record["verdict_by"], record["agreement"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a judgement: {error}") from error
        if judgement.verdict_by not in ("vote", "judge", "none"):
            raise ValueError(f"not a judgement: verdict_by {judgement.verdict_by!r}")
        return judgement


class GradesAnswers(Protocol):
    """What is needed of a `Grader`."""

    def grade(self, problem: Problem, content: str) -> Grade:
        """Return the verdict on a content."""
        ...


def has_answer(problem: Problem) -> bool:
    """Say whether a grader can tell right from wrong answers to this problem."""
    return problem.grader != NONE
