"""Judge what no grader could: the samples of a problem vote, and a judge looks at what the vote leaves open.

What they say is stored beside the traces, and only where it is new, so that judging twice adds nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from ...errors import UsageError
from ..context import Context
from ..recipe.teach import TeachRecipe
from ..records import GradesAnswers, Problem, Trace, has_answer
from ..teachers.budget import Budget
from ..traces.store import TraceStore
from .judge import judge_traces
from .vote import vote_on_traces

REPLIES_FILE = "judge.jsonl"
"""In the run folder: what the judge answered, so that it is never asked twice."""


def judge_ungraded(store: TraceStore, grader: GradesAnswers, *, context: Context, budget: Budget | None = None) -> None:
    """Bring the judgements of the traces that no grader judged up to date.

    Raises:
        TeacherError: the judge cannot answer any more; what it said before is kept.
    """
    recipe, report = context.recipe, context.report
    before: dict[str, tuple[str, float | None]] = {}

    def unknown() -> Iterator[Trace]:
        for trace in store:
            if trace.verdict == "unknown":
                before[trace.id] = (trace.verdict_by, trace.agreement)
                yield trace

    def is_same(one: str, other: str) -> bool:
        return grader.grade(Problem("", "", one, "", "math"), other).verdict == "right"

    votes = vote_on_traces(unknown(), recipe.voting, is_same) if recipe.voting else []
    judgements = {judgement.id: judgement for judgement in votes}
    if recipe.judging:
        left = (one for one in unknown() if one.id not in judgements or judgements[one.id].verdict_by == "none")
        judged = judge_traces(
            left,
            recipe.judging,
            path=context.run.folder / REPLIES_FILE,
            open_judge=context.open_judge,
            budget=budget,
            report=report,
        )
        judgements |= {judgement.id: judgement for judgement in judged.judgements}
        if judged.n_unreadable:
            report.say(f"{judged.n_unreadable} verdicts of the judge could not be read: those traces stay unjudged")
    if judgements:
        counts = Counter(judgement.verdict_by for judgement in judgements.values())
        accepted = ", ".join(f"{counts[by]} by {by}" for by in ("vote", "judge") if counts[by]) or "none"
        report.say(f"of {len(judgements)} traces that no grader judged are accepted: {accepted}")
    new = [one for one in judgements.values() if before[one.id] != (one.verdict_by, one.agreement)]
    store.append_judgements(new)


def check_judged(problems: Sequence[Problem], recipe: TeachRecipe) -> None:
    """Check that a grader, a vote or a judge can accept traces of these problems.

    Raises:
        UsageError: `code` "nothing-judges": none can, so no trace that is paid for would train.
    """
    votes = recipe.voting is not None and recipe.traces.samples > 1
    accept = recipe.curation.accept
    judges = recipe.judging is not None and (accept is None or "judge" in accept)
    if votes or judges or not recipe.curation.verified or any(has_answer(p) for p in problems):
        return
    raise UsageError(
        "no problem has an answer, and nothing would say which traces are good",
        "--samples 8 lets samples vote, --judge MODEL has a model judge, --set curation.verified=false trains on every "
        "trace",
        code="nothing-judges",
    )
