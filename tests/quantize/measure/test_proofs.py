"""The proofs hold for a true file, and each notices the one thing that it is for."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepdistill.localrun.families import template
from deepdistill.quantize.measure.proofs import Difference, judge, prove
from deepdistill.quantize.release import quantize

QUESTIONS = [f"{a} + {2 * a} = ?" for a in range(3, 14)]


@pytest.fixture(scope="module")
def f32(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("f32") / "f32.gguf"
    quantize(student, path, ftype="F32")
    return path


@pytest.fixture
def other(student: Path, tmp_path: Path) -> Path:
    """A copy of the student that is no longer what the file was made from."""
    folder = tmp_path / "other"
    shutil.copytree(student, folder)
    return folder


def test_a_true_file_is_proved(student: Path, tmp_path: Path) -> None:
    report = quantize(student, tmp_path / "f32.gguf", ftype="F32").proved(QUESTIONS)
    proofs = report.proofs
    assert proofs is not None
    assert not proofs.failed, proofs.summary()
    assert [p.holds for p in (proofs.valid, proofs.tokens, proofs.template, proofs.greedy)] == [True] * 4
    assert proofs.n_tokens == 64 * len(QUESTIONS)
    assert proofs.n_equal >= proofs.n_tokens - 2  # a random model has near ties
    assert any("same greedy output: yes" in line for line in report.summary())


def test_another_weight_is_noticed(f32: Path, other: Path) -> None:
    torch = pytest.importorskip("torch")
    AutoModelForCausalLM = pytest.importorskip("transformers").AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.neg_()
    model.save_pretrained(other)
    proofs = prove(other, f32, questions=QUESTIONS[:2])
    assert proofs.greedy.holds is False
    assert proofs.tokens.holds
    first = proofs.first_difference
    assert first is not None
    assert first.expected != first.got
    assert first.margin > 0
    assert f"transformers {first.expected}, the GGUF {first.got}" in proofs.greedy.detail


def test_another_way_to_cut_text_is_noticed(f32: Path, other: Path) -> None:
    read = json.loads((other / "tokenizer.json").read_text())
    read["pre_tokenizer"]["pretokenizers"].pop(0)  # digits may merge now
    (other / "tokenizer.json").write_text(json.dumps(read))
    proofs = prove(other, f32, questions=[])
    assert proofs.tokens.holds is False
    assert "transformers has" in proofs.tokens.detail


def test_another_template_is_noticed(f32: Path, other: Path) -> None:
    changed = other / "chat_template.jinja"
    changed.write_text(changed.read_text() + "x")
    proofs = prove(other, f32, questions=QUESTIONS[:1])
    assert proofs.tokens.holds
    assert proofs.template.holds is False
    assert proofs.failed


def test_a_template_without_end_disproves_and_does_not_hang(
    f32: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template, "MAX_SECONDS", 0.3)
    endless = "{% for a in range(9999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (other / "chat_template.jinja").write_text(f"{{% if pad_token is defined %}}{endless}{{% endif %}}")
    proofs = prove(other, f32, questions=[])
    assert proofs.template.holds is False


def test_a_cut_file_is_not_valid(student: Path, f32: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(f32.read_bytes()[:-5000])
    proofs = prove(student, cut, questions=QUESTIONS)
    assert proofs.valid.holds is False
    assert "cut short" in proofs.valid.detail
    assert proofs.greedy.holds is None


def test_a_quantized_file_is_not_proved_greedy(student: Path, tmp_path: Path) -> None:
    proofs = quantize(student, tmp_path / "q8.gguf", ftype="Q8_0").proved(QUESTIONS[:1]).proofs
    assert proofs is not None
    assert proofs.tokens.holds
    assert proofs.template.holds
    assert proofs.greedy.holds is None
    assert "Q8_0 rounds the weights" in str(proofs.greedy)


def test_without_transformers_it_says_so(student: Path, f32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else real(name))
    proofs = prove(student, f32, questions=QUESTIONS)
    assert proofs.valid.holds
    assert [str(p) for p in (proofs.tokens, proofs.greedy)] == ["not proved: transformers is not installed"] * 2


def test_ties_disprove_nothing_and_are_told() -> None:
    tie, error = Difference(1, 5, 10, 11, 0.001), Difference(2, 7, 3, 4, 0.5)
    assert judge([], n_prompts=2, n_tokens=64, ftype="F32").holds
    told = judge([tie], n_prompts=2, n_tokens=64, ftype="F32")
    assert told.holds
    assert "127 of 128" in told.detail
    assert "1 of 1 are ties" in told.detail
    assert judge([tie, error], n_prompts=2, n_tokens=64, ftype="F32").holds is False
