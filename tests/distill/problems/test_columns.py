"""Column names: what problems and traces each read today, where they differ."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepdistill.distill.problems.columns import find_column, read_reference, trace_answer
from deepdistill.distill.problems.load import load_problems
from deepdistill.distill.traces.importing import import_traces


def test_a_column_is_the_named_one_or_the_first_usual_one_in_any_case() -> None:
    row = {"Task": "a", "QUESTION": "b", "prompt": "c"}
    assert find_column(row, "Task", ("question",)) == "Task"
    assert find_column(row, "task", ("question",)) is None
    assert find_column(row, None, ("prompt", "question")) == "prompt"
    assert find_column(row, None, ("question", "prompt")) == "QUESTION"
    assert find_column(row, None, ("answer",)) is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, None), (" ", None), ("two\n#### 4", "4"), (4.5, "4.5"), ({"k": [1]}, '{"k": [1]}')],
)
def test_the_reference_of_a_problem(value: object, expected: str | None) -> None:
    assert read_reference(value).text == expected


def test_the_reference_in_a_trace() -> None:
    assert trace_answer({"answer": "two\n#### 4"}) == "4"
    assert trace_answer({"answer": " ", "ground_truth": 5}) == "5"
    assert trace_answer({"ground_truth_solution": r"so it is \boxed{6}."}) == "6"
    assert trace_answer({"ground_truth_solution": "so it is 6"}) is None
    assert trace_answer({"output": "7"}) is None


def test_problems_and_traces_take_their_question_in_different_orders(tmp_path: Path) -> None:
    path = tmp_path / "both.jsonl"
    path.write_text('{"instruction": "I", "prompt": "P", "query": "Q", "output": "7"}\n')
    (problem,) = load_problems(str(path))
    ((asked, trace),) = import_traces(path)
    assert (problem.question, problem.answer) == ("P", "7")
    assert (asked.question, asked.answer, trace.content) == ("I", None, "7")
