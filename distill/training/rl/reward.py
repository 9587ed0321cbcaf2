"""What an answer earns: the graders that verify traces, plus a little for an answer in the right form.

Source: DeepSeek-R1, arXiv 2501.12948, section 2.2.2: a reward for accuracy and one for the format, and no model of
rewards that could be fooled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ....localrun.families.thinking import split_thinking
from ...records import GradesAnswers, Problem


@dataclass(frozen=True)
class Reward:
    """What one answer earned: `total` is what the policy learns from."""

    total: float
    is_right: bool
    is_closed: bool | None
    """Whether it closed its thinking; None if it never opened any."""


def reward_of(
    problem: Problem, text: str, starts_inside: bool, grader: GradesAnswers, format_weight: float = 0.1
) -> Reward:
    """Grade a generated text, whose thinking the prompt may have opened already.

    A right answer earns 1; thinking that is closed and followed by an answer earns `format_weight`.
    """
    _, content, closed = split_thinking(text, starts_inside)
    is_right = bool(content.strip()) and grader.grade(problem, content).verdict == "right"
    has_form = bool(closed) and bool(content.strip())
    return Reward(is_right + format_weight * has_form, is_right, closed)


def mean(rewards: Sequence[Reward]) -> float:
    """Return the share of right answers."""
    return sum(reward.is_right for reward in rewards) / len(rewards) if rewards else 0.0
