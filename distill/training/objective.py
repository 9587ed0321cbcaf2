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

from ...errors import ModelError
from .fast.interface import use_row_attention
from .fast.model import FastDecoder, fast_decoder
from .losses import LOSSES, Segment, Targets, projected_loss, token_scores
from .packing import Layout, pack, pad
from .rows import Row

_PROBE = [Row([1 + (7 * i + 3 * j) % 11 for i in range(5 + j)], 1) for j in range(3)]

Pass = Literal["fast", "packed", "padded"]


class Objective:
    """A student's objective; `pass_` says how its states are computed."""

    def __init__(self, model: Any, longest: int) -> None:
        """Take over the forward of a causal language model, or of peft's around one, that stands on its device.

        longest: tokens of the longest row; a sliding window shorter than it leaves only the padded pass.

        Raises:
            ModelError: the model makes its logits in a way that the losses do not know.
        """
        self._model = model
        self.causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        _check_head(self.causal_lm)
        self._fast: FastDecoder | None = None
        self.pass_: Pass = self._choose(longest)
        self.causal_lm.forward = partial(_forward, self.causal_lm, self._fast)

    def _choose(self, longest: int) -> Pass:
        if window_of(self.causal_lm.config) < longest:
            return "padded"
        # FSDP and DeepSpeed gather a layer's weights when the layer itself is called, which the fast pass does not do.
        is_sharded = any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
        if not is_sharded:
            self._fast = fast_decoder(self.causal_lm)
        if self._fast:
            return "fast"
        return "packed" if can_pack(self.causal_lm) else "padded"

    def collator(self, pad_token_id: int) -> Callable[[Sequence[Row]], dict[str, Any]]:
        """Return what makes a batch of rows for this pass; another process can be handed it."""
        return partial(_padded, pad_token_id) if self.pass_ == "padded" else _packed

    @torch.no_grad()
    def scores(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return log q of each target `[N]` and whether it is the model's first choice `[N]`.

        It is a call of the whole model, as a step is: only so a sharded one gathers its weights.
        """
        moved = {name: inputs[name].to(self.causal_lm.device) for name in ("input_ids", "positions")}
        scored: tuple[Tensor, Tensor] = self._model(**inputs | moved, is_scored=True)
        return scored

    def release(self) -> None:
        """Give the model its own forward back."""
        del self.causal_lm.forward


def _padded(pad_token_id: int, rows: Sequence[Row]) -> dict[str, Any]:
    return pad(rows, pad_token_id).inputs()


def _packed(rows: Sequence[Row]) -> dict[str, Any]:
    return pack(rows).inputs()


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
    is_scored: bool = False,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    states = states_of(causal_lm, fast, input_ids, position_ids, layout).index_select(0, positions)
    head, config, targets = causal_lm.get_output_embeddings(), causal_lm.config, targets.to(states.device)
    softcap, scale = getattr(config, "final_logit_softcapping", None), logit_scale(config)
    if is_scored:
        return token_scores(states, head.weight, targets.ids, bias=head.bias, softcap=softcap, scale=scale)
    return projected_loss(states, head.weight, targets, segments, LOSSES, bias=head.bias, softcap=softcap, scale=scale)


def states_of(
    causal_lm: Any, fast: FastDecoder | None, input_ids: Tensor, position_ids: Tensor, layout: Layout | None
) -> Tensor:
    """Return the decoder's last states, flat `[T, H]`; a layout needs `can_pack`, or the fast pass."""
    layout = layout.to(input_ids.device) if layout is not None else None
    if fast is not None and layout is not None:
        return fast(input_ids, layout)
    rows = {} if layout is None else {"position_ids": position_ids.to(input_ids.device), "layout": layout}
    states: Tensor = causal_lm.get_decoder()(input_ids=input_ids, use_cache=False, **rows).last_hidden_state
    return states.flatten(0, 1)


@torch.no_grad()
def can_pack(causal_lm: Any) -> bool:
    """Let a model attend by rows if it then has the states of separate rows; say whether it has."""
    decoder, before = causal_lm.get_decoder(), causal_lm.config._attn_implementation
    batch, was_training = pack(_PROBE), causal_lm.training
    assert batch.layout is not None
    causal_lm.eval()
    layout, ids = batch.layout.to(causal_lm.device), batch.input_ids.to(causal_lm.device)
    try:
        plain = decoder(input_ids=ids[0][layout.gather], use_cache=False).last_hidden_state
        if use_row_attention(causal_lm):
            found = states_of(causal_lm, None, ids, batch.position_ids, batch.layout)
            wanted = batch.positions.to(causal_lm.device)
            if _near(found[wanted], plain.flatten(0, 1)[layout.scatter][wanted]):
                return True
    except (TypeError, ValueError, RuntimeError):
        pass  # it does not take what it is given, or does not hand it on
    finally:
        causal_lm.train(was_training)
    causal_lm.config._attn_implementation = before
    return False


@torch.no_grad()
def _check_head(causal_lm: Any) -> None:
    """See that the logits are what `projected_loss` computes of the last states."""
    was_training, config = causal_lm.training, causal_lm.config
    causal_lm.eval()
    try:
        ids = torch.tensor([_PROBE[0].input_ids], device=causal_lm.device)
        states = causal_lm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        head = causal_lm.get_output_embeddings()
        logits = head(states).float() * logit_scale(config)
        cap = getattr(config, "final_logit_softcapping", None)
        logits = cap * torch.tanh(logits / cap) if cap else logits
        if _near(logits, causal_lm(input_ids=ids, use_cache=False).logits.float()):
            return
    finally:
        causal_lm.train(was_training)
    raise ModelError(
        f"the student ({type(causal_lm).__name__}) makes its logits in a way that training does not know",
        "deepdistill trains models whose logits are a product with their last states, scaled or capped",
    )


def _near(found: Tensor, expected: Tensor) -> bool:
    """Say whether most states agree up to rounding."""
    error = (found.float() - expected.float()).norm(dim=-1)
    tolerance = 1e-3 if expected.dtype == torch.float32 and found.dtype == torch.float32 else 0.1
    return bool((error <= tolerance * expected.float().norm(dim=-1).clamp(min=1e-6)).float().mean() > 0.8)


def window_of(config: Any) -> float:
    """Return how far back the narrowest attention of a model sees, in tokens."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = getattr(text, "layer_types", None) or []
    if any("linear" in kind or "chunked" in kind for kind in kinds):
        return 0.0  # states run on from token to token, or cut at fixed places: rows must not lie end to end
    window = getattr(text, "sliding_window", None)
    is_used = "sliding_attention" in kinds if kinds else getattr(text, "use_sliding_window", True)
    return float(window) if window and is_used else float("inf")


def logit_scale(config: Any) -> float:
    """Return what the model multiplies its logits by: Granite divides them, Cohere scales them."""
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
