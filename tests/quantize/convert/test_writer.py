"""What a file computes against transformers, what it says about itself, and that nothing is ever half written."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from deepdistill.errors import ArtifactError, DeepDistillError, ModelError, UsageError
from deepdistill.localrun.core.reporter import Reporter
from deepdistill.localrun.engine.engine import Engine
from deepdistill.localrun.gguf import ggml
from deepdistill.localrun.gguf.header import read_gguf
from deepdistill.quantize.convert.writer import plan, write
from deepdistill.quantize.release import quantize

T = 120  # tokens: past the original context of the scaled models below


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **settings}}


LLAMA3 = rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = rope("yarn", original_max_position_embeddings=32)
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, every bias": {"attention_bias": True, "mlp_bias": True},
    "llama, wide heads": {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "llama, no grouped heads": {"num_key_value_heads": 4, "rms_norm_eps": 0.01},
    "llama, linear": rope("linear"),
    "llama, llama3": LLAMA3,
    "llama, yarn": YARN,
    "llama, yarn with its factor": rope(
        "yarn", original_max_position_embeddings=32, attention_factor=1.3, beta_fast=20
    ),
    "qwen2": {"arch": "qwen2", "pre": "qwen2"},
    "qwen2, tied, yarn": {"arch": "qwen2", "tie_word_embeddings": True, **YARN},
    "qwen3": {"arch": "qwen3", "pre": "qwen2"},
    "qwen3moe": {"arch": "qwen3moe", "pre": "qwen2"},
    "qwen3moe, untied, yarn": {"arch": "qwen3moe", **YARN},
    "gemma3": {"arch": "gemma3"},
    "gemma3, another pattern, capped, scaled": {
        "arch": "gemma3",
        "tie_word_embeddings": False,
        "final_logit_softcapping": 2.0,
        "layer_types": ["full_attention", *["sliding_attention", "sliding_attention", "full_attention"] * 2],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
        },
    },
    "deepseek2": {"arch": "deepseek2"},
    "deepseek2, plain query, all dense but one": {"arch": "deepseek2", "q_lora_rank": None, "first_k_dense_replace": 2},
    "deepseek2, yarn": {
        "arch": "deepseek2",
        **rope("yarn", original_max_position_embeddings=32, mscale=0.707, mscale_all_dim=0.707),
    },
    "deepseek3": {"arch": "deepseek3", "pre": "deepseek-v3"},
    "deepseek3, plain query, no groups": {"arch": "deepseek3", "q_lora_rank": None, "n_group": 1},
    "deepseek3, yarn": {
        "arch": "deepseek3",
        **rope("yarn", original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=1.0),
    },
    "qwen3, tied, biases": {"arch": "qwen3", "tie_word_embeddings": True, "attention_bias": False},
}


def logits_of(folder: Path, tokens: list[int]) -> np.ndarray:
    torch = pytest.importorskip("torch")
    AutoModelForCausalLM = pytest.importorskip("transformers").AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return np.asarray(model(torch.tensor([tokens])).logits[0].float())


@pytest.mark.parametrize("model", list(MODELS))
def test_an_f32_file_computes_what_transformers_does(
    make_checkpoint: Callable[..., Path], tmp_path: Path, model: str
) -> None:
    folder = make_checkpoint(**MODELS[model])
    path = tmp_path / "f32.gguf"
    quantize(folder, path, ftype="F32")
    tokens = np.random.default_rng(1).integers(5, 390, T).tolist()
    expected = logits_of(folder, tokens)
    with Engine(path, n_threads=1) as engine:
        got = engine.logits(tokens)
    assert expected.std() > 0.3  # else anything would be close
    close = np.abs(got - expected).max(1) < 0.02 * expected.std()  # the KV cache is f16
    # Of two experts that score alike, rounding decides which one is asked.
    assert close.mean() >= (0.97 if "moe" in model or "deepseek" in model else 1)


def test_the_reference_notices_a_missing_rope_setting(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Keep the test above honest: without its scaling, a model past its context is far off."""
    folder = make_checkpoint(**YARN)
    tokens = np.random.default_rng(1).integers(5, 390, T).tolist()
    expected = logits_of(folder, tokens)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    (plain / "config.json").write_text(json.dumps(config))
    quantize(plain, tmp_path / "f32.gguf", ftype="F32")
    with Engine(tmp_path / "f32.gguf", n_threads=1) as engine:
        assert np.abs(engine.logits(tokens) - expected).max() > 0.1 * expected.std()


def test_bf16_weights_pass_through_without_loss(student: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    AutoModelForCausalLM = pytest.importorskip("transformers").AutoModelForCausalLM
    quantize(student, tmp_path / "bf16.gguf", ftype="BF16")
    state = AutoModelForCausalLM.from_pretrained(student, dtype=torch.bfloat16).state_dict()
    stored = read_gguf(tmp_path / "bf16.gguf").tensors["blk.1.ffn_up.weight"]
    data = (tmp_path / "bf16.gguf").read_bytes()[stored.offset : stored.offset + stored.n_bytes]
    expected = state["model.layers.1.mlp.up_proj.weight"]
    assert stored.type.name == "BF16"
    assert data == expected.view(torch.uint16).numpy().tobytes()


def test_the_file_is_valid_and_says_where_it_comes_from(student: Path, tmp_path: Path) -> None:
    path = tmp_path / "q8.gguf"
    report = quantize(student, path, ftype="q8_0", metadata={"deepdistill.recipe": '{"seed": 1}'})
    reader = gguf.GGUFReader(path)

    def read(key: str) -> Any:
        field = reader.get_field(key)
        return field.contents() if field else None

    assert read("general.architecture") == "llama"
    assert read("general.license") == "apache-2.0"
    assert read("general.base_model.0.name") == "Some-Base-1B"
    assert read("general.base_model.0.organization") == "some-org"
    assert read("general.base_model.0.repo_url") == "https://huggingface.co/some-org/Some-Base-1B"
    assert read("tokenizer.chat_template") == (student / "chat_template.jinja").read_text()
    assert read("deepdistill.recipe") == '{"seed": 1}'
    assert (read("deepdistill.think_open"), read("deepdistill.think_close")) == ("<think>", "</think>")
    assert len(reader.tensors) == len(report.tensors) == 21
    assert report.n_bytes == path.stat().st_size
    n_bytes = sum(int(t.n_bytes) for t in reader.tensors)
    n_weights = sum(int(t.n_elements) for t in reader.tensors)
    assert report.bits_per_weight == pytest.approx(8 * n_bytes / n_weights)
    assert any("apache-2.0, from some-org/Some-Base-1B" in line for line in report.summary())
    Engine(path).close()


def test_fallbacks_are_told(student: Path, tmp_path: Path) -> None:
    report = quantize(student, tmp_path / "q4.gguf", ftype="Q4_K_M")
    got = {one.name: (one.asked, one.got) for one in report.fallbacks}
    assert got["blk.0.attn_q.weight"] == ("Q4_K", "Q5_0")
    assert got["output.weight"] == ("Q6_K", "Q8_0")
    assert len(got) == sum(name != "F32" for name in report.tensors.values())
    assert any("16 of 21 tensors cannot have their Q4_K_M type" in line for line in report.summary())


def test_parts_and_shards_change_no_byte(student: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    AutoModelForCausalLM = pytest.importorskip("transformers").AutoModelForCausalLM
    quantize(student, tmp_path / "whole.gguf", ftype="Q4_0")
    sharded = tmp_path / student.name  # the name goes into the file
    AutoModelForCausalLM.from_pretrained(student, dtype=torch.bfloat16).save_pretrained(sharded, max_shard_size="60KB")
    for path in student.iterdir():
        if path.suffix != ".safetensors" and not (sharded / path.name).exists():
            shutil.copy(path, sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    write(plan(sharded, "Q4_0"), tmp_path / "parts.gguf", n_threads=3, part_size=1024)
    assert (tmp_path / "parts.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_explicit_types_and_an_importance_matrix(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The bytes of each tensor against ggml, called with the tensor's own type and weights."""
    torch = pytest.importorskip("torch")
    AutoModelForCausalLM = pytest.importorskip("transformers").AutoModelForCausalLM
    folder = make_checkpoint(hidden_size=256, num_hidden_layers=1)
    name, other = "blk.0.ffn_up.weight", "blk.0.ffn_gate.weight"
    weights = np.random.default_rng(0).random(256, dtype=np.float32)
    conversion = plan(folder, "Q8_0", types={name: Type.IQ2_XXS, other: Type.Q2_K}, importance={name: weights})
    write(conversion, tmp_path / "out.gguf", n_threads=2)
    stored = read_gguf(tmp_path / "out.gguf").tensors
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    data = (tmp_path / "out.gguf").read_bytes()
    for tensor, source, type_, column in (
        (name, "up_proj", Type.IQ2_XXS, weights),
        (other, "gate_proj", Type.Q2_K, None),
        ("blk.0.attn_v.weight", "v_proj", Type.Q8_0, None),
    ):
        rows = next(value for key, value in state.items() if f"{source}.weight" in key).numpy()
        there = stored[tensor]
        assert there.type == type_
        expected = ggml.quantize_rows(rows, type_, imatrix=column).tobytes()
        assert data[there.offset : there.offset + there.n_bytes] == expected


@pytest.mark.parametrize(
    ("given", "code", "named"),
    [
        ({"types": {"blk.9.ffn_up.weight": Type.Q8_0}}, "no-such-tensor", "blk.9.ffn_up.weight"),
        ({"types": {"blk.0.ffn_down.weight": Type.Q4_K}}, "type-does-not-fit", "blk.0.ffn_down.weight"),
        ({"types": {"token_embd.weight": Type.IQ2_XS}}, "type-does-not-fit", "token_embd.weight"),
        ({"types": {"output.weight": Type.IQ2_XS}, "hidden_size": 256}, "needs-imatrix", "output.weight"),
        ({"importance": {"blk.0.ffn_up.weight": np.ones(5, np.float32)}}, "imatrix-mismatch", "blk.0.ffn_up.weight"),
    ],
)
def test_an_assignment_that_does_not_fit_is_refused(
    student: Path, make_checkpoint: Callable[..., Path], given: dict[str, Any], code: str, named: str
) -> None:
    width = given.pop("hidden_size", None)
    folder = make_checkpoint(hidden_size=width, num_hidden_layers=1) if width else student
    with pytest.raises(DeepDistillError, check=lambda error: error.code == code) as caught:
        plan(folder, "Q8_0", **given)
    assert named in caught.value.message


@pytest.fixture
def broken(student: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the student to break, and the promise that no file came of it."""
    folder = tmp_path / "broken"
    shutil.copytree(student, folder)
    yield folder
    assert not list(tmp_path.glob("*.gguf"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **changes)


@pytest.mark.parametrize(
    ("break_it", "code", "named"),
    [
        (config(architectures=["MixtralForCausalLM"]), "not-convertible", "MixtralForCausalLM"),
        (config(architectures=["DeepseekV3ForCausalLM"]), "not-convertible", "no shared experts"),
        (config(architectures=None, model_type="mamba"), "not-convertible", "mamba"),
        (config(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "not-convertible", "'dynamic'"),
        (config(rope_parameters={"rope_type": "linear"}), "config-broken", "factor"),
        (config(hidden_act="gelu"), "not-convertible", "hidden_act"),
        (config(layer_types=["sliding_attention"]), "not-convertible", "sliding-window"),
        (config(partial_rotary_factor=0.5, rope_parameters=None), "not-convertible", "partial_rotary_factor"),
        (config(quantization_config={"quant_method": "gptq"}), "already-quantized", "gptq"),
        (config(num_hidden_layers=3), "tensor-missing", "model.layers.2"),
        (config(num_hidden_layers=1), "not-convertible", "model.layers.1"),
        (config(intermediate_size=128), "tensor-mismatch", "config.json"),
        (config(hidden_size=None), "config-broken", "hidden_size"),
        (config(head_dim="wide"), "config-broken", "config.json"),
        (config(rope_parameters=["linear"]), "config-broken", "config.json"),
        (config(architectures=5), "config-broken", "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "json-broken", "config.json"),
        (lambda folder: (folder / "config.json").unlink(), "no-config", "config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no-tokenizer", "tokenizer.json"),
        (adapter, "base-missing", "broken"),
        (drop_weights, "no-weights", "broken"),
        (cut_weights, "safetensors-broken", "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"junk"), "safetensors-broken", "model.safetensors"),
        (lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"), "card-broken", "README.md"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused(
    broken: Path, tmp_path: Path, break_it: Callable[[Path], Any], code: str, named: str
) -> None:
    break_it(broken)
    with pytest.raises(DeepDistillError, check=lambda error: error.code == code) as caught:
        quantize(broken, tmp_path / "out.gguf", ftype="Q8_0")
    assert named in caught.value.message


def test_another_architecture_is_told_of_llama_cpps_converter(broken: Path, tmp_path: Path) -> None:
    edit(broken / "config.json", architectures=["MixtralForCausalLM"])
    with pytest.raises(ModelError) as caught:
        quantize(broken, tmp_path / "out.gguf")
    assert "convert_hf_to_gguf.py" in caught.value.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("ftype", ["F32", "F16", "Q4_K_M"])
def test_diverged_weights_make_no_file(broken: Path, tmp_path: Path, value: float, ftype: str) -> None:
    torch = pytest.importorskip("torch")
    AutoModelForCausalLM = pytest.importorskip("transformers").AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(broken, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    model.save_pretrained(broken)
    with pytest.raises(ArtifactError, check=lambda error: error.code == "weights-broken") as caught:
        quantize(broken, tmp_path / "out.gguf", ftype=ftype)
    assert "blk.1.ffn_down.weight" in caught.value.message


class FailsAfter(Reporter):
    """Raises an error as soon as so many weights are written, as a disk or a person would."""

    def __init__(self, n_weights: int, error: BaseException) -> None:
        self._n_weights, self._error = n_weights, error

    def progress(self, stage: str, done: float, *, total: float, note: str = "") -> None:
        if done > self._n_weights:
            raise self._error


def test_a_full_disk_leaves_what_was_there(student: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"what was there")
    full = FailsAfter(10_000, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(ArtifactError, check=lambda error: error.code == "write-failed"):
        quantize(student, out, report=full)
    assert out.read_bytes() == b"what was there"
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_a_part_that_cannot_be_written_leaves_none(student: Path, tmp_path: Path) -> None:
    conversion = plan(student, "Q8_0")
    two_parts = sum(one.n_weights for one in conversion.tensors) // 2
    full = FailsAfter(two_parts, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(ArtifactError, check=lambda error: error.code == "write-failed"):
        write(conversion, tmp_path / "m.gguf", report=full, n_threads=1, split_bytes=40_000)
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_seen_before_the_work(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(ArtifactError, check=lambda error: error.code == "write-failed"):
        quantize(student, tmp_path / "out.gguf", report=FailsAfter(-1, AssertionError("it began to write")))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing_half_written(student: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(student, tmp_path / "out.gguf", report=FailsAfter(10_000, KeyboardInterrupt()))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_replaced_and_a_folder_is_not(student: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")
    quantize(student, out, ftype="Q8_0")
    assert out.read_bytes()[:4] == b"GGUF"
    with pytest.raises(ArtifactError, check=lambda error: error.code == "is-folder"):
        quantize(student, tmp_path, ftype="Q8_0")


def test_the_default_place_is_beside_the_student(student: Path, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(student, folder)
    assert quantize(folder, ftype="q4_0").path == tmp_path / "student-Q4_0.gguf"


def test_metadata_of_the_file_cannot_be_overwritten(student: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "metadata-taken"):
        quantize(student, tmp_path / "out.gguf", metadata={"general.license": "mine"})
    assert list(tmp_path.iterdir()) == []


def test_without_a_card_the_report_says_that_there_is_no_licence(student: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(student, folder, ignore=shutil.ignore_patterns("README.md"))
    report = quantize(folder, tmp_path / "out.gguf")
    assert report.licence is None
    assert any("licence: none found" in line for line in report.summary())
    assert "general.license" not in read_gguf(report.path).metadata
