"""The names that other people's files give to the columns of problems and traces.

Problems and imported traces look for a question in different orders: of a row with both `prompt` and `instruction`, a
problem takes `prompt` and a trace takes `instruction`; only a trace knows `query`. Their answers differ too: a problem
takes the whole text of `solution`, a trace takes no column with worked solutions but what one puts in a box.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ..graders.answer import final_answer

PROBLEM_QUESTIONS = ("question", "problem", "prompt", "instruction", "input")
TRACE_QUESTIONS = ("problem", "question", "instruction", "prompt", "query", "input")

PROBLEM_ANSWERS = ("answer", "final_answer", "solution", "output", "target", "ground_truth")
TRACE_ANSWERS = ("answer", "final_answer", "ground_truth", "ground_truth_solution", "expected_answer")
"""Reference answers, as opposed to what a model said."""

PROBLEM_METADATA = {
    "tests": ("tests", "test_list", "unit_tests", "test"),
    "test_setup": ("test_setup", "test_setup_code"),
    "entry_point": ("entry_point",),
    "choices": ("choices", "options"),
    "schema": ("schema", "json_schema"),
}
"""What graders need beside the answer, by the name that they know it by."""
PROBLEM_WORKED = ("worked", "answer_cot", "solution", "worked_solution", "rationale", "explanation")
"""Worked solutions, from which `--teacher worked` makes traces."""

TRACE_REASONINGS = ("reasoning_content", "deepseek_reasoning", "reasoning", "reasoning_trace", "thinking")
TRACE_CONTENTS = ("deepseek_solution", "generation", "response", "completion", "content", "output")


def find_column(row: Mapping[str, Any], named: str | None, usual: Iterable[str]) -> str | None:
    """Return the column that the user named, else the first usual one in any case; None if the row lacks it."""
    if named is not None:
        return named if named in row else None
    lower = {str(key).lower(): key for key in row}
    return next((lower[name] for name in usual if name in lower), None)


def problem_answer(value: Any) -> str | None:
    """Return a problem's reference answer as text, without GSM8K's steps before `####`; None for a blank one."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.rsplit("####", 1)[-1].strip() or None


def trace_answer(row: Mapping[str, Any]) -> str | None:
    """Return the reference answer in a trace's row; of a worked solution only what it puts in a box."""
    for column in TRACE_ANSWERS:
        text = row.get(column)
        if not isinstance(text, str | int | float) or not str(text).strip():
            continue
        if "solution" in column:
            return final_answer(str(text), numeric=False) if "\\boxed" in str(text) else None
        return str(text).rsplit("####", 1)[-1].strip()
    return None
