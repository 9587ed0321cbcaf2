"""The reward of an answer: the verdict of the graders that verify traces, and a little for the right form.

Source: DeepSeek-R1, arXiv 2501.12948, section 2.2.2: a reward for accuracy and one for the format, and no reward
model that could be fooled.
"""

from __future__ import annotations

from dataclasses import dataclass

from ....localrun.families.thinking import split_thinking
from ...records import GradesAnswers, Problem


@dataclass(frozen=True)
class Reward:
    """The reward of one answer; the policy learns from `total`."""

    total: float
    is_right: bool


def reward_of(
    problem: Problem, text: str, *, starts_inside: bool, grader: GradesAnswers, format_weight: float = 0.1
) -> Reward:
    """Grade a generated text; `starts_inside` says that the prompt opened its thinking.

    A correct answer earns 1; thinking that is closed and followed by an answer earns `format_weight`.
    """
    _, content, closed = split_thinking(text, starts_inside)
    is_right = bool(content.strip()) and grader.grade(problem, content).verdict == "right"
    has_form = bool(closed) and bool(content.strip())
    return Reward(is_right + format_weight * has_form, is_right)
