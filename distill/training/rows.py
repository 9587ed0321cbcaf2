"""Traces as training rows: the tokens of the prompt, then those of reasoning and answer, which alone carry loss.

The prompt of a row is exactly the string that inference prompts with (`add_generation_prompt=True`). The completion is
tokenised apart from it, as it is when the student generates it: no token spans both. Each row names the losses that it
carries, so one training can mix rows of any kind.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...errors import ModelError
from ...localrun.core.generation import Message, TopLogprobs
from ..tokenizer import Tokenizer, ids_of, prompt_of
from ..traces.logprobs import StoredTop

CROSS_ENTROPY = (("cross_entropy", 1.0),)


@dataclass(frozen=True)
class Row:
    """One example: the first `n_prompt` tokens are the prompt, and each of the n that follow is a target.

    Training keeps thousands of rows in memory, so a row is small: four bytes per token, and `top` may stay on disk.

    losses: the losses that its targets carry, by their names in `losses.LOSSES`, each with its share.
    weights: `[n]`, at least 0: how much each target counts in the mean; 1 each if None.
    top: the teacher's k most probable tokens at each target, `[n, k]` (forward_kl, reverse_kl).
    advantages: `[n]`, of either sign (policy_gradient).
    old_logprobs: `[n]`, the targets' log-probabilities when they were sampled (policy_gradient).
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
        """How many tokens are targets."""
        return len(self.input_ids) - self.n_prompt

    def distribution(self) -> TopLogprobs | None:
        """Return the teacher's most probable tokens at each target; they are read from disk if they stayed there.

        Raises:
            ArtifactError: the file is missing or broken.
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

    `reasoning_weight` counts for the reasoning and its closing tag, `answer_weight` for all that follows.

    Raises:
        ModelError: see `_rendered`.
    """
    prompt, completion = _rendered(tokenizer, messages, reasoning=reasoning, content=content)
    prompt_ids = ids_of(tokenizer, prompt)
    if reasoning_weight == answer_weight == 1.0:
        return Row(prompt_ids + ids_of(tokenizer, completion), len(prompt_ids))
    encoded = tokenizer(completion, add_special_tokens=False, return_offsets_mapping=True)
    end = len(completion) - len(tokenizer.eos_token)
    answer_start = completion.rfind(content.strip(), 0, end) if content.strip() else end
    weights = [reasoning_weight if start < answer_start else answer_weight for start, _ in encoded.offset_mapping]
    return Row(prompt_ids + encoded.input_ids, len(prompt_ids), weights=weights)


def _rendered(tokenizer: Tokenizer, messages: Sequence[Message], *, reasoning: str, content: str) -> tuple[str, str]:
    """Return the prompt, and the completion up to EOS, as the student's chat template renders them.

    Raises:
        ModelError: `code` "template-mismatch": a finished turn does not begin with the generation prompt;
            "no-reasoning-slot": it lacks the reasoning; "no-turn-end": it does not end with EOS.
    """
    prompt = prompt_of(tokenizer, messages)
    turn = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    whole = prompt_of(tokenizer, [*messages, turn], asks=False)
    if not whole.startswith(prompt):
        raise ModelError(
            "the student's chat template renders an answer differently from how it prompts for one",
            "a finished turn must begin with what add_generation_prompt ends with",
            code="template-mismatch",
        )
    completion = whole[len(prompt) :]
    if reasoning.strip() not in completion:
        raise ModelError(
            "the student's chat template does not render the reasoning of an answer",
            "give its tokenizer a chat_template that renders message.reasoning_content",
            code="no-reasoning-slot",
        )
    before_eos, eos, _ = completion.rpartition(tokenizer.eos_token)  # the student never generates anything after EOS
    if not eos:
        raise ModelError(
            f"the student's chat template does not end a turn with its EOS, {tokenizer.eos_token!r}",
            "give its tokenizer the eos_token that the template ends a turn with",
            code="no-turn-end",
        )
    return prompt, before_eos + eos


def order_rows(rows: Sequence[Row], batch_size: int, *, epochs: int, seed: int) -> list[Row]:
    """Return the rows of every epoch in turn, shuffled so that each batch has rows of similar length.

    The longest rows come first, so that a training that does not fit the memory fails in its first step.
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
            # A short batch would make every later batch span two lengths, so it comes last in its window.
            full = [batch for batch in batches if len(batch) == batch_size]
            rng.shuffle(full)
            ordered += [row for batch in full + [b for b in batches if len(b) < batch_size] for row in batch]
    return ordered
