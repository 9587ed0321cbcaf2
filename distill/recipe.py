"""What a run makes (`TeachSettings`, kept as recipe.json) and how it works (`Work`, which may change as it goes on)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ..errors import ArtifactError, UsageError
from ..localrun.core.generation import Sampling
from .curation.curate import CurateSettings
from .judging.judge import DEFAULT_RUBRIC, JudgeSettings
from .judging.vote import VoteSettings
from .teachers import Teacher, open_teacher
from .teachers.budget import Limits

MAY_CHANGE = frozenset(
    {"n_traces", "samples", "keep", "expand", "logprobs", "curation", "pass_samples"}
    | {"accept", "vote_share", "judge", "judge_model", "judge_compare", "rubric"}
    | {"training", "method", "loss", "logit_share", "curriculum"}
    | {"rounds", "round_problems", "round_samples", "on_policy_loss"}
)
"""Settings that may change until the training has begun: what they ask for is added to what is there."""

Loss = Literal["auto", "cross-entropy", "logits"]
OnPolicy = Literal["auto", "reverse-kl", "forward-kl", "policy-gradient", "off"]

_OWN_FLAGS = {"accept", "keep", "seed"}
_NUMBER = re.compile(r"\d{1,9}(\.\d+)?|(\.\d+)")


@dataclass(frozen=True)
class TeachSettings:
    """Every setting of a run. Sampling None: greedy for pocket, else what R1's card advises.

    `judge` and `teacher` are model strings; `accept` None lets votes and judges stand for a grader where there is none.
    """

    problems: str
    teacher: str = "pocket"
    student: str = "smollm2"
    n_traces: int = 2000
    samples: int = 1
    keep: int = 1
    expand: int = 0
    logprobs: int = 0
    accept: list[str] | None = None
    vote_share: float = 0.6
    judge: str | None = None
    judge_model: str | None = None
    judge_compare: bool = False
    rubric: str = DEFAULT_RUBRIC
    curation: dict[str, Any] = field(default_factory=dict)
    pass_samples: int = 0
    n_eval: int = 200
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    eval_max_tokens: int = 512
    teacher_model: str | None = None
    seed: int = 0
    traces: str | None = None
    method: Literal["distill", "grpo"] = "distill"
    loss: Loss = "auto"
    logit_share: float = 0.9
    curriculum: bool = False
    rounds: int = 0
    round_problems: int = 500
    round_samples: int = 4
    on_policy_loss: OnPolicy = "auto"
    training: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_run(cls, folder: Path) -> TeachSettings:
        """Return the settings that a run folder was made with."""
        try:
            return cls(**json.loads((folder / "recipe.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ArtifactError(f"{folder}/recipe.json is broken: {error}") from error

    def teacher_sampling(self) -> Sampling:
        """Return how the teacher is sampled.

        Raises:
            UsageError: several samples of each problem, and all of them greedy.
        """
        is_pocket = self.teacher == "pocket"
        greedy = (is_pocket and self.samples == 1) or self.teacher == "worked"
        temperature = self.temperature if self.temperature is not None else (0.0 if greedy else 0.6)
        if self.samples > 1 and self.teacher == "worked":
            raise UsageError("a problem brings one worked solution", "leave --samples out")
        if self.samples > 1 and temperature == 0:
            raise UsageError("at temperature 0 all samples of a problem are the same", "give --temperature 0.6")
        top_p = self.top_p if self.top_p is not None else (1.0 if greedy else 0.95)
        limit = self.max_tokens if self.max_tokens is not None else (512 if is_pocket else 4096)
        return Sampling(temperature=temperature, top_p=top_p, seed=self.seed, max_tokens=limit)

    def curate_settings(self) -> CurateSettings:
        """Return which filters are on.

        Raises:
            UsageError: there is no such filter, or it does not take such a value.
        """
        return CurateSettings(**{"accept": self.accept, "keep": self.keep, "seed": self.seed} | self.curation)

    @staticmethod
    def curation_of(texts: Sequence[str]) -> dict[str, Any]:
        """Return the filters' settings that texts such as `similarity=0.9` or `verified=off` name.

        Raises:
            UsageError: one names no filter or no value.
        """
        defaults = {field.name: field.default for field in fields(CurateSettings)}
        given = dict[str, Any]()
        for text in texts:
            name, _, value = text.partition("=")
            name = name.strip().replace("-", "_")
            if name not in defaults or name in _OWN_FLAGS:
                raise UsageError(
                    f"--curate {text} names no filter", f"there are {', '.join(sorted(set(defaults) - _OWN_FLAGS))}"
                )
            is_switch = isinstance(defaults[name], bool)
            if value == "off" or (value == "on" and is_switch):
                given[name] = value == "on" if is_switch else (0.0 if name == "long_share" else None)
                continue
            number = _NUMBER.fullmatch(value)
            if is_switch or not number:
                takes = "on or off" if is_switch else "off or a number"
                raise UsageError(f"--curate {text} has no value", f"{name} takes {takes}")
            given[name] = float(value) if number.lastindex else int(value)
        return given

    def stage_training(self) -> dict[str, Any]:
        """Return the settings of one training: the first one and those of the rounds share `minutes` equally."""
        training = dict(self.training)
        if training.get("minutes") is not None:
            training["minutes"] = training["minutes"] / (1 + self.rounds)
        return training

    def vote_settings(self) -> VoteSettings | None:
        """Return when samples that agree are believed; None if they never are."""
        return VoteSettings(self.vote_share) if self.accept is None or "vote" in self.accept else None

    @property
    def model_of_judge(self) -> str | None:
        """The judge's name on its server: the teacher's, if they are one."""
        return self.judge_model or (self.teacher_model if self.judge in (None, self.teacher) else None)

    def judge_settings(self) -> JudgeSettings | None:
        """Return who judges and by what; None without a judge."""
        if not self.judge:
            return None
        name = f"{self.judge} {self.judge_model}" if self.judge_model else self.judge
        return JudgeSettings(name, self.rubric, compare=self.judge_compare)


@dataclass(frozen=True)
class Work:
    """How to work, not what to make. `say` is told what a user should know and no number shows."""

    concurrency: int | None = None
    batch_size: int | None = None
    timeout_s: float = 600.0
    max_rpm: int | None = None
    max_tpm: int | None = None
    limits: Limits = field(default_factory=Limits)
    device: str = "auto"
    offline: bool = False
    say: Callable[[str], None] = lambda _: None

    def open_teacher(self, spec: str, model: str | None = None) -> Teacher:
        """Open a teacher or a judge; `model` is its name on a server."""
        teacher = open_teacher(
            spec,
            concurrency=self.concurrency,
            batch_size=self.batch_size,
            timeout_s=self.timeout_s,
            max_rpm=self.max_rpm,
            max_tpm=self.max_tpm,
            model=model,
            device=self.device,
            offline=self.offline,
        )
        teacher.on_note = self.say
        return teacher

    def open_student(self, folder: Path) -> Teacher:
        """Open a student's checkpoint, to answer or to be scored."""
        return open_teacher(str(folder), device=self.device, batch_size=self.batch_size)


Stage = Literal["traces", "samples", "teacher", "training"]
