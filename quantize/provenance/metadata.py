"""What a file says of itself: where it comes from, what made it, what was measured, and how to run it.

Everything stands in `deepdistill.*` metadata, as text or JSON; a runner that ignores it loses nothing. What is measured
on the finished file has its room reserved before, so that filling it in moves no byte and the size is known beforehand.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from ...errors import ArtifactError
from ..convert.licence import Provenance
from ..convert.lora_adapter import find_base, is_adapter
from ..convert.writer import Conversion, Value, _write_metadata
from ..measure.texts import sha256_of

MEASURED = "deepdistill.measured"
_ROOM = 3072  # bytes of JSON
_ALIGNMENT = 32
_TOOLS = ("llama-cpp-python", "gguf", "numpy", "tokenizers", "torch", "transformers")
_KNOWN_LICENCES = {"pocket": "mit", "gym": "apache-2.0"}  # ours, and reasoning-gym's


def placeholder() -> str:
    """Return what stands in a file until its measurements are known: JSON and blanks."""
    return "{}".ljust(_ROOM)


def fill_in(path: Path, measured: Mapping[str, Any]) -> None:
    """Put measurements into the room that a file has for them; what does not fit is left out, the last first.

    Raises:
        ArtifactError: the file has no such room.
    """
    fields = dict(measured)
    while len(text := json.dumps(fields, separators=(",", ":")).encode()) > _ROOM:
        fields.popitem()
    key = MEASURED.encode()
    needle = len(key).to_bytes(8, "little") + key + (8).to_bytes(4, "little") + _ROOM.to_bytes(8, "little")
    with path.open("r+b") as file:
        at = file.read(1 << 26).find(needle)  # the metadata stands before all tensors
        if at < 0:
            raise ArtifactError(f"{path} has no room for measurements")
        file.seek(at + len(needle))
        file.write(text.ljust(_ROOM))
        file.flush()
        os.fsync(file.fileno())


def file_bytes(conversion: Conversion, metadata: Mapping[str, Value]) -> int:
    """Return how large the file will be, to the byte."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        writer = GGUFWriter(path, conversion.architecture.name)
        _write_metadata(conversion, writer, metadata)
        for typed in conversion.tensors:
            name, shape = typed.tensor.name, typed.tensor.shape
            writer.add_tensor_info(name, shape, np.dtype(np.float32), typed.n_bytes, raw_dtype=typed.got)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        n_header = path.stat().st_size
    return _padded(n_header) + sum(_padded(typed.n_bytes) for typed in conversion.tensors)


def _padded(n: int) -> int:
    return -(-n // _ALIGNMENT) * _ALIGNMENT


def source_of(folder: Path, base: Path | None = None) -> dict[str, Any]:
    """Return a checkpoint's folder and the SHA-256 of each file that decides what becomes of it, its base's too."""
    hashes = {path.name: sha256_of(path) for path in _deciding(folder)}
    if is_adapter(folder):
        hashes |= {f"base/{path.name}": sha256_of(path) for path in _deciding(base or find_base(folder))}
    return {"folder": str(folder.resolve()), "sha256": hashes}


def _deciding(folder: Path) -> list[Path]:
    names = {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    names.add("adapter_config.json")
    return sorted(path for path in folder.iterdir() if path.suffix == ".safetensors" or path.name in names)


def source_key(source: Mapping[str, Any]) -> str:
    """Return one hash of a source's files, wherever its folder stands."""
    return hashlib.sha256(json.dumps(source["sha256"], sort_keys=True).encode()).hexdigest()


def tools() -> dict[str, str]:
    """Return the versions of what has a part in a file."""
    found = {}
    for name in _TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def licence_chain(provenance: Provenance, recipe: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return what has a licence here: the model itself, its bases, the teacher's output, the problems.

    What nobody stated is `not stated`, so that whoever hands the file on knows what to ask.
    """
    chain = [{"what": "model", "name": provenance.name, "licence": provenance.licence or "not stated"}]
    chain += [{"what": "base model", "name": one, "licence": provenance.licence or "not stated"} for one in
              provenance.base_models]  # fmt: skip
    if teacher := recipe.get("teacher"):
        chain.append({"what": "teacher", "name": teacher, "licence": _KNOWN_LICENCES.get(teacher, "not stated")})
    if problems := recipe.get("problems"):
        kind = problems.partition(":")[0]
        chain.append({"what": "problems", "name": problems, "licence": _KNOWN_LICENCES.get(kind, "not stated")})
    return chain


def sampler_of(folder: Path) -> dict[str, float]:
    """Return the sampling that a checkpoint's generation config advises; greedy where it has none."""
    try:
        config = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    if not config.get("do_sample"):
        return {"temperature": 0.0}
    return {name: float(config[name]) for name in ("temperature", "top_p", "top_k", "min_p") if config.get(name)}
