"""The rows of the first training: what is held out for validation, what logits are refused, what is said."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from deepdistill.distill.recipe.teach import TeachRecipe
from deepdistill.distill.recipe.training import OnPolicyRecipe, TrainingRecipe
from deepdistill.distill.records import Grade, Problem, TeacherInfo, Trace
from deepdistill.distill.teachers import pocket_dir
from deepdistill.distill.teachers.huggingface.loading import load_tokenizer
from deepdistill.distill.training.dataset import by_level, hold_out, lessons
from deepdistill.distill.training.rows import Row
from deepdistill.distill.training.student import teach_template
from deepdistill.errors import ArtifactError
from deepdistill.localrun.core.generation import Completion, Sampling


def traces_of(n: int, samples: int = 1) -> list[Trace]:
    made = []
    for i in range(n):
        problem = Problem(f"{i}", f"{i} + 1 =", str(i + 1), "s", "number")
        done = Completion(str(i + 1), f"{i}+1={i + 1}", True, "stop", 0, 0, 0, 0.0)
        grade = Grade(str(i + 1), "right", "grader", 1.0)
        info = TeacherInfo("t", "gguf")
        made += [
            Trace.make(problem, done, grade=grade, info=info, teacher="t", sampling=Sampling(), sample=k)
            for k in range(samples)
        ]
    return made


def test_validation_rows_ask_what_no_training_row_asks() -> None:
    traces = traces_of(40, samples=2)
    rows = [Row([1, int(trace.problem_id) + 5], 1) for trace in traces]
    trained, validation = hold_out(rows, traces, n=4, seed=0)
    held = {row.input_ids[1] for row in validation}
    assert len(validation) == 4
    assert not held & {rows[i].input_ids[1] for i in trained}
    assert 72 <= len(trained) <= 76
    assert hold_out(rows, traces, n=4, seed=0) == (trained, validation)
    assert hold_out(rows, traces, n=6, seed=0) == (list(range(80)), [])  # more than an eighth of so few


def test_logits_that_cannot_be_had_are_an_error_only_if_they_were_asked_for(tmp_path: Path, recorder: Any) -> None:
    tokenizer = load_tokenizer(pocket_dir())
    teach_template(tokenizer)
    traces, path = traces_of(3), tmp_path / "traces.jsonl"

    def rows_with(loss: str) -> list[Row]:
        training = TrainingRecipe(max_length=64, loss=loss)  # type: ignore[arg-type]
        rows, _ = lessons(traces, path, tokenizer=tokenizer, training=training, report=recorder)
        return rows

    with pytest.raises(ArtifactError, check=lambda error: error.code == "no-logits") as caught:
        rows_with("logits")
    assert "cross-entropy" in caught.value.hint
    assert {row.losses for row in rows_with("auto")} == {(("cross_entropy", 1.0),)}
    assert recorder.said == []  # nobody asked, and there is nothing beside the traces
    path.with_name("traces.logprobs.bin").write_bytes(b"")
    assert len(rows_with("auto")) == 3
    assert recorder.said == ["no trace to train on has log-probabilities: training on the tokens alone (cross-entropy)"]


def test_rows_that_are_too_long_are_left_out() -> None:
    tokenizer = load_tokenizer(pocket_dir())
    teach_template(tokenizer)
    first, *others = traces_of(3)
    traces, none = [dataclasses.replace(first, reasoning_content="1+1=2\n" * 50), *others], Path("none.jsonl")
    rows, kept = lessons(traces, none, tokenizer=tokenizer, training=TrainingRecipe(max_length=64))
    assert [trace.id for trace in kept] == [trace.id for trace in others]
    assert len(rows) == 2
    with pytest.raises(ArtifactError, check=lambda error: error.code == "traces-too-long"):
        lessons(traces, none, tokenizer=tokenizer, training=TrainingRecipe(max_length=16))


def test_a_curriculum_puts_hopeless_problems_second() -> None:
    traces = traces_of(16)
    rows = [Row([1, int(trace.problem_id) + 5], 1) for trace in traces]
    rates = {trace.problem_id: 0.5 if int(trace.problem_id) < 8 else 0.0 for trace in traces}
    ordered = by_level(rows, traces, rates=rates, training=TrainingRecipe(batch_size=2, epochs=1))
    numbers = [row.input_ids[1] - 5 for row in ordered]
    assert set(numbers[:2]) <= set(range(8))
    assert sorted(numbers) == list(range(16))


def test_trainings_share_the_minutes() -> None:
    settings = TeachRecipe(
        problems="x.jsonl",
        on_policy=OnPolicyRecipe(rounds=2),
        training=TrainingRecipe(minutes=12.0, learning_rate=0.001),
    )
    assert (settings.one_training().minutes, settings.one_training(2).seed) == (4.0, 2)
    assert settings.training.minutes == 12.0
