"""Is our file what llama.cpp's converter makes of the same checkpoint? Every tensor and every key, compared.

    python benchmarks/compare_converter.py --llama-cpp PATH [CHECKPOINT ...] [--type F16]

PATH is a checkout of llama.cpp (sentencepiece and protobuf must be importable for a Gemma). Without checkpoints the
tests' small ones are taken, one of every architecture, and the pocket teacher. llama.cpp knows a pre-tokenizer by a
hash of sample tokens and so none that was trained for a test: there it is told the name that we found, and the report
says so.

`--write-expected FILE` keeps the hash of every tensor that llama.cpp's converter wrote, which the tests compare with.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from deepdistill.localrun.gguf.header import Header, read_gguf
from deepdistill.quantize.convert.writer import plan, write

ROOT = Path(__file__).resolve().parent.parent
# What the two say differently on purpose.
MEANT = {
    "general.file_type": "the number of the same type",
    "tokenizer.ggml.add_bos_token": "always said here: llama.cpp's default differs between tokenizers",
    "tokenizer.ggml.add_eos_token": "always said here",
    "tokenizer.ggml.add_space_prefix": "always said here",
    "tokenizer.ggml.eot_token_id": "another end of a turn, from generation_config.json",
    "deepdistill.think_open": "ours",
    "deepdistill.think_close": "ours",
    "*.vocab_size": "always said here",
    "*.attention.key_length": "always said here",
    "*.attention.value_length": "always said here",
    "*.rope.dimension_count": "always said here",
    "*.rope.freq_base": "always said here",
    "*.rope.freq_base_swa": "always said here",
    "*.attention.sliding_window_pattern": "said where it is not llama.cpp's own",
    "*.expert_gating_func": "always said here: transformers' configs leave it out, and llama.cpp would take softmax",
    "*.expert_weights_norm": "always said here",
    "*.expert_group_count": "not for DeepSeek-V2's greedy choice",
    "*.expert_group_used_count": "not for DeepSeek-V2's greedy choice",
    "*.attention.q_lora_rank": "0 where there is none: llama.cpp wants to be told",
    "*.rope.scaling.yarn_beta_fast": "always said here",
    "*.rope.scaling.yarn_beta_slow": "always said here",
    "general.basename": "guessed from the folder's name there",
    "general.finetune": "guessed from the folder's name there",
    "general.name": "the folder's or the card's name, spelled as it is here",
    "general.size_label": "read from the folder's name there, if it names a size",
    "general.base_model.0.name": "of the card, spelled as it is here",
    "general.base_model.0.organization": "of the card, spelled as it is here",
    "general.version": "guessed from the folder's name there",
    "general.organization": "guessed there",
    "general.tags": "of the card",
    "general.languages": "of the card",
    "general.sampling.*": "of generation_config.json",
}
_DRIVER = """
import runpy, sys
sys.path.insert(0, sys.argv[1]); sys.path.insert(1, sys.argv[1] + "/gguf-py")
import conversion.base as base
known = base.TextModel.get_vocab_base_pre
def named(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        print("PRE-TOKENIZER TOLD")
        return pre
base.TextModel.get_vocab_base_pre = named
pre = sys.argv[2]
sys.argv = [sys.argv[1] + "/convert_hf_to_gguf.py", *sys.argv[3:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def convert_by_llama_cpp(llama_cpp: Path, checkpoint: Path, out: Path, outtype: str, pre: str) -> bool:
    """Run llama.cpp's converter; return whether it had to be told the pre-tokenizer."""
    arguments = [str(llama_cpp), pre, str(checkpoint), "--outfile", str(out), "--outtype", outtype]
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, *arguments], capture_output=True, text=True, env=os.environ, check=False
    )
    if done.returncode:
        raise SystemExit(f"llama.cpp's converter failed on {checkpoint}:\n{done.stderr[-2000:]}")
    return "PRE-TOKENIZER TOLD" in done.stdout


def tensors_of(path: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Return each tensor's (type, shape, sha256 of its bytes)."""
    found = {}
    with path.open("rb") as file:
        for name, tensor in read_gguf(path).tensors.items():
            file.seek(tensor.offset)
            digest = hashlib.sha256(file.read(tensor.n_bytes)).hexdigest()
            found[name] = (tensor.type.name, tensor.shape, digest)
    return found


def keys(ours: Header, theirs: Header) -> dict[str, list[str]]:
    """Return the keys that are the same, differ, or stand in one file only, those of MEANT apart."""
    found: dict[str, list[str]] = {"same": [], "meant": [], "differ": [], "only ours": [], "only theirs": []}
    for key in sorted({*ours.metadata, *theirs.metadata}):
        a, b = ours.metadata.get(key), theirs.metadata.get(key)
        if key in ours.metadata and key in theirs.metadata and same(a, b):
            found["same"].append(key)
            continue
        arch = key.partition(".")[2]
        if key in MEANT or f"*.{arch}" in MEANT or (key.startswith("general.sampling.")):
            found["meant"].append(key)
        else:
            kind = "only theirs" if a is None else "only ours" if b is None else "differ"
            found[kind].append(f"{key}: {a!r} and {b!r}"[:200])
    return found


def same(a: Any, b: Any) -> bool:
    """Say whether two values are equal, numbers as float32."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)


def compare(llama_cpp: Path, checkpoint: Path, ftype: str) -> dict[str, Any]:
    """Convert a checkpoint both ways and return what differs."""
    with tempfile.TemporaryDirectory() as folder:
        ours_path, theirs_path = Path(folder) / "ours.gguf", Path(folder) / "theirs.gguf"
        conversion = plan(checkpoint, ftype)
        write(conversion, ours_path, n_threads=2)
        told = convert_by_llama_cpp(llama_cpp, checkpoint, theirs_path, ftype.lower(), conversion.tokenizer.pre)
        ours, theirs = tensors_of(ours_path), tensors_of(theirs_path)
        found = keys(read_gguf(ours_path), read_gguf(theirs_path))
    different = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    return {
        "checkpoint": checkpoint.parent.name if checkpoint.name == "weights" else checkpoint.name,
        "architecture": conversion.architecture.name,
        "type": ftype,
        "tensors": len(theirs),
        "different_tensors": different,
        "keys": {kind: names if kind != "same" else len(names) for kind, names in found.items()},
        "pre_tokenizer_told": told,
        "theirs": theirs,
    }


def small_checkpoints(folder: Path) -> list[Path]:
    """Write one small checkpoint of every architecture, as the tests do, and return them and the pocket teacher."""
    spec = importlib.util.spec_from_file_location("quantize_conftest", ROOT / "tests" / "quantize" / "conftest.py")
    assert spec
    assert spec.loader
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    for arch in conftest.FIXED:
        (folder / arch).mkdir()
        conftest.write_fixed(folder / arch, arch)
    return [*(folder / arch for arch in conftest.FIXED), ROOT / "distill" / "pocket" / "weights"]


def main() -> None:
    """Compare and print a line a checkpoint, and JSON last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--type", default="F16", choices=["F32", "F16", "BF16", "Q8_0"])
    parser.add_argument("--write-expected", type=Path)
    parser.add_argument("checkpoints", nargs="*", type=Path)
    given = parser.parse_args()
    reports = []
    with tempfile.TemporaryDirectory() as folder:
        for checkpoint in given.checkpoints or small_checkpoints(Path(folder)):
            report = compare(given.llama_cpp.resolve(), checkpoint, given.type)
            reports.append(report)
            count = len(report["different_tensors"])
            print(f"{report['checkpoint']}: {report['tensors']} tensors, {count} different; keys {report['keys']}")
    if given.write_expected:
        expected = {
            r["checkpoint"]: {
                name: f"{type_} {digest[:32]}" for name, (type_, _, digest) in sorted(r["theirs"].items())
            }
            for r in reports
        }
        given.write_expected.write_text(json.dumps(expected, indent=1) + "\n")
    for report in reports:
        del report["theirs"]
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
