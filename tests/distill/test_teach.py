"""The whole way of `teach` with the pocket teacher and the tiny dense student, real kills included."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from deepdistill.cli import main
from deepdistill.distill import teach as teach_module
from deepdistill.distill.curation.curate import apart_from, select
from deepdistill.distill.problems.split import bucket_of
from deepdistill.distill.recipe.gathering import CurationRecipe, TracesRecipe
from deepdistill.distill.recipe.teach import ScoresRecipe, TeachRecipe
from deepdistill.distill.recipe.training import TrainingRecipe
from deepdistill.distill.records import Problem
from deepdistill.distill.teach import teach
from deepdistill.distill.teachers import pocket_dir
from deepdistill.distill.traces.store import TraceStore
from deepdistill.errors import ArtifactError, ModelError, TeacherError, UsageError
from deepdistill.localrun.core.settings import changed

TRAINING = TrainingRecipe(weights="full", epochs=2, learning_rate=1e-3, save_every_s=0.0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, chain_sum: str) -> Path:
    """A run that went the whole way."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    teach(_settings(chain_sum), folder)
    return folder


def _settings(problems: str, **changes: Any) -> TeachRecipe:
    """Return a small recipe; a change's key has `__` where a setting's has a dot."""
    base = TeachRecipe(
        problems, "pocket", traces=TracesRecipe(48), scores=ScoresRecipe(8, max_tokens=24), training=TRAINING
    )
    return changed(base, {key.replace("__", "."): value for key, value in changes.items()})


def test_a_run_folder_holds_every_artifact(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "recipe.json",
        "traces.jsonl",
        "curation.json",
        "student",
        "scores.json",
        "report.html",
        "checkpoints",
    }
    traces = list(TraceStore.read(finished / "traces.jsonl"))
    assert len(traces) == 48
    assert sum(trace.verdict == "right" for trace in traces) >= 43
    assert all(bucket_of(trace.messages[0]["content"]) == "train" for trace in traces)
    assert all(trace.reasoning_content and "<think>" not in trace.reasoning_content for trace in traces)
    scores = json.loads((finished / "scores.json").read_text())
    assert set(scores) == {"base", "student"}
    keys = {"accuracy", "n", "interval", "closed", "looped", "tokens_per_answer", "tokens_per_s"}
    assert set(scores["student"]) >= keys
    answers = [json.loads(line) for line in (finished / "answers" / "student.jsonl").read_text().splitlines()]
    assert {bucket_of(answer["question"]) for answer in answers} == {"test"}


def test_the_same_command_again_repeats_nothing(finished: Path, chain_sum: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    traces = (finished / "traces.jsonl").read_bytes()
    teach(_settings(chain_sum), finished)
    assert (finished / "traces.jsonl").read_bytes() == traces
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")} == before


def test_a_finished_run_needs_no_checkpoints(finished: Path, chain_sum: str, tmp_path: Path, recorder: Any) -> None:
    assert not list(finished.rglob("checkpoint-*"))
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    (folder / "scores.json").unlink()
    teach(_settings(chain_sum), folder, report=recorder)
    assert json.loads((folder / "scores.json").read_text()).keys() == {"base", "student"}
    assert "training" not in {stage for stage, *_ in recorder.steps}
    kept = _settings(chain_sum, training__keep_checkpoints=True, traces__file=finished / "traces.jsonl")
    teach(kept, tmp_path / "kept", stop_after="training")
    assert list((tmp_path / "kept" / "checkpoints").glob("checkpoint-*"))


def test_traces_of_another_run_train_without_a_teacher(finished: Path, chain_sum: str, tmp_path: Path) -> None:
    settings = _settings(chain_sum, teacher__model="http://127.0.0.1:9/v1", traces__file=finished / "traces.jsonl")
    result = teach(settings, tmp_path / "run", stop_after="training")
    assert result.student_dir
    assert not (tmp_path / "run" / "traces.jsonl").exists()


def test_wrong_unknown_cut_and_held_out_traces_are_kept_out_of_training(finished: Path) -> None:
    good = [t for t in TraceStore.read(finished / "traces.jsonl") if t.verdict == "right"][:6]
    held_out = next(f"question {i}" for i in range(99) if bucket_of(f"question {i}") == "test")
    traces = [
        good[0],
        dataclasses.replace(good[1], verdict="wrong"),
        dataclasses.replace(good[2], verdict="unknown"),
        dataclasses.replace(good[3], finish_reason="length"),
        dataclasses.replace(good[4], reasoning_content=None),
        dataclasses.replace(good[5], messages=[{"role": "user", "content": held_out}]),
        dataclasses.replace(good[0], reasoning_content="1"),  # shorter: it takes the first one's place
    ]
    selection = select(lambda: traces)
    kept, record = list(selection), selection.record
    assert [t.reasoning_content for t in kept] == ["1"]
    assert record["dropped"] == dict.fromkeys(record["dropped"], 1)


def test_what_the_untrained_student_always_solves_is_left_out(chain_sum: str, tmp_path: Path) -> None:
    # It solves nearly all, if it may write as much as that takes.
    skilled = _settings(
        chain_sum, student=str(pocket_dir()), traces__n=16, training__pass_samples=2, scores__max_tokens=96
    )
    with suppress(ArtifactError):  # nothing may be left
        teach(skilled, tmp_path / "run", stop_after="training")
    known = json.loads((tmp_path / "run" / "pass_rate.json").read_text())
    right = {t.problem_id for t in TraceStore.read(tmp_path / "run" / "traces.jsonl") if t.verdict == "right"}
    always = {problem for problem, rate in known["rates"].items() if rate == 1}
    assert known["samples"] == 2
    assert set(known["rates"].values()) <= {0, 0.5, 1}
    assert len(always) >= 12
    curation = json.loads((tmp_path / "run" / "curation.json").read_text())
    assert curation["dropped"]["too_easy"] == len(right & always)


def test_the_pocket_teacher_refuses_what_it_never_learned(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, check=lambda error: error.code == "pocket-cannot-answer") as caught:
        teach(_settings("gym:gcd"), tmp_path / "run")
    assert "gym:gcd" in caught.value.message


def test_no_right_trace_is_said_with_the_reasons(finished: Path, chain_sum: str, tmp_path: Path) -> None:
    with TraceStore(tmp_path / "t.jsonl") as store:
        for trace in TraceStore.read(finished / "traces.jsonl"):
            store.append(dataclasses.replace(trace, verdict="wrong"))
    with pytest.raises(ArtifactError) as caught:
        teach(_settings(chain_sum, traces__file=tmp_path / "t.jsonl"), tmp_path / "run")
    assert "48 wrong" in caught.value.hint


def _command(folder: Path, chain_sum: str) -> subprocess.Popen[bytes]:
    arguments = ["teach", "--problems", chain_sum]
    arguments += [
        "--student",
        "pocket",
        "--weights",
        "full",
        "--n-traces",
        "200",
        "--n-eval",
        "4",
        "--set",
        "scores.max_tokens=8",
    ]
    arguments += ["--epochs", "4", "--set", "resources.batch_size=16", "--out", str(folder), "--quiet"]
    return subprocess.Popen(
        [sys.executable, "-m", "deepdistill", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def _wait_for(process: subprocess.Popen[bytes], condition: Any) -> None:
    deadline = time.monotonic() + 300  # the machine may be busy
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGINT])
def test_killed_while_asking_and_run_again_no_trace_is_asked_for_twice(
    signal_: signal.Signals, chain_sum: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    traces = folder / "traces.jsonl"
    process = _command(folder, chain_sum)
    _wait_for(process, lambda: traces.exists() and traces.read_bytes().count(b"\n") >= 20)
    os.kill(process.pid, signal_)
    code = process.wait()
    assert code == (-signal.SIGKILL if signal_ == signal.SIGKILL else 130)
    kept = traces.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert 20 <= kept.count(b"\n") < 200
    second = _command(folder, chain_sum)
    _wait_for(second, lambda: (folder / "curation.json").exists())
    second.kill()
    second.wait()
    assert traces.read_bytes().startswith(kept)  # what was stored stands, once
    ids = [json.loads(line)["id"] for line in traces.read_text().splitlines()]
    assert len(ids) == len(set(ids)) == 200


def test_killed_while_training_it_resumes_at_the_last_checkpoint(
    finished: Path, chain_sum: str, tmp_path: Path, recorder: Any
) -> None:
    folder = tmp_path / "run"
    settings = _settings(chain_sum, traces__file=finished / "traces.jsonl", training__epochs=40)
    code = (
        "import json, sys; from pathlib import Path\n"
        "from deepdistill.distill.teach import TeachRecipe, teach\n"
        "teach(TeachRecipe.from_json(json.loads(sys.argv[1])), Path(sys.argv[2]), stop_after='training')\n"
    )
    arguments = [sys.executable, "-c", code, json.dumps(settings.to_json()), str(folder)]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def saved() -> list[int]:
        return [int(p.parent.name.split("-")[1]) for p in folder.glob("checkpoints/checkpoint-*/clock.json")]

    _wait_for(process, lambda: max(saved(), default=0) >= 10)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "student").exists()
    reached = max(saved())
    result = teach(settings, folder, stop_after="training", report=recorder)
    done = [part for stage, part, _, _ in recorder.steps if stage == "training"]
    assert result.training
    assert len(done) == result.training["steps"] - reached  # not one step twice
    assert (folder / "student" / "model.safetensors").exists()


def test_what_is_wrong_with_the_training_is_found_before_the_teacher_is_asked(chain_sum: str, tmp_path: Path) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"training__report_to": ("carrier-pigeon",)}, "no-such-tracker"),
        ({"training__epochs": 0}, "bad-settings"),
    ]
    for changes, code in bad:
        with pytest.raises(UsageError, check=lambda error, code=code: error.code == code):  # type: ignore[misc]
            teach(_settings(chain_sum, teacher__model="http://127.0.0.1:9/v1", **changes), tmp_path / "run")
    with pytest.raises(UsageError, check=lambda error: error.code == "settings-conflict"):
        changed(TRAINING, {"lora.dora": True})
    with pytest.raises(UsageError, check=lambda error: error.code == "settings-conflict"):
        TrainingRecipe(reasoning_weight=0.0, answer_weight=0.0)
    qlora = _settings(chain_sum, training__weights="qlora", resources__device="cpu")
    with pytest.raises(ModelError, check=lambda error: error.code == "needs-gpu"):
        teach(qlora, tmp_path / "run")
    with pytest.raises(UsageError, check=lambda error: error.code == "no-rounds"):
        teach(_settings(chain_sum), tmp_path / "run", stop_after="samples")
    assert not (tmp_path / "run" / "traces.jsonl").exists()
    teach(_settings(chain_sum, traces__n=4), tmp_path / "run", stop_after="traces")
    other = _settings(chain_sum, traces__n=4, training__learning_rate=2e-3)
    teach(other, tmp_path / "run", stop_after="traces")  # nothing was trained with the other


def test_a_run_that_is_trained_asks_for_no_more_traces(finished: Path, chain_sum: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    record = json.loads((folder / "curation.json").read_text()) | {"marked": True}
    (folder / "curation.json").write_text(json.dumps(record))
    lines = (folder / "traces.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "traces.jsonl").write_bytes(b"".join(lines[:-3]))  # as if three requests had failed
    teach(_settings(chain_sum), folder)
    assert len((folder / "traces.jsonl").read_bytes().splitlines()) == len(lines) - 3
    assert json.loads((folder / "curation.json").read_text())["marked"], (
        "what it was trained on stays as it was counted"
    )


def test_problems_that_ask_what_held_out_ones_ask_are_left_out(recorder: Any) -> None:
    def problem(text: str) -> Problem:
        return Problem(text, text, "1", "x", "number")

    long = "how many legs do seven dogs and two very old blue chairs have"
    asked = [problem(f"please answer: {long}"), problem("what is one and one")]
    kept = apart_from(asked, [problem(long)], filters=CurationRecipe(), report=recorder)
    assert [one.question for one in kept] == ["what is one and one"]
    assert len(recorder.said) == 1
    assert apart_from(asked, [problem(long)], filters=CurationRecipe(contamination_ngram=None)) == asked


def test_a_run_without_traces_ends_without_a_word_of_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reinforcement learning has none."""
    made = teach_module.TeachResult(tmp_path, None, {}, {}, None)
    monkeypatch.setattr(teach_module, "teach", lambda *_, **__: made)
    command = ["teach", "--problems", "gym:leg_counting", "--method", "grpo", "--out", str(tmp_path), "--json"]
    assert main(command) == 0
    assert "traces train" not in capsys.readouterr().out
