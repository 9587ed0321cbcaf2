"""What a dry run says, against what the run then asks for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from deepdistill.distill.preview import Preview, describe_preview, preview
from deepdistill.distill.recipe import TeachSettings
from deepdistill.distill.records import Grade, Problem, TeacherInfo, Trace
from deepdistill.distill.teachers.budget import Limits, Price
from deepdistill.distill.traces.store import TraceStore
from deepdistill.errors import UsageError
from deepdistill.localrun.core.generation import Completion

PROBLEMS = [Problem(f"p{i}", "x" * 400, "4", "mine", "math") for i in range(30)]
PROBLEMS += [Problem(f"p{i}", "x" * 400, None, "mine", "none") for i in range(30, 40)]
SETTINGS = TeachSettings(problems="mine", teacher="http://a/v1", samples=4, keep=2, temperature=1.0)


def look(folder: Path, limits: Limits | None = None, **changes: Any) -> Preview:
    return preview(PROBLEMS, PROBLEMS[:7], dataclasses.replace(SETTINGS, **changes), limits or Limits(), folder)


def store(folder: Path, n: int, *, right: bool = True) -> None:
    """Keep the first samples of n problems: 300 tokens and 2 s each."""
    folder.mkdir(parents=True)
    done = Completion("4", None, None, "stop", 100, 300, 0, 2.0)
    grade = Grade("4", "right" if right else "wrong", "grader", 1.0)
    with TraceStore(folder / "traces.jsonl") as traces:
        for problem in PROBLEMS[:n]:
            info = TeacherInfo("t", "endpoint")
            traces.append(
                Trace.make(
                    problem,
                    done,
                    grade=grade,
                    info=info,
                    teacher=SETTINGS.teacher,
                    sampling=SETTINGS.teacher_sampling(),
                )
            )


def test_before_anything_is_there_every_answer_takes_its_limit(tmp_path: Path) -> None:
    made = look(tmp_path, Limits(Price(1, 10)), max_tokens=1000)
    assert (made.n_problems, made.n_held_out, made.n_there, made.n_traces) == (40, 7, 0, 160)
    assert (made.prompt_tokens, made.completion_tokens) == (160 * 100, 160 * 1000)
    assert made.usd == pytest.approx((16_000 * 1 + 160_000 * 10) / 1e6)
    assert (made.hours, made.is_projected) == (None, False)
    assert not (tmp_path / "traces.jsonl").exists()


def test_what_is_there_is_not_asked_again_and_tells_what_the_rest_takes(tmp_path: Path) -> None:
    store(tmp_path / "run", 30)
    made = look(tmp_path / "run", Limits(Price(0, 10)))
    # All were right: a second one of 30 problems, and 4 samples of 10 that nobody can grade.
    assert (made.n_there, made.n_traces, made.is_projected) == (30, 70, True)
    assert made.completion_tokens == 70 * 300
    assert made.usd == pytest.approx(0.21)
    assert made.hours == pytest.approx(70 * 2 / 8 / 3600)


def test_few_traces_say_nothing_of_the_rest(tmp_path: Path) -> None:
    store(tmp_path / "run", 19)
    made = look(tmp_path / "run", max_tokens=1000)
    assert (made.n_there, made.is_projected, made.hours) == (19, False, None)


@pytest.mark.parametrize(("compare", "samples", "n"), [(False, 4, 40), (True, 4, 80), (True, 2, 20), (True, 1, 0)])
def test_the_judge_is_counted(tmp_path: Path, compare: bool, samples: int, n: int) -> None:
    changes = {"judge": "http://b/v1", "judge_compare": compare, "samples": samples, "keep": 1}
    limits = Limits(Price(0, 0), judge_price=Price(0, 1e6))
    made = look(tmp_path, limits, **changes)
    assert made.n_judgements == n
    assert made.usd == n * 2048, "a dollar a token of the judge's"


def test_new_problems_are_counted(tmp_path: Path) -> None:
    made = look(tmp_path, expand=10)
    assert made.n_expansions == 80, "eight to a request"
    assert made.n_traces == 160 + 40 * 10 * 4


def test_traces_of_ones_own_cost_nothing(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, traces="mine.jsonl", judge="http://b/v1")
    made = preview(PROBLEMS, [], settings, Limits(Price(1, 1)), tmp_path)
    assert (made.n_traces, made.n_judgements, made.usd) == (0, 0, 0.0)
    assert any("no teacher is asked" in line for line in describe_preview(made, PROBLEMS, settings, Limits()))


def test_what_is_off_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot make a trace train"):
        look(tmp_path, accept=["me"])


def test_the_lines(tmp_path: Path) -> None:
    store(tmp_path / "run", 30)
    limits = Limits(Price(0, 10), max_usd=3.0, max_hours=2.0)
    settings = dataclasses.replace(SETTINGS, expand=2, judge="http://b/v1")
    made = preview(PROBLEMS, PROBLEMS[:7], settings, limits, tmp_path / "run")
    text = "\n".join(describe_preview(made, PROBLEMS, settings, limits))
    for part in (
        "40 from the training part: mine, 10 of them without an answer",
        "4 of each, until 2 are right: at most 390 requests to http://a/v1 beside 30 that are there",
        "2 new problems to each, 40 requests",
        "at most 360 requests for what no grader can judge",
        "as the 30 traces there had on average",
        "it ends at $3",
        "it asks for 2 h at most",
        "scored on 7 held-out problems",
        "nothing was asked",
    ):
        assert part in text, text
