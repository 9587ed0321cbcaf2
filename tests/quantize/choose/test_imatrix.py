"""The importance matrix against torch's own activations, and its file against gguf's reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from deepdistill.errors import ArtifactError, ModelError
from deepdistill.localrun.weights.activations import collect_squares
from deepdistill.localrun.weights.swap import Probe
from deepdistill.quantize.choose.imatrix import Imatrix, collect_imatrix, read_imatrix, write_imatrix
from deepdistill.quantize.release import quantize

TEXTS = [list(range(3, 40)), list(range(90, 60, -1))]


def inputs_of(model: Any, texts: list[list[int]]) -> dict[str, list[np.ndarray[Any, Any]]]:
    """Return what every linear layer is given `[tokens, columns]`, a text at a time."""
    torch = pytest.importorskip("torch")
    seen: dict[str, list[Any]] = {}

    def hook(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        return lambda _, given: seen.setdefault(name, []).append(given[0].reshape(-1, given[0].shape[-1]).numpy())

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([text]))
    return seen


def squares(seen: list[Any]) -> Any:
    return sum((part.astype(np.float64) ** 2).sum(axis=0) for part in seen)


def test_squares_are_those_of_torch(student: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    AutoModelForCausalLM = pytest.importorskip("transformers").AutoModelForCausalLM
    quantize(student, tmp_path / "f32.gguf", ftype="F32")
    found = collect_squares(tmp_path / "f32.gguf", TEXTS, n_threads=1)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    seen = inputs_of(model, TEXTS)
    names = {"self_attn.q_proj": "attn_q", "self_attn.o_proj": "attn_output", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "self_attn.v_proj": "attn_v"}
    for layer in range(2):
        for theirs, ours in names.items():
            expected = squares(seen[f"model.layers.{layer}.{theirs}"])
            one = found[f"blk.{layer}.{ours}.weight"]
            np.testing.assert_allclose(one.sums[0], expected, rtol=0.01, atol=1e-4 * expected.max())
            assert one.counts.tolist() == [sum(map(len, TEXTS))], "the last layer sees every token too"
    np.testing.assert_allclose(found["output.weight"].sums[0], squares(seen["lm_head"]), rtol=0.01)


def test_experts_count_what_is_routed_to_them(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    AutoModelForCausalLM = pytest.importorskip("transformers").AutoModelForCausalLM
    folder = make_checkpoint("qwen3moe")
    quantize(folder, tmp_path / "moe.gguf", ftype="F32")
    found = collect_squares(tmp_path / "moe.gguf", TEXTS, n_threads=1)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    routed: list[tuple[Any, Any]] = []
    model.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda _, given: routed.append((given[0].detach().numpy(), given[1].numpy()))
    )
    with torch.no_grad():
        for text in TEXTS:
            model(torch.tensor([text]))
    one = found["blk.0.ffn_gate_exps.weight"]
    expected, counts = np.zeros(one.sums.shape), np.zeros(len(one.counts), int)
    for hidden, chosen in routed:
        for token, experts in enumerate(chosen):
            for expert in experts:
                expected[expert] += hidden[token].astype(np.float64) ** 2
                counts[expert] += 1
    assert one.counts.tolist() == counts.tolist()
    np.testing.assert_allclose(one.sums, expected, rtol=0.01, atol=1e-4 * expected.max())


def test_a_file_has_llama_cpps_form_and_comes_back(student: Path, tmp_path: Path) -> None:
    quantize(student, tmp_path / "f16.gguf", ftype="F16")
    made = collect_imatrix(tmp_path / "f16.gguf", TEXTS, dataset="traces.jsonl", n_threads=1)
    write_imatrix(made, tmp_path / "im.gguf")
    reader = gguf.GGUFReader(tmp_path / "im.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["traces.jsonl"]
    assert reader.fields["imatrix.chunk_count"].contents() == 1
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["blk.0.attn_q.weight.in_sum2"].shape.tolist() == [64, 1]
    assert tensors["blk.0.attn_q.weight.counts"].data.item() == sum(map(len, TEXTS))
    back = read_imatrix(tmp_path / "im.gguf")
    assert back.hash() == made.hash()
    assert (back.datasets, back.n_tokens) == (("traces.jsonl",), sum(map(len, TEXTS)))


def test_importance_is_the_mean_and_unseen_experts_count_alike() -> None:
    sums = {"a.weight": np.array([[2.0, 4.0]], np.float32), "e.weight": np.array([[6, 3], [0, 0]], np.float32)}
    counts = {"a.weight": np.array([2], np.float32), "e.weight": np.array([3, 0], np.float32)}
    found = Imatrix(sums, counts).importance({"a.weight": (5, 2), "e.weight": (2, 7, 2), "other.weight": (1, 2)})
    assert found["a.weight"].tolist() == [1, 2]
    assert found["e.weight"].tolist() == [[2, 1], [1, 1]]
    with pytest.raises(
        ModelError, check=lambda error: error.code == "imatrix-mismatch" and "a.weight" in error.message
    ):
        Imatrix(sums, counts).importance({"a.weight": (5, 3)})


def test_what_is_no_imatrix_is_refused(student: Path, tmp_path: Path) -> None:
    quantize(student, tmp_path / "model.gguf", ftype="F16")
    with pytest.raises(ArtifactError, check=lambda error: error.code == "not-an-imatrix"):
        read_imatrix(tmp_path / "model.gguf")
    with pytest.raises(ArtifactError, check=lambda error: error.code == "no-imatrix"):
        read_imatrix(tmp_path / "none.gguf")
    bad = Imatrix({"a.weight": np.array([[-1.0]], np.float32)}, {"a.weight": np.array([1], np.float32)})
    write_imatrix(bad, tmp_path / "bad.gguf")
    with pytest.raises(ArtifactError, check=lambda error: error.code == "imatrix-broken"):
        read_imatrix(tmp_path / "bad.gguf")


def test_a_weight_is_exchanged_in_memory(student: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    AutoModelForCausalLM = pytest.importorskip("transformers").AutoModelForCausalLM
    quantize(student, tmp_path / "f16.gguf", ftype="F16")
    model: Any = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    weight = model.model.layers[1].mlp.down_proj.weight
    text = TEXTS[0]

    def expected() -> Any:
        with torch.no_grad():
            return model(torch.tensor([text])).logits[0, 4:-1].numpy()

    with Probe(tmp_path / "f16.gguf", n_threads=1) as probe:

        def rows() -> Any:
            return np.array([row.copy() for row in probe.logit_rows(text, 5)])

        before, plain = rows(), weight.detach().numpy().copy()
        np.testing.assert_allclose(before, expected(), atol=0.02)
        probe.set("blk.1.ffn_down.weight", -plain)
        weight.data.neg_()
        after = rows()
        np.testing.assert_allclose(after, expected(), atol=0.02)
        assert np.abs(after - before).max() > 0.5
        probe.set("blk.1.ffn_down.weight", plain)
        assert (rows() == before).all()
        with pytest.raises(ModelError, check=lambda error: error.code == "no-such-weight"):
            probe.set("blk.9.ffn_down.weight", plain)
