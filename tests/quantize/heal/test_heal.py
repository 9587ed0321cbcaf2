"""Healing: rows are found wherever an architecture puts them, the loss is the divergence, and the file gets nearer."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from deepdistill.cli import main
from deepdistill.errors import ArtifactError
from deepdistill.localrun.core.reporter import SILENT, Reporter
from deepdistill.quantize.convert.writer import plan
from deepdistill.quantize.heal.heal import heal
from deepdistill.quantize.measure.texts import Text
from deepdistill.quantize.provenance.inspect import own_metadata
from deepdistill.quantize.recipe import CalibrationRecipe, HealRecipe, QuantizeRecipe
from deepdistill.quantize.release import DistillStage, release
from deepdistill.quantize.verify import verify


class Planted:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def _write_traces(path: Path) -> Path:
    lines = (
        {"messages": [{"role": "user", "content": f"{i} + 1?"}], "content": str(i + 1), "verdict": "right"}
        | {"reasoning_content": f"{i} + 1 = {i + 1}", "finish_reason": "stop"}
        for i in range(80)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_healed_file_is_nearer_and_holds_the_blocks_that_were_trained(student: Path, tmp_path: Path) -> None:
    projected_kl = pytest.importorskip("deepdistill.distill.training.losses").projected_kl
    traces = _write_traces(tmp_path / "traces.jsonl")
    settings = {"type": "Q4_0", "traces": traces, "calibration": CalibrationRecipe(1500, 40, 300)}
    plain = release(student, tmp_path / "plain.gguf", settings=QuantizeRecipe(**settings), n_threads=1)  # type: ignore[arg-type]
    healed = release(
        student,
        tmp_path / "healed.gguf",
        settings=QuantizeRecipe(heal=HealRecipe(30), **settings),  # type: ignore[arg-type]
        stage=DistillStage(divergence=projected_kl),
        n_threads=1,
    )
    assert plain.fidelity is not None
    assert healed.fidelity is not None
    assert healed.healed is not None
    assert healed.fidelity.kl_mean < 0.7 * plain.fidelity.kl_mean
    assert healed.healed["loss_after"] < healed.healed["loss_before"]
    assert healed.healed["requantized_same"] > 0.95
    assert healed.report.tensors == plain.report.tensors
    assert own_metadata(tmp_path / "healed.gguf")["source"]["folder"] == "healed-healed"
    assert verify(tmp_path / "healed.gguf").holds, "the healed checkpoint quantizes to the same blocks again"


def test_a_healing_that_was_cut_off_comes_to_the_weights_of_one_that_was_not(student: Path, tmp_path: Path) -> None:
    projected_kl = pytest.importorskip("deepdistill.distill.training.losses").projected_kl
    torch = pytest.importorskip("torch")

    class Killed(BaseException):
        pass

    class Steps(Reporter):
        """Notes the steps of the healing, and kills it after one of them."""

        def __init__(self, last: float = float("inf")) -> None:
            self.steps, self._last = list[float](), last

        def progress(self, stage: str, done: float, *, total: float, note: str = "") -> None:
            self.steps.append(done)
            if stage == "healing" and done == self._last:
                raise Killed

    def run(name: str, tensors: Any, settings: HealRecipe, report: Reporter = SILENT) -> dict[str, Any]:
        return heal(
            student,
            tmp_path / name,
            tensors=tensors,
            texts=texts,
            divergence=projected_kl,
            settings=settings,
            report=report,
        )

    rng = np.random.default_rng(0)
    texts = [Text(tuple(rng.integers(5, 60, 10 + i % 7).tolist()), 4) for i in range(12)]
    tensors = plan(student, "Q8_0").tensors
    settings = HealRecipe(steps=10, lr=1e-3, batch_tokens=64, refresh=2, save_every_s=0.0)
    wanted = run("straight", tensors, settings)
    with pytest.raises(Killed):
        run("cut", tensors, settings, Steps(last=7))
    assert not (tmp_path / "cut").exists()
    planted = tmp_path / ".planted.partial.pt"
    torch.save({"key": Planted(tmp_path / "ran")}, planted)
    with pytest.raises(ArtifactError, check=lambda error: error.code == "checkpoint-broken"):
        run("planted", tensors, settings)
    assert not (tmp_path / "ran").exists()
    planted.unlink()
    shutil.copy(tmp_path / ".cut.partial.pt", tmp_path / ".other.partial.pt")
    other = run("other", tensors, replace(settings, steps=2, lr=1e-4))
    assert other["steps"] == 2, "what other settings left is no beginning for these"
    resumed = Steps()
    found = run("cut", tensors, settings, resumed)
    assert resumed.steps[-4:] == [7, 8, 9, 10], "six steps were kept"
    assert found["loss_after"] == wanted["loss_after"]
    assert other["loss_before"] == wanted["loss_before"]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("straight", "cut")]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert not list(tmp_path.glob(".*part*"))
    repeated = Steps()
    assert (run("cut", tensors, settings, repeated), repeated.steps) == (found, []), "what is done is not done again"
    importance = {"blk.0.ffn_up.weight": np.ones(64, np.float32)}
    run("cut", plan(student, "Q8_0", importance=importance).tensors, replace(settings, steps=1))
    assert json.loads((tmp_path / "cut" / "healing.json").read_text())["report"]["steps"] == 1


def test_the_command_heals(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traces = _write_traces(tmp_path / "traces.jsonl")
    command = ["quantize", str(student), "--type", "Q4_0", "--heal", "3", "--traces", str(traces), "--no-proofs"]
    command += ["--imatrix", "none", "--out", str(tmp_path / "healed.gguf"), "--quiet", "--json"]
    assert main(command) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert made["healed"]["steps"] == 3
    assert own_metadata(tmp_path / "healed.gguf")["source"]["folder"] == "healed-healed"
