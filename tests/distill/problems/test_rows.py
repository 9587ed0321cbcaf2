"""Rows as other people's data sets write them: what is asked, what is shown, which replies are right."""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from deepdistill.distill.graders.pool import Grader
from deepdistill.distill.problems.load import load_problems
from deepdistill.distill.records import Problem, messages_of
from deepdistill.errors import ArtifactError, UsageError
from deepdistill.localrun.core.reporter import SILENT, Reporter

CASES = [
    json.loads(line)
    for line in (Path(__file__).parents[2] / "data" / "problem_rows.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as grader:
        yield grader


def load(tmp_path: Path, *rows: dict[str, Any], query: str = "", report: Reporter = SILENT) -> list[Problem]:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_problems(f"{path}{query}", report=report)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["layout"])
def test_known_layouts(case: dict[str, Any], tmp_path: Path, grader: Grader) -> None:
    (problem,) = load(tmp_path, case["row"])
    messages = messages_of(problem)
    assert messages == case.get("messages", messages)
    shown = "\n".join(turn["content"] for turn in messages)
    assert [text for text in case.get("must_show", []) if text not in shown] == []
    if "reference" in case:
        assert problem.answer == case["reference"]
    assert bool(problem.metadata.get("worked")) == case.get("worked", False)
    for verdict in ("right", "wrong"):
        replies = case.get(f"{verdict}_replies", [])
        assert [grader.grade(problem, reply).verdict for reply in replies] == [verdict] * len(replies)


@pytest.mark.parametrize(
    ("row", "shown", "right", "wrong"),
    [
        (
            {"question": "2+2?", "options": ["A)3", "B)4", "C)5"], "correct": "B", "rationale": "two twos"},
            ["A. 3", "B. 4", "C. 5"],
            "B",
            "3",
        ),
        ({"question": "?", "opa": "liver", "opb": "heart", "opc": "lung", "opd": "skin", "cop": 1}, ["B."], "B", "A"),
        (
            {"Question": "Mass?", "Correct Answer": "9 kg", "Incorrect Answer 1": "8 kg", "Incorrect Answer 2": "7 kg"},
            ["9 kg", "8 kg", "7 kg"],
            "9 kg",
            "8 kg",
        ),
        ({"question": "Capital?", "answer": ["Paris", "City of Paris"]}, [], "City of Paris", "Lyon"),
        ({"question": "Capital?", "answer": {"value": "Paris", "aliases": ["Lutetia"]}}, [], "lutetia", "Lyon"),
        ({"question": "Pick.", "choices": {"A": "x", "B": "y"}, "answer": "B"}, ["A. x", "B. y"], "(B)", "(A)"),
        ({"prompt": "2+2?", "verification_info": '{"ground_truth": "4"}'}, [], "4", "5"),
        ({"question": "Tax?", "answer": 0.07}, [], "7%", "7"),
    ],
)  # fmt: skip
def test_more_layouts(
    row: dict[str, Any], shown: list[str], right: str, wrong: str, tmp_path: Path, grader: Grader
) -> None:
    (problem,) = load(tmp_path, row)
    assert [text for text in shown if text not in problem.question] == []
    assert grader.grade(problem, right).verdict == "right"
    assert grader.grade(problem, wrong).verdict != "right"


def test_options_that_the_question_has_are_not_shown_again(tmp_path: Path) -> None:
    (problem,) = load(tmp_path, {"question": "Which is red? A. sky B. blood", "choices": ["sky", "blood"], "answer": 1})
    assert problem.question == "Which is red? A. sky B. blood"
    assert problem.answer == "B"


def test_all_or_any_of_several_answers_is_the_specs_to_say(tmp_path: Path, grader: Grader) -> None:
    row = {"question": "Roots?", "answer": [2, -2]}
    (every,) = load(tmp_path, row)
    (any_of,) = load(tmp_path, row, query="?answers=any")
    assert [grader.grade(every, reply).verdict for reply in (r"\boxed{\pm 2}", r"\boxed{2}")] == ["right", "wrong"]
    assert [grader.grade(any_of, reply).verdict for reply in (r"\boxed{-2}", r"\boxed{3}")] == ["right", "wrong"]
    with pytest.raises(UsageError, check=lambda error: error.code == "bad-parameter"):
        load(tmp_path, row, query="?answers=some")


def test_a_conversation_is_asked_whole_and_its_bucket_is_that_of_the_users_turns(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
        {"from": "human", "value": [{"type": "text", "text": "2+3?"}]},
        {"from": "gpt", "value": "5"},
    ]
    (problem,) = load(tmp_path, {"messages": turns, "answer": "5"})
    assert [turn["role"] for turn in messages_of(problem)] == ["user", "assistant", "user"]
    assert problem.question == "Hi\n2+3?"
    chat = [{"role": "system", "content": "x"}, {"role": "user", "content": "2+3?"}]
    plain, with_system = (load(tmp_path, {"prompt": prompt})[0] for prompt in ("2+3?", chat))
    assert (plain.id, plain.question) == (with_system.id, with_system.question)
    assert messages_of(with_system)[0] == {"role": "system", "content": "x"}


def test_two_questions_are_one_only_if_they_mean_the_same(tmp_path: Path, recorder: Any) -> None:
    rows = [("What is 5²?", "25"), ("What is 52?", "52"), ("what  is 52?", "52"), ("What is 52?", "53")]
    problems = load(tmp_path, *({"question": q, "answer": a} for q, a in rows), report=recorder)
    assert [(p.question, p.answer) for p in problems] == [("What is 5²?", "25"), ("What is 52?", "52")]
    assert any("52 and 53" in line for line in recorder.said)


def test_a_bad_row_is_named_and_never_the_end(tmp_path: Path, recorder: Any) -> None:
    path = tmp_path / "rows.jsonl"
    deep = '{"question": ' + "[" * 100_000 + "}"
    bad = [
        "{",
        "[]",
        deep,
        '{"question": " "}',
        '{"question": "\\ud800?"}',
        '{"question": "a", "answer": 1e400}',
        '{"x": 1}',
    ]
    bad.append('{"question": "b", "answer": NaN}')
    bad.append(json.dumps({"question": "c", "choices": ["x", "y"], "answer": 7}))
    path.write_text("\n".join([*bad, json.dumps({"question": "d", "answer": "4", "note": "n", "level": 2})]))
    (problem,) = load_problems(str(path), report=recorder)
    assert problem.question == "d"
    assert f"9 of 10 rows are left out: {path}:1" in recorder.said[0]
    assert "level, note" in recorder.said[1]


def test_columns_of_parquet_that_are_no_text(tmp_path: Path) -> None:
    rows = [
        {"question": "a", "answer": decimal.Decimal("1.50")},
        {"question": "b", "answer": decimal.Decimal("2.00")},
    ]
    for name, some in {
        "decimal": rows,
        "date": [{"question": "a", "answer": datetime.date(2026, 12, 1)}],
        "bytes": [{"question": "a", "answer": b"4"}],
        "list": [{"question": "a", "answer": [1, 2]}],
        "float": [{"question": "a", "answer": 0.5}],
    }.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), tmp_path / f"{name}.parquet")
    found = {p.stem: [one.answer for one in load_problems(str(p))] for p in sorted(tmp_path.glob("*.parquet"))}
    assert found == {
        "bytes": ["4"], "date": ["2026-12-01"], "decimal": ["1.50", "2.00"], "float": ["0.5"], "list": ["1, 2"],
    }  # fmt: skip
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"question": "a", "answer": b"\xff"}]), tmp_path / "x.parquet"
    )
    with pytest.raises(ArtifactError, check=lambda error: error.code == "bad-row"):
        load_problems(str(tmp_path / "x.parquet"))
