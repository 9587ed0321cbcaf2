"""Every setting of `teach`, declared once: flags, files, recipe.json and the reference all come from here.

`recipe.json` in a run folder has a version. A folder of an older version is read by upgrading its recipe step by step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from ..errors import ArtifactError, UsageError
from ..localrun.core.generation import Sampling
from ..localrun.core.settings import Flag, build, flat, put, values_of

VERSION = 1
"""Of recipe.json. A setting that is renamed or means something else takes a new one, and a step in `_UPGRADES`."""

Stage = Literal["traces", "samples", "teacher", "training"]
OnPolicyLoss = Literal["auto", "reverse-kl", "forward-kl", "policy-gradient", "off"]

DEMO_PROBLEMS = "gym:chain_sum?min_terms=2&max_terms=4&min_digits=1&max_digits=2"

_PROBLEMS, _TEACHER, _COST = "Problems and student", "Teacher and traces", "Cost"
_TRAINING, _RUNNING = "Training", "Running"
_GRPO = ("grpo",)

DEFAULT_RUBRIC = """\
5: correct and complete; every step follows, nothing is made up, and the question as it was asked is answered.
4: correct; something minor is missing, unclear or longer than it need be.
3: partly right: a gap or an error that changes some of the result.
2: mostly wrong, or an answer to another question.
1: wrong, empty, evasive, or false in what matters.
Work the question out yourself before you score. If you cannot tell whether a claim is true, count it as an error."""


def _rubric(text: str) -> str:
    """Return a rubric, or the text of the file that `@FILE` names."""
    if not text.startswith("@"):
        return text
    try:
        rubric = Path(text[1:]).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ValueError(f"cannot be read from {text[1:]}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot be read from {text[1:]}, which is not UTF-8 text") from error
    if not rubric:
        raise ValueError(f"cannot be read from {text[1:]}, which is empty")
    return rubric


@dataclass(frozen=True)
class TeacherRecipe:
    """Who is asked, and how it is sampled."""

    model: Annotated[
        str,
        Flag(
            "The teacher: pocket (built in), https://HOST/v1, hf:ORG/NAME, a checkpoint folder, a .gguf file, or "
            "worked, for solutions that the problems bring.",
            name="teacher",
            heading=_TEACHER,
            metavar="TEACHER",
            fixed=True,
        ),
    ] = "pocket"
    server_model: Annotated[
        str | None,
        Flag(
            "The teacher's name on its server, if the server has several models.",
            name="model",
            heading=_TEACHER,
            fixed=True,
        ),
    ] = None
    temperature: Annotated[
        float | None,
        Flag("Sampling temperature. 0 for one sample of the pocket teacher, otherwise 0.6.", min=0, fixed=True),
    ] = None
    top_p: Annotated[
        float | None,
        Flag("Nucleus sampling. 1 for one sample of the pocket teacher, otherwise 0.95.", min=0, max=1, fixed=True),
    ] = None
    max_tokens: Annotated[
        int | None,
        Flag(
            "Tokens per answer, thinking included. 512 for the pocket teacher, otherwise 4096.",
            min=1,
            heading=_TEACHER,
            fixed=True,
        ),
    ] = None
    logprobs: Annotated[
        int,
        Flag(
            "Log-probabilities to keep per token, for a student that learns the teacher's distribution; 64 is usual.",
            min=0,
            heading=_TEACHER,
            unused_by=_GRPO,
        ),
    ] = 0


@dataclass(frozen=True)
class ExpandRecipe:
    """New problems that the teacher writes."""

    n: Annotated[
        int, Flag("New problems that the teacher writes for each given one.", min=0, name="expand", unused_by=_GRPO)
    ] = 0
    similarity: Annotated[
        float,
        Flag("Overlap of word trigrams (Jaccard) from which two problems with the same numbers are one.", min=0, max=1),
    ] = 0.8
    ngram: Annotated[
        int, Flag("Words in a row that a new problem may not share with an evaluation question.", min=1)
    ] = 8
    temperature: Annotated[float, Flag("Sampling temperature of the teacher while it writes problems.", min=0)] = 1.0
    top_p: Annotated[float, Flag("Nucleus sampling of the teacher while it writes problems.", min=0, max=1)] = 0.95
    max_tokens: Annotated[int, Flag("Tokens per request for problems, thinking included.", min=1)] = 4096

    @property
    def sampling(self) -> Sampling:
        """How the teacher is sampled while it writes problems."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_tokens)


@dataclass(frozen=True)
class TracesRecipe:
    """How many traces are wanted, and where they come from."""

    n: Annotated[int, Flag("Problems to ask the teacher.", min=1, name="n-traces", heading=_TEACHER)] = 2000
    samples: Annotated[int, Flag("Samples per problem, at most.", min=1, heading=_TEACHER)] = 1
    file: Annotated[
        Path | None,
        Flag(
            "Train on the traces in this file, ours or another tool's, instead of asking a teacher.",
            name="traces",
            heading=_TEACHER,
            metavar="FILE",
            fixed=True,
            unused_by=_GRPO,
        ),
    ] = None
    expand: ExpandRecipe = field(default_factory=ExpandRecipe)


@dataclass(frozen=True)
class JudgeRecipe:
    """A model that judges what no grader can."""

    model: Annotated[
        str | None,
        Flag(
            "A model that judges answers which no grader can check; given as --teacher is.",
            name="judge",
            heading=_TEACHER,
            metavar="TEACHER",
        ),
    ] = None
    server_model: Annotated[
        str | None, Flag("The judge's name on its server, if the server has several models.", name="judge-model")
    ] = None
    rubric: Annotated[
        str, Flag("What each score from 5 to 1 takes; @FILE reads it from a file.", name="rubric", parse=_rubric)
    ] = DEFAULT_RUBRIC
    min_score: Annotated[int, Flag("The lowest score that accepts an answer.", min=1, max=5)] = 4
    max_tokens: Annotated[int, Flag("Tokens per verdict, thinking included.", min=1)] = 2048

    @property
    def name(self) -> str:
        """The judge as the user gave it, with its name on the server: what its stored verdicts are known by."""
        return f"{self.model} {self.server_model}" if self.server_model else f"{self.model}"

    @property
    def sampling(self) -> Sampling:
        """How the judge is sampled: greedily."""
        return Sampling(max_tokens=self.max_tokens)


@dataclass(frozen=True)
class VoteRecipe:
    """Agreement among the samples of one problem."""

    min_share: Annotated[
        float, Flag("Share of a problem's samples that have to agree on an answer.", min=0.01, max=1, name="vote-share")
    ] = 0.6
    min_votes: Annotated[int, Flag("Samples that have to agree on an answer, at least.", min=1)] = 2


@dataclass(frozen=True)
class CurationRecipe:
    """Which traces train. `none` or `false` switches a filter off."""

    accept: Annotated[
        tuple[Literal["vote", "judge"], ...] | None,
        Flag("What may stand in for a grader. Both, for problems that no grader judged, unless set."),
    ] = None
    keep: Annotated[
        int | None,
        Flag(
            "Correct traces to keep per problem, the shortest first; sampling it stops then.",
            min=1,
            heading=_TEACHER,
        ),
    ] = 1
    train_bucket: Annotated[bool, Flag("Leave out questions that the split does not give to training.")] = True
    verified: Annotated[
        bool, Flag("Leave out wrong and unknown answers. Off, to measure what verification is worth.")
    ] = True
    whole: Annotated[bool, Flag("Leave out traces that were cut off, have no answer, or hold stray think tags.")] = True
    reasoning: Annotated[bool, Flag("Leave out traces without reasoning.")] = True
    min_tokens: Annotated[int | None, Flag("Tokens that a trace has at least.", min=1)] = None
    max_trace_tokens: Annotated[int | None, Flag("Tokens that a trace has at most.", min=1)] = None
    max_repeated: Annotated[
        float | None, Flag("Share of a trace's 8-grams that may have stood in it before.", min=0, max=1)
    ] = 0.5
    min_pass_rate: Annotated[
        float | None, Flag("Leave out problems that the untrained student solves less often than this.", min=0, max=1)
    ] = None
    max_pass_rate: Annotated[
        float | None, Flag("Leave out problems that the untrained student solves more often than this.", min=0, max=1)
    ] = 0.99
    contamination_ngram: Annotated[
        int | None, Flag("Words in a row that a question may not share with an evaluation question.", min=1)
    ] = 8
    similarity: Annotated[
        float | None,
        Flag(
            "Overlap of word trigrams (Jaccard) from which two questions, or traces, are one; 1: only copies.",
            min=0,
            max=1,
        ),
    ] = 0.8
    long_share: Annotated[
        float | None,
        Flag(
            "Share of the kept traces for which a problem's longest is taken. 0.2 for students under 3 B parameters, "
            "otherwise 0.",
            min=0,
            max=1,
        ),
    ] = None
    per_source: Annotated[int | None, Flag("Traces to keep per source, at most.", min=1)] = None


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


@dataclass(frozen=True)
class ScoresRecipe:
    """What base, student and file are scored on."""

    n: Annotated[int, Flag("Held-out problems to score on.", min=1, name="n-eval", heading=_TRAINING, fixed=True)] = 200
    max_tokens: Annotated[
        int, Flag("Tokens per answer, thinking included.", min=1, name="eval-max-tokens", fixed=True)
    ] = 512


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens."""

    prompt: float
    completion: float

    def of(self, n_prompt: int, n_completion: int) -> float:
        """Return what so many tokens cost, in dollars."""
        return (n_prompt * self.prompt + n_completion * self.completion) / 1e6


def read_price(text: str) -> tuple[float, float]:
    """Return the two prices in `IN,OUT`.

    Raises:
        ValueError: it is not two numbers.
    """
    try:
        prompt, completion = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"is {text!r}; write IN,OUT in dollars per million tokens, such as 0.55,2.19") from None
    return prompt, completion


@dataclass(frozen=True)
class CostRecipe:
    """What the traces may cost. It belongs to a command, not to the run: recipe.json leaves it out."""

    price: Annotated[
        tuple[float, float] | None,
        Flag(
            "IN,OUT: what the teacher costs, in dollars per million tokens.",
            min=0,
            max=1e6,
            heading=_COST,
            metavar="IN,OUT",
            parse=read_price,
        ),
    ] = None
    judge_price: Annotated[
        tuple[float, float] | None,
        Flag("IN,OUT of the judge. The teacher's, unless set.", min=0, max=1e6, metavar="IN,OUT", parse=read_price),
    ] = None
    max_usd: Annotated[float | None, Flag("Dollars that the traces may cost in all.", min=0, heading=_COST)] = None
    max_hours: Annotated[float | None, Flag("Hours that this command may ask.", min=0, heading=_COST)] = None

    def __post_init__(self) -> None:
        if self.max_usd is not None and self.price is None:
            raise UsageError(
                "--max-usd needs the teacher's price",
                "give --price IN,OUT in dollars per million tokens",
                code="price-missing",
            )

    @property
    def teacher_price(self) -> Price | None:
        """What the teacher's tokens cost; None if that is not known."""
        return Price(*self.price) if self.price else None

    def price_of_judge(self, judge: str | None, teacher: str) -> Price | None:
        """Return what a judge's tokens cost: nothing in this process, unless a price is given; None if not known."""
        price = Price(*self.judge_price) if self.judge_price else None
        if judge is None or judge == teacher:
            return price or self.teacher_price
        is_here = not judge.startswith(("http://", "https://"))
        return price or (Price(0.0, 0.0) if is_here and self.price else self.teacher_price)


@dataclass(frozen=True)
class ResourcesRecipe:
    """What the work may use. It belongs to a command, not to the run: recipe.json leaves it out."""

    device: Annotated[
        str, Flag("auto, cpu, cuda or cuda:1, for models that run in this process.", heading=_RUNNING)
    ] = "auto"
    concurrency: Annotated[
        int | None, Flag("Requests in flight to an endpoint. It finds the best number, unless set.", min=1)
    ] = None
    batch_size: Annotated[
        int | None, Flag("Sequences that a model in this process answers at once. What fits, unless set.", min=1)
    ] = None
    timeout_s: Annotated[float, Flag("Seconds that an endpoint may be silent.", min=0.1, name="timeout")] = 600.0
    max_rpm: Annotated[int | None, Flag("Requests a minute to an endpoint, at most.", min=1)] = None
    max_tpm: Annotated[int | None, Flag("Tokens a minute of an endpoint, at most.", min=1)] = None
    offline: Annotated[bool, Flag("Never touch the network.", heading=_RUNNING)] = False


@dataclass(frozen=True)
class TeachRecipe:
    """Problems and a teacher -> verified traces -> a trained student -> scores."""

    problems: Annotated[
        str,
        Flag(
            "A .jsonl, .csv, .parquet or .txt file, a folder of prompts, gym:NAME?param=value, or hf:ORG/NAME?split=…; "
            "?grader=KIND says how answers are graded.",
            heading=_PROBLEMS,
            metavar="SPEC",
            fixed=True,
        ),
    ]
    student: Annotated[
        str,
        Flag(
            "The model to teach: smollm2 or pocket (built in), hf:ORG/NAME, or a checkpoint folder.",
            heading=_PROBLEMS,
            metavar="MODEL",
            fixed=True,
        ),
    ] = "smollm2"
    seed: Annotated[
        int, Flag("Seed of the choice of problems, the sampling and the training.", min=0, heading=_RUNNING, fixed=True)
    ] = 0
    teacher: TeacherRecipe = field(default_factory=TeacherRecipe)
    traces: TracesRecipe = field(default_factory=TracesRecipe)
    vote: VoteRecipe = field(default_factory=VoteRecipe)
    judge: JudgeRecipe = field(default_factory=JudgeRecipe)
    cost: CostRecipe = field(default_factory=CostRecipe)
    curation: CurationRecipe = field(default_factory=CurationRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    on_policy: OnPolicyRecipe = field(default_factory=OnPolicyRecipe)
    grpo: GrpoRecipe = field(default_factory=GrpoRecipe)
    scores: ScoresRecipe = field(default_factory=ScoresRecipe)
    resources: ResourcesRecipe = field(default_factory=ResourcesRecipe)

    @property
    def sampling(self) -> Sampling:
        """How the teacher is sampled.

        Raises:
            UsageError: `code` "samples-alike": several samples of each problem, and all of them the same.
        """
        of = self.teacher
        is_pocket, n = of.model == "pocket", self.traces.samples
        greedy = (is_pocket and n == 1) or of.model == "worked"
        temperature = of.temperature if of.temperature is not None else (0.0 if greedy else 0.6)
        if n > 1 and of.model == "worked":
            raise UsageError("a problem brings one worked solution", "leave --samples out", code="samples-alike")
        if n > 1 and temperature == 0:
            hint = "give --set teacher.temperature=0.6"
            raise UsageError("at temperature 0 all samples of a problem are the same", hint, code="samples-alike")
        top_p = of.top_p if of.top_p is not None else (1.0 if greedy else 0.95)
        limit = of.max_tokens if of.max_tokens is not None else (512 if is_pocket else 4096)
        return Sampling(temperature=temperature, top_p=top_p, seed=self.seed, max_tokens=limit)

    @property
    def keep(self) -> int:
        """Correct traces of a problem after which it is sampled no more."""
        return min(self.curation.keep or self.traces.samples, self.traces.samples)

    @property
    def voting(self) -> VoteRecipe | None:
        """When samples that agree are believed; None if they never are."""
        return self.vote if self.curation.accept is None or "vote" in self.curation.accept else None

    @property
    def judging(self) -> JudgeRecipe | None:
        """Who judges what no grader can; None without a judge."""
        return self.judge if self.judge.model else None

    def one_training(self, number: int = 0) -> TrainingRecipe:
        """Return the settings of the first training (0) or of a round's: all of them share `minutes` equally."""
        minutes = self.training.minutes
        return replace(
            self.training,
            minutes=None if minutes is None else minutes / (1 + self.on_policy.rounds),
            seed=(self.seed if self.training.seed is None else self.training.seed) + number,
        )

    def to_json(self) -> dict[str, Any]:
        """Return what recipe.json holds: what makes the run what it is, not what this command may use for it."""
        kept = {name: value for name, value in values_of(self).items() if name not in ("cost", "resources")}
        return {"version": VERSION, **kept}

    @classmethod
    def of_run(cls, folder: Path) -> TeachRecipe:
        """Return the recipe that a run folder was made with, brought to this version.

        Raises:
            ArtifactError: `code` "recipe-broken" or "recipe-newer".
        """
        path = folder / "recipe.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ArtifactError(f"{path} is broken: {error}", "restore it from a copy", code="recipe-broken") from error
        return cls.from_json(record, str(path))

    @classmethod
    def from_json(cls, record: Any, where: str = "the recipe") -> TeachRecipe:
        """Return the recipe in a JSON record of this or an older version.

        Raises:
            ArtifactError: `code` "recipe-broken" or "recipe-newer"; every unknown key and wrong value is named.
        """
        values = upgraded(record, where)
        try:
            return build(cls, values)
        except UsageError as error:
            hint = "correct or remove these keys; `deepdistill recipe` lists the settings of this version"
            raise ArtifactError(f"{where} is broken: {error.message}", hint, code="recipe-broken") from error


@dataclass(frozen=True)
class EvalRecipe:
    """How a model is scored on held-out problems."""

    problems: Annotated[
        str,
        Flag(
            "A file, a folder of prompts, gym:NAME or hf:ORG/NAME, as teach takes it.",
            heading="Scoring",
            metavar="SPEC",
        ),
    ] = DEMO_PROBLEMS
    n: Annotated[int, Flag("Held-out problems to ask.", min=1, heading="Scoring")] = ScoresRecipe.n
    seed: Annotated[int, Flag("Seed of the choice of problems and the sampling.", min=0, heading="Scoring")] = 0
    max_tokens: Annotated[int, Flag("Tokens per answer, thinking included.", min=1, heading="Scoring")] = (
        ScoresRecipe.max_tokens
    )
    temperature: Annotated[float, Flag("Sampling temperature; 0 is greedy.", min=0, heading="Scoring")] = 0.0
    answers: Annotated[
        Path | None,
        Flag("Write every question, answer and verdict to this JSONL file.", heading="Scoring", metavar="FILE"),
    ] = None
    server_model: Annotated[
        str | None,
        Flag("The model's name on its server, if the server has several.", name="model", heading="Scoring"),
    ] = None
    resources: ResourcesRecipe = field(default_factory=ResourcesRecipe)


def upgraded(record: Any, where: str = "the recipe") -> dict[str, Any]:
    """Return a recipe's nested values as this version names them, without the version.

    Raises:
        ArtifactError: `code` "recipe-broken": it is no recipe; "recipe-newer": a later version wrote it.
    """
    version = record.get("version", 0) if isinstance(record, dict) else None
    if type(version) is not int or version < 0:
        raise ArtifactError(f"{where} is no recipe", "restore it from a copy", code="recipe-broken")
    if version > VERSION:
        hint = "pip install --upgrade deepdistill"
        raise ArtifactError(f"{where} was written by a newer version of deepdistill", hint, code="recipe-newer")
    for step in _UPGRADES[version:]:
        record = step(record)
    return {key: value for key, value in record.items() if key != "version"}


_FROM_0: dict[str, str | None] = {
    "teacher": "teacher.model",
    "teacher_model": "teacher.server_model",
    "temperature": "teacher.temperature",
    "top_p": "teacher.top_p",
    "max_tokens": "teacher.max_tokens",
    "logprobs": "teacher.logprobs",
    "n_traces": "traces.n",
    "samples": "traces.samples",
    "traces": "traces.file",
    "expand": "traces.expand.n",
    "vote_share": "vote.min_share",
    "judge": "judge.model",
    "judge_model": "judge.server_model",
    "judge_compare": None,  # what it judged is in the verdicts
    "rubric": "judge.rubric",
    "accept": "curation.accept",
    "keep": "curation.keep",
    "method": "training.method",
    "pass_samples": "training.pass_samples",
    "loss": "training.loss",
    "logit_share": "training.logit_share",
    "curriculum": "training.curriculum.enabled",
    "rounds": "on_policy.rounds",
    "round_problems": "on_policy.n_problems",
    "round_samples": "on_policy.samples",
    "on_policy_loss": "on_policy.loss",
    "n_eval": "scores.n",
    "eval_max_tokens": "scores.max_tokens",
    "training.lora_rank": "training.lora.rank",
    "training.lora_alpha": "training.lora.alpha",
    "training.lora_targets": "training.lora.targets",
    "training.lora_first_layer": "training.lora.first_layer",
    "training.lora_plus": "training.lora.plus",
    "training.dora": "training.lora.dora",
    "training.rslora": "training.lora.rslora",
    "training.lr": "training.learning_rate",
}


def _from_0(record: Mapping[str, Any]) -> dict[str, Any]:
    """Take a recipe of version 0.1.0, which was flat but for `curation` and `training`, into sections."""
    values: dict[str, Any] = {"version": 1}
    for path, value in flat(record):
        key = ".".join(path)
        if key in ("training.full", "training.qlora"):  # two switches became one choice of weights
            if value:
                put(values, ("training", "weights"), path[-1])
        elif (new := _FROM_0.get(key, key)) is not None:
            is_list = key in ("training.lora_targets", "training.report_to") and isinstance(value, str)
            put(values, new.split("."), [part for part in value.split(",") if part] if is_list else value)
    return values


_UPGRADES: tuple[Callable[[Mapping[str, Any]], dict[str, Any]], ...] = (_from_0,)
"""Step i takes a recipe of version i to version i + 1."""
