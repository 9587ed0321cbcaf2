"""The records of a generation that all backends share: sampling, guidance, log-probabilities, completion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FinishReason = Literal["stop", "length", "loop", "error"]
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


GREEDY = Sampling()


@dataclass(frozen=True)
class Guidance:
    """Constraints on a turn beyond sampling; by default none, so that a model is measured as it is.

    With a budget or the guard, thinking ends early enough to leave room for an answer, and there always is one.
    """

    think_budget: int | None = None
    """Tokens of thinking, at most; before they run out, a short hint and then the closing tag are inserted."""
    loop_guard: bool = False
    """Detect loops: use DRY sampling first, then end the thinking or the answer."""
    grammar: str | None = None
    """GBNF with a `root`, which constrains the text after the thinking."""
    schema: str | None = None
    """A JSON schema, as its text, which the text after the thinking has to fit."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer and are not part of it; they have no effect in the thinking."""
    speculate: bool = False
    """Draft tokens from the text so far, or with the draft model, and check them in one batch."""
    dry_multiplier: float = 0.0
    repeat_penalty: float = 1.0

    @property
    def is_constrained(self) -> bool:
        """Whether the answer has to fit a grammar or a schema."""
        return self.grammar is not None or self.schema is not None

    @property
    def ensures_answer(self) -> bool:
        """Whether the thinking is made to leave room for an answer."""
        return self.loop_guard or self.think_budget is not None


FREE = Guidance()


@dataclass(frozen=True, eq=False)
class TopLogprobs:
    """The k most probable tokens at each of T generated positions, the most probable first.

    `values` are natural logarithms of the model's own probabilities: temperature 1, before any filter.
    """

    ids: npt.NDArray[np.int32]  # [T, k]
    values: npt.NDArray[np.float32]  # [T, k]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Completion:
    """One finished answer, thinking apart.

    `closed` is None if the model never opened its thinking, else whether it closed it. `finish_reason` is "loop" where
    the loop guard ended it. `token_ids` holds what was generated, thinking included, where the backend knows it.
    `seconds` is wall time from the request's start.
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
    logprobs: TopLogprobs | None = None
    """One row for each of `token_ids`, if asked for and the backend has them."""
    lost_tokens: tuple[int, int] = (0, 0)
    """Prompt and completion tokens of attempts that broke off before this one: paid for, but not counted above."""
    not_sent: frozenset[str] = frozenset()
    """Fields of `Sampling` that the server does not take, so that it chose for itself."""
