"""On-policy rounds with the pocket teacher and its own checkpoint as the student: artifacts, resuming, the mixture."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepdistill.distill.problems.split import bucket_of
from deepdistill.distill.recipe.gathering import TracesRecipe
from deepdistill.distill.recipe.teach import ScoresRecipe, TeachRecipe
from deepdistill.distill.recipe.training import OnPolicyRecipe, TrainingRecipe
from deepdistill.distill.records import Trace
from deepdistill.distill.teach import teach
from deepdistill.distill.teachers import Teacher, open_teacher, pocket_dir
from deepdistill.distill.teachers.huggingface.loading import load_tokenizer
from deepdistill.distill.traces.logprobs import Logprobs, logprobs_path
from deepdistill.distill.traces.store import TraceStore
from deepdistill.distill.training.on_policy import teacher as round_teacher
from deepdistill.distill.training.on_policy.dataset import SampleLogprobs, mix, pass_rates
from deepdistill.errors import ArtifactError, TeacherError, UsageError
from deepdistill.localrun.core.reporter import Reporter
from deepdistill.localrun.core.settings import changed


def _settings(chain_sum: str, **changes: Any) -> TeachRecipe:
    """The pocket teacher's own checkpoint as the student: it solves nearly all, so rounds have right samples."""
    settings = TeachRecipe(
        chain_sum,
        str(pocket_dir()),
        traces=TracesRecipe(8),
        scores=ScoresRecipe(4, max_tokens=48),
        on_policy=OnPolicyRecipe(1, n_problems=6, samples=2),
        training=TrainingRecipe(weights="full", epochs=1, learning_rate=1e-3),
    )
    return changed(settings, {key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory, chain_sum: str) -> Path:
    """A run whose first round waits for its teacher."""
    folder = tmp_path_factory.mktemp("rounds") / "waiting"
    result = teach(_settings(chain_sum), folder, stop_after="samples")
    assert not result.scores
    assert not (folder / "rounds/1/scores.bin").exists()
    return folder


@pytest.fixture(scope="module")
def finished(waiting: Path, tmp_path_factory: pytest.TempPathFactory, chain_sum: str) -> Path:
    """The same, gone the whole way."""
    folder = shutil.copytree(waiting, tmp_path_factory.mktemp("rounds") / "finished")
    teach(_settings(chain_sum), folder)
    return folder


@pytest.fixture
def run(waiting: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(waiting, tmp_path / "run")


def test_a_round_keeps_what_it_was_made_of(finished: Path) -> None:
    folder = finished / "rounds" / "1"
    samples = list(TraceStore.read(folder / "samples.jsonl"))
    assert len(samples) == 12
    assert len({trace.problem_id for trace in samples}) == 6
    asked = {trace.problem_id for trace in TraceStore.read(finished / "traces.jsonl")}
    assert not asked & {trace.problem_id for trace in samples}, "a round's problems are new"
    assert all(bucket_of(trace.messages[0]["content"]) == "train" for trace in samples)
    with Logprobs(folder / "scores.bin") as scores, Logprobs(logprobs_path(folder / "samples.jsonl")) as own:
        for trace in samples:
            scored, said = scores.get(trace.id), own.get(trace.id)
            assert scored is not None
            assert said is not None
            assert scored[0].tolist() == said[0].tolist()
            assert scored[1].ids.shape[1] == 64
    record = json.loads((folder / "round.json").read_text())
    assert record["scored"] is True
    assert record["rows"]["scored"] == 12
    assert record["training"]["steps"] >= 1
    scores_json = json.loads((finished / "scores.json").read_text())
    assert list(scores_json) == ["base", "imitation", "student"]
    page = (finished / "report.html").read_text()
    assert '<h2 id="rounds">' in page
    assert "12 scored" in page
    assert (finished / "rounds" / "0" / "student" / "model.safetensors").exists()
    assert json.loads((finished / "teacher.json").read_text())["name"] == "pocket"


def test_the_same_command_again_repeats_nothing(finished: Path, chain_sum: str) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.suffix in (".safetensors", ".bin", ".jsonl")}
    assert not list(finished.rglob("checkpoint-*"))
    teach(_settings(chain_sum), finished)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_the_teacher_is_needed_for_its_part_alone(run: Path, chain_sum: str) -> None:
    settings = _settings(chain_sum, on_policy__loss="policy-gradient")
    (run / "recipe.json").write_text(json.dumps(settings.to_json()))
    teach(settings, run, stop_after="teacher")
    assert (run / "rounds/1/scores.bin").exists()
    assert not (run / "student").exists()

    def no_teacher(*_: Any, **__: Any) -> Teacher:
        raise AssertionError("the teacher is not here")

    assert teach(settings, run, stop_after="training", opener=no_teacher).student_dir
    assert (run / "rounds/1/own_scores.bin").exists()  # the student's own, to compare with


def test_a_round_that_was_cut_off_scores_only_what_is_left(run: Path, chain_sum: str) -> None:
    settings = _settings(chain_sum)
    asked: list[int] = []

    class Killed(BaseException):
        pass

    class Dies(Reporter):
        def progress(self, stage: str, done: float, *, total: float, note: str = "") -> None:
            if stage == "the teacher scores":
                asked.append(int(total))
                if (done, total) == (5, 12):
                    raise Killed

    with pytest.raises(Killed):
        teach(settings, run, stop_after="teacher", report=Dies())
    path = run / "rounds/1/scores.bin"
    path.write_bytes(path.read_bytes()[:-7])  # and the last record torn
    teach(settings, run, stop_after="teacher", report=Dies())
    assert (asked[0], asked[-1]) == (12, 8)
    with Logprobs(path) as scores:
        assert len(scores) == 12


def test_another_teacher_is_refused(run: Path, chain_sum: str) -> None:
    first, *others = (run / "traces.jsonl").read_text().splitlines(keepends=True)
    (run / "traces.jsonl").write_text(first.replace('"revision": "', '"revision": "another') + "".join(others))
    with pytest.raises(TeacherError, check=lambda error: error.code == "teacher-differs") as caught:
        teach(_settings(chain_sum), run, stop_after="teacher")
    assert "revision" in caught.value.message


def test_samples_of_another_student_are_refused(run: Path, chain_sum: str) -> None:
    path = run / "rounds/1/samples.jsonl"
    path.write_text(path.read_text().replace('"revision": "', '"revision": "another'))
    with pytest.raises(ArtifactError, check=lambda error: error.code == "student-differs"):
        teach(_settings(chain_sum), run, stop_after="teacher")


def test_a_foreign_tokenizer_leaves_own_right_answers_and_corrections_and_says_so(
    run: Path, chain_sum: str, monkeypatch: pytest.MonkeyPatch, recorder: Any
) -> None:
    monkeypatch.setattr(round_teacher, "why_not_scored", lambda teacher, tokenizer: "the teacher has another tokenizer")
    with pytest.raises(TeacherError, check=lambda error: error.code == "cannot-score"):
        ask_for(run, _settings(chain_sum, on_policy__loss="reverse-kl"))
    teach(_settings(chain_sum), run, report=recorder, stop_after="training")
    record = json.loads((run / "rounds/1/round.json").read_text())
    assert record["scored"] is False
    assert set(record["rows"]) <= {"own_right", "corrected", "replayed"}
    assert record["rows"]["own_right"] >= 1
    assert any("another tokenizer" in line and "corrections" in line for line in recorder.said)


def ask_for(run: Path, settings: TeachRecipe) -> None:
    """Ask the teacher with other settings than the recipe's, as a run does before its training."""
    before = (recipe := run / "recipe.json").read_text()
    recipe.write_text(json.dumps(settings.to_json()))
    try:
        teach(settings, run, stop_after="teacher")
    finally:
        recipe.write_text(before)


def _mixed(finished: Path, scored: bool, **changes: Any) -> Any:
    folder = finished / "rounds" / "1"
    samples = list(TraceStore.read(folder / "samples.jsonl"))
    tokenizer = load_tokenizer(pocket_dir())
    with Logprobs(folder / "scores.bin") as scores, Logprobs(logprobs_path(folder / "samples.jsonl")) as own:
        logprobs = SampleLogprobs(own, scores if scored else None, scores)
        return samples, mix(tokenizer, samples, logprobs=logprobs, options=OnPolicyRecipe(**changes))


def test_own_right_answers_are_the_shortest_of_each_problem(finished: Path) -> None:
    samples, mixture = _mixed(finished, scored=False)
    rates = pass_rates(samples)
    assert mixture.counts == {"own_right": sum(rate > 0 for rate in rates.values())}
    by_problem: dict[str, list[Trace]] = {}
    for trace in samples:
        if trace.verdict == "right":
            by_problem.setdefault(trace.problem_id, []).append(trace)
    lengths = sorted(min(t.usage.completion for t in traces) for traces in by_problem.values())
    assert sorted(row.n_targets for row, _ in mixture.lessons) == lengths


def test_right_samples_are_imitated_too_and_wrong_ones_only_judged(finished: Path) -> None:
    samples, mixture = _mixed(finished, scored=True)
    expected = {"right": (("reverse_kl", 0.8), ("cross_entropy", pytest.approx(0.2))), "wrong": (("reverse_kl", 1.0),)}
    assert [row.losses for row, _ in mixture.lessons] == [expected[trace.verdict] for trace in samples]
    assert all(row.top is not None and len(row.top) == row.n_targets for row, _ in mixture.lessons)


def test_the_policy_gradient_compares_teacher_and_student(finished: Path) -> None:
    """Both are the same scores here, so no token is better or worse than expected."""
    _, mixture = _mixed(finished, scored=True, loss="policy-gradient")
    for row, _ in mixture.lessons:
        assert row.losses[0][0] == "policy_gradient"
        assert row.advantages is not None
        assert row.old_logprobs is not None
        assert np.allclose(row.advantages, 0)
        assert max(row.old_logprobs) <= 1e-3


def test_scores_are_the_teachers_own(finished: Path) -> None:
    folder = finished / "rounds" / "1"
    trace: Trace = next(iter(TraceStore.read(folder / "samples.jsonl")))
    with Logprobs(folder / "scores.bin") as scores, open_teacher("pocket") as teacher:
        stored = scores.get(trace.id)
        assert stored is not None
        ids: Sequence[int] = stored[0].tolist()
        fresh = teacher.score(trace.messages, ids, top_logprobs=64)
    np.testing.assert_allclose(np.exp(stored[1].values), np.exp(fresh.values), atol=2e-3)
    assert (stored[1].ids == fresh.ids).mean() > 0.95


def test_what_cannot_be_had_is_said_before_anything_is_asked(tmp_path: Path, chain_sum: str) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"Tell me of the number {i}.\n" for i in range(40)))
    ungraded = TeachRecipe(
        problems=str(tmp_path / "prompts.txt"), student=str(pocket_dir()), on_policy=OnPolicyRecipe(rounds=1)
    )
    with pytest.raises(UsageError, check=lambda error: error.code == "no-answers"):
        teach(ungraded, tmp_path / "run")
    with pytest.raises(UsageError, check=lambda error: error.code == "logprobs-missing"):
        teach(_settings(chain_sum, training__loss="logits"), tmp_path / "run")
    assert not (tmp_path / "run" / "traces.jsonl").exists()
