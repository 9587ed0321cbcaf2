"""Every tensor of one small checkpoint of each architecture, against what llama.cpp's own converter wrote of it.

expected_tensors.json holds sha256 hashes, 32 hex digits each, of the tensors that convert_hf_to_gguf.py of the
llama.cpp in llama-cpp-python 0.3.36 wrote as F16 from these very checkpoints: `benchmarks/compare_converter.py
--write-expected` made it, and makes it anew. Their weights come from numpy's generator, the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepdistill.errors import ModelError
from deepdistill.localrun.gguf.header import read_gguf
from deepdistill.quantize.convert.architectures import ARCHITECTURES
from deepdistill.quantize.convert.writer import plan, write

EXPECTED: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("expected_tensors.json").read_text())
ROOT = Path(__file__).resolve().parents[4]


@pytest.mark.parametrize("arch", list(EXPECTED))
def test_every_tensor_is_that_of_llama_cpps_converter(
    write_fixed: Callable[[Path, str], None], tmp_path: Path, arch: str
) -> None:
    folder = tmp_path / arch
    if arch == "pocket":
        folder = ROOT / "distill" / "pocket" / "weights"
    else:
        folder.mkdir()
        write_fixed(folder, arch)
    write(plan(folder, "F16"), tmp_path / "out.gguf", n_threads=1)
    data = (tmp_path / "out.gguf").read_bytes()
    found = {
        name: f"{t.type.name} {hashlib.sha256(data[t.offset : t.offset + t.n_bytes]).hexdigest()[:32]}"
        for name, t in read_gguf(tmp_path / "out.gguf").tensors.items()
    }
    assert found == EXPECTED[arch]


def test_every_architecture_is_among_them() -> None:
    ours = {one.name for one in ARCHITECTURES.values()}
    assert ours | {"deepseek3", "pocket"} == set(EXPECTED)


@pytest.mark.parametrize(
    ("arch", "changes", "named"),
    [
        ("qwen3moe", {"mlp_only_layers": [0]}, "dense layers among the sparse"),
        ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob off"),
        ("gemma3", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 64"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"use_bidirectional_attention": True}, "bidirectional"),
        ("gemma3", {"layer_types": ["full_attention"]}, "1 layer_types"),
        ("gemma3", {"hidden_activation": "silu"}, "hidden_act"),
        ("deepseek2", {"topk_method": "group_limited_greedy"}, "group_limited_greedy"),
        ("deepseek3", {"rope_interleave": False}, "not interleaved"),
        ("deepseek3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "YaRN's mscale"),
        ("deepseek3", {"n_shared_experts": 0}, "no shared experts"),
        ("deepseek3", {"num_hidden_layers": 27}, "low-rank query in 27 layers"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    make_checkpoint: Callable[..., Path], arch: str, changes: dict[str, Any], named: str
) -> None:
    folder = make_checkpoint(arch)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, check=lambda error: error.code == "not-convertible") as caught:
        plan(folder, "Q8_0")
    assert named in caught.value.message


def test_layers_that_predict_further_ahead_are_left_out(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("deepseek3")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2}))  # the third is such a one
    assert max(t.tensor.name for t in plan(folder, "Q8_0").tensors if "blk" in t.tensor.name).startswith("blk.1.")
