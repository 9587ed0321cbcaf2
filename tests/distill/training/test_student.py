from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepdistill.distill.teachers.huggingface.loading import load_tokenizer
from deepdistill.distill.training.lora import load_base
from deepdistill.distill.training.student import student_dir, teach_template
from deepdistill.errors import ModelError, UsageError
from deepdistill.localrun.families.template import render


def test_the_pocket_student_is_made_once_and_loads_in_plain_transformers(pocket_student: Path) -> None:
    made = (pocket_student / "model.safetensors").stat().st_mtime_ns
    assert student_dir("pocket") == pocket_student
    assert (pocket_student / "model.safetensors").stat().st_mtime_ns == made
    model = AutoModelForCausalLM.from_pretrained(pocket_student)
    assert model.config.model_type == "llama"
    assert model.get_input_embeddings().weight.shape[0] == len(AutoTokenizer.from_pretrained(pocket_student))


@pytest.mark.slow
def test_smollm2_is_the_wheels_gguf(chain_sum: str) -> None:
    folder = student_dir("smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 134.5
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert "system" in tokenizer.chat_template  # its own, until it is taught
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert "apache-2.0" in (folder / "README.md").read_text()


def test_a_template_that_renders_reasoning_is_kept(pocket_student: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket_student)
    own = tokenizer.chat_template + "{# mine #}"
    tokenizer.chat_template = own
    teach_template(tokenizer)
    assert tokenizer.chat_template == own


def test_a_chatml_template_is_replaced(pocket_student: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket_student)
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    teach_template(tokenizer)
    assert "reasoning_content" in tokenizer.chat_template


def test_what_all_rows_begin_with_is_what_a_chat_begins_with(pocket_student: Path) -> None:
    tokenizer, plain = AutoTokenizer.from_pretrained(pocket_student), AutoTokenizer.from_pretrained(pocket_student)
    told = 'End with the label:\n"bug" or \\feature, für alle {{ 1 }}.'
    teach_template(plain)
    teach_template(tokenizer, told)
    system, asked = {"role": "system", "content": told}, {"role": "user", "content": "It crashes."}
    other = {"role": "system", "content": "Be brief."}
    expected = str(plain.apply_chat_template([system, asked], add_generation_prompt=True, tokenize=False))
    for conversation in ([asked], [system, asked]):
        assert tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False) == expected
        assert render(tokenizer.chat_template, conversation, thinking=True) == expected
    assert told not in str(tokenizer.apply_chat_template([other, asked], tokenize=False))


@pytest.mark.parametrize(
    ("missing", "named"),
    [("config.json", "config.json"), ("tokenizer.json", "tokenizer"), ("model.safetensors", "weights")],
)
def test_incomplete_folders(missing: str, named: str, pocket_student: Path, tmp_path: Path) -> None:
    for file in pocket_student.iterdir():
        if file.name != missing:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, check=lambda error: error.code == "model-incomplete") as caught:
        student_dir(str(tmp_path))
    assert named in caught.value.message


def test_an_unknown_student() -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "no-such-model"):
        student_dir("smollm3")


def test_a_hub_student_without_the_network_says_so() -> None:
    with pytest.raises(ModelError, check=lambda error: error.code == "not-in-cache") as caught:
        student_dir("hf:nobody/nothing", offline=True)
    assert "nobody/nothing" in caught.value.message
    assert "--offline" in caught.value.hint


def test_a_hub_student_is_downloaded_once(
    pocket_student: Path, tmp_path: Path, hub: Callable[[dict[str, dict[str, bytes]]], AbstractContextManager[str]]
) -> None:
    files = {file.name: file.read_bytes() for file in pocket_student.iterdir()} | {"pytorch_model.bin": b"a pickle"}
    code = (
        "import sys; from deepdistill.distill.training.student import student_dir\n"
        "print(student_dir(sys.argv[1], len(sys.argv) > 2))"
    )

    def ask(*arguments: str) -> Path:  # in a process of its own: the hub's library reads its settings once
        env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip())

    with hub({"org/student": files}) as endpoint:
        folder = ask("hf:org/student")
    assert ask("hf:org/student", "offline") == folder
    assert {f.name for f in folder.iterdir()} == set(files) - {"pytorch_model.bin"}, "no pickle is ever fetched"
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    AutoModelForCausalLM.from_pretrained(folder)


class _Planted:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_no_code_of_a_checkpoint_runs(pocket_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, code, pickled = tmp_path / "ran", tmp_path / "code", tmp_path / "pickled"
    shutil.copytree(pocket_student, code)
    (code / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Evil: pass\n")
    config = json.loads((code / "config.json").read_text())
    names = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoModel", "AutoTokenizer"), "evil.Evil")
    config |= {"model_type": "evil", "auto_map": names}
    (code / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((code / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (code / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    shutil.copytree(pocket_student, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save({"weights": _Planted(ran)}, pickled / "pytorch_model.bin")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # who would be asked for leave, and give it
    for folder in (code, pickled):
        with pytest.raises(ModelError):
            load_base(folder, torch.float32)
        with contextlib.suppress(ModelError):
            load_tokenizer(folder)
    assert not ran.exists()
