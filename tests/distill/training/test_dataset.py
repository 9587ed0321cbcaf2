"""The rows of the first training: validation rows, long rows, and the teacher's distribution from the sidecar."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from deepdistill.distill.graders.pool import Grader
from deepdistill.distill.problems.load import load_problems
from deepdistill.distill.recipe.teach import TeachRecipe
from deepdistill.distill.recipe.training import OnPolicyRecipe, TrainingRecipe
from deepdistill.distill.records import Grade, Problem, TeacherInfo, Trace, messages_of
from deepdistill.distill.teachers import Request, open_teacher, pocket_dir
from deepdistill.distill.teachers.huggingface.loading import load_tokenizer
from deepdistill.distill.teachers.vocabulary import is_same, of_tokenizer
from deepdistill.distill.traces.logprobs import Logprobs, logprobs_path
from deepdistill.distill.traces.store import TraceStore
from deepdistill.distill.training.curriculum import arrange
from deepdistill.distill.training.dataset import (
    OTHER_TOKENS,
    WITH_LOGITS,
    add_logits,
    hold_out,
    lessons,
    mixture,
    row_of,
    why_no_logits,
)
from deepdistill.distill.training.losses import LOSSES, Head, projected_loss
from deepdistill.distill.training.packing import pad
from deepdistill.distill.training.rows import Row, make_row
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


def test_what_is_too_long_loses_the_middle_of_its_reasoning_and_keeps_its_end() -> None:
    tokenizer = load_tokenizer(pocket_dir())
    teach_template(tokenizer)
    reasoning = "\n".join(f"{i}+1={i + 1}" for i in range(40))
    trace = dataclasses.replace(traces_of(8)[7], reasoning_content=reasoning)

    def row_at(max_length: int) -> Row:
        return row_of(tokenizer, trace, TrainingRecipe(max_length=max_length, too_long="shorten"))

    whole, short = row_of(tokenizer, trace, TrainingRecipe(max_length=120)), row_at(120)
    text = tokenizer.decode(short.input_ids[short.n_prompt :])
    assert 100 < len(short.input_ids) <= 120 < len(whole.input_ids)
    assert text.startswith("0+1=1\n1+1=2\n")
    assert text.endswith("39+1=40\n</think>\n\n8<|im_end|>")
    assert row_at(len(whole.input_ids)) == whole
    assert row_at(short.n_prompt + 3) == whole  # nothing of it would fit


def test_a_curriculum_puts_hopeless_problems_second() -> None:
    rows = [(Row([1, i + 5], 1), 0.5 if i < 8 else 0.0) for i in range(16)]
    ordered = arrange(rows, TrainingRecipe(batch_size=2, epochs=1))
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


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory, chain_sum: str) -> Path:
    """Traces of the pocket teacher, sampled, with 64 log-probabilities a token."""
    path = tmp_path_factory.mktemp("traces") / "traces.jsonl"
    problems, sampling = load_problems(chain_sum, "train", n=8, seed=0), Sampling(temperature=1.0, max_tokens=128)
    with TraceStore(path) as store, open_teacher("pocket") as teacher, Grader() as grader:
        requests = [Request(messages_of(problem), i) for i, problem in enumerate(problems)]
        for i, done in teacher.generate(requests, sampling, top_logprobs=64):
            grade = grader.grade(problems[i], done.content)
            store.append(
                Trace.make(problems[i], done, grade=grade, info=teacher.info, teacher="pocket", sampling=sampling), done
            )
    return path


def _rows(path: Path) -> tuple[list[Row], list[Trace]]:
    tokenizer = load_tokenizer(pocket_dir())
    held = list(TraceStore.read(path))
    return [make_row(tokenizer, t.messages, reasoning=t.reasoning_content or "", content=t.content) for t in held], held


def test_the_offline_loss_is_the_dense_online_one(traces: Path, pocket_student: Path) -> None:
    """Within 2 % of KL over the whole vocabulary with the teacher in memory (issue's bar; k = 64)."""
    tokenizer = load_tokenizer(pocket_dir())
    rows, held = _rows(traces)
    with Logprobs(logprobs_path(traces)) as logprobs:
        assert why_no_logits(logprobs, held, tokenizer) is None
        rows, counts = add_logits(rows, held, logprobs=logprobs, share=1.0)
    assert counts == {WITH_LOGITS: len(held)}
    student = AutoModelForCausalLM.from_pretrained(pocket_student)
    teacher = AutoModelForCausalLM.from_pretrained(pocket_dir(), dtype=torch.float32)
    batch = pad(rows, tokenizer.pad_token_id)
    with torch.no_grad():
        hidden = student.get_decoder()(input_ids=batch.input_ids).last_hidden_state.flatten(0, 1)[batch.positions]
        sparse = (
            projected_loss(
                hidden, Head(student.lm_head.weight), targets=batch.targets, segments=batch.segments, losses=LOSSES
            )
            / batch.weight
        )
        p, q = (
            F.log_softmax(model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions].float(), -1)
            for model in (teacher, student)
        )
        dense = (p.exp() * (p - q)).sum(-1).mean()
    assert dense > 1
    assert sparse.item() == pytest.approx(dense.item(), rel=0.02)


def test_a_token_that_the_teacher_did_not_say_is_taught_as_itself(traces: Path) -> None:
    rows, held = _rows(traces)
    row = rows[0]
    third = row.n_prompt + 2  # 9 stands where the teacher said something else
    other = Row([*row.input_ids[:third], 9, *row.input_ids[third + 1 :]], row.n_prompt)
    with Logprobs(logprobs_path(traces)) as logprobs:
        (made,), _ = add_logits([other], held[:1], logprobs=logprobs, share=0.8)
        stored = logprobs.get(held[0].id)
    top = made.distribution()  # the file is closed: a row reads for itself
    assert stored is not None
    assert top is not None
    assert made.losses == (("forward_kl", 0.8), ("cross_entropy", pytest.approx(0.2)))
    assert top.ids[2, 0] == 9 != row.input_ids[third]
    assert top.values[2, 0] == 0
    assert (top.ids[2, 1:] == -1).all()
    for part in (np.s_[:2], np.s_[3 : other.n_targets]):
        assert np.array_equal(top.ids[part], stored[1].ids[part])
        assert np.array_equal(top.values[part], stored[1].values[part])


def test_a_row_holds_a_few_bytes_a_token_and_survives_the_way_to_another_process(traces: Path, tmp_path: Path) -> None:
    rows, held = _rows(traces)
    sidecar = Path(shutil.copy(logprobs_path(traces), tmp_path))
    with Logprobs(sidecar) as logprobs:
        made, _ = add_logits(rows, held, logprobs=logprobs, share=0.8)
    sent = pickle.dumps(made)
    assert len(sent) < 12 * sum(len(row.input_ids) for row in made)  # its ids and places; the distribution has 325
    for row, back in zip(made, pickle.loads(sent), strict=True):
        assert row == back
        mine, its = row.distribution(), back.distribution()
        assert np.array_equal(mine.values, its.values)
    sidecar.unlink()
    with pytest.raises(ArtifactError):
        made[0].distribution()


def test_rows_rendered_as_other_tokens_keep_their_cross_entropy(traces: Path) -> None:
    rows, held = _rows(traces)
    strange = Row([*rows[0].input_ids[: rows[0].n_prompt], *range(300, 320)], rows[0].n_prompt)
    with Logprobs(logprobs_path(traces)) as logprobs:
        made, counts = add_logits([strange], held[:1], logprobs=logprobs, share=1.0)
    assert made == [strange]
    assert counts == {WITH_LOGITS: 0, OTHER_TOKENS: 1}


def test_another_vocabulary_is_refused_by_its_fingerprint_and_without_one_by_what_was_said(traces: Path) -> None:
    tokenizer = load_tokenizer(pocket_dir())
    held = list(TraceStore.read(traces))
    assert {trace.teacher.vocabulary for trace in held} == {of_tokenizer(tokenizer)}
    other = load_tokenizer(pocket_dir())
    other.add_tokens(["<|more|>"])
    assert is_same(held[0].teacher.vocabulary, other) is False
    unknown = [
        dataclasses.replace(t, teacher=dataclasses.replace(t.teacher, vocabulary=None), content="something else")
        for t in held
    ]
    with Logprobs(logprobs_path(traces)) as logprobs:
        assert "is not the teacher's" in str(why_no_logits(logprobs, held, other))
        assert "as another text" in str(why_no_logits(logprobs, unknown, tokenizer))
        assert "no trace" in str(why_no_logits(logprobs, [], tokenizer))
    assert "--logprobs 64" in str(why_no_logits(None, held, tokenizer))


def test_shares_of_a_mixture() -> None:
    assert mixture("forward_kl", 1.0) == (("forward_kl", 1.0),)
    assert mixture("forward_kl", 0.0) == (("cross_entropy", 1.0),)
