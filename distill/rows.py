"""Traces as training rows: the tokens of the prompt, then of the reasoning and the answer, which alone carry loss.

The prompt of a row is the very string that inference prompts with (`apply_chat_template(add_generation_prompt=True)`),
and the completion is tokenised apart from it, as it is when it is generated: no token spans the seam.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ModelError
from ..localrun.generation import Message

IGNORED = -100


@dataclass(frozen=True)
class Row:
    """Token ids of one example; the first `n_prompt` carry no loss."""

    input_ids: list[int]
    n_prompt: int


def make_row(tokenizer: Any, messages: Sequence[Message], reasoning: str, content: str) -> Row:
    """Render a trace with the student's template and tokenise it.

    Raises:
        ModelError: the template does not continue the generation prompt with the answer, or does not end it with EOS.
    """
    prompt = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    answer = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    whole = tokenizer.apply_chat_template([*messages, answer], tokenize=False)
    if not whole.startswith(prompt):
        raise ModelError(
            "the student's chat template renders an answer differently from how it prompts for one",
            "a finished turn must begin with what add_generation_prompt ends with",
        )
    completion = whole[len(prompt) :]
    end = completion.rfind(tokenizer.eos_token)
    if end < 0:
        raise ModelError(f"the student's chat template does not end a turn with its EOS, {tokenizer.eos_token!r}")
    completion = completion[: end + len(tokenizer.eos_token)]  # nothing after EOS is ever generated
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    return Row(prompt_ids + tokenizer(completion, add_special_tokens=False).input_ids, len(prompt_ids))


def order_rows(rows: Sequence[Row], batch_size: int, epochs: int, seed: int) -> list[Row]:
    """Return the rows of every epoch in turn, shuffled so that each batch holds rows of similar length."""
    rng = random.Random(seed)
    ordered: list[Row] = []
    window = 8 * batch_size
    for _ in range(epochs):
        shuffled = rng.sample(list(rows), len(rows))
        for start in range(0, len(shuffled), window):
            near = sorted(shuffled[start : start + window], key=lambda row: len(row.input_ids))
            batches = [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
            # A short batch would shift every later one across two lengths: it comes last of its window.
            full = [batch for batch in batches if len(batch) == batch_size]
            rng.shuffle(full)
            ordered += [row for batch in full + [b for b in batches if len(b) < batch_size] for row in batch]
    return ordered


def collate(rows: Sequence[Row], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right. `labels[b, t]` is the token after position t where that token carries loss, else -100.

    No attention mask: a causal model never looks right, so real tokens cannot see the padding, and sdpa keeps its fast
    causal kernel.
    """
    width = max(len(row.input_ids) for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)  # [B, T]
    labels = torch.full((len(rows), width), IGNORED)  # [B, T]
    for i, row in enumerate(rows):
        input_ids[i, : len(row.input_ids)] = torch.tensor(row.input_ids)
        labels[i, row.n_prompt - 1 : len(row.input_ids) - 1] = torch.tensor(row.input_ids[row.n_prompt :])
    return {"input_ids": input_ids, "labels": labels}
