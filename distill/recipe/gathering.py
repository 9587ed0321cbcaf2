"""Settings of the first half of `teach`: the teacher, the number of traces, their judges, and which of them train."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...errors import UsageError
from ...localrun.core.generation import Sampling
from ...localrun.core.settings import setting
from ...localrun.families.thinking import Think

_PROBLEMS, _TEACHER, _SERVER, _COST = "Problems and student", "Teacher and traces", "Requests to a server", "Cost"
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


def _json_object(text: str) -> str:
    """Return a JSON object as text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError('has to be a JSON object, such as {"top_k": 20}')
    return text


@dataclass(frozen=True)
class AskingRecipe:
    """How the problems of a file are asked and graded."""

    instruction: str | None = setting(
        None,
        "What teacher and student are told beside every question. How to end an answer, by grader, unless set; "
        '"" says nothing.',
        heading=_PROBLEMS,
        metavar="TEXT",
        fixed=True,
    )
    graders: Literal["shape", "columns"] = setting(
        "shape",
        "What chooses a row's grader where nothing names it: the shape of its reference, or, as in older runs, "
        "its columns alone.",
        fixed=True,
    )


@dataclass(frozen=True)
class RequestRecipe:
    """What every request to a server has beside its conversation."""

    system: str | None = setting(
        None, "System message for the server's model, before a problem's own.", heading=_SERVER, fixed=True
    )
    think: Think = setting(
        "auto", "Switch the model's thinking on or off, as its server takes it.", heading=_SERVER, fixed=True
    )
    effort: str | None = setting(
        None, "How much the model thinks, in its own words: low, high, …", heading=_SERVER, metavar="WORD", fixed=True
    )
    body: str | None = setting(
        None,
        "More fields for each request, as a JSON object.",
        heading=_SERVER,
        metavar="JSON",
        parse=_json_object,
        fixed=True,
    )


@dataclass(frozen=True)
class TeacherRecipe:
    """The teacher, and how it is sampled."""

    model: str = setting(
        "pocket",
        "The teacher: pocket (built in), https://HOST/v1, hf:ORG/NAME, a checkpoint folder, a .gguf file, or "
        "worked, for solutions that the problems bring.",
        name="teacher",
        heading=_TEACHER,
        metavar="TEACHER",
        fixed=True,
    )
    server_model: str | None = setting(
        None,
        "The teacher's name on its server, if the server has several models.",
        name="model",
        heading=_TEACHER,
        fixed=True,
    )
    temperature: float | None = setting(
        None, "Sampling temperature. 0 for one sample of the pocket teacher, otherwise 0.6.", min=0, fixed=True
    )
    top_p: float | None = setting(
        None, "Nucleus sampling. 1 for one sample of the pocket teacher, otherwise 0.95.", min=0, max=1, fixed=True
    )
    max_tokens: int | None = setting(
        None,
        "Tokens per answer, thinking included. 512 for the pocket teacher, otherwise 4096.",
        min=1,
        heading=_TEACHER,
        fixed=True,
    )
    logprobs: int = setting(
        0,
        "Log-probabilities to keep per token, for a student that learns the teacher's distribution; 64 is usual.",
        min=0,
        heading=_TEACHER,
        unused_by=_GRPO,
    )
    request: RequestRecipe = field(default_factory=RequestRecipe)


@dataclass(frozen=True)
class ExpandRecipe:
    """New problems that the teacher writes."""

    n: int = setting(
        0, "New problems that the teacher writes for each given one.", min=0, name="expand", unused_by=_GRPO
    )
    similarity: float = setting(
        0.8, "Overlap of word trigrams (Jaccard) from which two problems with the same numbers are one.", min=0, max=1
    )
    ngram: int = setting(8, "Words in a row that a new problem may not share with an evaluation question.", min=1)
    temperature: float = setting(1.0, "Sampling temperature of the teacher while it writes problems.", min=0)
    top_p: float = setting(0.95, "Nucleus sampling of the teacher while it writes problems.", min=0, max=1)
    max_tokens: int = setting(4096, "Tokens per request for problems, thinking included.", min=1)

    @property
    def sampling(self) -> Sampling:
        """How the teacher is sampled while it writes problems."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_tokens)


@dataclass(frozen=True)
class TracesRecipe:
    """How many traces are wanted, and where they come from."""

    n: int = setting(2000, "Problems to ask the teacher.", min=1, name="n-traces", heading=_TEACHER)
    samples: int = setting(1, "Samples per problem, at most.", min=1, heading=_TEACHER)
    file: Path | None = setting(
        None,
        "Train on the traces in this file, ours or another tool's, instead of asking a teacher.",
        name="traces",
        heading=_TEACHER,
        metavar="FILE",
        fixed=True,
        unused_by=_GRPO,
    )
    expand: ExpandRecipe = field(default_factory=ExpandRecipe)


@dataclass(frozen=True)
class JudgeRecipe:
    """A model that judges what no grader can."""

    model: str | None = setting(
        None,
        "A model that judges answers which no grader can check; given as --teacher is.",
        name="judge",
        heading=_TEACHER,
        metavar="TEACHER",
    )
    server_model: str | None = setting(
        None, "The judge's name on its server, if the server has several models.", name="judge-model"
    )
    rubric: str = setting(
        DEFAULT_RUBRIC, "What each score from 5 to 1 takes; @FILE reads it from a file.", name="rubric", parse=_rubric
    )
    min_score: int = setting(4, "The lowest score that accepts an answer.", min=1, max=5)
    max_tokens: int = setting(2048, "Tokens per verdict, thinking included.", min=1)

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

    min_share: float = setting(
        0.6, "Share of a problem's samples that have to agree on an answer.", min=0.01, max=1, name="vote-share"
    )
    min_votes: int = setting(2, "Samples that have to agree on an answer, at least.", min=1)


@dataclass(frozen=True)
class CurationRecipe:
    """Which traces train. `none` or `false` switches a filter off."""

    accept: tuple[Literal["vote", "judge"], ...] | None = setting(
        None, "What may accept an answer that no grader judged. Both, unless set."
    )
    keep: int | None = setting(
        1, "Correct traces to keep per problem, the shortest first; sampling it stops then.", min=1, heading=_TEACHER
    )
    train_bucket: bool = setting(True, "Leave out questions that the split does not give to training.")
    verified: bool = setting(True, "Leave out wrong and unknown answers. Off, to measure what verification is worth.")
    whole: bool = setting(True, "Leave out traces that were cut off, have no answer, or hold stray think tags.")
    reasoning: bool = setting(True, "Leave out traces without reasoning.")
    min_tokens: int | None = setting(None, "Tokens that a trace has at least.", min=1)
    max_trace_tokens: int | None = setting(None, "Tokens that a trace has at most.", min=1)
    max_repeated: float | None = setting(0.5, "Share of a trace's 8-grams that may repeat earlier ones.", min=0, max=1)
    min_pass_rate: float | None = setting(
        None, "Leave out problems that the untrained student solves less often than this.", min=0, max=1
    )
    max_pass_rate: float | None = setting(
        0.99, "Leave out problems that the untrained student solves more often than this.", min=0, max=1
    )
    contamination_ngram: int | None = setting(
        8, "Words in a row that a question may not share with an evaluation question.", min=1
    )
    similarity: float | None = setting(
        0.8,
        "Overlap of word trigrams (Jaccard) from which two questions, or traces, are one; 1: only copies.",
        min=0,
        max=1,
    )
    long_share: float | None = setting(
        None,
        "Share of the kept traces for which a problem's longest is taken. 0.2 for students under 3 B parameters, "
        "otherwise 0.",
        min=0,
        max=1,
    )
    per_source: int | None = setting(None, "Traces to keep per source, at most.", min=1)


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
    """The most that the traces may cost. It belongs to a command, not to the run: recipe.json leaves it out."""

    price: tuple[float, float] | None = setting(
        None,
        "IN,OUT: what the teacher costs, in dollars per million tokens.",
        min=0,
        max=1e6,
        heading=_COST,
        metavar="IN,OUT",
        parse=read_price,
    )
    judge_price: tuple[float, float] | None = setting(
        None, "IN,OUT of the judge. The teacher's, unless set.", min=0, max=1e6, metavar="IN,OUT", parse=read_price
    )
    max_usd: float | None = setting(None, "Dollars that the traces may cost in all.", min=0, heading=_COST)
    max_hours: float | None = setting(None, "Hours that this command may ask.", min=0, heading=_COST)

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
