"""TRL's `GRPOTrainer` on packed rows, without those that teach nothing, and with a falling learning rate.

TRL pads every answer to the longest. Here rows are packed end to end, and a problem's prompt is computed once for its
whole group (see `packing`). If all answers of a group earned the same, none has an advantage: such rows, often half of
them or more, are not computed. The loss and its gradient are TRL's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from trl.trainer.grpo_trainer import GRPOTrainer

from ..fast.interface import use_row_attention
from ..objective import can_pack, logit_scale, states_of, window_of
from ..packing import pack
from ..rows import Row
from ..trainer import ResumingTrainer

_LEAST = 1e-3  # the mean of equal rewards is rounded: a smaller advantage is zero
_CHUNK_BYTES = 64 << 20  # of fp32 logits at once


class RewardTrainer(ResumingTrainer, GRPOTrainer):  # type: ignore[misc]
    """GRPO whose learning rate is `rate(step)` times the peak."""

    model: Any
    lr_scheduler: Any

    def __init__(self, rate: Callable[[int], float], **keywords: Any) -> None:
        super().__init__(**keywords)
        self._rate = rate
        self._longest = self._longest_packed()  # longer rows are padded, as TRL does

    def _longest_packed(self) -> float:
        config = self.model.config
        is_plain = not getattr(config, "final_logit_softcapping", None) and logit_scale(config) == 1.0
        # DDP, FSDP and DeepSpeed work only if the whole model is called
        if not is_plain or self.accelerator.num_processes > 1:
            return 0
        with _kept_attention(self.model):
            return window_of(config) if can_pack(self.model) else 0

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the schedule that multiplies the peak by `rate(step)`."""
        if self.lr_scheduler is None:
            optimizer = optimizer if optimizer is not None else self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return self.lr_scheduler

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss: Tensor = super()._compute_loss(model, teaching_rows(inputs))
        return loss

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return log-probabilities and entropies of the answers' tokens `[n, logits_to_keep]`; no auxiliary loss."""
        if input_ids.shape[1] > self._longest or others.get("compute_aux_loss"):
            found: tuple[Tensor, Tensor | None, Tensor | None] = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **others
            )
            return found
        n_at_once = batch_size or len(input_ids)
        parts = [
            self._scores(
                model,
                input_ids[i : i + n_at_once],
                attention_mask=attention_mask[i : i + n_at_once],
                n_kept=logits_to_keep,
            )
            for i in range(0, len(input_ids), n_at_once)
        ]
        logps, entropies = (torch.cat(each) for each in zip(*parts, strict=True))
        return logps, entropies if compute_entropy else None, None

    def _scores(self, model: Any, input_ids: Tensor, *, attention_mask: Tensor, n_kept: int) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies `[n, n_kept]` of rows whose last n_kept columns hold the answers."""
        is_token, device = attention_mask.bool().cpu(), input_ids.device  # [n, L]
        n_prompt = is_token[:, :-n_kept].sum(1).tolist()
        rows = [Row(ids[mask].tolist(), n) for ids, mask, n in zip(input_ids.cpu(), is_token, n_prompt, strict=True)]
        order = sorted(range(len(rows)), key=lambda i: list(rows[i].input_ids))  # the order in which `pack` lays them
        batch = pack([rows[i] for i in order])
        with _kept_attention(model), self.accelerator.autocast():
            use_row_attention(model)
            input_ids, position_ids = batch.input_ids.to(device), batch.position_ids
            states = states_of(model, None, input_ids=input_ids, position_ids=position_ids, layout=batch.layout)
            states, ids = states[batch.positions.to(device)], batch.targets.ids.to(device)
            scored = _token_scores(states, ids, head=model.get_output_embeddings(), temperature=self.temperature)
        row, place = is_token[order, -n_kept:].nonzero(as_tuple=True)
        index = torch.tensor(order, device=device)[row.to(device)], place.to(device)
        shape = len(rows), n_kept
        # back from packed targets to the answers' places in the padded rows
        logps, entropies = (flat.new_zeros(shape).index_put(index, flat) for flat in scored)
        return logps, entropies


def teaching_rows(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return TRL's batch without the rows that have no advantage; one row stays if none has."""
    advantages = inputs["advantages"]
    kept = (advantages.abs().reshape(len(advantages), -1).amax(1) > _LEAST).nonzero().squeeze(1)
    if not len(kept):
        kept = kept.new_zeros(1)

    def teaching(value: Any) -> Any:
        is_by_row = isinstance(value, Tensor) and value.dim() > 0 and len(value) == len(advantages)
        return value[kept] if is_by_row else value

    return {name: teaching(value) for name, value in inputs.items()}


def _token_scores(states: Tensor, ids: Tensor, *, head: Any, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log-probability and entropy of each token `[N]` of the states `[N, H]` that predict them, in chunks."""

    def score(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logps = torch.log_softmax(head(states).float() / temperature, dim=-1)  # [n, V]
        with torch.no_grad():
            entropies = -(logps.exp() * logps).sum(-1)
        return logps.gather(1, ids[:, None]).squeeze(1), entropies

    rows = max(1, _CHUNK_BYTES // (4 * head.weight.shape[0]))
    if len(states) <= rows:
        return score(states, ids)
    chunks = zip(states.split(rows), ids.split(rows), strict=True)
    parts = [checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks]
    logps, entropies = (torch.cat(each) for each in zip(*parts, strict=True))
    return logps, entropies


@contextmanager
def _kept_attention(model: Any) -> Iterator[None]:
    """Restore the model's attention afterwards, with which answers are sampled."""
    attention = model.config._attn_implementation
    try:
        yield
    finally:
        model.config._attn_implementation = attention
