"""What comes from others runs nothing here: checkpoints with code of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from deepdistill.cli import main
from deepdistill.distill.teachers.huggingface.loading import load_tokenizer
from deepdistill.distill.training.merge import merge_adapter, save_checkpoint
from deepdistill.errors import DeepDistillError

PROBLEMS = ["--problems", "gym:chain_sum?max_terms=2&max_digits=1"]
FEW = ["--set", "calibration.n_heal=200", "--set", "calibration.n_measure=200"]


def plant(student: Path, folder: Path, config: dict[str, object]) -> Path:
    """Copy a checkpoint whose config and tokenizer ask for a Python file that writes `ran` beside the folder."""
    shutil.copytree(student, folder)
    (folder / "evil.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    names = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoModel", "AutoTokenizer"), "evil.Evil")
    asked = {
        "config.json": {"model_type": "evil", "auto_map": names, **config},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Evil"] * 2}, "tokenizer_class": "Evil"},
    }
    for name, more in asked.items():
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | more))
    return folder


def write_traces(path: Path) -> Path:
    line = {"verdict": "right", "finish_reason": "stop"}
    rows = (
        line
        | {"messages": [{"role": "user", "content": f"{i} + 1?"}], "content": str(i + 1), "reasoning_content": "so"}
        for i in range(80)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["teach", *PROBLEMS, "--student", "{planted}", "--out", "{tmp}/run"], "needs-own-code"),
        (["teach", *PROBLEMS, "--student", "pocket", "--teacher", "{planted}", "--out", "{tmp}/run"], "needs-own-code"),
        (["eval", "{planted}", *PROBLEMS, "--n", "4"], "needs-own-code"),
        (["quantize", "{tmp}/unknown"], "not-convertible"),
        (["quantize", "{planted}"], None),  # it reads the weights, and transformers is asked only for the proofs
        (
            ["quantize", "{planted}", "--type", "Q4_0", "--traces", "{tmp}/traces.jsonl", "--heal", "1", *FEW],
            "load-failed",
        ),
    ],
)
def test_a_checkpoint_with_code_of_its_own_is_refused_and_runs_none(
    argv: list[str],
    code: str | None,
    pocket_student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # who would be asked for leave, and give it
    planted = plant(pocket_student, tmp_path / "planted", {})
    plant(pocket_student, tmp_path / "unknown", {"architectures": ["EvilForCausalLM"]})
    write_traces(tmp_path / "traces.jsonl")
    words = [word.format(planted=planted, tmp=tmp_path) for word in argv]
    assert main([*words, "--json", "--quiet"]) == (1 if code else 0)
    printed, said = capsys.readouterr()
    record = json.loads(printed.splitlines()[-1])
    assert not (tmp_path / "ran").exists()
    assert "Traceback" not in said
    if code:
        assert record["error"]["code"] == code
        assert "\n" not in record["error"]["message"]
    else:
        assert record["proofs"]["tokens"]["holds"] is None


def test_no_code_of_a_base_runs_when_an_adapter_is_merged(
    pocket_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("builtins.input", lambda *_: "y")
    planted, tokenizer = plant(pocket_student, tmp_path / "planted", {}), load_tokenizer(pocket_student)
    model = AutoModelForCausalLM.from_pretrained(pocket_student, dtype=torch.float32)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(DeepDistillError, check=lambda error: error.code == "needs-own-code"):
        merge_adapter(tmp_path / "adapter", planted, tokenizer=tokenizer, out=tmp_path / "out")
    with pytest.raises(ValueError, match="custom code"):
        save_checkpoint(model, planted, tokenizer=tokenizer, out=tmp_path / "out")
    assert not (tmp_path / "ran").exists()
