"""The training objective as the model's own forward: `model(**batch.inputs())` is the summed loss of a batch.

It stands in the model's `forward`, so that whatever wraps a model to train it on several devices (DDP, FSDP) sees an
ordinary call. The states come from the fastest pass that is exact for the student: `fast` (see `fast.model`), `packed`
(the model's own layers, attention by rows), or `padded`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from .fast.interface import use_row_attention
from .fast.model import FastDecoder, fast_decoder
from .losses import LOSSES, Segment, Targets, projected_loss, token_scores
from .packing import Batch, Layout, pack, pad
from .rows import Row

Pass = Literal["fast", "packed", "padded"]


class Objective:
    """A student's objective; `pass_` says how its states are computed."""

    def __init__(self, model: Any, longest: int) -> None:
        """Take over the forward of a causal language model, or of peft's around one, that stands on its device.

        longest: tokens of the longest row; a sliding window shorter than it leaves only the padded pass.
        """
        self.causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._fast: FastDecoder | None = None
        self.pass_: Pass = self._choose(longest)
        self.causal_lm.forward = partial(_forward, self.causal_lm, self._fast)

    def _choose(self, longest: int) -> Pass:
        if _window(self.causal_lm.config) < longest:
            return "padded"
        # FSDP and DeepSpeed gather a layer's weights when the layer itself is called, which the fast pass does not do.
        is_sharded = any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
        if not is_sharded:
            self._fast = fast_decoder(self.causal_lm)
        if self._fast:
            return "fast"
        return "packed" if use_row_attention(self.causal_lm) else "padded"

    def collator(self, pad_token_id: int) -> Callable[[Sequence[Row]], dict[str, Any]]:
        """Return what makes a batch of rows for this pass."""
        if self.pass_ == "padded":
            return lambda rows: pad(rows, pad_token_id).inputs()
        return lambda rows: pack(rows).inputs()

    @torch.no_grad()
    def scores(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return log q of each target `[N]` and whether it is the model's first choice `[N]`."""
        batch = Batch(**inputs)
        device = self.causal_lm.device
        states = _states(self.causal_lm, self._fast, batch.input_ids.to(device), batch.position_ids, batch.layout)
        head = self.causal_lm.get_output_embeddings()
        wanted = states.index_select(0, batch.positions.to(device))
        return token_scores(wanted, head.weight, batch.targets.ids.to(device), bias=head.bias)

    def release(self) -> None:
        """Give the model its own forward back."""
        del self.causal_lm.forward


def _forward(
    causal_lm: Any,
    fast: FastDecoder | None,
    *,
    input_ids: Tensor,
    position_ids: Tensor,
    layout: Layout | None,
    positions: Tensor,
    targets: Targets,
    segments: Sequence[Segment],
    **_: Any,
) -> Tensor:
    states = _states(causal_lm, fast, input_ids, position_ids, layout)
    head, config = causal_lm.get_output_embeddings(), causal_lm.config
    return projected_loss(
        states.index_select(0, positions),
        head.weight,
        targets.to(states.device),
        segments,
        LOSSES,
        bias=head.bias,
        softcap=getattr(config, "final_logit_softcapping", None),
        scale=_logit_scale(config),
    )


def _states(
    causal_lm: Any, fast: FastDecoder | None, input_ids: Tensor, position_ids: Tensor, layout: Layout | None
) -> Tensor:
    """Return the decoder's last states, flat `[T, H]`."""
    layout = layout.to(input_ids.device) if layout is not None else None
    if fast is not None and layout is not None:
        return fast(input_ids, layout)
    rows = {} if layout is None else {"position_ids": position_ids.to(input_ids.device), "layout": layout}
    states: Tensor = causal_lm.get_decoder()(input_ids=input_ids, use_cache=False, **rows).last_hidden_state
    return states.flatten(0, 1)


def _window(config: Any) -> float:
    """Return how far back the narrowest attention of a model sees, in tokens."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = getattr(text, "layer_types", None) or []
    if any("linear" in kind or "chunked" in kind for kind in kinds):
        return 0.0  # states run on from token to token, or cut at fixed places: rows must not lie end to end
    window = getattr(text, "sliding_window", None)
    is_used = "sliding_attention" in kinds if kinds else getattr(text, "use_sliding_window", True)
    return float(window) if window and is_used else float("inf")


def _logit_scale(config: Any) -> float:
    """Return what the model multiplies its logits by: Granite divides them, Cohere scales them."""
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
