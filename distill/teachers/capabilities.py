"""Find out what a teacher gives, with one tiny request, before a run relies on it.

There are three rungs: text alone; log-probabilities of the text it generates; log-probabilities of any given text.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import TeacherError
from ...localrun.core.generation import Completion, Sampling
from ..records import Request
from .base import Capabilities, Rung, Teacher

USUAL_LOGPROBS = 64
_MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}]
_N_TOKENS = 8
_ALLOWS: dict[Rung, str] = {
    "text": "its traces train a student by imitation (SFT)",
    "generated": "its traces train a student by imitation (SFT) and, with stored log-probabilities, on its whole "
    "distribution (top-k logit distillation)",
    "given": "its traces train a student by imitation (SFT) and on its whole distribution (top-k logit distillation), "
    "and it can score the student's own answers (on-policy distillation)",
}


def probe(teacher: Teacher, top_logprobs: int = USUAL_LOGPROBS) -> Capabilities:
    """Ask a teacher for a few tokens with `top_logprobs` log-probabilities each, and for those of a given text.

    Raises:
        TeacherError: `code` "teacher-cannot-answer".
        ModelError: the model cannot run here.
    """
    answer = _ask(teacher, top_logprobs)
    if answer.finish_reason == "error" and top_logprobs:
        answer = _ask(teacher, 0)  # a server may refuse only the log-probabilities
    if answer.finish_reason == "error":
        is_server = teacher.backend == "endpoint"
        hint = "this is the server's own message: check the model's name (--model) and the server" if is_server else ""
        raise TeacherError(f"{teacher.name} cannot answer: {answer.error}", hint, code="teacher-cannot-answer")
    n_top = 0 if answer.logprobs is None else answer.logprobs.ids.shape[1]
    rung: Rung = "generated" if n_top else "text"
    if top_logprobs and _scores(teacher, answer.token_ids or "5", n_top or 1):
        rung = "given"
    return Capabilities(rung, n_top, answer.reasoning_content is not None, answer.token_ids is not None)


def describe(capabilities: Capabilities) -> str:
    """Return one line about what the teacher gives, and one about what that allows."""
    gives = ["text"]
    if capabilities.top_logprobs:
        gives.append(f"{capabilities.top_logprobs} log-probabilities for each token that it generates")
    if capabilities.rung == "given":
        gives.append("those of a given text")
    gives += ["its reasoning apart"] * capabilities.reasoning + ["token ids"] * capabilities.token_ids
    return f"the teacher gives {', '.join(gives)}\n{_ALLOWS[capabilities.rung]}"


def _ask(teacher: Teacher, top_logprobs: int) -> Completion:
    sampling = Sampling(max_tokens=_N_TOKENS)
    ((_, answer),) = teacher.generate([Request(_MESSAGES)], sampling, top_logprobs=top_logprobs)
    return answer


def _scores(teacher: Teacher, answer: str | Sequence[int], top_logprobs: int) -> bool:
    try:
        teacher.score(_MESSAGES, answer, top_logprobs=top_logprobs)
    except TeacherError:
        return False
    return True
