from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepdistill.distill.training import callback as clock_module
from deepdistill.distill.training.callback import Clock
from deepdistill.distill.training.rows import Row
from deepdistill.distill.training.train import TrainSettings, train
from deepdistill.distill.training.trainer import schedule

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an older name


def rows_of(n: int, length: int = 12) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    return [Row(torch.randint(5, 200, (length + i % 5,), generator=generator).tolist(), 4) for i in range(n)]


def naive_loss(model: Any, rows: list[Row]) -> torch.Tensor:
    """Return the mean loss of the targets, each row by itself, over the whole vocabulary."""
    losses = []
    for row in rows:
        logits = model(torch.tensor([row.input_ids])).logits[0].float()
        losses.append(
            F.cross_entropy(
                logits[row.n_prompt - 1 : -1], torch.tensor(row.input_ids[row.n_prompt :]), reduction="none"
            )
        )
    return torch.cat(losses).mean()


def test_lora_is_merged_and_only_the_asked_weights_learn(pocket_student: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket_student)
    rows = rows_of(8)
    report = train(
        pocket_student, rows, tokenizer, TrainSettings(epochs=20, batch_size=8, lr=5e-3), tmp_path / "c", tmp_path / "s"
    )
    assert (report.steps, report.rows) == (20, 160)
    base = AutoModelForCausalLM.from_pretrained(pocket_student)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "s")  # plain transformers loads it
    assert torch.equal(base.get_input_embeddings().weight, student.get_input_embeddings().weight)
    assert naive_loss(student, rows) < 0.8 * naive_loss(base, rows)
    assert AutoTokenizer.from_pretrained(tmp_path / "s").chat_template == tokenizer.chat_template
    assert student.generation_config.eos_token_id == tokenizer.eos_token_id


def test_full_training_moves_every_matrix(pocket_student: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket_student)
    settings = TrainSettings(full=True, epochs=5, batch_size=8, lr=1e-3)
    train(pocket_student, rows_of(8), tokenizer, settings, tmp_path / "c", tmp_path / "s")
    before = AutoModelForCausalLM.from_pretrained(pocket_student).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "s").state_dict()
    assert not any(torch.equal(before[name], after[name]) for name in before if before[name].dim() == 2)


def test_training_resumes_from_its_last_whole_checkpoint_to_the_same_weights(
    pocket_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket_student)
    settings = TrainSettings(full=True, epochs=6, batch_size=4, lr=1e-3, save_every_s=0)
    train(pocket_student, rows_of(16), tokenizer, settings, tmp_path / "c1", tmp_path / "straight")

    class Killed(BaseException):
        pass

    def die(stage: str, done: float, total: float, note: str) -> None:
        if done >= 0.5:
            raise Killed

    with pytest.raises(Killed):
        train(pocket_student, rows_of(16), tokenizer, settings, tmp_path / "c2", tmp_path / "resumed", die)
    whole = sorted(path.name for path in (tmp_path / "c2").iterdir())
    torn = tmp_path / "c2" / "checkpoint-999"  # as kill -9 leaves one: without its clock
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    seen: list[float] = []
    train(
        pocket_student,
        rows_of(16),
        tokenizer,
        settings,
        tmp_path / "c2",
        tmp_path / "resumed",
        lambda stage, done, total, note: seen.append(done),
    )
    assert whole
    assert not torn.exists()
    assert seen[0] > 0.4  # it went on and did not begin again
    straight = AutoModelForCausalLM.from_pretrained(tmp_path / "straight").state_dict()
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "resumed").state_dict()
    assert all(torch.allclose(straight[name], resumed[name], atol=1e-5) for name in straight)


def test_minutes_box_the_time_and_shape_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TrainSettings(minutes=1.0, warmup=0.1, final_lr=0.05)
    clock = Clock(settings, rows_of(4), 1.0, None, lambda *_: None)
    rate = schedule(settings, lambda step: clock.progress(step / 1000))
    now = clock._started
    seen = []
    for seconds in (0, 3, 6, 33, 60, 90):
        monkeypatch.setattr(clock_module.time, "monotonic", lambda seconds=seconds: now + seconds)
        seen.append(round(rate(0), 3))
    assert seen == [0.01, 0.5, 1.0, 0.525, 0.05, 0.05]


def test_a_checkpoint_remembers_the_time_it_took(pocket_student: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket_student)
    settings = TrainSettings(full=True, epochs=1, batch_size=4, save_every_s=0)
    train(pocket_student, rows_of(8), tokenizer, settings, tmp_path / "c", tmp_path / "s")
    checkpoint = max((tmp_path / "c").glob("checkpoint-*"))
    assert json.loads((checkpoint / "clock.json").read_text())["seconds"] > 0


def test_a_checkpoint_that_does_not_fit_the_disk_is_one_line_and_keeps_the_last(
    pocket_student: Path, tmp_path: Path
) -> None:
    """A limit on the size of files fails the same writes as a full disk does, and asks for no rights."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from transformers import AutoTokenizer\n"
        "from deepdistill.distill.training.rows import Row\n"
        "from deepdistill.distill.training.train import TrainSettings, train\n"
        "from deepdistill.errors import ArtifactError\n"
        "base, out, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "rows = [Row(list(range(5, 25)), 4)] * 8\n"
        "settings = TrainSettings(full=True, epochs=1, batch_size=4, save_every_s=0)\n"
        "try:\n    train(base, rows, AutoTokenizer.from_pretrained(base), settings, out / 'c', out / 's')\n"
        "except ArtifactError as error:\n    print(error.message, error.hint, sep=' | ')"
    )
    n_bytes = (pocket_student / "model.safetensors").stat().st_size
    for limit in (n_bytes // 2, int(n_bytes * 1.5)):  # the weights do not fit; they do, and the optimizer's state not
        done = subprocess.run(
            [sys.executable, "-c", code, str(pocket_student), str(tmp_path), str(limit)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"cannot write in {tmp_path}: ")
        assert "free some disk space" in done.stdout
        assert not (tmp_path / "s").exists()
