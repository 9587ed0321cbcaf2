"""The settings of `teach` as a whole, as recipe.json keeps them, and those of `eval`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ...errors import ArtifactError, UsageError
from ...localrun.core.generation import Sampling
from ...localrun.core.settings import build, required, setting, values_of
from .gathering import (
    AskingRecipe,
    CostRecipe,
    CurationRecipe,
    JudgeRecipe,
    RequestRecipe,
    TeacherRecipe,
    TracesRecipe,
    VoteRecipe,
)
from .training import GrpoRecipe, OnPolicyRecipe, TrainingRecipe
from .upgrade import VERSION, upgraded

Stage = Literal["traces", "samples", "teacher", "training"]

DEMO_PROBLEMS = "gym:chain_sum?min_terms=2&max_terms=4&min_digits=1&max_digits=2"

_PROBLEMS, _TRAINING, _RUNNING = "Problems and student", "Training", "Running"


@dataclass(frozen=True)
class ScoresRecipe:
    """What base, student and file are scored on."""

    n: int = setting(200, "Held-out problems to score on.", min=1, name="n-eval", heading=_TRAINING, fixed=True)
    max_tokens: int = setting(512, "Tokens per answer, thinking included.", min=1, name="eval-max-tokens", fixed=True)


@dataclass(frozen=True)
class ResourcesRecipe:
    """What the work may use. It belongs to a command, not to the run: recipe.json leaves it out."""

    device: str = setting("auto", "auto, cpu, cuda or cuda:1, for models that run in this process.", heading=_RUNNING)
    concurrency: int | None = setting(
        None, "Requests in flight to an endpoint. It finds the best number, unless set.", min=1
    )
    batch_size: int | None = setting(
        None, "Sequences that a model in this process answers at once. What fits, unless set.", min=1
    )
    timeout_s: float = setting(600.0, "Seconds that an endpoint may be silent.", min=0.1, name="timeout")
    max_rpm: int | None = setting(None, "Requests a minute to an endpoint, at most.", min=1)
    max_tpm: int | None = setting(None, "Tokens a minute of an endpoint, at most.", min=1)
    offline: bool = setting(False, "Never touch the network.", heading=_RUNNING)


@dataclass(frozen=True)
class TeachRecipe:
    """Problems and a teacher -> verified traces -> a trained student -> scores.

    >>> from deepdistill import TeachRecipe
    >>> recipe = TeachRecipe.from_json({"version": 1, "problems": "gym:chain_sum", "training": {"epochs": 2}})
    >>> recipe.student, recipe.training.epochs
    ('smollm2', 2)
    """

    problems: str = required(
        "A .jsonl, .csv, .parquet or .txt file, a folder of prompts, gym:NAME?param=value, or hf:ORG/NAME?split=…; "
        "?grader=KIND says how answers are graded.",
        heading=_PROBLEMS,
        metavar="SPEC",
        fixed=True,
    )
    student: str = setting(
        "smollm2",
        "The model to teach: smollm2 or pocket (built in), hf:ORG/NAME, or a checkpoint folder.",
        heading=_PROBLEMS,
        metavar="MODEL",
        fixed=True,
    )
    seed: int = setting(
        0, "Seed of the choice of problems, the sampling and the training.", min=0, heading=_RUNNING, fixed=True
    )
    asking: AskingRecipe = field(default_factory=AskingRecipe)
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
        """Correct traces that are enough for a problem: then no more are sampled."""
        return min(self.curation.keep or self.traces.samples, self.traces.samples)

    @property
    def voting(self) -> VoteRecipe | None:
        """How many samples have to agree to be accepted; None if agreement does not count."""
        return self.vote if self.curation.accept is None or "vote" in self.curation.accept else None

    @property
    def judging(self) -> JudgeRecipe | None:
        """The model that judges what no grader can; None without one."""
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

    problems: str = setting(
        DEMO_PROBLEMS,
        "A file, a folder of prompts, gym:NAME or hf:ORG/NAME, as teach takes it.",
        heading="Scoring",
        metavar="SPEC",
    )
    n: int = setting(ScoresRecipe.n, "Held-out problems to ask.", min=1, heading="Scoring")
    seed: int = setting(0, "Seed of the choice of problems and the sampling.", min=0, heading="Scoring")
    max_tokens: int = setting(
        ScoresRecipe.max_tokens, "Tokens per answer, thinking included.", min=1, heading="Scoring"
    )
    temperature: float = setting(0.0, "Sampling temperature; 0 is greedy.", min=0, heading="Scoring")
    answers: Path | None = setting(
        None, "Write every question, answer and verdict to this JSONL file.", heading="Scoring", metavar="FILE"
    )
    server_model: str | None = setting(
        None, "The model's name on its server, if the server has several.", name="model", heading="Scoring"
    )
    asking: AskingRecipe = field(default_factory=AskingRecipe)
    request: RequestRecipe = field(default_factory=RequestRecipe)
    resources: ResourcesRecipe = field(default_factory=ResourcesRecipe)


"""Step i takes a recipe of version i to version i + 1."""
