"""Traces as training rows: the tokens of the prompt, then of the reasoning and the answer, which alone carry loss.

The prompt of a row is the very string that inference prompts with (`apply_chat_template(add_generation_prompt=True)`),
and the completion is tokenised apart from it, as it is when it is generated: no token spans the seam. A row says which
loss it carries, so a training run is any mixture of rows.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...errors import ModelError
from ...localrun.core.generation import Message, TopLogprobs
from ..tokenizer import Tokenizer
from ..traces.logprobs import StoredTop

CROSS_ENTROPY = (("cross_entropy", 1.0),)


@dataclass(frozen=True)
class Row:
    """One example. The first `n_prompt` tokens are given; each of the n that follow is a target.

    Thousands are held while a student trains, so a row is small: four bytes a token, and `top` may stay on the disk.

    losses: the names of `losses.LOSSES` that its targets carry, each with its share.
    weights: `[n]`, at least 0, how much each target counts; all count 1 if None. They are in the mean's denominator.
    top: the teacher's `[n, k]` best tokens at each target (forward_kl, reverse_kl).
    advantages: `[n]`, any sign (policy_gradient). old_logprobs: `[n]`, of the targets when they were sampled.
    """

    input_ids: Sequence[int]
    n_prompt: int
    losses: tuple[tuple[str, float], ...] = CROSS_ENTROPY
    weights: list[float] | None = None
    top: TopLogprobs | StoredTop | None = field(default=None, repr=False)
    advantages: list[float] | None = None
    old_logprobs: list[float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_ids", array("i", self.input_ids))
        n = self.n_targets
        assert 0 < self.n_prompt <= len(self.input_ids), "a target needs a token before it"
        for values in (self.weights, self.advantages, self.old_logprobs):
            assert values is None or len(values) == n, "one value a target"
        assert self.top is None or len(self.top) == n, "one row of log-probabilities a target"

    @property
    def n_targets(self) -> int:
        """How many tokens are to be learned."""
        return len(self.input_ids) - self.n_prompt

    def distribution(self) -> TopLogprobs | None:
        """Return the teacher's best tokens at each target, from the disk where they stayed there.

        Raises:
            ArtifactError: the file is gone or broken.
        """
        if isinstance(self.top, StoredTop):
            return self.top.read(self.input_ids[self.n_prompt :])
        return self.top


def make_row(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    reasoning: str,
    content: str,
    reasoning_weight: float = 1.0,
    answer_weight: float = 1.0,
) -> Row:
    """Render a trace with the student's template and tokenise it.

    The weights are those of the thinking, its closing tag included, and of what follows.

    Raises:
        ModelError: the template does not continue the generation prompt with the answer, leaves the reasoning out, or
            does not end the turn with EOS.
    """
    prompt = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    answer = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    whole = tokenizer.apply_chat_template([*messages, answer], tokenize=False)
    if not whole.startswith(prompt):
        raise ModelError(
            "the student's chat template renders an answer differently from how it prompts for one",
            "a finished turn must begin with what add_generation_prompt ends with",
            code="template-mismatch",
        )
    completion = whole[len(prompt) :]
    if reasoning.strip() not in completion:
        raise ModelError(
            "the student's chat template has no slot for reasoning: a rendered answer lacks it",
            "give its tokenizer a chat_template that renders message.reasoning_content",
            code="no-reasoning-slot",
        )
    end = completion.rfind(tokenizer.eos_token)
    if end < 0:
        eos = tokenizer.eos_token
        raise ModelError(
            f"the student's chat template does not end a turn with its EOS, {eos!r}",
            "give its tokenizer the eos_token that the template ends a turn with",
            code="no-turn-end",
        )
    completion = completion[: end + len(tokenizer.eos_token)]  # nothing after EOS is ever generated
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    if reasoning_weight == answer_weight == 1.0:
        return Row(prompt_ids + tokenizer(completion, add_special_tokens=False).input_ids, len(prompt_ids))
    coded = tokenizer(completion, add_special_tokens=False, return_offsets_mapping=True)
    seam = completion.rfind(content.strip(), 0, end) if content.strip() else end
    weights = [reasoning_weight if start < seam else answer_weight for start, _ in coded.offset_mapping]
    return Row(prompt_ids + coded.input_ids, len(prompt_ids), weights=weights)


def shortened(
    tokenizer: Tokenizer,
    row: Row,
    *,
    messages: Sequence[Message],
    reasoning: str,
    content: str,
    max_length: int,
    weights: Mapping[str, float] | None = None,
) -> Row:
    """Return a row of at most max_length tokens: the same without lines from the middle of its reasoning.

    What cannot be shortened so far, and what is short enough, is returned as it is.
    """
    lines = reasoning.splitlines()
    best, low, high = row, 1, len(lines) - 1  # how many lines may stay
    if len(row.input_ids) <= max_length:
        return row
    while low <= high:
        n_kept = (low + high) // 2
        kept = lines[: (n_kept + 1) // 2] + lines[len(lines) - n_kept // 2 :]
        tried = make_row(tokenizer, messages, reasoning="\n".join(kept), content=content, **(weights or {}))
        if len(tried.input_ids) <= max_length:
            best, low = tried, n_kept + 1
        else:
            high = n_kept - 1
    return best


def order_rows(rows: Sequence[Row], batch_size: int, *, epochs: int, seed: int) -> list[Row]:
    """Return the rows of every epoch in turn, shuffled so that each batch has rows of similar length.

    The very first batch has the longest rows, so that rows that do not fit the memory fail in the first step.
    """
    rng = random.Random(seed)
    ordered: list[Row] = []
    window = 8 * batch_size
    for epoch in range(epochs):
        shuffled = rng.sample(list(rows), len(rows))
        if epoch == 0:
            longest = sorted(range(len(shuffled)), key=lambda i: -len(shuffled[i].input_ids))[:batch_size]
            first = set(longest)
            ordered += [shuffled[i] for i in longest]
            shuffled = [row for i, row in enumerate(shuffled) if i not in first]
        for start in range(0, len(shuffled), window):
            near = sorted(shuffled[start : start + window], key=lambda row: len(row.input_ids))
            batches = [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
            # A short batch would shift every later one across two lengths: it comes last of its window.
            full = [batch for batch in batches if len(batch) == batch_size]
            rng.shuffle(full)
            ordered += [row for batch in full + [b for b in batches if len(b) < batch_size] for row in batch]
    return ordered
