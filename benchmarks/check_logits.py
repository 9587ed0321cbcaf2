"""Does every type on every architecture compute in llama.cpp what transformers computes with the very same numbers?

    python benchmarks/check_logits.py [--arch llama ...] [--type Q4_K_M ...]

A small random checkpoint of each architecture becomes a file of each type; llama.cpp runs the file, transformers the
tensors that `gguf` dequantizes out of it. Where each number belongs is learned from a checkpoint that holds its own
indices, converted the same way, so nothing here knows a layout. The cache is float32 and attention plain, so what is
left is llama.cpp's arithmetic: it rounds activations to 8 bits before it multiplies them with quantized weights, to 16
with F16 and BF16. The figure is a token's largest difference of any logit, over the logits' standard deviation: the
median of 24 tokens is held against LIMITS, and the worst is shown. (Of two experts that score alike rounding decides
which is asked, so single tokens may be far off in the pocket teacher. The other models ask all of theirs here.)
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deepdistill.localrun.engine import llama
from deepdistill.localrun.gguf.header import read_gguf
from deepdistill.quantize.convert.ftypes import FTYPES
from deepdistill.quantize.convert.writer import plan, write

ROOT = Path(__file__).resolve().parent.parent
_WIDE = {
    "initializer_range": 0.05,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "head_dim": 64,
}
_SPARSE = {"moe_intermediate_size": 256}
_LATENT = _SPARSE | {"num_hidden_layers": 2, "head_dim": 16, "kv_lora_rank": 256, "num_experts_per_tok": 4}
MODELS: dict[str, dict[str, Any]] = {
    "llama": _WIDE,
    "qwen2": _WIDE,
    "qwen3": _WIDE,
    "qwen3moe": _WIDE | _SPARSE | {"num_experts_per_tok": 4},
    "gemma3": _WIDE | {"num_hidden_layers": 2, "query_pre_attn_scalar": 64},
    "deepseek2": _WIDE | _LATENT | {"q_lora_rank": 256},
    "deepseek3": _WIDE | _LATENT | {"q_lora_rank": None, "n_group": 1},
}
"""Sizes that K and IQ types divide."""
LIMITS = dict.fromkeys(FTYPES, 0.15) | {"F32": 0.002, "F16": 0.006, "BF16": 0.04}
"""Of the logits' deviation, a token's largest difference. F32's is Gemma's: llama.cpp looks GELU up in 16 bits."""
N_TOKENS = 24


def load_conftest() -> ModuleType:
    """Return the tests' module that writes small checkpoints."""
    spec = importlib.util.spec_from_file_location("quantize_conftest", ROOT / "tests" / "quantize" / "conftest.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers_of(path: Path) -> dict[str, np.ndarray]:
    """Return a file's tensors, dequantized by `gguf`."""
    found = {}
    for name, tensor in read_gguf(path).tensors.items():
        raw = np.fromfile(path, np.uint8, tensor.n_bytes, offset=tensor.offset)
        rows = raw.reshape(-1, tensor.n_bytes // int(np.prod(tensor.shape[:-1])))
        found[name] = gguf.quants.dequantize(rows, tensor.type).reshape(tensor.shape)
    return found


def places(folder: Path, scratch: Path) -> dict[str, np.ndarray]:
    """Return for each tensor of a file the index of each number among the checkpoint's, one tensor after the other."""
    copy = scratch / "indices"
    shutil.copytree(folder, copy)
    tensors, at = {}, 0
    for name, weight in load_file(copy / "model.safetensors").items():
        n = weight.numel()
        tensors[name] = torch.arange(at, at + n, dtype=torch.float32).reshape(weight.shape)
        at += n
    assert at < 1 << 24, "float32 cannot count so far"
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    write(plan(copy, "F32"), scratch / "indices.gguf", n_threads=1)
    found = numbers_of(scratch / "indices.gguf")
    if "Gemma3" in json.loads((folder / "config.json").read_text())["architectures"][0]:
        found = {name: index - ("norm" in name) for name, index in found.items()}
    return {name: index.astype(np.int64) for name, index in found.items() if name != "rope_freqs.weight"}


def dequantized(folder: Path, path: Path, where: dict[str, np.ndarray], scratch: Path) -> Path:
    """Write a checkpoint that holds the numbers of a file."""
    is_gemma = "Gemma3" in json.loads((folder / "config.json").read_text())["architectures"][0]
    tensors = {name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()}
    flat = np.concatenate([weight.numpy().reshape(-1) for weight in tensors.values()])
    for name, values in numbers_of(path).items():
        if name in where:
            flat[where[name]] = values - (is_gemma and "norm" in name)
    copy = scratch / f"{path.stem}-dequantized"
    shutil.copytree(folder, copy)
    at, written = 0, {}
    for name, weight in tensors.items():
        written[name] = torch.from_numpy(flat[at : at + weight.numel()].reshape(weight.shape).copy())
        at += weight.numel()
    save_file(written, copy / "model.safetensors", {"format": "pt"})
    return copy


def logits_by_transformers(folder: Path, tokens: list[int]) -> np.ndarray:
    """Return logits `[T, V]` of a checkpoint in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    with torch.inference_mode():
        return np.asarray(model(torch.tensor([tokens])).logits[0])


def logits_by_llama_cpp(path: Path, tokens: list[int]) -> np.ndarray:
    """Return logits `[T, V]` of a file, its cache in float32 and without flash attention, which rounds to 16 bits."""
    llama.KV_TYPES.setdefault("f32", gguf.GGMLQuantizationType.F32)
    model = llama.Model(path)
    context = llama.Context(model, 64, n_batch=64, kv_type="f32", flash=False)
    try:
        context.decode([llama.Entry(token, i, 0, True) for i, token in enumerate(tokens)])
        return np.stack([np.array(context.logits(i)) for i in range(len(tokens))])
    finally:
        context.close()
        model.close()


def check(folder: Path, ftypes: list[str], scratch: Path, *, own: bool = False) -> dict[str, dict[str, float]]:
    """Return for each type the tokens' largest differences of a logit: in logits, and over their deviation."""
    where = places(folder, scratch)
    n_vocab = min(390, int(where["token_embd.weight"].shape[0]) - 10)
    tokens = np.random.default_rng(1).integers(5, n_vocab, N_TOKENS).tolist()
    columns = {
        name: np.ones(index.shape[:1] + index.shape[-1:] if index.ndim == 3 else index.shape[-1:], np.float32)
        for name, index in where.items()
        if index.ndim > 1 and name.startswith("blk.")
    }
    found = {}
    for ftype in ftypes:
        path = scratch / f"{ftype}.gguf"
        write(plan(folder, ftype, importance=columns), path, n_threads=1)
        source = folder if own else dequantized(folder, path, where, scratch)
        expected = logits_by_transformers(source, tokens)
        got = logits_by_llama_cpp(path, tokens)
        off, std = np.abs(got - expected).max(1), float(expected.std())
        found[ftype] = {
            "median": float(np.median(off)) / std,
            "worst": float(off.max()) / std,
            "median_logit": float(np.median(off)),
            "worst_logit": float(off.max()),
        }
        path.unlink()
    return found


def main() -> None:
    """Check, print a table, and JSON last; fail where a type is off by more than LIMITS allows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="*", default=[*MODELS, "pocket"])
    parser.add_argument("--type", nargs="*", default=list(FTYPES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    conftest, report = load_conftest(), {}
    for arch in given.arch:
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name)
            folder = ROOT / "distill" / "pocket" / "weights"
            if arch != "pocket":
                folder = scratch / "checkpoint"
                folder.mkdir()
                conftest.write_checkpoint(folder, arch, dtype="float16", **MODELS[arch])
            report[arch] = check(folder, given.type, scratch)
        print(f"{arch}: " + ", ".join(f"{t} {one['median']:.4f}" for t, one in report[arch].items()), flush=True)
    for ftype in given.type:
        rows = {arch: types[ftype] for arch, types in report.items()}
        arch = max(rows, key=lambda arch: rows[arch]["median"])
        worst = max(rows, key=lambda arch: rows[arch]["worst"])
        print(
            f"{ftype:8} {rows[arch]['median']:.4f} at most ({arch}), allowed {LIMITS[ftype]}; "
            f"single tokens {rows[worst]['worst']:.4f} ({worst}); "
            f"in logits {max(one['median_logit'] for one in rows.values()):.4f} and "
            f"{max(one['worst_logit'] for one in rows.values()):.4f}"
        )
    print(json.dumps(report))
    if any(one["median"] > LIMITS[ftype] for types in report.values() for ftype, one in types.items()):
        sys.exit(1)


if __name__ == "__main__":
    main()
