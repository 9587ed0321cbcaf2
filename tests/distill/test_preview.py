"""What a dry run says, against what the run then asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deepdistill.distill.preview import Preview, describe_preview, describe_problem, preview
from deepdistill.distill.recipe.gathering import CostRecipe, CurationRecipe, TeacherRecipe, TracesRecipe
from deepdistill.distill.recipe.teach import TeachRecipe
from deepdistill.distill.records import Grade, Problem, TeacherInfo, Trace
from deepdistill.distill.traces.store import TraceStore
from deepdistill.localrun.core.generation import Completion
from deepdistill.localrun.core.settings import changed

PROBLEMS = [Problem(f"p{i}", "x" * 400, "4", "mine", "math") for i in range(30)]
PROBLEMS += [Problem(f"p{i}", "x" * 400, None, "mine", "none") for i in range(30, 40)]
SETTINGS = TeachRecipe(
    problems="mine",
    teacher=TeacherRecipe(model="http://a/v1", temperature=1.0),
    traces=TracesRecipe(samples=4),
    curation=CurationRecipe(keep=2),
)


def look(folder: Path, changes: dict[str, Any] | None = None) -> Preview:
    return preview(changed(SETTINGS, changes or {}), folder, problems=PROBLEMS, held_out=PROBLEMS[:7])


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
                    teacher=SETTINGS.teacher.model,
                    sampling=SETTINGS.sampling,
                )
            )


def test_before_anything_is_there_every_answer_takes_its_limit(tmp_path: Path) -> None:
    made = look(tmp_path, {"cost.price": (1, 10), "teacher.max_tokens": 1000})
    assert (made.n_problems, made.n_held_out, made.n_there, made.n_traces) == (40, 7, 0, 160)
    assert (made.prompt_tokens, made.completion_tokens) == (160 * 100, 160 * 1000)
    assert made.usd == pytest.approx((16_000 * 1 + 160_000 * 10) / 1e6)
    assert (made.hours, made.is_projected) == (None, False)
    assert not (tmp_path / "traces.jsonl").exists()


def test_what_is_there_is_not_asked_again_and_tells_what_the_rest_takes(tmp_path: Path) -> None:
    store(tmp_path / "run", 30)
    made = look(tmp_path / "run", {"cost.price": (0, 10)})
    # All were right: a second one of 30 problems, and 4 samples of 10 that nobody can grade.
    assert (made.n_there, made.n_traces, made.is_projected) == (30, 70, True)
    assert made.completion_tokens == 70 * 300
    assert made.usd == pytest.approx(0.21)
    assert made.hours == pytest.approx(70 * 2 / 8 / 3600)


def test_few_traces_say_nothing_of_the_rest(tmp_path: Path) -> None:
    store(tmp_path / "run", 19)
    made = look(tmp_path / "run", {"teacher.max_tokens": 1000})
    assert (made.n_there, made.is_projected, made.hours) == (19, False, None)


@pytest.mark.parametrize(("samples", "n"), [(4, 40), (1, 10)])
def test_the_judge_is_counted(tmp_path: Path, samples: int, n: int) -> None:
    changes = {"judge.model": "http://b/v1", "traces.samples": samples, "curation.keep": 1}
    made = look(tmp_path, changes | {"cost.price": (0, 0), "cost.judge_price": (0, 1e6)})
    assert made.n_judgements == n
    assert made.usd == n * 2048, "a dollar a token of the judge's"


def test_new_problems_are_counted(tmp_path: Path) -> None:
    made = look(tmp_path, {"traces.expand.n": 10})
    assert made.n_expansions == 80, "eight to a request"
    assert made.n_traces == 160 + 40 * 10 * 4


def test_traces_of_ones_own_cost_nothing(tmp_path: Path) -> None:
    changes = {"traces.file": Path("mine.jsonl"), "judge.model": "http://b/v1", "cost.price": (1, 1)}
    settings = changed(SETTINGS, changes)
    made = preview(settings, tmp_path, problems=PROBLEMS, held_out=[])
    assert (made.n_traces, made.n_judgements, made.usd) == (0, 0, 0.0)
    assert any("no teacher is asked" in line for line in describe_preview(made, PROBLEMS, settings))


def test_a_problem_is_shown_as_it_is_asked() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Roots?\x1b[2J\nof x² = 4"}]
    problem = Problem("id", "Roots?", "2, -2", "mine", "math", {"together": "all"}, turns)
    assert list(describe_problem(problem)) == [
        "system    Be brief.",
        "user      Roots?[2J",
        "          of x² = 4",
        "reference 2, -2 (all of them, in any order)",
        "grader    math",
    ]
    any_of = Problem("id", "line\n" * 99, "Paris", "mine", "exact", {"aliases": ["Lutetia"]})
    lines = list(describe_problem(any_of))
    assert (len(lines), lines[-2]) == (14, "reference Paris or Lutetia")


def test_the_lines(tmp_path: Path) -> None:
    store(tmp_path / "run", 30)
    cost = CostRecipe(price=(0, 10), max_usd=3.0, max_hours=2.0)
    settings = changed(SETTINGS, {"traces.expand.n": 2, "judge.model": "http://b/v1", "cost": cost})
    made = preview(settings, tmp_path / "run", problems=PROBLEMS, held_out=PROBLEMS[:7])
    text = "\n".join(describe_preview(made, PROBLEMS, settings))
    for part in (
        "40 from the training part: mine, 10 of them without an answer",
        "4 of each, until 2 are right: at most 390 requests to http://a/v1 beside the 30 stored ones",
        "2 new problems to each, 40 requests",
        "at most 360 requests for what no grader can judge",
        "as the 30 stored traces had on average",
        "it ends at $3",
        "it asks for 2 h at most",
        "scored on 7 held-out problems",
        "nothing was asked",
    ):
        assert part in text, text
