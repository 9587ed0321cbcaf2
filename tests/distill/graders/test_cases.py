"""Replies whose verdict a person wrote down, with the reason: no wrong one is right, and every right one is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from deepdistill.distill.graders.pool import Grader
from deepdistill.distill.records import Problem

DATA = Path(__file__).parents[2] / "data"
CASES = [
    json.loads(line)
    for path in sorted(DATA.glob("verdicts*.jsonl"))
    for line in path.read_text(encoding="utf-8").splitlines()
]


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(timeout_s=30) as grader:
        yield grader


def verdict(grader: Grader, case: dict[str, Any]) -> str:
    metadata = {"choices": case["choices"]} if "choices" in case else {}
    problem = Problem("id", case.get("question", "question?"), case["reference"], "test", case["grader"], metadata)
    return grader.grade(problem, case["reply"]).verdict


@pytest.mark.parametrize("kind", ["math", "number", "choice", "exact"])
def test_verdicts_that_a_person_gave(grader: Grader, kind: str) -> None:
    cases = [case for case in CASES if case["grader"].partition(":")[0] == kind]
    assert len(cases) >= 10
    with ThreadPoolExecutor(grader.n_workers) as threads:
        verdicts = list(threads.map(lambda case: verdict(grader, case), cases))
    pairs = list(zip(cases, verdicts, strict=True))
    assert [case for case, said in pairs if case["verdict"] == "wrong" and said == "right"] == []
    assert [case for case, said in pairs if case["verdict"] == "right" and said != "right"] == []
