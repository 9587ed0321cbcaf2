"""Do readers that share no code with us accept our files? transformers' GGUF loader, @huggingface/gguf, node-llama-cpp.

    npm install --prefix DIR @huggingface/gguf node-llama-cpp
    python benchmarks/check_readers.py --node DIR [--type F16 Q4_K_M]

A small checkpoint of every architecture and the pocket teacher become files. transformers loads each and its logits
are compared with those of the checkpoint whose numbers the file holds; @huggingface/gguf parses each, and must see the
tensors and metadata that our reader sees; node-llama-cpp, which brings a llama.cpp of its own, loads each, tokenizes
and generates. Without --node only transformers runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from deepdistill.localrun.gguf.header import read_gguf
from deepdistill.quantize.convert.writer import plan, write

ROOT = Path(__file__).resolve().parent.parent
# transformers' loader takes these from its own defaults, whatever the file says.
DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 128},
    "qwen3moe": {"head_dim": 128, "moe_intermediate_size": 768},
    "gemma3": {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096},
}
_PARSE = """
import { gguf } from "@huggingface/gguf";
const { metadata, tensorInfos } = await gguf(process.argv[2], { allowLocalFile: true });
const tensors = tensorInfos.map((t) => [t.name, t.shape.map(Number), Number(t.dtype), Number(t.offset)]);
console.log(JSON.stringify({ tensors, architecture: metadata["general.architecture"],
  n_tokens: metadata["tokenizer.ggml.tokens"].length, file_type: metadata["general.file_type"],
  keys: Object.keys(metadata).filter((k) => k.includes(".")).sort() }));
"""
_RUN = """
import { getLlama, LlamaCompletion, LlamaLogLevel } from "node-llama-cpp";
const llama = await getLlama({ build: "never", gpu: false, logLevel: LlamaLogLevel.error });
const model = await llama.loadModel({ modelPath: process.argv[2] });
const context = await model.createContext({ contextSize: 128 });
const completion = new LlamaCompletion({ contextSequence: context.getSequence() });
const tokens = model.tokenize("47 + 85 = ");
const text = await completion.generateCompletion("47 + 85 = ", { maxTokens: 8, temperature: 0 });
console.log(JSON.stringify({ tokens: Array.from(tokens, Number), text, size: model.size }));
await llama.dispose();
"""


def load(name: str, path: Path) -> Any:
    """Return a module that is no part of a package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_transformers(checks: Any, checkpoint: Path, path: Path, scratch: Path) -> str:
    """Load a file with transformers and compare logits with those of the numbers in it."""
    tokens = np.random.default_rng(1).integers(5, 390, 24).tolist()
    where = checks.places(checkpoint, scratch)
    expected = checks.logits_by_transformers(checks.dequantized(checkpoint, path, where, scratch), tokens)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
        ).eval()
        with torch.inference_mode():
            got = np.asarray(model(torch.tensor([tokens])).logits[0])
    except Exception as error:
        return f"refused: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return f"logits off by {np.abs(got - expected).max() / expected.std():.4f} of their deviation at most"


def by_node(node: Path, script: str, path: Path) -> dict[str, Any] | str:
    """Run a script of node on a file and return what it printed as JSON, or why it failed."""
    (node / "script.mjs").write_text(script)
    done = subprocess.run(
        ["node", "script.mjs", str(path)], cwd=node, capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        return "refused: " + (done.stderr.strip().splitlines() or ["no reason"])[-1][:200]
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def parsed(node: Path, path: Path) -> str:
    """Compare what @huggingface/gguf reads with what our reader does."""
    found = by_node(node, _PARSE, path)
    if isinstance(found, str):
        return found
    header = read_gguf(path)
    start = min(t.offset for t in header.tensors.values())
    ours = [[t.name, list(t.shape[::-1]), int(t.type), t.offset - start] for t in header.tensors.values()]
    same = found["tensors"] == ours and set(header.metadata) <= set(found["keys"])
    return f"{len(ours)} tensors, {len(found['keys'])} keys, {'the same' if same else 'NOT the same'}"


def ran(node: Path, path: Path) -> str:
    """Let node-llama-cpp load a file, and compare its tokens with ours."""
    found = by_node(node, _RUN, path)
    if isinstance(found, str):
        return found
    from deepdistill.localrun.engine.engine import Engine

    with Engine(path, n_ctx=128, n_threads=1) as engine:
        ours = engine.model.tokenize("47 + 85 = ", whole=False)
    same = "the same tokens" if [*found["tokens"]] == [*ours] else f"tokens {found['tokens']}, ours {ours}"
    return f"loaded, {same}, says {found['text']!r}"


def main() -> None:
    """Check, print a line a file and reader, and JSON last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--node", type=Path)
    parser.add_argument("--type", nargs="*", default=["F16", "Q4_K_M"])
    parser.add_argument("--arch", nargs="*")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    checks = load("check_logits", ROOT / "benchmarks" / "check_logits.py")
    conftest, report = checks.load_conftest(), {}
    for arch in given.arch or [*checks.MODELS, "pocket"]:
        for ftype in given.type:
            with tempfile.TemporaryDirectory() as name:
                scratch = Path(name)
                checkpoint = ROOT / "distill" / "pocket" / "weights"
                if arch != "pocket":
                    checkpoint = scratch / "checkpoint"
                    checkpoint.mkdir()
                    conftest.write_checkpoint(
                        checkpoint, arch, dtype="float16", **checks.MODELS[arch] | DEFAULTS.get(arch, {})
                    )
                (path,) = write(plan(checkpoint, ftype), scratch / f"{arch}-{ftype}.gguf", n_threads=1)
                found = {"transformers": by_transformers(checks, checkpoint, path, scratch)}
                if given.node:
                    found |= {"@huggingface/gguf": parsed(given.node, path), "node-llama-cpp": ran(given.node, path)}
                for reader, said in found.items():
                    print(f"{path.name}: {reader}: {said}", flush=True)
                report[path.name] = found
    print(json.dumps(report))
    sys.exit(any("NOT" in said for found in report.values() for said in found.values()))


if __name__ == "__main__":
    main()
