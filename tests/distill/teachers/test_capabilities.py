"""The probe against teachers that give more or less, made up for the purpose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pytest

from deepdistill.distill.teachers import Request, Teacher, open_teacher
from deepdistill.distill.teachers.base import Capabilities, Rung
from deepdistill.distill.teachers.capabilities import describe, probe
from deepdistill.errors import TeacherError
from deepdistill.localrun.core.generation import Completion, Message, Sampling, TopLogprobs


def top(n_tokens: int, k: int) -> TopLogprobs:
    return TopLogprobs(np.zeros((n_tokens, k), np.int32), np.zeros((n_tokens, k), np.float32))


class Modest(Teacher):
    """Gives at most `cap` log-probabilities and refuses to be asked for them at all where that is None."""

    name, backend = "modest", "endpoint"

    def __init__(self, cap: int | None, scores: bool = False, reasoning: str | None = None) -> None:
        self.cap, self.scores, self.reasoning = cap, scores, reasoning
        self.asked: list[int] = []

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, *, top_logprobs: int = 0
    ) -> Iterator[tuple[int, Completion]]:
        assert sampling.max_tokens <= 8, "a probe costs next to nothing"
        for index, _ in enumerate(requests):
            self.asked.append(top_logprobs)
            if top_logprobs and self.cap is None:
                yield index, Completion("", None, None, "error", 1, 0, 0, 0.0, error="logprobs are not supported")
                continue
            k = min(top_logprobs, self.cap or 0)
            yield index, Completion("5", self.reasoning, None, "stop", 9, 2, 0, 0.1, logprobs=top(2, k) if k else None)

    def score(self, messages: Sequence[Message], answer: str | Sequence[int], *, top_logprobs: int) -> TopLogprobs:
        if not self.scores:
            return super().score(messages, answer, top_logprobs=top_logprobs)
        return top(1, top_logprobs)


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        (Modest(None), Capabilities("text", 0, False, False)),
        (Modest(0, reasoning="so"), Capabilities("text", 0, True, False)),
        (Modest(20), Capabilities("generated", 20, False, False)),
        (Modest(100, scores=True), Capabilities("given", 64, False, False)),
    ],
)
def test_the_rung_is_what_the_teacher_gave(teacher: Modest, expected: Capabilities) -> None:
    assert probe(teacher) == expected
    assert len(teacher.asked) <= 2
    lines = describe(expected).splitlines()
    assert len(lines) == 2
    assert ("log-probabilities" in lines[0]) == bool(expected.top_logprobs)


def test_each_rung_allows_more() -> None:
    rungs: list[Rung] = ["text", "generated", "given"]
    allowed = [describe(Capabilities(rung, 4, False, False)).splitlines()[1] for rung in rungs]
    assert [("logit distillation" in line, "on-policy" in line) for line in allowed] == [
        (False, False),
        (True, False),
        (True, True),
    ]


def test_who_cannot_answer_at_all_is_said() -> None:
    class Down(Modest):
        def generate(
            self, requests: Iterable[Request], sampling: Sampling, *, top_logprobs: int = 0
        ) -> Iterator[tuple[int, Completion]]:
            for index, _ in enumerate(requests):
                yield index, Completion("", None, None, "error", 0, 0, 0, 0.0, error="no such model")

    with pytest.raises(TeacherError, check=lambda error: error.code == "teacher-cannot-answer"):
        probe(Down(None))


def test_the_pocket_teacher_gives_everything() -> None:
    with open_teacher("pocket", device="cpu") as teacher:
        assert probe(teacher, 16) == Capabilities("given", 16, reasoning=True, token_ids=True)
