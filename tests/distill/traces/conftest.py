"""A small file of traces that its tests can count by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from deepdistill.distill.records import Grade, Judgement, Problem, TeacherInfo, Trace
from deepdistill.distill.traces.store import TraceStore
from deepdistill.localrun.core.generation import Completion, Sampling

MakeTrace = Callable[[int], Trace]


def _make_trace(index: int) -> Trace:
    problem = Problem(f"p{index}", f"question {index}?", "42", f"source {index % 2}", "math")
    done = Completion("**42**", f"40+2={index}", True, "stop", 10, 5 * (index + 1), 3, 0.5)
    info = TeacherInfo("t", "gguf")
    grade = Grade("42", "right", "grader", 1.0)
    return replace(Trace.make(problem, done, grade=grade, info=info, teacher="t", sampling=Sampling()), cost_usd=0.25)


@pytest.fixture
def make_trace() -> MakeTrace:
    """Make the trace of a number: 5 tokens for the first, 5 more for each later one."""
    return _make_trace


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two right traces, a wrong one without a price, and an unknown one in a loop that a vote favours."""
    path = tmp_path / "traces.jsonl"
    with TraceStore(path) as store:
        for trace in (
            _make_trace(0),
            replace(_make_trace(1), verdict="wrong", cost_usd=None),
            replace(_make_trace(2), verdict="unknown", verdict_by="none", finish_reason="loop"),
            _make_trace(3),
        ):
            store.append(trace)
        store.append_judgements([Judgement(_make_trace(2).id, "vote", 0.75)])
    return path
