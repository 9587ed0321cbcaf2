"""What a run would do and cost, without a call: from the problems, the settings, and the traces that are there.

Where traces are there, what is left is projected from them; else every answer is taken to need its limit, so that the
figures are upper bounds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..localrun.core.printable import printable
from ..localrun.core.text import format_duration, listed, shorten
from .problems.instruction import shared_system
from .problems.shape import graded_as
from .recipe.gathering import CostRecipe
from .recipe.teach import TeachRecipe
from .records import Problem, Trace, has_answer, messages_of
from .teachers.expand import missing_expansions
from .traces.collect import CollectSettings, Ledger
from .traces.store import TraceStore

_CHARACTERS_PER_TOKEN = 4  # of English text, roughly, with today's tokenizers
_JUDGED_FROM = 20  # traces; fewer say little about the rest
_SHOWN_LINES = 12  # of a message
_AT_ONCE = 8  # requests to a server at the beginning


@dataclass(frozen=True)
class Preview:
    """What is left to ask, at most: requests by kind, their tokens, dollars and hours (None: not known)."""

    n_problems: int
    n_held_out: int
    n_there: int
    """Traces that need not be asked for again."""
    n_traces: int
    n_expansions: int
    n_judgements: int
    prompt_tokens: int
    completion_tokens: int
    usd: float | None
    hours: float | None
    is_projected: bool
    """Whether the traces that are there say how long answers are, instead of their limit."""


def preview(recipe: TeachRecipe, folder: Path, *, problems: Sequence[Problem], held_out: Sequence[Problem]) -> Preview:
    """Return what a run would ask for.

    Raises:
        DeepDistillError: a setting is off, or what the folder holds is broken.
    """
    seen, path = _Seen(), folder / "traces.jsonl"
    wanted = CollectSettings(recipe.teacher.model, recipe.sampling, recipe.traces.samples, recipe.keep)
    stored = seen.watch(TraceStore.read(path)) if path.exists() else iter(())
    n_traces = 0 if recipe.traces.file else Ledger(problems, wanted, stored).n_left
    per_trace = seen.completion / seen.n if seen.is_telling else wanted.sampling.max_tokens

    expand, teacher = recipe.traces.expand, recipe.teacher.model
    expansions = missing_expansions(problems, expand, path=folder / "expand.jsonl", teacher=teacher) if expand.n else []
    n_traces += len(problems) * expand.n * recipe.traces.samples if expansions else 0  # none of them is known yet
    n_judgements = _n_judgements(problems, recipe)

    told = sum(len(turn["content"]) for problem in problems for turn in messages_of(problem))
    asked = told / max(1, len(problems)) / _CHARACTERS_PER_TOKEN
    expand_prompts = sum(len(m["content"]) for ask in expansions for m in ask.messages) / _CHARACTERS_PER_TOKEN
    prompts = n_traces * asked + expand_prompts
    answers = n_traces * per_trace + len(expansions) * expand.max_tokens
    judge_prompts, judge_answers = n_judgements * (asked + per_trace), n_judgements * recipe.judge.max_tokens
    usd, price = None, recipe.cost.teacher_price
    if price:
        price_of_judge = recipe.cost.price_of_judge(recipe.judge.model, teacher) or price
        usd = price.of(round(prompts), round(answers))
        usd = round(usd + price_of_judge.of(round(judge_prompts), round(judge_answers)), 6)
    return Preview(
        n_problems=len(problems),
        n_held_out=len(held_out),
        n_there=seen.n,
        n_traces=n_traces,
        n_expansions=len(expansions),
        n_judgements=n_judgements,
        prompt_tokens=round(prompts + judge_prompts),
        completion_tokens=round(answers + judge_answers),
        usd=usd,
        hours=n_traces * seen.seconds / seen.n / _AT_ONCE / 3600 if seen.is_telling and seen.seconds else None,
        is_projected=seen.is_telling,
    )


def describe_preview(made: Preview, problems: Sequence[Problem], recipe: TeachRecipe) -> Iterator[str]:
    """Yield the plan of a run in lines."""
    sampling, traces, judge = recipe.sampling, recipe.traces, recipe.judge
    sources = Counter(problem.source for problem in problems).most_common()
    named = listed((f"{n:,} {source}" if len(sources) > 1 else source for source, n in sources), most=5)
    n_open = sum(not has_answer(problem) for problem in problems)
    without = f", {n_open:,} of them without an answer" if n_open else ""
    yield f"problems  {made.n_problems:,} from the training part: {named}{without}; the first one:"
    yield from describe_problem(problems[0])
    yield from _asked_and_graded(problems)
    if traces.file:
        yield f"traces    {traces.file}: no teacher is asked"
        yield from _student(made, recipe)
        return
    until = f", until {recipe.keep} are right" if traces.samples > recipe.keep else ""
    stored = f" beside the {made.n_there:,} stored ones" if made.n_there else ""
    requests = f"at most {made.n_traces:,} requests to {recipe.teacher.model}{stored}"
    yield f"samples   {traces.samples} of each{until}: {requests}"
    yield (
        f"sampling  temperature {sampling.temperature:g}, top-p {sampling.top_p:g}; "
        f"{sampling.max_tokens:,} tokens or less"
    )
    if traces.expand.n:
        yield f"expand    {traces.expand.n} new problems to each, {made.n_expansions:,} requests"
    if judge.model:
        yield f"judge     {judge.model}: at most {made.n_judgements:,} requests for what no grader can judge"
    how = (
        f"as the {made.n_there:,} stored traces had on average"
        if made.is_projected
        else f"if every answer took its limit; {_JUDGED_FROM} samples will tell better"
    )
    yield f"tokens    about {made.prompt_tokens:,} of prompts and {made.completion_tokens:,} of answers, {how}"
    yield from _cost(made, recipe.cost)
    yield from _student(made, recipe)


def describe_problem(problem: Problem) -> Iterator[str]:
    """Yield a problem in lines, as the teacher is asked it, with its reference and its grader."""
    for turn in messages_of(problem):
        lines = [printable(line) for line in turn["content"].strip().splitlines()]
        if len(lines) > _SHOWN_LINES:
            lines[_SHOWN_LINES - 2 : -1] = [f"… {len(lines) - _SHOWN_LINES + 1:,} more lines …"]
        yield from (f"{turn['role'] if i == 0 else '':<10}{shorten(line, 400)}" for i, line in enumerate(lines))
    aliases = problem.metadata.get("aliases", [])
    how = " (all of them, in any order)" if problem.metadata.get("together") == "all" else ""
    answer = listed([problem.answer, *aliases], most=5).replace(" and ", " or ") if aliases else problem.answer
    yield f"reference {printable(answer) + how if answer else 'none'}"
    yield f"grader    {problem.grader}"


def _asked_and_graded(problems: Sequence[Problem]) -> Iterator[str]:
    """Yield how the problems are graded, and what they are told beside their questions if that differs."""
    graded = Counter(graded_as(problem) or "nothing" for problem in problems)
    yield f"graded    {listed(f'{n:,} as {printable(name)}' for name, n in graded.most_common())}"
    told = Counter(shared_system([messages_of(problem)]) for problem in problems)
    for text, n in told.most_common(4) if len(told) > 1 else ():
        yield f"told      {n:,} of them: {printable(shorten(text, 200)) or 'nothing'}"


def _cost(made: Preview, cost: CostRecipe) -> Iterator[str]:
    if made.usd is None:
        yield "cost      not known: give --price IN,OUT in dollars per million tokens"
    else:
        yield f"cost      ${made.usd:,.2f}" + ("" if cost.max_usd is None else f"; it ends at ${cost.max_usd:g}")
    known = None if made.hours is None else f"about {format_duration(3600 * made.hours)}"
    time = known or "not known before some samples are stored"
    yield f"time      {time}" + ("" if cost.max_hours is None else f"; it asks for {cost.max_hours:g} h at most")


def _student(made: Preview, recipe: TeachRecipe) -> Iterator[str]:
    rounds = recipe.on_policy
    if rounds.rounds:
        yield (
            f"rounds    {rounds.rounds} of {rounds.n_problems:,} new problems, answered {rounds.samples} times; "
            "the teacher scores that, if it can, and answers what fails (not counted)"
        )
    yield f"student   {recipe.student}, scored on {made.n_held_out:,} held-out problems"
    yield "nothing was asked"


class _Seen:
    """Sums up traces as somebody else reads them."""

    def __init__(self) -> None:
        self.n, self.completion, self.seconds = 0, 0, 0.0

    def watch(self, traces: Iterator[Trace]) -> Iterator[Trace]:
        for trace in traces:
            self.n += 1
            self.completion += trace.usage.completion
            self.seconds += trace.seconds
            yield trace

    @property
    def is_telling(self) -> bool:
        return self.n >= _JUDGED_FROM and self.completion > 0


def _n_judgements(problems: Sequence[Problem], recipe: TeachRecipe) -> int:
    """Return how often the judge is asked at most: of every sample that no grader can judge."""
    if recipe.judge.model is None or recipe.traces.file:
        return 0
    n_open = sum(not has_answer(problem) for problem in problems) + len(problems) * recipe.traces.expand.n
    return n_open * recipe.traces.samples
