"""The run as a whole: real kills, several processes, micro-batches, early ends, what goes wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepdistill.distill.training import train as train_module
from deepdistill.distill.training.callback import Clock
from deepdistill.distill.training.curves import read_curve
from deepdistill.distill.training.rows import Row
from deepdistill.distill.training.train import TrainSettings, train
from deepdistill.distill.training.trainer import arguments
from deepdistill.errors import ArtifactError, ModelError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an older name

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
from deepdistill.distill.training.train import TrainSettings, train
base, out, options = Path(sys.argv[1]), Path(sys.argv[2]), eval(sys.argv[3])
settings = TrainSettings(**options)
report = train(base, rows, AutoTokenizer.from_pretrained(base), settings, out / "c", out / "s")
print(report.final_loss, report.steps)
"""
)


def rows_of(n: int = 48) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    return [Row(torch.randint(5, 200, (12 + i % 5,), generator=generator).tolist(), 4) for i in range(n)]


def go(base: Path, out: Path, rows: list[Row] | None = None, progress: Any = None, **options: Any) -> Any:
    """Train in this process; the keywords of `train` begin with an underscore."""
    keywords = {name[1:]: options.pop(name) for name in list(options) if name.startswith("_")}
    settings = TrainSettings(**({"dtype": "fp32", "threads": 1, "lr": 3e-3} | options))
    tokenizer = AutoTokenizer.from_pretrained(base)
    arguments = [base, rows or rows_of(), tokenizer, settings, out / "c", out / "s"]
    return train(*arguments, *([progress] if progress else []), **keywords)


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
    options = {"full": full, "batch_size": 8, "lr": 3e-3, "save_every_s": 0.0, "threads": 1, **ends}
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
    curves = [read_curve(tmp_path / name / "curve.jsonl") for name in ("straight", "killed")]
    steps = [[(point["step"], point["loss"]) for point in curve if "step" in point] for curve in curves]
    assert steps[0] == steps[1]  # no step twice, none missing
    straight.communicate()
    resumed.communicate()


@pytest.mark.slow
def test_two_processes_come_to_the_loss_and_weights_of_one(pocket_student: Path, tmp_path: Path) -> None:
    options = {"batch_size": 8, "lr": 3e-3, "epochs": 2, "dtype": "fp32"}
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
    losses = [
        [point["loss"] for point in read_curve(tmp_path / name / "curve.jsonl") if "loss" in point]
        for name in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)
    one, two = weights(tmp_path / "one" / "s"), weights(tmp_path / "two" / "s")
    assert all(torch.allclose(one[name], two[name], atol=2e-3) for name in one)


def test_micro_batches_change_nothing(pocket_student: Path, tmp_path: Path) -> None:
    go(pocket_student, tmp_path / "whole", batch_size=8, micro_batch=8, steps=4)
    report = go(pocket_student, tmp_path / "parts", batch_size=8, micro_batch=2, steps=4)
    curves = [read_curve(tmp_path / name / "curve.jsonl") for name in ("whole", "parts")]
    losses = [[point["loss"] for point in curve] for curve in curves]
    assert (report.steps, report.micro_batch) == (4, 2)
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_out_of_memory_halves_what_is_computed_at_once_and_says_so_once(
    pocket_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = train_module.load_student
    said: list[str] = []
    tried: list[int] = []
    plain = train_module.arguments

    def watch(*given: Any) -> Any:
        tried.append(given[3])
        return plain(*given)

    def load(*given: Any) -> Any:
        model = real(*given)

        def refuse(module: Any, inputs: Any, output: Any) -> None:
            if output.shape[1] > 40:  # packed tokens
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

        model.get_base_model().get_input_embeddings().register_forward_hook(refuse)
        return model

    monkeypatch.setattr(train_module, "load_student", load)
    monkeypatch.setattr(train_module, "arguments", watch)
    report = go(pocket_student, tmp_path, batch_size=8, steps=3, _say=said.append)
    assert tried == [8, 4, 2]
    assert len(said) == 2
    assert "4 rows at once do not fit the memory: 2 from here on" in said[1]
    assert (report.steps, report.micro_batch) == (3, 2)
    assert json.loads((tmp_path / "c" / "plan.json").read_text())["micro_batch"] == 2
    with pytest.raises(ModelError, match="not even one row"):
        go(pocket_student, tmp_path / "b", [Row(list(range(5, 60)), 3)] * 4, batch_size=1)


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_last_good_checkpoint(
    pocket_student: Path, tmp_path: Path
) -> None:
    def poison(stage: str, done: float, total: float, note: str) -> None:
        if done >= 0.5:
            clock = sys._getframe(1).f_locals["self"]
            assert isinstance(clock, Clock)
            clock._losses.append(0.0)
            for parameter in poisoned:
                parameter.data.fill_(float("nan"))

    poisoned: list[Any] = []
    real = train_module.load_student

    def load(*given: Any) -> Any:
        model = real(*given)
        poisoned.extend(p for p in model.parameters() if p.requires_grad)
        return model

    patch = pytest.MonkeyPatch()
    patch.setattr(train_module, "load_student", load)
    try:
        with pytest.raises(
            ModelError, match=r"the loss is nan after step 4; the last good checkpoint is .*checkpoint-3"
        ):
            go(pocket_student, tmp_path, progress=poison, batch_size=8, steps=6, save_every_s=0.0)
    finally:
        patch.undo()
    assert not (tmp_path / "s").exists()


def test_a_diverging_loss_ends_the_run(pocket_student: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="diverges"):
        go(pocket_student, tmp_path, full=True, batch_size=2, epochs=20, lr=3.0, warmup=0.5)


def test_training_ends_early_where_held_out_rows_get_no_better(pocket_student: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(9)
    held_out = [Row(torch.randint(5, 60, (14,), generator=generator).tolist(), 4) for _ in range(8)]  # of another kind
    report = go(pocket_student, tmp_path, batch_size=4, epochs=30, lr=1e-2, patience=2, full=True, _validation=held_out)
    curve = read_curve(tmp_path / "curve.jsonl")
    losses = [point["validation_loss"] for point in curve if "validation_loss" in point]
    assert report.stopped == "early"
    assert report.steps < 360
    assert min(losses[-2:]) >= min(losses[:-2])
    assert report.validation_loss == pytest.approx(min(losses), abs=1e-3)
    best = next(after["step"] for point, after in pairwise(curve) if point.get("validation_loss") == min(losses))
    wanted = load_file(tmp_path / "c" / f"checkpoint-{best}" / "model.safetensors")
    assert best < report.steps
    found = weights(tmp_path / "s")
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert report.validation_accuracy is not None


def test_validation_is_the_loss_and_accuracy_of_the_held_out_targets(pocket_student: Path, tmp_path: Path) -> None:
    held_out = rows_of(6)
    report = go(pocket_student, tmp_path, batch_size=8, epochs=1, full=True, _validation=held_out)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "s", dtype=torch.float32)
    logprobs, right = [], []
    for row in held_out:
        logits = student(torch.tensor([row.input_ids])).logits[0].log_softmax(-1).detach()
        for i in range(row.n_prompt, len(row.input_ids)):
            logprobs.append(float(logits[i - 1, row.input_ids[i]]))
            right.append(int(logits[i - 1].argmax()) == row.input_ids[i])
    assert report.validation_loss == pytest.approx(-sum(logprobs) / len(logprobs), rel=1e-3)
    assert report.validation_accuracy == pytest.approx(sum(right) / len(right), abs=0.02)


def test_the_curve_has_every_step(pocket_student: Path, tmp_path: Path) -> None:
    report = go(pocket_student, tmp_path, batch_size=8, epochs=2)
    points = read_curve(tmp_path / "curve.jsonl")
    assert [point["step"] for point in points] == list(range(1, report.steps + 1))
    assert points[-1]["lr"] < points[3]["lr"]
    assert all(point["tokens_per_s"] > 0 for point in points)
    with (tmp_path / "curve.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')  # as a kill leaves it
    assert len(read_curve(tmp_path / "curve.jsonl")) == len(points)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_targets": "q_proj,v_proj"},
        {"full": True},
        pytest.param({"dora": True}, marks=pytest.mark.slow),
        pytest.param({"rslora": True}, marks=pytest.mark.slow),
        pytest.param({"lora_first_layer": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda options: next(iter(options)),
)
def test_each_way_to_adapt_learns_and_merges(pocket_student: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    report = go(pocket_student, tmp_path, rows_of(8), batch_size=8, epochs=25, lr=5e-3, **options)
    losses = [point["loss"] for point in read_curve(tmp_path / "curve.jsonl")]
    assert losses[-1] < losses[0] - 0.05
    assert report.pass_ == ("packed" if {"dora", "full"} & set(options) else "fast")
    changed = {
        name
        for name, tensor in weights(tmp_path / "s").items()
        if not torch.equal(tensor, weights(pocket_student)[name])
    }
    if "lora_targets" in options:
        assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj"}
    if "lora_first_layer" in options:
        assert {name.split(".")[2] for name in changed} == {"2"}
    if "full" in options:
        assert report.merge_error is None
    else:
        assert report.merge_error is not None
        assert report.merge_error < 1e-4
        assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("options", [{"full": True}, {"dora": True}, {}], ids=["full", "dora", "lora"])
def test_in_bf16_the_first_loss_is_that_of_fp32_up_to_rounding_and_it_learns(
    pocket_student: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    losses = {}
    for dtype in ("bf16", "fp32"):
        go(pocket_student, tmp_path / dtype, rows_of(8), batch_size=8, epochs=12, lr=5e-3, dtype=dtype, **options)
        losses[dtype] = [point["loss"] for point in read_curve(tmp_path / dtype / "curve.jsonl")]
    assert losses["bf16"][0] == pytest.approx(losses["fp32"][0], rel=1e-2)
    assert losses["bf16"][-1] == pytest.approx(losses["fp32"][-1], rel=5e-2)
    assert losses["bf16"][-1] < losses["bf16"][0] - 0.02


def test_lora_plus_gives_b_another_learning_rate(pocket_student: Path, tmp_path: Path) -> None:
    from deepdistill.distill.training.lora import load_student, parameter_groups

    settings = TrainSettings(lora_plus=16.0, lr=1e-3)
    model = load_student(pocket_student, settings, torch.device("cpu"), torch.float32)
    groups = parameter_groups(model, settings)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {group["lr"]: {names[id(p)].split(".")[-3] for p in group["params"]} for group in groups}
    assert rates == {1e-3: {"lora_A"}, 16e-3: {"lora_B"}}


def test_a_tokenizer_that_knows_more_than_the_student_embeds_is_said(pocket_student: Path, tmp_path: Path) -> None:
    n = AutoModelForCausalLM.from_pretrained(pocket_student).get_input_embeddings().num_embeddings
    with pytest.raises(ModelError, match=f"use token {n}, and the student embeds {n}"):
        go(pocket_student, tmp_path, [Row([5, 6, n], 1)] * 4)


def test_settings_that_do_not_go_together_are_said() -> None:
    with pytest.raises(UsageError, match="--full trains all weights, --dora"):
        TrainSettings(full=True, dora=True)
    with pytest.raises(UsageError, match="nothing to learn"):
        TrainSettings(reasoning_weight=0, answer_weight=0)


def test_qlora_without_a_gpu_is_said(pocket_student: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ModelError, match="needs an NVIDIA GPU"):
        go(pocket_student, tmp_path, qlora=True)


def test_an_adapter_of_another_base_is_not_merged(pocket_student: Path, tmp_path: Path) -> None:
    from deepdistill.distill.training.merge import merge_adapter

    go(pocket_student, tmp_path, batch_size=8, steps=2)
    other = AutoModelForCausalLM.from_pretrained(pocket_student)
    other.get_input_embeddings().weight.data[3, 3] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ArtifactError, match="belongs to another base"):
        merge_adapter(
            tmp_path / "adapter", tmp_path / "other", AutoTokenizer.from_pretrained(pocket_student), tmp_path / "m"
        )
    assert not (tmp_path / "m").exists()


def test_a_merge_that_is_cut_off_leaves_no_student_and_is_done_again(
    pocket_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepdistill.distill.training import merge

    class Killed(BaseException):
        pass

    real = merge.save_checkpoint

    def die(*given: Any) -> None:
        given[3].with_name(f".{given[3].name}.partial").mkdir()
        raise Killed

    monkeypatch.setattr(merge, "save_checkpoint", die)
    with pytest.raises(Killed):
        go(pocket_student, tmp_path, batch_size=8, steps=3)
    assert not (tmp_path / "s").exists()
    monkeypatch.setattr(merge, "save_checkpoint", real)
    steps: list[float] = []
    report = go(pocket_student, tmp_path, progress=lambda stage, done, *_: steps.append(done), batch_size=8, steps=3)
    assert (tmp_path / "s" / "model.safetensors").exists()
    assert report.steps == 3
    assert not steps  # nothing is trained twice
    assert not (tmp_path / ".s.partial").exists()


def test_a_sliding_window_narrower_than_the_rows_is_padded_and_exact(tmp_path: Path, pocket_student: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    from deepdistill.distill.training.objective import Objective

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = MistralForCausalLM(
        MistralConfig(vocab_size=200, num_key_value_heads=1, sliding_window=8, attn_implementation="sdpa", **sizes)
    )
    rows = rows_of(5)
    alone = torch.stack([_naive(model, row) for row in rows]).sum()
    objective = Objective(model, max(len(row.input_ids) for row in rows))
    assert objective.pass_ == "padded"
    assert model(**objective.collator(0)(rows)).item() == pytest.approx(alone.item(), rel=1e-4)
    objective.release()
    wide = Objective(model, 8)
    assert wide.pass_ != "padded"


def _naive(model: Any, row: Row) -> torch.Tensor:
    logits = model(torch.tensor([row.input_ids])).logits[0]
    targets = torch.tensor(row.input_ids[row.n_prompt :])
    return torch.nn.functional.cross_entropy(logits[row.n_prompt - 1 : -1], targets, reduction="sum")


@pytest.mark.parametrize("kind", ["deepseek", "dora", "full"])
def test_the_packed_pass_has_the_loss_and_gradients_of_separate_rows(kind: str, pocket_student: Path) -> None:
    from deepdistill.distill.teachers import pocket_dir
    from deepdistill.distill.training.lora import load_student
    from deepdistill.distill.training.objective import Objective

    base = pocket_dir() if kind == "deepseek" else pocket_student
    settings = TrainSettings(full=kind != "dora", dora=kind == "dora")
    model = load_student(base, settings, torch.device("cpu"), torch.float32)
    rows = [Row([5, 6, 7, 8, 9], 2), Row([5, 6, 7, 10, 11, 12], 3), Row([20, 21], 1)]
    expected = torch.stack([_naive(model, row) for row in rows]).sum()
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    objective = Objective(model, 6)
    assert objective.pass_ == "packed"
    loss = model(**objective.collator(0)(rows))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for name, parameter in model.named_parameters():
        if name in wanted:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=2e-5, msg=name)


def test_a_run_keeps_what_it_measured_at_its_start(pocket_student: Path, tmp_path: Path) -> None:
    settings = TrainSettings(batch_size=8, steps=2)
    tokenizer = AutoTokenizer.from_pretrained(pocket_student)
    first = train(pocket_student, rows_of(), tokenizer, settings, tmp_path / "c", tmp_path / "s")
    plan = json.loads((tmp_path / "c" / "plan.json").read_text())
    assert plan == {"dtype": first.dtype, "threads": first.threads, "micro_batch": first.micro_batch}
    (tmp_path / "c" / "plan.json").write_text(json.dumps(plan | {"threads": 3}))
    more = dataclasses.replace(settings, steps=4)
    assert train(pocket_student, rows_of(), tokenizer, more, tmp_path / "c", tmp_path / "s").threads == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_the_loss(pocket_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    go(pocket_student, tmp_path, batch_size=8, steps=3, report_to="tensorboard")
    (events,) = (tmp_path / "c").rglob("events.out.tfevents.*")
    accumulated = EventAccumulator(str(events.parent))
    accumulated.Reload()
    losses = [point["loss"] for point in read_curve(tmp_path / "curve.jsonl")]
    assert [event.value for event in accumulated.Scalars("train/loss")] == pytest.approx(losses, rel=1e-3)


def test_a_tracker_shows_the_name_of_the_run_folder(tmp_path: Path) -> None:
    checkpoints = str(tmp_path / "sums" / "checkpoints")
    given = arguments(TrainSettings(batch_size=8), checkpoints, torch.device("cpu"), 8, False, 8)
    assert (given.project, given.run_name) == ("deepdistill", "sums")


def test_a_reporter_that_is_not_installed_is_said(pocket_student: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--report-to nobody is unknown"):
        go(pocket_student, tmp_path, batch_size=8, steps=1, report_to="nobody")
    with pytest.raises(UsageError, match="neptune: it is not installed"):
        go(pocket_student, tmp_path, batch_size=8, steps=1, report_to="neptune")


def test_attention_that_rows_cannot_have_is_found_out_and_padded() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from deepdistill.distill.training.objective import Objective

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=200, num_key_value_heads=1, head_dim=16, attn_logit_softcapping=0.05, sliding_window=64,
            final_logit_softcapping=2.0, attn_implementation="eager", **sizes,
        )
    )  # fmt: skip
    rows = rows_of(4)
    alone = torch.stack([_naive(model, row) for row in rows]).sum()
    objective = Objective(model, max(len(row.input_ids) for row in rows))
    assert objective.pass_ == "padded"  # attention scores are capped there
    assert model(**objective.collator(0)(rows)).item() == pytest.approx(alone.item(), rel=1e-4)


def test_logits_that_are_no_product_are_refused(pocket_student: Path) -> None:
    from deepdistill.distill.training.objective import Objective

    model = AutoModelForCausalLM.from_pretrained(pocket_student)
    plain = model.forward

    def twisted(*given: Any, **more: Any) -> Any:
        out = plain(*given, **more)
        out.logits = out.logits.square()
        return out

    model.forward = twisted
    with pytest.raises(ModelError, match="makes its logits"):
        Objective(model, 16)


def test_steps_are_at_most_and_never_more_passes(pocket_student: Path, tmp_path: Path) -> None:
    report = go(pocket_student, tmp_path, batch_size=4, epochs=2, steps=100, full=True, _validation=rows_of(2))
    assert (report.steps, report.rows) == (24, 96)
    validated = [point for point in read_curve(tmp_path / "curve.jsonl") if "validation_loss" in point]
    assert len(validated) > 1


@pytest.mark.parametrize(("batch_size", "micro_batch", "at_once"), [(4, 3, 2), (4, 32, 4), (5, 3, 1), (6, 4, 3)])
def test_a_step_is_as_many_rows_as_asked_whatever_is_computed_at_once(
    pocket_student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    micro_batch: int,
    at_once: int,
) -> None:
    seen = []

    def watch(*given: Any) -> Any:
        made = train_module_arguments(*given)
        seen.append((made.per_device_train_batch_size, made.gradient_accumulation_steps))
        return made

    train_module_arguments = train_module.arguments
    monkeypatch.setattr(train_module, "arguments", watch)
    go(pocket_student, tmp_path, batch_size=batch_size, micro_batch=micro_batch, steps=1)
    assert seen == [(at_once, batch_size // at_once)]


def test_a_checkpoint_goes_on_with_its_own_rows_only(
    pocket_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(stage: str, done: float, total: float, note: str) -> None:
        if done > 0.6:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"batch_size": 8, "steps": 6, "full": True, "save_every_s": 0.0}
    with pytest.raises(KeyboardInterrupt):
        go(pocket_student, tmp_path, progress=stop, **options)
    with pytest.raises(ArtifactError, match="the rows are others than when the training"):
        go(pocket_student, tmp_path, rows_of()[1:], **options)
    assert go(pocket_student, tmp_path, **options).steps == 6


def test_a_student_of_experts_takes_the_packed_pass(tmp_path: Path, pocket_student: Path) -> None:
    """Its layers have the names of Llama's, and what stands behind one of them is another thing."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    AutoTokenizer.from_pretrained(pocket_student).save_pretrained(tmp_path / "moe")
    report = go(tmp_path / "moe", tmp_path, [Row(list(range(5, 20)), 3)] * 8, batch_size=4, epochs=1, full=True)
    assert report.pass_ == "packed"
