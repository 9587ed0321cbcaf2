"""Tasks as people bring them (labels, JSON, dates, quantities): cases by hand, each with its file's references.

The grader is chosen as it is for a file, from the references alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepdistill.distill.graders.pool import Grader
from deepdistill.distill.problems.shape import grader_of, labels_of
from deepdistill.distill.records import Problem

CASES = [
    json.loads(line)
    for line in (Path(__file__).parents[2] / "data" / "own_tasks.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(n_workers=1) as one:
        yield one


def problem_of(case: dict[str, Any]) -> Problem:
    chosen, metadata = grader_of(case["reference"], labels_of(case["references"] * 2))
    return Problem("", case["question"], case["reference"], "", chosen, metadata)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["reply"][:40])
def test_a_reply_gets_the_verdict_that_a_person_gave_it(case: dict[str, Any], grader: Grader) -> None:
    found = grader.grade(problem_of(case), case["reply"])
    assert (found.verdict, bool(found.reason)) == (case["verdict"], case["verdict"] == "unknown"), case["reason"]
