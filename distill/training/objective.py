"""The training objective as the model's own forward: `model(**batch.inputs())` is the summed loss of a batch.

It is the model's `forward`, so that whatever wraps a model to train it on several devices (DDP, FSDP) sees an ordinary
call. The states come from the fastest pass that is exact for the student: `fast` (see `fast.model`), `packed` (the
model's own layers, attention by rows), or `padded`.
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
from .losses import LOSSES, Head, projected_loss, token_scores
from .packing import Batch, Layout, pack, pad
from .rows import Row

_PROBE = [Row([1 + (7 * i + 3 * j) % 11 for i in range(5 + j)], 1) for j in range(3)]

Pass = Literal["fast", "packed", "padded"]


class Objective:
    """A student's objective; `pass_` says how its states are computed."""

    def __init__(self, model: Any, longest: int) -> None:
        """Replace the forward of a causal language model, or of the one inside peft's, once it is on its device.

        longest: tokens of the longest row; with a sliding window shorter than that only the padded pass is exact.

        Raises:
            ModelError: `code` "unknown-logits": the model makes its logits in a way that the losses do not know.
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
        """Return the function that makes this pass's batches; it can be sent to another process."""
        return partial(_padded, pad_token_id) if self.pass_ == "padded" else _packed

    @torch.no_grad()
    def scores(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return log q of each target `[N]` and whether it is the model's first choice `[N]`.

        It calls the whole model, as a step does: a sharded one gathers its weights only then.
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
    causal_lm: Any, fast: FastDecoder | None, *, is_scored: bool = False, **inputs: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """Return a batch's summed loss, or with `is_scored` what `token_scores` says of its targets."""
    batch = Batch(**{name: inputs[name] for name in Batch.__dataclass_fields__})  # peft adds arguments of its own
    states = states_of(causal_lm, fast, input_ids=batch.input_ids, position_ids=batch.position_ids, layout=batch.layout)
    states, targets = states.index_select(0, batch.positions), batch.targets.to(states.device)  # [N, H]
    projection, config = causal_lm.get_output_embeddings(), causal_lm.config
    softcap = getattr(config, "final_logit_softcapping", None)
    head = Head(projection.weight, projection.bias, softcap, logit_scale(config))
    if is_scored:
        return token_scores(states, head, targets.ids)
    return projected_loss(states, head, targets=targets, segments=batch.segments, losses=LOSSES)


def states_of(
    causal_lm: Any, fast: FastDecoder | None, *, input_ids: Tensor, position_ids: Tensor, layout: Layout | None
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
    """Let a model attend by rows if its states are then those of separate rows; say whether they are."""
    decoder, before = causal_lm.get_decoder(), causal_lm.config._attn_implementation
    batch, was_training = pack(_PROBE), causal_lm.training
    assert batch.layout is not None
    causal_lm.eval()
    layout, ids = batch.layout.to(causal_lm.device), batch.input_ids.to(causal_lm.device)
    try:
        plain = decoder(input_ids=ids[0][layout.gather], use_cache=False).last_hidden_state
        if use_row_attention(causal_lm):
            position_ids = batch.position_ids
            found = states_of(causal_lm, None, input_ids=ids, position_ids=position_ids, layout=batch.layout)
            wanted = batch.positions.to(causal_lm.device)
            if _near(found[wanted], plain.flatten(0, 1)[layout.scatter][wanted]):
                causal_lm.train()  # dropout in its attention is refused
                states_of(causal_lm, None, input_ids=ids, position_ids=position_ids, layout=batch.layout)
                return True
    except (TypeError, ValueError, RuntimeError):
        pass  # the model does not accept a layout, or does not pass it on to its attention
    finally:
        causal_lm.train(was_training)
    causal_lm.config._attn_implementation = before
    return False


@torch.no_grad()
def _check_head(causal_lm: Any) -> None:
    """Check that the model's logits are those that `projected_loss` computes of its last states."""
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
        f"the student ({type(causal_lm).__name__}) makes its logits in a way that deepdistill cannot train",
        "deepdistill trains models whose logits are a product with their last states, scaled or capped",
        code="unknown-logits",
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
    """Return the factor of a model's logits: Granite divides them, Cohere multiplies them."""
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
