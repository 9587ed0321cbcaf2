"""The run as a whole: real kills, several processes, micro-batches, a full disk, each way to adapt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepdistill.distill.recipe.training import LoraRecipe
from deepdistill.distill.records import CURVE_FILE, CurvePoint
from deepdistill.distill.training import train as train_module
from deepdistill.distill.training.rows import Row
from deepdistill.errors import ArtifactError, ModelError
from deepdistill.localrun.core.record_log import read_records

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an older name

Go = Callable[..., Any]
Rows = Callable[..., list[Row]]


ROWS = """
import sys
from pathlib import Path
import torch
from deepdistill.distill.training.rows import Row
generator = torch.Generator().manual_seed(0)
rows = [Row(torch.randint(5, 200, (12 + i % 5,), generator=generator).tolist(), 4) for i in range(48)]
"""
RUN = (
    ROWS
    + """
from transformers import AutoTokenizer

from deepdistill.distill.recipe.training import LoraRecipe, TrainingRecipe
from deepdistill.distill.training.rows import order_rows
from deepdistill.distill.training.train import TrainPaths, train
base, out, options = Path(sys.argv[1]), Path(sys.argv[2]), eval(sys.argv[3])
settings = TrainingRecipe(**options)
rows = order_rows(rows, settings.batch_size, epochs=settings.epochs, seed=settings.seed or 0)
paths = TrainPaths(base, out / "c", out / "s")
report = train(paths, rows, tokenizer=AutoTokenizer.from_pretrained(base), settings=settings)
print(report.final_loss, report.steps)
"""
)


def curve_of(folder: Path) -> list[CurvePoint]:
    return list(read_records(folder / CURVE_FILE, CurvePoint))


def losses_of(folder: Path) -> list[float]:
    return [point.loss for point in curve_of(folder) if point.loss is not None]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def spawn(base: Path, out: Path, options: dict[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-c", RUN, str(base), str(out), repr(options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("ends", [{"epochs": 6}, {"epochs": 9, "steps": 40}])
@pytest.mark.parametrize("full", [False, True])
def test_a_run_that_was_killed_comes_to_the_very_weights_of_one_that_was_not(
    pocket_student: Path, tmp_path: Path, full: bool, ends: dict[str, int]
) -> None:
    options = {
        "weights": "full" if full else "lora",
        "batch_size": 8,
        "learning_rate": 3e-3,
        "save_every_s": 0.0,
        "threads": 1,
        **ends,
    }
    straight = spawn(pocket_student, tmp_path / "straight", options)
    assert straight.wait(300) == 0, straight.communicate()[1]
    killed = spawn(pocket_student, tmp_path / "killed", options)
    deadline = time.monotonic() + 200
    while not any((tmp_path / "killed").glob("c/checkpoint-1?/clock.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    killed.communicate()
    assert not (tmp_path / "killed" / "s").exists()
    resumed = spawn(pocket_student, tmp_path / "killed", options)
    assert resumed.wait(300) == 0, resumed.communicate()[1]
    wanted, found = weights(tmp_path / "straight" / "s"), weights(tmp_path / "killed" / "s")
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    curves = [curve_of(tmp_path / name) for name in ("straight", "killed")]
    steps = [[(point.step, point.loss) for point in curve if point.step is not None] for curve in curves]
    assert steps[0] == steps[1]  # no step twice, none missing
    straight.communicate()
    resumed.communicate()


@pytest.mark.slow
def test_two_processes_come_to_the_loss_and_weights_of_one(pocket_student: Path, tmp_path: Path) -> None:
    options = {"batch_size": 8, "learning_rate": 3e-3, "epochs": 2, "dtype": "fp32"}
    alone = spawn(pocket_student, tmp_path / "one", options)
    out, err = alone.communicate(timeout=300)
    assert alone.returncode == 0, err
    script = tmp_path / "run.py"
    script.write_text(RUN)
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    command = [*launcher, "29611", str(script), str(pocket_student), str(tmp_path / "two"), repr(options)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[1] == out.split()[1] == "12"
    losses = [losses_of(tmp_path / name) for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)
    one, two = weights(tmp_path / "one" / "s"), weights(tmp_path / "two" / "s")
    assert all(torch.allclose(one[name], two[name], atol=2e-3) for name in one)


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


def test_lora_is_merged_and_only_the_asked_weights_learn(
    go: Go, rows_of: Rows, pocket_student: Path, tmp_path: Path
) -> None:
    rows = rows_of(8)
    report = go(tmp_path, rows, epochs=20, batch_size=8, learning_rate=5e-3)
    assert (report.steps, report.rows) == (20, 160)
    base = AutoModelForCausalLM.from_pretrained(pocket_student)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "s")  # plain transformers loads it
    assert torch.equal(base.get_input_embeddings().weight, student.get_input_embeddings().weight)
    assert naive_loss(student, rows) < 0.8 * naive_loss(base, rows)
    tokenizer = AutoTokenizer.from_pretrained(pocket_student)
    assert AutoTokenizer.from_pretrained(tmp_path / "s").chat_template == tokenizer.chat_template
    assert student.generation_config.eos_token_id == tokenizer.eos_token_id


def test_full_training_moves_every_matrix(go: Go, rows_of: Rows, pocket_student: Path, tmp_path: Path) -> None:
    go(tmp_path, rows_of(8), weights="full", epochs=5, batch_size=8, learning_rate=1e-3)
    before, after = weights(pocket_student), weights(tmp_path / "s")
    assert not any(torch.equal(before[name], after[name]) for name in before if before[name].dim() == 2)


def test_training_resumes_from_its_last_whole_checkpoint_to_the_same_weights(
    go: Go, rows_of: Rows, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "weights": "full",
        "epochs": 6,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "save_every_s": 0,
    }
    go(tmp_path / "straight", rows_of(16), **settings)

    class Killed(BaseException):
        pass

    def die(done: float) -> None:
        if done >= 0.5:
            raise Killed

    out = tmp_path / "resumed"
    with pytest.raises(Killed):
        go(out, rows_of(16), progress=die, **settings)
    assert list((out / "c").glob("checkpoint-*/clock.json"))
    torn = out / "c" / "checkpoint-999"  # as kill -9 leaves one: without its clock
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    seen: list[float] = []
    go(out, rows_of(16), progress=seen.append, **settings)
    assert not torn.exists()
    assert seen[0] > 0.4  # it resumed and did not begin again
    straight, resumed = weights(tmp_path / "straight" / "s"), weights(out / "s")
    assert all(torch.allclose(straight[name], resumed[name], atol=1e-5) for name in straight)


def test_micro_batches_change_nothing(go: Go, tmp_path: Path) -> None:
    go(tmp_path / "whole", batch_size=8, micro_batch=8, steps=4)
    report = go(tmp_path / "parts", batch_size=8, micro_batch=2, steps=4)
    curves = [curve_of(tmp_path / name) for name in ("whole", "parts")]
    losses = [[point.loss for point in curve] for curve in curves]
    assert (report.steps, report.micro_batch) == (4, 2)
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_out_of_memory_halves_what_is_computed_at_once_and_says_so_each_time(
    go: Go, tmp_path: Path, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, notes = train_module.load_student, recorder.said

    def load(*given: Any, **options: Any) -> Any:
        model = real(*given, **options)

        def refuse(module: Any, inputs: Any, output: Any) -> None:
            if output.shape[1] > 40:  # packed tokens
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

        model.get_base_model().get_input_embeddings().register_forward_hook(refuse)
        return model

    monkeypatch.setattr(train_module, "load_student", load)
    report = go(tmp_path, report=recorder, batch_size=8, steps=3)
    assert ["8 rows" in notes[0], "4 rows" in notes[1], len(notes)] == [True, True, 2]
    assert (report.steps, report.micro_batch) == (3, 2)
    assert json.loads((tmp_path / "c" / "plan.json").read_text())["micro_batch"] == 2
    with pytest.raises(ModelError, check=lambda error: error.code == "model-too-large"):
        go(tmp_path / "b", [Row(list(range(5, 60)), 3)] * 4, batch_size=1)


@pytest.mark.parametrize(
    "options",
    [
        {"lora": LoraRecipe(targets=("q_proj", "v_proj"))},
        {"weights": "full"},
        pytest.param({"lora": LoraRecipe(dora=True)}, marks=pytest.mark.slow),
        pytest.param({"lora": LoraRecipe(rslora=True)}, marks=pytest.mark.slow),
        pytest.param({"lora": LoraRecipe(first_layer=2)}, marks=pytest.mark.slow),
    ],
    ids=["targets", "full", "dora", "rslora", "first_layer"],
)
def test_each_way_to_adapt_learns_and_merges(
    go: Go, rows_of: Rows, pocket_student: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    report = go(tmp_path, rows_of(8), batch_size=8, epochs=25, learning_rate=5e-3, **options)
    losses = losses_of(tmp_path)
    assert losses[-1] < losses[0] - 0.05
    lora, is_full = options.get("lora", LoraRecipe()), options.get("weights") == "full"
    assert report.pass_ == ("packed" if is_full or lora.dora else "fast")
    changed = {
        name
        for name, tensor in weights(tmp_path / "s").items()
        if not torch.equal(tensor, weights(pocket_student)[name])
    }
    if lora.targets:
        assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj"}
    if lora.first_layer:
        assert {name.split(".")[2] for name in changed} == {"2"}
    if is_full:
        assert report.merge_error is None
    else:
        assert report.merge_error is not None
        assert report.merge_error < 1e-4
        assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "options", [{"weights": "full"}, {"lora": LoraRecipe(dora=True)}, {}], ids=["full", "dora", "lora"]
)
def test_in_bf16_the_first_loss_is_that_of_fp32_up_to_rounding_and_it_learns(
    go: Go, rows_of: Rows, tmp_path: Path, options: dict[str, Any]
) -> None:
    losses = {}
    for dtype in ("bf16", "fp32"):
        go(tmp_path / dtype, rows_of(8), batch_size=8, epochs=12, learning_rate=5e-3, dtype=dtype, **options)
        losses[dtype] = losses_of(tmp_path / dtype)
    assert losses["bf16"][0] == pytest.approx(losses["fp32"][0], rel=1e-2)
    assert losses["bf16"][-1] == pytest.approx(losses["fp32"][-1], rel=5e-2)
    assert losses["bf16"][-1] < losses["bf16"][0] - 0.02


def test_steps_are_at_most_and_never_more_passes(go: Go, rows_of: Rows, tmp_path: Path) -> None:
    report = go(tmp_path, batch_size=4, epochs=2, steps=100, weights="full", validation=rows_of(2))
    assert (report.steps, report.rows) == (24, 96)
    validated = [point for point in curve_of(tmp_path) if point.validation_loss is not None]
    assert len(validated) > 1


def test_a_checkpoint_resumes_with_its_own_rows_only(go: Go, rows_of: Rows, tmp_path: Path) -> None:
    def stop(done: float) -> None:
        if done > 0.6:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"batch_size": 8, "steps": 6, "weights": "full", "save_every_s": 0.0}
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, progress=stop, **options)
    with pytest.raises(ArtifactError, check=lambda error: error.code == "other-rows"):
        go(tmp_path, rows_of()[1:], **options)
    assert go(tmp_path, **options).steps == 6


def test_a_checkpoint_that_does_not_fit_the_disk_is_one_line_and_keeps_the_last(
    pocket_student: Path, tmp_path: Path
) -> None:
    """A limit on the size of files fails the same writes as a full disk does, and asks for no rights."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from transformers import AutoTokenizer\n"
        "from deepdistill.distill.training.rows import Row\n"
        "from deepdistill.distill.recipe.training import TrainingRecipe\n"
        "from deepdistill.distill.training.train import TrainPaths, train\n"
        "from deepdistill.errors import ArtifactError\n"
        "base, out, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "rows = [Row(list(range(5, 25)), 4)] * 8\n"
        "settings = TrainingRecipe(weights='full', epochs=1, batch_size=4, save_every_s=0)\n"
        "paths, tokenizer = TrainPaths(base, out / 'c', out / 's'), AutoTokenizer.from_pretrained(base)\n"
        "try:\n    train(paths, rows, tokenizer=tokenizer, settings=settings)\n"
        "except ArtifactError as error:\n    print(error.code, error.message)"
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
        assert done.stdout.startswith("write-failed ")
        assert str(tmp_path) in done.stdout
        assert not (tmp_path / "s").exists()
