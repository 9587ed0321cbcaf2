"""The figures of a training, as training.json keeps them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainReport:
    """The result of a training. `tokens_per_s` counts every token of the rows, prompts included, without padding.

    `computed_tokens_per_s` counts a beginning that rows share only once, as it is computed. `stopped` is `end`, `time`
    or `early`. `pass_` names the way in which states were computed (see `objective`). The validation's loss is
    cross-entropy, its accuracy the share of target tokens that are the student's first choice after the correct tokens
    before them. `merge_error` is the largest difference between the logits of the merged student and those of base and
    adapter, in fp32, as a share of the largest logit.
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
