"""Ask a teacher for the samples that a store lacks, and verify each as it comes, until there are enough.

Every problem is asked for its first sample before any is asked for its second, and a problem with its K verified traces
is not asked again. What a run has is read from its store, so resuming never pays twice. A request whose failure was
final is listed in `failures.jsonl`; the next run asks it again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...localrun.core.generation import Completion, Sampling
from ...localrun.core.record_log import RecordLog, read_records
from ...localrun.core.reporter import SILENT, Reporter
from ..graders.pool import grade_answer
from ..recipe.gathering import CostRecipe, TeacherRecipe, TracesRecipe
from ..records import (
    GradesAnswers,
    Problem,
    Request,
    TeacherInfo,
    Trace,
    has_answer,
    messages_of,
    sample_seed,
    trace_id,
)
from ..teachers.asking import Asked, ask_all
from ..teachers.base import Teacher
from ..teachers.budget import Budget
from .store import TraceStore

_TELL_EVERY_S = 0.25


@dataclass(frozen=True)
class CollectSettings:
    """What to ask for. `teacher` is the string that the user gave; `samples` of each problem until `keep` are right.

    `stage` is the name under which progress is reported.
    """

    teacher: str
    sampling: Sampling
    samples: int = TracesRecipe.samples
    keep: int = 1
    top_logprobs: int = TeacherRecipe.logprobs
    stage: str = "traces"


@dataclass(frozen=True)
class Failure:
    """A request whose failure was final, as `failures.jsonl` holds it; `time` is in seconds since 1970."""

    problem_id: str
    sample: int
    error: str | None
    time: float
    seconds: float = 0.0
    cost_usd: float | None = None


class Ledger:
    """Which samples of which problems are stored, in flight and wanted."""

    def __init__(self, problems: Sequence[Problem], settings: CollectSettings, traces: Iterable[Trace]) -> None:
        self.problems, self.settings = problems, settings
        self.n_done = 0  # samples that ended with a trace
        self._right, self._begun, self._ended = Counter[str](), Counter[str](), Counter[str]()
        self._begun_ids: set[str] = set()
        by_id = {problem.id: problem for problem in problems}
        for trace in traces:
            if trace.problem_id in by_id:
                self._begun_ids.add(trace.id)
                self._begun[trace.problem_id] += 1
                self.end(by_id[trace.problem_id], is_right=trace.verdict == "right", has_failed=False)

    def id_of(self, problem: Problem, sample: int) -> str:
        """Return the id of a sample's trace."""
        return trace_id(problem.id, self.settings.teacher, sampling=self.settings.sampling, sample=sample)

    def wanted(self) -> Iterator[tuple[Problem, int]]:
        """Yield each (problem, sample) to ask for, as things are when it is drawn. This changes nothing.

        A problem whose samples in flight may be all it needs is left out: a later call finds it if they were not.
        """
        for sample in range(self.settings.samples):
            for problem in self.problems:
                if not self._may_have_enough(problem) and self.id_of(problem, sample) not in self._begun_ids:
                    yield problem, sample

    def begin(self, problem: Problem, sample: int) -> None:
        """Count a sample as in flight."""
        self._begun_ids.add(self.id_of(problem, sample))
        self._begun[problem.id] += 1

    def end(self, problem: Problem, *, is_right: bool, has_failed: bool) -> None:
        """Count a sample as ended."""
        self._right[problem.id] += is_right
        self._ended[problem.id] += 1
        self.n_done += not has_failed

    @property
    def n_right(self) -> int:
        """Verified traces."""
        return self._right.total()

    @property
    def n_left(self) -> int:
        """Samples still to ask for, if they turn out right as often as the earlier ones."""
        share = self.n_right / self.n_done if self.n_done else 0.0
        left = 0.0
        for problem in self.problems:
            room = self.settings.samples - self._ended[problem.id]
            missing = self.settings.keep - self._right[problem.id]
            if not has_answer(problem):
                left += max(0, room)
            elif missing > 0:
                left += min(room, missing / share if share else room)
        return round(left)

    def _may_have_enough(self, problem: Problem) -> bool:
        in_flight = self._begun[problem.id] - self._ended[problem.id]
        return has_answer(problem) and self._right[problem.id] + in_flight >= self.settings.keep


def collect(
    problems: Sequence[Problem],
    store: TraceStore,
    *,
    settings: CollectSettings,
    open_teacher: Callable[[], Teacher],
    grader: GradesAnswers,
    budget: Budget | None = None,
    report: Reporter = SILENT,
) -> Asked:
    """Ask for the samples that the store lacks. The teacher is opened only if there is something to ask.

    Requests whose failure is final are listed in `failures.jsonl` beside the store.

    Raises:
        TeacherError: no request can succeed any more, or the teacher was not made for these problems.
        ArtifactError: a trace cannot be written.
    """
    ledger = Ledger(problems, settings, store)
    budget = budget or Budget(CostRecipe())
    stopped = budget.why_stop(0)
    if stopped or next(ledger.wanted(), None) is None:
        return Asked(0, 0, stopped)
    with open_teacher() as teacher:
        for source in sorted({problem.source for problem in problems}):
            teacher.accepts(source)
        asking = _Samples(ledger, store, teacher.info, grader, budget, report)
        asked = ask_all(teacher, asking, sampling=settings.sampling, budget=budget, top_logprobs=settings.top_logprobs)
        asking.tell()
    return asked


@dataclass
class _Samples:
    """The samples that a ledger wants: an `Asking` that grades each answer and stores its trace."""

    ledger: Ledger
    store: TraceStore
    teacher: TeacherInfo
    grader: GradesAnswers
    budget: Budget
    report: Reporter
    n_failed: int = 0
    told_at: float = 0.0

    def wanted(self) -> Iterator[tuple[Problem, int]]:
        """Yield (problem, sample)."""
        return self.ledger.wanted()

    def begin(self, item: tuple[Problem, int]) -> Request:
        """Count a sample as in flight; its seed is what an interrupted run would have taken."""
        self.ledger.begin(*item)
        return Request(messages_of(item[0]), sample_seed(self.ledger.id_of(*item)))

    def end(self, item: tuple[Problem, int], completion: Completion, cost_usd: float | None) -> None:
        """Grade and store an answer, or note a failure."""
        (problem, sample), settings = item, self.ledger.settings
        if completion.finish_reason == "error":
            self.n_failed += 1
            with RecordLog(_failures_path(self.store.path), Failure) as failures:
                failures.append(
                    Failure(problem.id, sample, completion.error, time.time(), completion.seconds, cost_usd)
                )
            self.ledger.end(problem, is_right=False, has_failed=True)
        else:
            grade = grade_answer(self.grader, problem, completion)
            trace = Trace.make(
                problem,
                completion,
                grade=grade,
                info=self.teacher,
                teacher=settings.teacher,
                sampling=settings.sampling,
                sample=sample,
            )
            self.store.append(replace(trace, cost_usd=cost_usd, created=round(time.time(), 3)), completion)
            self.ledger.end(problem, is_right=grade.verdict == "right", has_failed=False)
        if time.monotonic() - self.told_at > _TELL_EVERY_S:
            self.tell()

    def tell(self) -> None:
        """Report how far the samples are, and what all of them will come to."""
        ledger, n_left = self.ledger, self.ledger.n_left
        failed = f", {self.n_failed} failed" if self.n_failed else ""
        projection = self.budget.project(n_left)
        about = f"; about {projection} in all" if projection else ""
        right = f"{ledger.n_right} of {ledger.n_done} right" if any(map(has_answer, ledger.problems)) else "not graded"
        total, note = ledger.n_done + n_left, f"{right}{failed}{about}"
        self.report.progress(ledger.settings.stage, ledger.n_done, total=total, note=note)
        self.told_at = time.monotonic()


def failures_usd(traces_path: Path) -> float:
    """Return the dollars that the failures beside a store have cost; a broken line counts for nothing."""
    failures = read_records(_failures_path(traces_path), Failure, missing_ok=True, skip_broken=True)
    return sum(failure.cost_usd or 0.0 for failure in failures)


def _failures_path(traces_path: Path) -> Path:
    return traces_path.with_name("failures.jsonl")
