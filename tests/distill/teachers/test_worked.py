"""Worked solutions that problems bring become graded traces, from reasoning-gym and from files alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepdistill.distill.problems.load import load_problems
from deepdistill.distill.problems.split import bucket_of
from deepdistill.distill.recipe.gathering import CurationRecipe, TeacherRecipe, TracesRecipe
from deepdistill.distill.recipe.teach import ScoresRecipe, TeachRecipe
from deepdistill.distill.records import Problem
from deepdistill.distill.teach import teach
from deepdistill.distill.teachers.worked import WorkedTeacher, worked_solution
from deepdistill.distill.traces.store import TraceStore
from deepdistill.errors import ArtifactError, TeacherError, UsageError


def _problem(worked: str, answer: str | None = "7") -> Problem:
    return Problem("p", "q", answer, "s", "number", {"worked": worked})


@pytest.mark.parametrize(
    ("worked", "steps", "answer"),
    [
        ("3+4=<<3+4=7>>7\nso 7\n#### 7", "3+4=7\nso 7", "7"),
        ("3 and 4 make 7.", "3 and 4 make 7.", "7"),
        ("thus \\boxed{7} of 9", "thus \\boxed{7} of 9", "7"),
    ],
)
def test_steps_and_answer_are_told_apart(worked: str, steps: str, answer: str) -> None:
    assert worked_solution(_problem(worked)) == (steps, answer)


def test_a_problem_without_a_solution_brings_none() -> None:
    assert worked_solution(_problem("  ")) is None
    with pytest.raises(TeacherError, check=lambda error: error.code == "no-worked-solutions"):
        WorkedTeacher([_problem("")])


def test_a_file_with_worked_solutions_teaches_and_wrong_ones_are_left_out(tmp_path: Path) -> None:
    questions = [q for q in (f"What is {i} and 1?" for i in range(60)) if bucket_of(q) == "train"][:12]
    rows = [
        {"question": q, "answer": str(n + 1), "steps": f"{n}+1={n + 1}\n#### {n + 1 if i else 'no number'}"}
        for i, q in enumerate(questions)
        for n in [int(q.split()[2])]
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = TeachRecipe(
        problems=f"{path}?worked=steps",
        teacher=TeacherRecipe(model="worked"),
        traces=TracesRecipe(n=100),
        curation=CurationRecipe(similarity=1.0),
    )
    with pytest.raises(ArtifactError, check=lambda error: error.code == "no-problems"):
        teach(settings, tmp_path / "run", stop_after="traces")
    held_out = next(f"test {i}" for i in range(99) if bucket_of(f"test {i}") == "test")
    with path.open("a") as file:
        file.write(json.dumps({"question": held_out, "answer": "1", "steps": "#### 1"}) + "\n")
    result = teach(settings, tmp_path / "run", stop_after="traces")
    traces = list(TraceStore.read(tmp_path / "run" / "traces.jsonl"))
    assert [trace.verdict for trace in traces] == ["wrong"] + ["right"] * 11
    assert traces[1].reasoning_content == f"{int(traces[1].content) - 1}+1={traces[1].content}"
    assert traces[1].teacher.backend == "worked"
    assert result.curation["kept"] == 11


def test_gsm8k_rows_bring_their_solution_in_the_answer(tmp_path: Path) -> None:
    path = tmp_path / "gsm8k.jsonl"
    path.write_text(json.dumps({"question": "Two and two?", "answer": "2+2=<<2+2=4>>4\n#### 4"}) + "\n")
    (problem,) = load_problems(str(path))
    assert problem.answer == "4"
    assert worked_solution(problem) == ("2+2=4", "4")
    with pytest.raises(ArtifactError, check=lambda error: error.code == "no-such-column"):
        load_problems(f"{path}?worked=steps")


def test_gsm_symbolic_teaches_itself(tmp_path: Path) -> None:
    settings = TeachRecipe(
        problems="gym:gsm_symbolic",
        teacher=TeacherRecipe(model="worked"),
        traces=TracesRecipe(n=40),
        scores=ScoresRecipe(n=5),
    )
    teach(settings, tmp_path / "run", stop_after="traces")
    traces = list(TraceStore.read(tmp_path / "run" / "traces.jsonl"))
    assert len(traces) == 40
    assert sum(trace.verdict == "right" for trace in traces) >= 38
    assert all("####" not in (trace.reasoning_content or "") for trace in traces)


def test_one_solution_cannot_be_sampled_twice() -> None:
    recipe = TeachRecipe("x.jsonl", teacher=TeacherRecipe(model="worked"), traces=TracesRecipe(samples=2))
    with pytest.raises(UsageError, check=lambda error: error.code == "samples-alike"):
        _ = recipe.sampling
