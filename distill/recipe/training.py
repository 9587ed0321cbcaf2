"""Settings of the second half of `teach`: how the student is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ...errors import UsageError
from ...localrun.core.settings import setting

_TRAINING = "Training"
_GRPO = ("grpo",)


OnPolicyLoss = Literal["auto", "reverse-kl", "forward-kl", "policy-gradient", "off"]


@dataclass(frozen=True)
class LoraRecipe:
    """The adapter that is trained beside frozen weights."""

    rank: int = setting(32, "Rank of the adapter.", min=1, name="lora-rank", unused_by=_GRPO)
    alpha: int = setting(
        32, "Scale of the adapter: its update is multiplied by alpha / rank.", min=1, name="lora-alpha", unused_by=_GRPO
    )
    targets: tuple[str, ...] = setting(
        (),
        "Linear maps with an adapter, such as q_proj,v_proj. Every one, if empty.",
        name="lora-targets",
        unused_by=_GRPO,
    )
    first_layer: int = setting(
        0,
        "The first layer with an adapter: the backward pass stops there, so that a higher one is faster.",
        min=0,
        name="lora-first-layer",
        unused_by=_GRPO,
    )
    plus: float = setting(
        1.0,
        "Learning rate of the adapter's B divided by that of its A; LoRA+ (arXiv 2402.12354) advises 16.",
        min=0.01,
        name="lora-plus",
        unused_by=_GRPO,
    )
    dora: bool = setting(False, "Weight-decomposed LoRA (arXiv 2402.09353); slower.", unused_by=_GRPO)
    rslora: bool = setting(
        False, "Divide by the root of the rank instead of the rank (arXiv 2312.03732).", unused_by=_GRPO
    )


@dataclass(frozen=True)
class CurriculumRecipe:
    """An order of the traces by how often the untrained student solves their problems."""

    enabled: bool = setting(
        False,
        "Order the traces by how often the untrained student solves their problems.",
        name="curriculum",
        unused_by=_GRPO,
    )
    easy_from: float = setting(0.75, "Pass rate from which a problem is easy.", min=0, max=1)
    easy_share: float = setting(0.5, "Share of the epochs in which an easy problem trains.", min=0, max=1)
    middle_times: int = setting(
        2, "Times that a problem of middling difficulty trains per epoch, from the second on.", min=1
    )
    head_start: float = setting(
        0.1, "Share of the rows before problems train that the student never solves.", min=0, max=1
    )


@dataclass(frozen=True)
class GrpoRecipe:
    """Reinforcement by the graders' verdicts, without a teacher."""

    group_size: int | None = setting(None, "Answers per problem. --samples if that is above 1, otherwise 8.", min=2)
    problems_per_step: int = setting(16, "Problems per step.", min=1)
    temperature: float = setting(1.0, "Sampling temperature of the student.", min=0)
    warmup_steps: int = setting(5, "Steps over which the learning rate rises.", min=0)
    clip_low: float = setting(0.2, "How far below 1 a probability ratio counts.", min=0, max=1)
    clip_high: float = setting(0.28, "How far above 1 a probability ratio counts.", min=0)
    kl_weight: float = setting(0.0, "Weight of the divergence from the untrained student.", min=0)
    format_weight: float = setting(0.1, "Reward for an answer in the right form, right or not.", min=0, max=1)
    max_grad_norm: float = setting(1.0, "Norm to which gradients are clipped.", min=0)


@dataclass(frozen=True)
class OnPolicyRecipe:
    """Rounds after the first training, in which the student answers, the teacher corrects, and the student trains."""

    rounds: int = setting(
        0, "Rounds after the first training: the student answers, the teacher corrects it.", min=0, heading=_TRAINING
    )
    n_problems: int = setting(500, "New problems per round.", min=1, name="round-problems")
    samples: int = setting(4, "The student's answers to each of them.", min=1, name="round-samples")
    loss: OnPolicyLoss = setting(
        "auto",
        "How the teacher's scores of the student's own tokens train it. Off: its own correct answers train.",
        name="on-policy-loss",
    )
    temperature: float = setting(1.0, "Sampling temperature of the student.", min=0)
    top_logprobs: int = setting(64, "The teacher's log-probabilities per token.", min=1)
    epochs: int = setting(2, "Passes over a round's rows.", min=1)
    lr_scale: float = setting(0.5, "Peak learning rate of a round, as a share of the first training's.", min=0)
    imitation_share: float = setting(
        0.2, "Share of cross-entropy in the loss of a correct sample that the teacher scored.", min=0, max=1
    )
    correct_below: float = setting(0.5, "Pass rate below which the teacher answers a problem itself.", min=0, max=1)
    replay: float = setting(0.5, "Earlier rows to train on again, per new one.", min=0)


@dataclass(frozen=True)
class TrainingRecipe:
    """How the student is trained."""

    method: Literal["distill", "grpo"] = setting(
        "distill",
        "grpo: no teacher; the student improves by what the graders say (needs the rl extra).",
        heading=_TRAINING,
    )
    weights: Literal["lora", "full", "qlora"] = setting(
        "lora",
        "Which weights learn: a LoRA adapter, all of them, or an adapter on a 4-bit base (needs a GPU).",
        heading=_TRAINING,
        unused_by=_GRPO,
    )
    epochs: int = setting(3, "Passes over the traces, at most.", min=1, heading=_TRAINING)
    minutes: float | None = setting(
        None, "Minutes of training, at most; the learning rate follows the clock.", min=0.01, heading=_TRAINING
    )
    steps: int | None = setting(None, "Training steps, at most.", min=1)
    learning_rate: float | None = setting(
        None, "Peak learning rate. 6e-4 for an adapter, 1e-4 for all weights.", min=0, name="lr", heading=_TRAINING
    )
    batch_size: int = setting(16, "Rows per training step.", min=1, name="train-batch-size", unused_by=_GRPO)
    micro_batch: int | None = setting(
        None, "Rows computed at once. As many as fit the memory, unless set.", min=1, unused_by=_GRPO
    )
    max_length: int = setting(
        1024, "Tokens per training row, at most; longer traces are left out and counted.", min=16, heading=_TRAINING
    )
    too_long: Literal["drop", "shorten"] = setting(
        "drop", "What becomes of longer traces; shorten takes lines out of the middle of the reasoning."
    )
    loss: Literal["auto", "cross-entropy", "logits"] = setting(
        "auto",
        "What is learned: the teacher's tokens, or its log-probabilities. Auto: these, if they were kept.",
        unused_by=_GRPO,
    )
    logit_share: float = setting(
        0.9, "Share of the loss that is KL to the teacher's log-probabilities; the rest is cross-entropy.", min=0, max=1
    )
    reasoning_weight: float = setting(1.0, "Loss weight of reasoning tokens.", min=0)
    answer_weight: float = setting(1.0, "Loss weight of answer tokens.", min=0)
    warmup: float = setting(0.03, "Share of the training over which the learning rate rises.", min=0, max=1)
    final_lr: float = setting(0.05, "Learning rate at the end, as a share of the peak.", min=0, max=1)
    weight_decay: float = setting(0.0, "AdamW's weight decay.", min=0)
    pass_samples: int = setting(
        0,
        "Tries of the untrained student at each problem. What it always solves is left out; with grpo, what it "
        "never solves too.",
        min=0,
    )
    n_validation: int = setting(32, "Training problems held out to watch the training; none if there are few.", min=0)
    patience: int = setting(
        8, "Validations without progress, of 20 in a run, after which training ends early; 0: never.", min=0
    )
    save_every_s: float = setting(60.0, "Seconds between checkpoints.", min=0)
    keep_checkpoints: bool = setting(False, "Keep the checkpoints of the training when the student is there.")
    dtype: Literal["bf16", "fp32"] | None = setting(
        None,
        "Number format of the computation. The faster one here, measured, unless set.",
        name="train-dtype",
        unused_by=_GRPO,
    )
    threads: int | None = setting(None, "CPU threads. Measured, unless set.", min=1, unused_by=_GRPO)
    seed: int | None = setting(None, "Seed of the training. The run's, unless set.", min=0)
    report_to: tuple[str, ...] = setting(
        (), "Experiment trackers: tensorboard, trackio, wandb, and others of transformers.", unused_by=_GRPO
    )
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    curriculum: CurriculumRecipe = field(default_factory=CurriculumRecipe)

    def __post_init__(self) -> None:
        """Check what does not go together.

        Raises:
            UsageError: `code` "settings-conflict".
        """
        given = [name for name in ("dora", "targets") if getattr(self.lora, name)]
        if self.weights == "full" and given:
            named = ", ".join(f"training.lora.{name}" for name in given)
            raise UsageError(
                f"training.weights=full trains all weights, {named} an adapter",
                "leave one of them out",
                code="settings-conflict",
            )
        if self.reasoning_weight == 0 and self.answer_weight == 0:
            raise UsageError(
                "with reasoning and answer both weighing 0 there is nothing to learn",
                "give training.reasoning_weight or training.answer_weight a value above 0",
                code="settings-conflict",
            )

    @property
    def peak_lr(self) -> float:
        """The highest learning rate of the schedule."""
        default = 1e-4 if self.weights == "full" else 6e-4
        return default if self.learning_rate is None else self.learning_rate
