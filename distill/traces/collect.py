"""Ask a teacher for the samples that a store lacks, verify each as it comes, and stop when there is enough of it.

Every problem is asked for its first sample before any is asked for its second, and a problem that has its K verified
traces is asked no more. What a run holds is read from its store, so a run that goes on never pays twice. A request that
failed for good stands in `failures.jsonl`; the next run asks it again.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...localrun.core.generation import Completion, Sampling
from ...localrun.core.record_log import whole_lines
from ...localrun.core.reporter import Progress, no_progress
from ..records import (
    GradesAnswers,
    Problem,
    Request,
    Trace,
    has_answer,
    messages_of,
    sample_seed,
    trace_id,
)
from ..teachers.base import Teacher
from ..teachers.budget import Budget, Limits
from .store import TraceStore

_TELL_EVERY_S = 0.25


@dataclass(frozen=True)
class CollectSettings:
    """What to ask for. `teacher` is the string that the user gave; `samples` of each problem until `keep` are right."""

    teacher: str
    sampling: Sampling
    samples: int = 1
    keep: int = 1
    top_logprobs: int = 0


@dataclass(frozen=True)
class Collected:
    """What a run of `collect` came to. `stopped` says why it ended early, None if it asked for all there was."""

    n_asked: int
    n_failed: int
    stopped: str | None


class Ledger:
    """Which samples of which problems are there, in flight and wanted."""

    def __init__(self, problems: Sequence[Problem], settings: CollectSettings, there: Iterable[Trace]) -> None:
        self.problems, self.settings = problems, settings
        self.n_done = 0  # samples that ended with a trace
        self._right, self._drawn, self._ended = Counter[str](), Counter[str](), Counter[str]()
        self._there: set[str] = set()
        self._asked: set[str] = set()
        by_id = {problem.id: problem for problem in problems}
        for trace in there:
            if trace.problem_id in by_id:
                self._there.add(trace.id)
                self._drawn[trace.problem_id] += 1
                self.end(by_id[trace.problem_id], is_right=trace.verdict == "right", has_failed=False)

    def id_of(self, problem: Problem, sample: int) -> str:
        """Return the id of a sample's trace."""
        return trace_id(problem.id, self.settings.teacher, self.settings.sampling, sample)

    def wanted(self) -> Iterator[tuple[Problem, int]]:
        """Yield (problem, sample) for one after the other that is to be asked for, as things stand when it is drawn.

        A problem whose samples in flight may be all it needs is passed over: another pass finds it, if they were not.
        """
        for sample in range(self.settings.samples):
            for problem in self.problems:
                key = self.id_of(problem, sample)
                if key in self._there or key in self._asked or self._may_have_enough(problem):
                    continue
                self._asked.add(key)
                self._drawn[problem.id] += 1
                yield problem, sample

    def put_back(self, problem: Problem, sample: int) -> None:
        """Take back what was drawn last: it is not asked for yet."""
        self._asked.discard(self.id_of(problem, sample))
        self._drawn[problem.id] -= 1

    @property
    def n_in_flight(self) -> int:
        """Samples that were drawn and have not ended."""
        return self._drawn.total() - self._ended.total()

    @property
    def n_right(self) -> int:
        """Verified traces."""
        return self._right.total()

    @property
    def n_left(self) -> int:
        """Samples still to come, if those to come are right as often as those that came."""
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

    def end(self, problem: Problem, *, is_right: bool, has_failed: bool) -> None:
        """Take notice that a sample has ended."""
        self._right[problem.id] += is_right
        self._ended[problem.id] += 1
        self.n_done += not has_failed

    def _may_have_enough(self, problem: Problem) -> bool:
        in_flight = self._drawn[problem.id] - self._ended[problem.id]
        return has_answer(problem) and self._right[problem.id] + in_flight >= self.settings.keep


def collect(
    problems: Sequence[Problem],
    store: TraceStore,
    settings: CollectSettings,
    *,
    open_teacher: Callable[[], Teacher],
    open_grader: Callable[[], GradesAnswers],
    failures_path: Path,
    budget: Budget | None = None,
    on_progress: Progress = no_progress,
) -> Collected:
    """Bring the store to what is wanted of it. The teacher is opened only if there is something to ask.

    Raises:
        TeacherError: no request can succeed any more, or the teacher was not made for these problems.
        ArtifactError: a trace cannot be written.
    """
    ledger = Ledger(problems, settings, store)
    budget = budget or Budget(Limits())
    n_asked = n_failed = 0
    stopped = budget.why_stop(0)
    if stopped or next(Ledger(problems, settings, store).wanted(), None) is None:
        return Collected(0, 0, stopped)
    with open_teacher() as teacher:
        for source in sorted({problem.source for problem in problems}):
            teacher.accepts(source)
        grader = open_grader()
        drawn: list[tuple[Problem, int]] = []

        def requests() -> Iterator[Request]:
            for problem, sample in ledger.wanted():
                if budget.why_stop(ledger.n_in_flight - 1, settings.sampling.max_tokens):
                    ledger.put_back(problem, sample)
                    return
                drawn.append((problem, sample))
                yield Request(messages_of(problem), sample_seed(ledger.id_of(problem, sample)))

        told, first = 0.0, -1
        while len(drawn) > first and not stopped:  # until a pass finds nothing more to ask
            first = len(drawn)
            for index, completion in teacher.generate(
                requests(), settings.sampling, top_logprobs=settings.top_logprobs
            ):
                problem, sample = drawn[first + index]
                n_asked += 1
                cost = budget.record(completion)
                if completion.finish_reason == "error":
                    n_failed += 1
                    _note_failure(failures_path, problem, sample, completion, cost)
                    ledger.end(problem, is_right=False, has_failed=True)
                else:
                    grade = grader.grade(problem, completion.content)
                    trace = Trace.make(
                        problem,
                        completion,
                        grade,
                        teacher.info,
                        settings.teacher,
                        settings.sampling,
                        sample,
                        cost_usd=cost,
                        created=round(time.time(), 3),
                    )
                    store.append(trace, completion)
                    ledger.end(problem, is_right=grade.verdict == "right", has_failed=False)
                if time.monotonic() - told > _TELL_EVERY_S:
                    _tell(on_progress, ledger, budget, n_failed)
                    told = time.monotonic()
            stopped = budget.why_stop(0)
        _tell(on_progress, ledger, budget, n_failed)
    if stopped and next(ledger.wanted(), None) is None:
        stopped = None  # spent, and all is there
    return Collected(n_asked, n_failed, stopped)


def _tell(on_progress: Progress, ledger: Ledger, budget: Budget, n_failed: int) -> None:
    left = ledger.n_left
    failed = f", {n_failed} failed" if n_failed else ""
    whole = budget.project(left)
    about = f"; in all about {whole}" if whole else ""
    right = f"{ledger.n_right} of {ledger.n_done} right" if any(map(has_answer, ledger.problems)) else "not graded"
    on_progress("traces", ledger.n_done, ledger.n_done + left, f"{right}{failed}{about}")


def _note_failure(path: Path, problem: Problem, sample: int, completion: Completion, cost_usd: float | None) -> None:
    """Record a request that failed for good: a line in a file beside the traces."""
    record = {"problem_id": problem.id, "sample": sample, "error": completion.error, "time": time.time()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record | {"seconds": completion.seconds, "cost_usd": cost_usd}) + "\n")


def failures_usd(path: Path) -> float:
    """Return what the failures that stand in a file have cost, in dollars; a torn line counts for nothing."""
    total = 0.0
    for _, line in whole_lines(path) if path.exists() else ():
        with suppress(ValueError, AttributeError):
            total += json.loads(line).get("cost_usd") or 0.0
    return total
