"""How a student is trained, and what a training run reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...errors import UsageError


@dataclass(frozen=True)
class TrainSettings:
    """How to train. `lr` None is 6e-4 for LoRA and 1e-4 for all weights; `minutes` None trains `epochs` to the end.

    Layers below `lora_first_layer` have no adapter, so the backward pass stops there. `lora_targets` are names of
    linear maps (`q_proj,v_proj`) with commas between them; empty takes every one. `lora_plus` is the learning rate of
    LoRA's B by that of its A (arXiv 2402.12354). `steps` ends the run early and shapes the schedule.
    `micro_batch` None takes as many rows at once as fit the memory; a step is `batch_size` rows whatever it is.
    `dtype` and `threads` None are measured at the start of a run and then kept.
    """

    full: bool = False
    lora_rank: int = 32
    lora_alpha: int = 32
    lora_targets: str = ""
    lora_first_layer: int = 0
    lora_plus: float = 1.0
    dora: bool = False
    rslora: bool = False
    qlora: bool = False
    lr: float | None = None
    batch_size: int = 16
    micro_batch: int | None = None
    epochs: int = 3
    steps: int | None = None
    minutes: float | None = None
    max_length: int = 1024
    too_long: Literal["drop", "shorten"] = "drop"
    reasoning_weight: float = 1.0
    answer_weight: float = 1.0
    warmup: float = 0.03
    final_lr: float = 0.05
    weight_decay: float = 0.0
    n_validation: int = 32
    patience: int = 8
    save_every_s: float = 60.0
    dtype: Literal["bf16", "fp32"] | None = None
    threads: int | None = None
    report_to: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        """Collect what does not go together.

        Raises:
            UsageError: some of it does not.
        """
        lora_only = {"dora": self.dora, "rslora": self.rslora, "qlora": self.qlora, "lora_targets": self.lora_targets}
        given = [name for name, value in lora_only.items() if value]
        if self.full and given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UsageError(f"--full trains all weights, {flags} an adapter", "leave one of them out")
        if self.reasoning_weight == 0 and self.answer_weight == 0:
            raise UsageError(
                "with reasoning and answer both weighing 0 there is nothing to learn",
                "give --reasoning-weight or --answer-weight a value above 0",
            )

    @property
    def peak_lr(self) -> float:
        """The highest learning rate of the schedule."""
        return self.lr if self.lr is not None else (1e-4 if self.full else 6e-4)


@dataclass(frozen=True)
class TrainReport:
    """What a training run did. `tokens_per_s` counts every token of the rows, prompts included, without padding.

    Rows that begin alike have the beginning computed once: `computed_tokens_per_s` counts what was. `stopped` is `end`,
    `time` or `early`. `pass_` is how states were computed (see `objective`). The validation's loss is cross-entropy,
    its accuracy the share of its target tokens that are the student's first choice, the tokens before them given.
    `merge_error` is the largest difference of the merged student's logits from those of base and adapter, in fp32, by
    the largest logit.
    """

    steps: int
    rows: int
    tokens: int
    minutes: float
    tokens_per_s: float
    computed_tokens_per_s: float
    final_loss: float
    stopped: str
    pass_: str
    dtype: str
    threads: int
    micro_batch: int
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    merge_error: float | None = None
