"""Judge what no grader could: the samples of a problem vote, and a judge looks at what the vote leaves open.

What they say goes beside the traces, and only where it is new, so that settling twice adds nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ...errors import UsageError
from ...localrun.core.reporter import Progress, no_progress
from ..recipe import TeachSettings
from ..records import GradesAnswers, Judgement, Problem, Trace, has_answer
from ..teachers.base import Teacher
from ..teachers.budget import Budget
from ..traces.store import TraceStore
from .judge import Judged, JudgeSettings, judge_traces
from .vote import VoteSettings, vote_on_traces


def settle(
    store: TraceStore,
    grader: GradesAnswers,
    *,
    voting: VoteSettings | None,
    judging: JudgeSettings | None,
    replies_path: Path,
    open_judge: Callable[[], Teacher],
    budget: Budget | None = None,
    say: Callable[[str], None] = lambda _: None,
    on_progress: Progress = no_progress,
) -> Judged | None:
    """Bring the judgements of the traces that no grader judged up to date. None switches a way of judging off.

    Return what the judge said, None without one.

    Raises:
        TeacherError: the judge cannot answer any more; what it said before is kept.
    """
    known: dict[str, tuple[str, float | None]] = {}

    def unknown() -> Iterator[Trace]:
        for trace in store:
            if trace.verdict == "unknown":
                known[trace.id] = (trace.verdict_by, trace.agreement)
                yield trace

    def is_same(one: str, other: str) -> bool:
        return grader.grade(Problem("", "", one, "", "math"), other).verdict == "right"

    said = {judgement.id: judgement for judgement in vote_on_traces(unknown(), voting, is_same)} if voting else {}
    judged = None
    if judging:
        left = (trace for trace in unknown() if trace.id not in said or said[trace.id].verdict_by == "none")
        judged = judge_traces(
            left, judging, replies_path, open_judge=open_judge, budget=budget, on_progress=on_progress
        )
        said |= {judgement.id: judgement for judgement in judged.judgements}
    if said:
        counts = Counter(judgement.verdict_by for judgement in said.values())
        favoured = ", ".join(f"{counts[by]} by {by}" for by in ("vote", "judge") if counts[by]) or "none"
        say(f"of {len(said)} traces that no grader judged are favoured: {favoured}")
    store.append_judgements(judgement for judgement in said.values() if known[judgement.id] != _as_stored(judgement))
    return judged


def check_judged(problems: Sequence[Problem], settings: TeachSettings) -> None:
    """Return if traces of these problems can come to train: a grader, a vote or a judge may speak for them.

    Raises:
        UsageError: nothing would, and every trace would be paid for in vain.
    """
    votes = settings.vote_settings() is not None and settings.samples > 1
    judges = settings.judge is not None and (settings.accept is None or "judge" in settings.accept)
    if votes or judges or not settings.curate_settings().verified or any(has_answer(p) for p in problems):
        return
    raise UsageError(
        "no problem has an answer, and nothing would say which traces are good",
        "--samples 8 lets samples vote, --judge MODEL has a model judge, --curate verified=off trains on every trace",
    )


def _as_stored(judgement: Judgement) -> tuple[str, float | None]:
    return judgement.verdict_by, judgement.agreement
