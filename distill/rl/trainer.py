"""TRL's `GRPOTrainer` on packed rows, with a learning rate that falls to zero.

TRL pads every answer to the longest: with answers of 76 tokens on average and a few of 192, most of what it computes
is padding. Here rows lie end to end, a problem's prompt once for its whole group (see `packing`); the loss is TRL's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer

from ..fast.interface import use_row_attention
from ..objective import can_pack, states_of
from ..packing import pack
from ..rows import Row


class RewardTrainer(GRPOTrainer):
    """GRPO whose learning rate is `rate(step)` times the peak."""

    model: Any

    def __init__(self, rate: Callable[[int], float], **keywords: Any) -> None:
        super().__init__(**keywords)
        self._rate = rate
        # Answers are sampled with the model's own attention. DDP, FSDP and DeepSpeed need the call of the whole model.
        with self._own_attention():
            self._packs = self.accelerator.num_processes == 1 and can_pack(self.model)

    @contextmanager
    def _own_attention(self) -> Iterator[None]:
        """Leave the model with the attention that it has now."""
        attention = self.model.config._attn_implementation
        try:
            yield
        finally:
            self.model.config._attn_implementation = attention

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the schedule."""
        if self.lr_scheduler is None:
            of = optimizer if optimizer is not None else self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(of, self._rate)  # type: ignore[arg-type]
        return self.lr_scheduler

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
        """Return log-probabilities and entropies of the answers' tokens `[n, logits_to_keep]`, and no other loss."""
        if not self._packs or others.get("compute_aux_loss"):
            found: tuple[Tensor, Tensor | None, Tensor | None] = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **others
            )
            return found
        n_at_once = batch_size or len(input_ids)
        parts = [
            self._scores(input_ids[i : i + n_at_once], attention_mask[i : i + n_at_once], logits_to_keep)
            for i in range(0, len(input_ids), n_at_once)
        ]
        logps, entropies = (torch.cat(each) for each in zip(*parts, strict=True))
        return logps, entropies if compute_entropy else None, None

    def _scores(self, input_ids: Tensor, attention_mask: Tensor, n_kept: int) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies `[n, n_kept]` of rows whose last n_kept places hold the answers."""
        there = attention_mask.bool()
        n_prompt = there[:, :-n_kept].sum(1).tolist()
        given = [Row(ids[here].tolist(), n) for ids, here, n in zip(input_ids, there, n_prompt, strict=True)]
        order = sorted(range(len(given)), key=lambda i: list(given[i].input_ids))  # as they are packed
        batch = pack([given[i] for i in order])
        device = input_ids.device
        with self._own_attention(), self.accelerator.autocast():
            use_row_attention(self.model)
            states = states_of(self.model, None, batch.input_ids.to(device), batch.position_ids, batch.layout)
            logits = self.model.get_output_embeddings()(states[batch.positions.to(device)])  # [N, V]
        each = torch.log_softmax(logits.float() / self.temperature, dim=-1)
        chosen = each.gather(1, batch.targets.ids[:, None].to(device)).squeeze(1)
        with torch.no_grad():
            spread = -(each.exp() * each).sum(-1)
        row, place = there[order, -n_kept:].nonzero(as_tuple=True)
        index, shape = (torch.tensor(order, device=device)[row], place), (len(given), n_kept)
        return chosen.new_zeros(shape).index_put(index, chosen), spread.new_zeros(shape).index_put(index, spread)
