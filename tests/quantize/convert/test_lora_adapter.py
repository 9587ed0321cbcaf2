"""Adapters that peft made, merged on the way, against peft's own merge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepdistill.errors import ArtifactError, DeepDistillError, UsageError
from deepdistill.localrun.gguf.header import read_gguf
from deepdistill.quantize.convert.checkpoint import Checkpoint
from deepdistill.quantize.convert.writer import plan, write
from deepdistill.quantize.provenance.metadata import source_key, source_of
from deepdistill.quantize.recipe import HealRecipe, QuantizeRecipe
from deepdistill.quantize.release import release
from deepdistill.quantize.verify import verify

pytestmark = [  # peft, on tied weights and missing configs, and with the names of older releases
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
LINEAR = ["q_proj", "v_proj", "down_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LINEAR},
    "rank-stabilized": {"target_modules": LINEAR, "use_rslora": True},
    "ranks and alphas of their own": {
        "target_modules": LINEAR,
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 64, "down_proj": 1},
    },
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "the whole output matrix": {"target_modules": LINEAR, "modules_to_save": ["lm_head"]},
}


def make_adapter(base: Path, folder: Path, **settings: Any) -> dict[str, np.ndarray]:
    """Write an adapter of random weights; return what peft merges them to in float32."""
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    AutoModelForCausalLM = pytest.importorskip("transformers").AutoModelForCausalLM
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                weight.normal_(std=0.2)
    wrapped.save_pretrained(folder)
    merged = wrapped.merge_and_unload()
    return {name: weight.numpy() for name, weight in merged.state_dict().items()}


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_what_is_merged_is_what_peft_merges(student: Path, tmp_path: Path, kind: str) -> None:
    expected = make_adapter(student, tmp_path / "adapter", **SETTINGS[kind])
    plain = Checkpoint(student)
    for base in (student, None):  # given, and as adapter_config.json names it
        merged = Checkpoint(tmp_path / "adapter", base)
        assert set(merged.tensors) == set(expected)
        changed = 0
        for name, weight in merged.tensors.items():
            rows = np.concatenate([weight.rows(slice(i, i + 7)) for i in range(0, weight.shape[0], 7)])
            np.testing.assert_allclose(rows, expected[name], atol=1e-6)
            changed += not np.array_equal(rows, plain.tensors[name].rows())
        assert changed == {"embeddings": 3, "the whole output matrix": 7}.get(kind, 6)


def test_a_file_of_an_adapter_has_the_bases_config_and_tokenizer(student: Path, tmp_path: Path) -> None:
    expected = make_adapter(student, tmp_path / "adapter", target_modules=LINEAR)
    write(plan(tmp_path / "adapter", "F32"), tmp_path / "out.gguf", n_threads=1)
    header = read_gguf(tmp_path / "out.gguf")
    there = header.tensors["blk.1.ffn_down.weight"]
    data = np.fromfile(tmp_path / "out.gguf", np.float32, there.n_bytes // 4, offset=there.offset)
    np.testing.assert_allclose(data.reshape(there.shape), expected["model.layers.1.mlp.down_proj.weight"], atol=1e-6)
    assert header.metadata["tokenizer.chat_template"] == (student / "chat_template.jinja").read_text()
    assert header.metadata["general.license"] == "apache-2.0"
    assert header.metadata["general.base_model.0.name"] == "Some-Base-1B"  # no place on this machine
    assert str(student) not in str(header.metadata)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut_a_factor(folder: Path) -> None:
    load_file = pytest.importorskip("safetensors.torch").load_file
    save_file = pytest.importorskip("safetensors.torch").save_file
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: t for name, t in tensors.items() if "lora_B" not in name}, folder / "adapter_model.safetensors")


def widen(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    save_file = pytest.importorskip("safetensors.torch").save_file
    tensors = load_file(folder / "adapter_model.safetensors")
    wide = {name: torch.zeros(t.shape[0], 99) if "lora_A" in name else t for name, t in tensors.items()}
    save_file(wide, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("break_it", "code", "named"),
    [
        (lambda folder: edit(folder, use_dora=True), "adapter-not-plain", "DoRA"),
        (lambda folder: edit(folder, bias="all"), "adapter-not-plain", "biases"),
        (lambda folder: edit(folder, peft_type="IA3"), "adapter-not-plain", "IA3"),
        (lambda folder: edit(folder, base_model_name_or_path="some/where"), "base-missing", "some/where"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no-weights", "adapter_model.safetensors"),
        (cut_a_factor, "adapter-mismatch", "down_proj"),
        (widen, "adapter-mismatch", "x 99"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    student: Path, tmp_path: Path, break_it: Callable[[Path], Any], code: str, named: str
) -> None:
    make_adapter(student, tmp_path / "adapter", target_modules=LINEAR)
    break_it(tmp_path / "adapter")
    with pytest.raises(DeepDistillError, check=lambda error: error.code == code) as caught:
        plan(tmp_path / "adapter", "Q8_0")
    assert named in caught.value.message


def test_a_base_is_only_for_adapters(student: Path, tmp_path: Path) -> None:
    shutil.copytree(student, tmp_path / "whole")
    with pytest.raises(ArtifactError, check=lambda error: error.code == "not-an-adapter"):
        plan(tmp_path / "whole", "Q8_0", base=student)


def test_an_adapter_is_known_by_its_base_too(student: Path, tmp_path: Path) -> None:
    """Or what was measured with one base would be taken for another's."""
    load_file = pytest.importorskip("safetensors.torch").load_file
    save_file = pytest.importorskip("safetensors.torch").save_file
    make_adapter(student, tmp_path / "adapter", target_modules=LINEAR)
    other = Path(shutil.copytree(student, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: weight + 0.1 for name, weight in weights.items()}, other / "model.safetensors", {"format": "pt"})
    keys = {source_key(source_of(tmp_path / "adapter", base)) for base in (student, None, other)}
    assert len(keys) == 2, "the one that it names is the first"
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    assert source_key(source_of(tmp_path / "adapter", student)) not in keys
    wanted = QuantizeRecipe(type="Q8_0", base=other)
    made = release(tmp_path / "adapter", tmp_path / "a.gguf", settings=wanted, n_threads=1)
    assert verify(made.report.path).holds
    assert not verify(made.report.path, base=student).holds
    with pytest.raises(UsageError, check=lambda error: error.code == "adapter-not-healable"):
        release(
            tmp_path / "adapter",
            tmp_path / "b.gguf",
            settings=QuantizeRecipe(heal=HealRecipe(2), base=other),
            n_threads=1,
        )
