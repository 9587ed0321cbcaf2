"""What a training run reports."""

from __future__ import annotations

from dataclasses import dataclass


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
