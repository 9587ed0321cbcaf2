"""`teach` under a launcher of several processes: one does everything, the others train with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepdistill.distill.records import CURVE_FILE, CurvePoint
from deepdistill.localrun.core.record_log import read_records

SUMS = "gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=2"
TEACH = ["--problems", SUMS, "--n-traces", "60", "--n-eval", "4", "--set", "scores.max_tokens=8"]
SETTINGS = ("steps=3", "batch_size=4", "dtype=fp32", "n_validation=0")
TRAIN = [word for setting in SETTINGS for word in ("--set", f"training.{setting}")]
PROCESSES = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCHER = [*PROCESSES, "-m"]

# accelerate shards on GPUs alone, though torch does on CPUs: it is told that it may. DIE_AT ends a process after that
# many steps, and there is a checkpoint after each.
SHARDED = """
import os, sys
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from deepdistill.cli import main
from deepdistill.distill.training import callback, trainer

begin, step = AcceleratorState.__init__, trainer.StudentTrainer.training_step
is_fsdp = "ACCELERATE_USE_FSDP" in os.environ

def begin_sharded(self, *given, fsdp_plugin=None, **options):
    begin(self, *given, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP

def step_or_die(self, model, *given, **options):
    if is_fsdp:
        assert type(next(model.parameters())).__name__ == "DTensor", "each process holds a part"
    else:
        assert type(model).__name__ == "DeepSpeedEngine"
    if self.state.global_step == int(os.environ.get("DIE_AT", -1)):
        os._exit(9)
    return step(self, model, *given, **options)

AcceleratorState.__init__, trainer.StudentTrainer.training_step = begin_sharded, step_or_die
callback.shared = lambda _: 1e9
sys.exit(main(sys.argv[sys.argv.index("deepdistill") + 1:]))
"""
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
# DS_ACCELERATOR says that it is the CPU; accelerate leaves DeepSpeed out where it is told so itself
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}
SHARDINGS = {
    "fsdp": FSDP,
    "zero2": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}


def curve_of(folder: Path) -> list[CurvePoint]:
    return list(read_records(folder / CURVE_FILE, CurvePoint))


def teach(
    launcher: list[str], student: Path, out: Path, *more: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, "deepdistill", "teach", *TEACH, *TRAIN, "--student", str(student)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(
        [*command, "--out", str(out), *more], capture_output=True, text=True, timeout=300, check=False, env=environment
    )


@pytest.mark.slow
def test_teach_in_two_processes_comes_to_what_one_comes_to(pocket_student: Path, tmp_path: Path) -> None:
    one = teach(["-m"], pocket_student, tmp_path / "one", "--weights", "full", "--json", "--quiet")
    two = teach(LAUNCHER, pocket_student, tmp_path / "two", "--weights", "full", "--json", "--quiet")
    assert (one.returncode, two.returncode) == (0, 0), two.stderr[-3000:]
    results = [json.loads(done.stdout.strip().splitlines()[-1]) for done in (one, two)]
    assert results[0]["training"]["steps"] == results[1]["training"]["steps"] == 3
    assert two.stdout.count("traces train") == 1  # the other process is silent
    losses = [[point.loss for point in curve_of(tmp_path / name) if point.loss is not None] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)
    assert set(results[1]["scores"]) == {"base", "student"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "adapter"])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_processes_that_hold_a_part_of_the_weights_each_come_to_the_student_of_one(
    sharding: str, kind: str, pocket_student: Path, tmp_path: Path
) -> None:
    if sharding != "fsdp":
        pytest.importorskip("deepspeed")
    flags = ["--json", "--quiet", "--set", "training.n_validation=4"]
    flags += ["--weights", "full"] if kind == "full" else []
    one = teach(["-m"], pocket_student, tmp_path / "one", *flags)
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    variables = SHARDINGS[sharding]
    launcher = [*PROCESSES, str(script)]
    killed = teach(launcher, pocket_student, tmp_path / "two", *flags, DIE_AT="2", **variables)
    assert killed.returncode != 0
    assert not (tmp_path / "two" / "student").exists()
    two = teach(launcher, pocket_student, tmp_path / "two", *flags, **variables)
    assert (one.returncode, two.returncode) == (0, 0), two.stderr[-3000:]
    expected, found = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("one", "two"))
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=2e-6)
    base = load_file(pocket_student / "model.safetensors")
    assert any(not torch.allclose(found[name], base[name], atol=1e-4) for name in base)
    points = [curve_of(tmp_path / name) for name in ("one", "two")]
    for key in ("loss", "validation_loss"):
        losses = [[value for point in curve if (value := getattr(point, key)) is not None] for curve in points]
        assert losses[1][-1] == pytest.approx(losses[0][-1], rel=2e-4)


@pytest.mark.slow
def test_an_error_of_the_first_process_ends_the_others(pocket_student: Path, tmp_path: Path) -> None:
    done = teach(LAUNCHER, pocket_student, tmp_path / "run", "--traces", str(tmp_path / "none.jsonl"))
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
