"""The teacher: the unquantized student's most probable tokens at every position of its replies, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ...localrun.core.reporter import Reporter
from ..measure.texts import Text
from .model import states_of, uses_bf16

if TYPE_CHECKING:
    import torch

_WIDTH = 16  # widths of batches are multiples: oneDNN compiles a product for each shape


@dataclass(frozen=True)
class TaughtText:
    """A text with the teacher's top k tokens at its T reply positions, and their log-probabilities `[T, k]`."""

    tokens: tuple[int, ...]
    n_prompt: int
    top: torch.Tensor
    logprobs: torch.Tensor


_T = TypeVar("_T", Text, TaughtText)


def teach(
    model: Any, texts: Sequence[Text], *, top_k: int, batch_tokens: int, device: torch.device, report: Reporter
) -> list[TaughtText]:
    """Return every text with the unquantized model's top tokens; its logits are computed in fp32."""
    import torch

    k = min(top_k, model.config.vocab_size - 1)
    taught: list[TaughtText] = []
    for batch in cut(sorted(texts, key=lambda text: len(text.tokens)), batch_tokens):
        tokens, wanted = collate(batch, device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(model, device)):
            states = states_of(model, tokens, wanted=wanted, weights={}).split([int(n) for n in wanted.sum(1)])
        for text, text_states in zip(batch, states, strict=True):
            with torch.no_grad():
                logits = model.get_output_embeddings()(text_states.float())
                logprobs, top = torch.log_softmax(logits, dim=-1).topk(k)
            taught.append(TaughtText(text.tokens, text.n_prompt, top.int().cpu(), logprobs.cpu()))
        report.progress("the teacher reads", len(taught), total=len(texts))
    return taught


def cut(texts: Sequence[_T], batch_tokens: int) -> list[list[_T]]:
    """Return texts, given the shortest first, as batches of at most so many tokens, padding included."""
    batches: list[list[_T]] = [[]]
    for text in texts:
        if batches[-1] and (len(batches[-1]) + 1) * _width(text) > batch_tokens:
            batches.append([])
        batches[-1].append(text)
    return batches


def _width(text: Text | TaughtText) -> int:
    return -(-len(text.tokens) // _WIDTH) * _WIDTH


def collate(batch: Sequence[Text | TaughtText], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens `[B, T]`, padded on the right, and which positions `[B, T]` predict a token of a reply.

    A causal model never looks to the right, so it needs no mask.
    """
    import torch

    width = max(_width(text) for text in batch)
    tokens = torch.zeros((len(batch), width), dtype=torch.long)
    wanted = torch.zeros((len(batch), width), dtype=torch.bool)
    for i, text in enumerate(batch):
        tokens[i, : len(text.tokens)] = torch.tensor(text.tokens)
        wanted[i, max(text.n_prompt - 1, 0) : len(text.tokens) - 1] = True
    return tokens.to(device), wanted.to(device)
