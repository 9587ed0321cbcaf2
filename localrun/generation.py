"""What is asked of a model and what comes back: the two records that every backend shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "error"]
Message = dict[str, str]
"""One turn: `role`, `content`, and `reasoning_content` where an assistant's thinking is kept."""


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. `temperature` 0 is greedy; `max_tokens` bounds thinking and answer together."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    max_tokens: int = 512


@dataclass(frozen=True)
class Completion:
    """One finished answer, thinking apart.

    `closed` is None if the model never opened its thinking, else whether it closed it. `token_ids` holds what was
    generated, thinking included, where the backend knows it. `seconds` is wall time from the request's start.
    """

    content: str
    reasoning_content: str | None
    closed: bool | None
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    seconds: float
    token_ids: tuple[int, ...] | None = None
    error: str | None = None
