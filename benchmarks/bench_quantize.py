"""How fast, and in how much memory, a checkpoint folder becomes a Q4_K_M file: ours against llama.cpp's two steps.

    python benchmarks/bench_quantize.py --llama-cpp PATH [--checkpoint DIR] [--trials 5]
    python benchmarks/bench_quantize.py --large          # memory alone, of a 1.5B Qwen2-shaped random checkpoint

The physics: reading 2 bytes a weight, quantizing at ggml's pace on all cores, writing less than 1 byte a weight. The
peer reads and writes the whole model once more in between, as an f16 file. Each step runs in a process of its own, in
turn (ours, peer, ours, …) after a round that is not counted; the peak is the process's resident memory, from wait4.
PATH is a checkout of llama.cpp, whose convert_hf_to_gguf.py is the peer's first step. The second is
`llama_model_quantize` of the installed llama-cpp-python, the function that the program llama-quantize calls; Python's
start is not counted for it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

_QUANTIZE = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from requantize import requantize
started = time.perf_counter()
requantize(Path(sys.argv[1]), Path(sys.argv[2]), ftype=15)
print(time.perf_counter() - started)
"""
_QWEN2_1_5B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


def measured(command: list[str]) -> tuple[float, float, str]:
    """Run a command; return (seconds, peak resident MiB, what it printed)."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(command[:4])} … failed")
    return seconds, usage.ru_maxrss / (1024 if sys.platform != "darwin" else 2**20), printed


def ours(checkpoint: Path, folder: Path) -> dict[str, float]:
    """Convert and quantize with deepdistill."""
    command = [sys.executable, "-m", "deepdistill", "quantize", str(checkpoint), "--type", "Q4_K_M", "--quiet"]
    command += ["--imatrix", "none", "--no-proofs", "--no-fidelity", "--out", str(folder / "ours.gguf")]
    seconds, peak, _ = measured(command)
    return {"seconds": seconds, "peak_mib": peak}


def peer(llama_cpp: Path, checkpoint: Path, folder: Path) -> dict[str, float]:
    """Convert to f16 with llama.cpp's converter, then quantize with its quantizer."""
    f16, out = folder / "f16.gguf", folder / "peer.gguf"
    script = str(llama_cpp / "convert_hf_to_gguf.py")
    converted, peak_1, _ = measured(
        [sys.executable, script, str(checkpoint), "--outfile", str(f16), "--outtype", "f16"]
    )
    _, peak_2, printed = measured([sys.executable, "-c", _QUANTIZE, str(f16), str(out), str(Path(__file__).parent)])
    quantized = float(printed)
    f16.unlink()
    return {
        "seconds": converted + quantized,
        "convert_s": converted,
        "quantize_s": quantized,
        "peak_mib": max(peak_1, peak_2),
    }


def same_tensors(folder: Path) -> bool:
    """Say whether both files hold the same types and bytes."""
    from deepdistill.localrun.gguf.header import read_gguf

    a, b = read_gguf(folder / "ours.gguf"), read_gguf(folder / "peer.gguf")
    ours_data, peer_data = (folder / "ours.gguf").read_bytes(), (folder / "peer.gguf").read_bytes()
    return set(a.tensors) == set(b.tensors) and all(
        t.type == b.tensors[n].type
        and ours_data[t.offset : t.offset + t.n_bytes]
        == peer_data[b.tensors[n].offset : b.tensors[n].offset + t.n_bytes]
        for n, t in a.tensors.items()
    )


def write_large(folder: Path) -> int:
    """Write a random bf16 checkpoint of Qwen2-1.5B's shape and return its number of weights."""
    h, ff, kv = 1536, 8960, 256
    shapes = {"model.embed_tokens.weight": (151936, h), "model.norm.weight": (h,)}
    for i in range(28):
        at = f"model.layers.{i}."
        shapes |= {
            f"{at}self_attn.{p}.weight": s
            for p, s in {"q_proj": (h, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, h)}.items()
        }
        shapes |= {f"{at}self_attn.{p}.bias": (n,) for p, n in {"q_proj": h, "k_proj": kv, "v_proj": kv}.items()}
        shapes |= {
            f"{at}mlp.{p}.weight": s
            for p, s in {"gate_proj": (ff, h), "up_proj": (ff, h), "down_proj": (h, ff)}.items()
        }
        shapes |= {f"{at}{p}.weight": (h,) for p in ("input_layernorm", "post_attention_layernorm")}
    header, at = {}, 0
    for name, shape in shapes.items():
        n = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + n]}
        at += n
    data = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        for shape in shapes.values():
            for start in range(0, math.prod(shape), 1 << 24):
                n = min(1 << 24, math.prod(shape) - start)
                values = 0.05 * rng.standard_normal(n, np.float32)
                file.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())
    (folder / "config.json").write_text(json.dumps(_QWEN2_1_5B))
    _write_tokenizer(folder)
    return sum(map(math.prod, shapes.values()))


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)}
    merges = []
    for a in letters:
        for b in letters:
            if len(vocab) < 60_000:
                merges.append((a, b))
                vocab[a + b] = len(vocab)
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    split = pre_tokenizers.Split(Regex(words), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def spread(values: list[float]) -> dict[str, float]:
    """Return the median with the least and the most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    """Measure, print a table, and JSON last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--large", action="store_true")
    given = parser.parse_args()
    if given.large:
        with tempfile.TemporaryDirectory() as folder:
            n_weights = write_large(Path(folder))
            found = ours(Path(folder), Path(folder))
        print(f"{n_weights / 1e9:.2f} billion weights: {found['seconds']:.1f} s, peak {found['peak_mib']:.0f} MiB")
        print(json.dumps({"n_weights": n_weights, **found}))
        return
    checkpoint = given.checkpoint
    if checkpoint is None:
        from deepdistill.distill.training.student import student_dir

        checkpoint = student_dir("smollm2")
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as folder:
        for trial in range(given.trials + 1):
            one = ours(checkpoint, Path(folder))
            other = peer(given.llama_cpp.resolve(), checkpoint, Path(folder))
            if trial:
                runs["ours"].append(one)
                runs["peer"].append(other)
        equal = same_tensors(Path(folder))
    report: dict[str, Any] = {
        who: {key: spread([one[key] for one in trials]) for key in trials[0]} for who, trials in runs.items()
    }
    for who, figures in report.items():
        seconds, peak = figures["seconds"], figures["peak_mib"]["median"]
        print(f"{who}: {seconds['median']:.2f} s ({seconds['min']:.2f} to {seconds['max']:.2f}), peak {peak:.0f} MiB")
    report["time_ratio"] = report["ours"]["seconds"]["median"] / report["peer"]["seconds"]["median"]
    report["memory_ratio"] = report["ours"]["peak_mib"]["median"] / report["peer"]["peak_mib"]["median"]
    print(f"time {report['time_ratio']:.2f} times, memory {report['memory_ratio']:.2f} times, equal tensors: {equal}")
    print(json.dumps(report | {"equal_tensors": equal, "trials": given.trials}))


if __name__ == "__main__":
    main()
