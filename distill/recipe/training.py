"""Settings of the second half of `teach`: how the student is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ...errors import UsageError
from ...localrun.core.settings import Flag

_TRAINING = "Training"
_GRPO = ("grpo",)


OnPolicyLoss = Literal["auto", "reverse-kl", "forward-kl", "policy-gradient", "off"]


@dataclass(frozen=True)
class LoraRecipe:
    """The adapter that is trained beside frozen weights."""

    rank: Annotated[int, Flag("Rank of the adapter.", min=1, name="lora-rank", unused_by=_GRPO)] = 32
    alpha: Annotated[
        int,
        Flag(
            "Scale of the adapter: its update is multiplied by alpha / rank.", min=1, name="lora-alpha", unused_by=_GRPO
        ),
    ] = 32
    targets: Annotated[
        tuple[str, ...],
        Flag(
            "Linear maps with an adapter, such as q_proj,v_proj. Every one, if empty.",
            name="lora-targets",
            unused_by=_GRPO,
        ),
    ] = ()
    first_layer: Annotated[
        int,
        Flag(
            "The first layer with an adapter: the backward pass stops there, so that a higher one is faster.",
            min=0,
            name="lora-first-layer",
            unused_by=_GRPO,
        ),
    ] = 0
    plus: Annotated[
        float,
        Flag(
            "Learning rate of the adapter's B divided by that of its A; LoRA+ (arXiv 2402.12354) advises 16.",
            min=0.01,
            name="lora-plus",
            unused_by=_GRPO,
        ),
    ] = 1.0
    dora: Annotated[bool, Flag("Weight-decomposed LoRA (arXiv 2402.09353); slower.", name="dora", unused_by=_GRPO)] = (
        False
    )
    rslora: Annotated[
        bool,
        Flag("Divide by the root of the rank instead of the rank (arXiv 2312.03732).", name="rslora", unused_by=_GRPO),
    ] = False


@dataclass(frozen=True)
class CurriculumRecipe:
    """An order of the traces by how often the untrained student solves their problems."""

    enabled: Annotated[
        bool,
        Flag(
            "Order the traces by how often the untrained student solves their problems.",
            name="curriculum",
            unused_by=_GRPO,
        ),
    ] = False
    easy_from: Annotated[float, Flag("Pass rate from which a problem is easy.", min=0, max=1)] = 0.75
    easy_share: Annotated[float, Flag("Share of the epochs in which an easy problem trains.", min=0, max=1)] = 0.5
    middle_times: Annotated[
        int, Flag("Times that a problem of middling difficulty trains per epoch, from the second on.", min=1)
    ] = 2
    head_start: Annotated[
        float, Flag("Share of the rows before problems train that the student never solves.", min=0, max=1)
    ] = 0.1


@dataclass(frozen=True)
class GrpoRecipe:
    """Reinforcement by the graders' verdicts, without a teacher."""

    group_size: Annotated[
        int | None, Flag("Answers per problem. --samples if that is above 1, otherwise 8.", min=2)
    ] = None
    problems_per_step: Annotated[int, Flag("Problems per step.", min=1)] = 16
    temperature: Annotated[float, Flag("Sampling temperature of the student.", min=0)] = 1.0
    warmup_steps: Annotated[int, Flag("Steps over which the learning rate rises.", min=0)] = 5
    clip_low: Annotated[float, Flag("How far below 1 a probability ratio counts.", min=0, max=1)] = 0.2
    clip_high: Annotated[float, Flag("How far above 1 a probability ratio counts.", min=0)] = 0.28
    kl_weight: Annotated[float, Flag("Weight of the divergence from the untrained student.", min=0)] = 0.0
    format_weight: Annotated[float, Flag("Reward for an answer in the right form, right or not.", min=0, max=1)] = 0.1
    max_grad_norm: Annotated[float, Flag("Norm to which gradients are clipped.", min=0)] = 1.0


@dataclass(frozen=True)
class OnPolicyRecipe:
    """Rounds after the first training, in which the student answers, the teacher corrects, and the student trains."""

    rounds: Annotated[
        int,
        Flag(
            "Rounds after the first training: the student answers, the teacher corrects it.", min=0, heading=_TRAINING
        ),
    ] = 0
    n_problems: Annotated[int, Flag("New problems per round.", min=1, name="round-problems")] = 500
    samples: Annotated[int, Flag("The student's answers to each of them.", min=1, name="round-samples")] = 4
    loss: Annotated[
        OnPolicyLoss,
        Flag(
            "How the teacher's scores of the student's own tokens train it. Off: its own correct answers train.",
            name="on-policy-loss",
        ),
    ] = "auto"
    temperature: Annotated[float, Flag("Sampling temperature of the student.", min=0)] = 1.0
    top_logprobs: Annotated[int, Flag("The teacher's log-probabilities per token.", min=1)] = 64
    epochs: Annotated[int, Flag("Passes over a round's rows.", min=1)] = 2
    lr_scale: Annotated[float, Flag("Peak learning rate of a round, as a share of the first training's.", min=0)] = 0.5
    imitation_share: Annotated[
        float, Flag("Share of cross-entropy in the loss of a correct sample that the teacher scored.", min=0, max=1)
    ] = 0.2
    correct_below: Annotated[
        float, Flag("Pass rate below which the teacher answers a problem itself.", min=0, max=1)
    ] = 0.5
    replay: Annotated[float, Flag("Earlier rows to train on again, per new one.", min=0)] = 0.5


@dataclass(frozen=True)
class TrainingRecipe:
    """How the student is trained."""

    method: Annotated[
        Literal["distill", "grpo"],
        Flag("grpo: no teacher; the student improves by what the graders say (needs the rl extra).", heading=_TRAINING),
    ] = "distill"
    weights: Annotated[
        Literal["lora", "full", "qlora"],
        Flag(
            "Which weights learn: a LoRA adapter, all of them, or an adapter on a 4-bit base (needs a GPU).",
            heading=_TRAINING,
            unused_by=_GRPO,
        ),
    ] = "lora"
    epochs: Annotated[int, Flag("Passes over the traces, at most.", min=1, heading=_TRAINING)] = 3
    minutes: Annotated[
        float | None,
        Flag("Minutes of training, at most; the learning rate follows the clock.", min=0.01, heading=_TRAINING),
    ] = None
    steps: Annotated[int | None, Flag("Training steps, at most.", min=1)] = None
    learning_rate: Annotated[
        float | None,
        Flag("Peak learning rate. 6e-4 for an adapter, 1e-4 for all weights.", min=0, name="lr", heading=_TRAINING),
    ] = None
    batch_size: Annotated[int, Flag("Rows per training step.", min=1, name="train-batch-size", unused_by=_GRPO)] = 16
    micro_batch: Annotated[
        int | None, Flag("Rows computed at once. As many as fit the memory, unless set.", min=1, unused_by=_GRPO)
    ] = None
    max_length: Annotated[
        int,
        Flag("Tokens per training row, at most; longer traces are left out and counted.", min=16, heading=_TRAINING),
    ] = 1024
    too_long: Annotated[
        Literal["drop", "shorten"],
        Flag("What becomes of longer traces; shorten takes lines out of the middle of the reasoning."),
    ] = "drop"
    loss: Annotated[
        Literal["auto", "cross-entropy", "logits"],
        Flag(
            "What is learned: the teacher's tokens, or its log-probabilities. Auto: these, if they were kept.",
            unused_by=_GRPO,
        ),
    ] = "auto"
    logit_share: Annotated[
        float,
        Flag(
            "Share of the loss that is KL to the teacher's log-probabilities; the rest is cross-entropy.", min=0, max=1
        ),
    ] = 0.9
    reasoning_weight: Annotated[float, Flag("Loss weight of reasoning tokens.", min=0)] = 1.0
    answer_weight: Annotated[float, Flag("Loss weight of answer tokens.", min=0)] = 1.0
    warmup: Annotated[float, Flag("Share of the training over which the learning rate rises.", min=0, max=1)] = 0.03
    final_lr: Annotated[float, Flag("Learning rate at the end, as a share of the peak.", min=0, max=1)] = 0.05
    weight_decay: Annotated[float, Flag("AdamW's weight decay.", min=0)] = 0.0
    pass_samples: Annotated[
        int,
        Flag(
            "Tries of the untrained student at each problem. What it always solves is left out; with grpo, what it "
            "never solves too.",
            min=0,
        ),
    ] = 0
    n_validation: Annotated[
        int, Flag("Training problems held out to watch the training; none if there are few.", min=0)
    ] = 32
    patience: Annotated[
        int, Flag("Validations without progress, of 20 in a run, after which training ends early; 0: never.", min=0)
    ] = 8
    save_every_s: Annotated[float, Flag("Seconds between checkpoints.", min=0)] = 60.0
    dtype: Annotated[
        Literal["bf16", "fp32"] | None,
        Flag(
            "Number format of the computation. The faster one here, measured, unless set.",
            name="train-dtype",
            unused_by=_GRPO,
        ),
    ] = None
    threads: Annotated[int | None, Flag("CPU threads. Measured, unless set.", min=1, unused_by=_GRPO)] = None
    seed: Annotated[int | None, Flag("Seed of the training. The run's, unless set.", min=0)] = None
    report_to: Annotated[
        tuple[str, ...],
        Flag("Experiment trackers: tensorboard, trackio, wandb, and others of transformers.", unused_by=_GRPO),
    ] = ()
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
    def full(self) -> bool:
        """Whether all weights train."""
        return self.weights == "full"

    @property
    def is_qlora(self) -> bool:
        """Whether an adapter trains on a base of 4 bits."""
        return self.weights == "qlora"

    @property
    def peak_lr(self) -> float:
        """The highest learning rate of the schedule."""
        return self.learning_rate if self.learning_rate is not None else (1e-4 if self.full else 6e-4)
