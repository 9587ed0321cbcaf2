"""Samples until enough are right, within a budget, never twice: with a teacher that says what the test wants."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdistill.distill.recipe.gathering import CostRecipe
from deepdistill.distill.records import Grade, Problem, Request, Trace
from deepdistill.distill.teachers.asking import Asked
from deepdistill.distill.teachers.base import Teacher
from deepdistill.distill.teachers.budget import Budget
from deepdistill.distill.traces.collect import CollectSettings, Ledger, collect
from deepdistill.distill.traces.store import TraceStore
from deepdistill.errors import TeacherError
from deepdistill.localrun.core.generation import Completion, Sampling

SAMPLING = Sampling(temperature=0.5, max_tokens=50)


class Scripted(Teacher):
    """Answers `right`, `wrong` or `error` as a function of (question, how often it was asked), `width` at a time."""

    name, backend = "scripted", "endpoint"

    def __init__(self, say: Any, width: int = 4, seed: int = 0) -> None:
        self.say, self.n_parallel, self.rng = say, width, random.Random(seed)
        self.asked: list[tuple[str, int]] = []
        self.most_ahead = 0

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, *, top_logprobs: int = 0
    ) -> Iterator[tuple[int, Completion]]:
        source, in_flight, n_answered = enumerate(requests), list[tuple[int, Request]](), 0
        while True:
            while len(in_flight) < self.n_parallel and (drawn := next(source, None)):
                in_flight.append(drawn)
            if not in_flight:
                return
            self.most_ahead = max(self.most_ahead, len(in_flight))
            index, request = in_flight.pop(self.rng.randrange(len(in_flight)))
            question = request.messages[-1]["content"]
            n_before = sum(asked == question for asked, _ in self.asked)
            self.asked.append((question, request.seed))
            text = self.say(question, n_before)
            n_answered += 1
            if text == "dead":
                raise TeacherError("the server is down")
            error = "HTTP 400" if text == "error" else None
            yield (
                index,
                Completion(
                    content=text,
                    reasoning_content="because",
                    closed=True,
                    finish_reason="error" if error else "stop",
                    prompt_tokens=10,
                    completion_tokens=0 if error else 90,
                    reasoning_tokens=50,
                    seconds=0.1,
                    error=error,
                ),
            )


class Judges:
    """What is said is the verdict."""

    def grade(self, problem: Problem, content: str) -> Grade:
        if problem.grader == "none":
            return Grade(content, "unknown", "none", None)
        return Grade(content, "right" if content == "right" else "wrong", "grader", float(content == "right"))


def problems(n: int, grader: str = "exact") -> list[Problem]:
    return [Problem(f"p{i}", f"question {i}", "right", "toy", grader) for i in range(n)]


def run(
    folder: Path, teacher: Scripted, n: int, samples: int = 1, keep: int = 1, grader: str = "exact", **limits: Any
) -> Asked:
    with TraceStore(folder / "traces.jsonl") as store:
        return collect(
            problems(n, grader),
            store,
            settings=CollectSettings("toy", SAMPLING, samples, keep),
            open_teacher=lambda: teacher,
            grader=Judges(),
            budget=Budget(CostRecipe(**limits), sum(trace.cost_usd or 0 for trace in store)),
        )


def test_a_problem_is_asked_until_it_has_what_is_kept(tmp_path: Path) -> None:
    teacher = Scripted(lambda question, n: "right" if n >= int(question.split()[-1]) else "wrong")
    run(tmp_path, teacher, n=5, samples=4, keep=1)
    counts = Counter(question for question, _ in teacher.asked)
    assert [counts[f"question {i}"] for i in range(5)] == [1, 2, 3, 4, 4], "the last is never right"
    assert len({seed for _, seed in teacher.asked}) == len(teacher.asked), "every sample has a seed of its own"


def test_no_problem_gets_its_second_sample_before_all_have_their_first(tmp_path: Path) -> None:
    teacher = Scripted(lambda question, n: "wrong", width=1)
    run(tmp_path, teacher, n=4, samples=2)
    assert [question for question, _ in teacher.asked[:4]] == [f"question {i}" for i in range(4)]


def test_problems_without_an_answer_are_asked_for_every_sample(tmp_path: Path) -> None:
    teacher = Scripted(lambda question, n: "right")
    run(tmp_path, teacher, n=3, samples=4, grader="none")
    assert len(teacher.asked) == 12


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_never_more_than_is_needed_whatever_comes_back(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    n, samples = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    keep = data.draw(st.integers(1, samples))
    script = {(i, k): data.draw(st.sampled_from(["right", "wrong", "error"])) for i in range(n) for k in range(9)}
    teacher = Scripted(
        lambda q, k: script[int(q.split()[-1]), k], data.draw(st.integers(1, 7)), data.draw(st.integers())
    )
    folder = tmp_path_factory.mktemp("run")
    collected = run(folder, teacher, n, samples, keep)
    right: Counter[str] = Counter()
    for trace in TraceStore.read(folder / "traces.jsonl"):
        right[trace.problem_id] += trace.verdict == "right"
    asked = Counter(question for question, _ in teacher.asked)
    for i in range(n):
        assert right[f"p{i}"] <= keep, "what was asked beyond what is kept is paid for in vain"
        assert right[f"p{i}"] == keep or asked[f"question {i}"] == samples
    assert collected.n_asked == len(teacher.asked)
    assert collected.n_failed == sum(script[int(q.split()[-1]), k] == "error" for q, k in _numbered(teacher))


def _numbered(teacher: Scripted) -> list[tuple[str, int]]:
    seen: Counter[str] = Counter()
    numbered = []
    for question, _ in teacher.asked:
        numbered.append((question, seen[question]))
        seen[question] += 1
    return numbered


def test_resuming_asks_only_for_what_is_missing(tmp_path: Path) -> None:
    first = Scripted(lambda question, n: "dead" if question == "question 7" else "right", width=3)
    with pytest.raises(TeacherError):
        run(tmp_path, first, n=10)
    answered = {trace.messages[-1]["content"] for trace in TraceStore.read(tmp_path / "traces.jsonl")}
    assert answered
    second = Scripted(lambda question, n: "right")
    run(tmp_path, second, n=10)
    assert {question for question, _ in second.asked} == {f"question {i}" for i in range(10)} - answered
    third = Scripted(lambda question, n: "right")
    assert run(tmp_path, third, n=10) == Asked(0, 0, None)
    assert not third.asked


def test_the_store_is_read_once_and_a_ledger_that_is_asked_stays_as_it_is(tmp_path: Path) -> None:
    class Counting(TraceStore):
        n_reads = 0

        def __iter__(self) -> Iterator[Trace]:
            self.n_reads += 1
            return super().__iter__()

    run(tmp_path, Scripted(lambda question, n: "right"), n=5)
    for n in (5, 8):  # with nothing and with something to ask
        with Counting(tmp_path / "traces.jsonl") as store:
            wanted = CollectSettings("toy", SAMPLING)
            teacher = Scripted(lambda question, n: "right")
            collect(problems(n), store, settings=wanted, open_teacher=lambda: teacher, grader=Judges())  # noqa: B023
            assert (store.n_reads, len(teacher.asked)) == (1, n - 5)
    ledger = Ledger(problems(9), CollectSettings("toy", SAMPLING, 2, 2), TraceStore.read(tmp_path / "traces.jsonl"))
    assert list(ledger.wanted()) == list(ledger.wanted())
    assert len(list(ledger.wanted())) == 8 + 2


def test_a_resumed_sample_has_the_seed_that_it_would_have_had(tmp_path: Path) -> None:
    whole, part, rest = (Scripted(lambda question, n: "right") for _ in range(3))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    run(tmp_path / "a", whole, n=8)
    run(tmp_path / "b", part, n=3)
    run(tmp_path / "b", rest, n=8)
    assert sorted(part.asked + rest.asked) == sorted(whole.asked)


def test_failures_are_recorded_counted_and_asked_again_by_the_next_run(tmp_path: Path) -> None:
    collected = run(tmp_path, Scripted(lambda question, n: "error" if question.endswith("2") else "right"), n=4)
    assert (collected.n_asked, collected.n_failed, collected.stopped) == (4, 1, None)
    (line,) = (tmp_path / "failures.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["problem_id"], record["sample"], record["error"]) == ("p2", 0, "HTTP 400")
    again = Scripted(lambda question, n: "right")
    run(tmp_path, again, n=4)
    assert [question for question, _ in again.asked] == ["question 2"]


@pytest.mark.parametrize("width", [1, 5, 16])
def test_the_bound_is_passed_by_no_more_than_what_is_in_flight(tmp_path: Path, width: int) -> None:
    price = (0, 1e6 / 90)  # a dollar a sample
    collected = run(tmp_path, Scripted(lambda q, n: "right", width), n=200, price=price, max_usd=40.0)
    traces = list(TraceStore.read(tmp_path / "traces.jsonl"))
    assert "--max-usd" in (collected.stopped or "")
    assert 40 <= len(traces) <= 40 + width
    assert sum(trace.cost_usd or 0 for trace in traces) == pytest.approx(len(traces))
    again = Scripted(lambda q, n: "right", width)
    assert run(tmp_path, again, n=200, price=price, max_usd=40.0).stopped
    assert not again.asked, "what was spent before counts"
    more = run(tmp_path, Scripted(lambda q, n: "right", width), n=200, price=price, max_usd=60.0)
    assert more.stopped
    assert 60 <= len(list(TraceStore.read(tmp_path / "traces.jsonl"))) <= 60 + width


def test_until_answers_are_known_each_may_take_its_limit_and_short_ones_make_room(tmp_path: Path) -> None:
    class Watched(Scripted):
        def generate(
            self, requests: Iterable[Request], sampling: Sampling, *, top_logprobs: int = 0
        ) -> Iterator[tuple[int, Completion]]:
            for drawn in super().generate(requests, sampling):
                ahead.append(self.most_ahead)
                yield drawn

    ahead: list[int] = []
    wanted = CollectSettings("toy", Sampling(max_tokens=900))  # a dollar at the limit; ten cents for what comes back
    with TraceStore(tmp_path / "traces.jsonl") as store:
        collected = collect(
            problems(40),
            store,
            settings=wanted,
            open_teacher=lambda: Watched(lambda q, n: "right", 16),
            grader=Judges(),
            budget=Budget(CostRecipe(price=(0, 1e6 / 900), max_usd=5.0)),
        )
    assert (collected.n_asked, collected.stopped) == (40, None)
    assert (ahead[0], max(ahead)) == (5, 16)
