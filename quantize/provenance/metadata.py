"""What a file says about itself: where it comes from, what made it, how it was measured, and how to run it.

All of it is `deepdistill.*` metadata, text or JSON; a runner that ignores it loses nothing. Space for the measurements
of the finished file is reserved in advance, so that filling it in moves no byte and the file's size is known before.
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

from gguf import GGUFWriter

from ...errors import ArtifactError
from ..convert.files import sha256_of
from ..convert.licence import Provenance
from ..convert.lora_adapter import find_base, is_adapter
from ..convert.writer import Conversion, Value, write_header, write_metadata

MEASURED = "deepdistill.measured"
_RESERVED = 3072  # bytes of JSON
_ALIGNMENT = 32
_TOOLS = ("llama-cpp-python", "gguf", "numpy", "tokenizers", "torch", "transformers")
_KNOWN_LICENCES = {"pocket": "mit", "gym": "apache-2.0"}  # ours, and reasoning-gym's


def placeholder() -> str:
    """Return the value that a file has until its measurements are known: JSON and blanks."""
    return "{}".ljust(_RESERVED)


def fill_in(path: Path, measured: Mapping[str, Any]) -> None:
    """Write measurements into the space that a file reserves for them; if it is too small, the last ones are left out.

    Raises:
        ArtifactError: `code` "nothing-reserved".
    """
    fields = dict(measured)
    while len(text := json.dumps(fields, separators=(",", ":")).encode()) > _RESERVED:
        fields.popitem()
    key = MEASURED.encode()
    needle = len(key).to_bytes(8, "little") + key + (8).to_bytes(4, "little") + _RESERVED.to_bytes(8, "little")
    with path.open("r+b") as file:
        at = file.read(1 << 26).find(needle)  # the metadata comes before all tensors
        if at < 0:
            raise ArtifactError(f"{path} reserves no space for measurements", code="nothing-reserved")
        file.seek(at + len(needle))
        file.write(text.ljust(_RESERVED))
        file.flush()
        os.fsync(file.fileno())


def file_bytes(conversion: Conversion, metadata: Mapping[str, Value]) -> int:
    """Return the exact size of the file to be written."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        writer = GGUFWriter(path, conversion.architecture.name)
        write_metadata(conversion, writer, metadata)
        write_header(conversion.tensors, writer)
        writer.close()
        n_header = path.stat().st_size
    return _padded(n_header) + sum(_padded(typed.n_bytes) for typed in conversion.tensors)


def _padded(n: int) -> int:
    return -(-n // _ALIGNMENT) * _ALIGNMENT


def source_of(folder: Path, base: Path | None = None) -> dict[str, Any]:
    """Return a checkpoint's folder and the SHA-256 of each file that the GGUF depends on, its base's too."""
    hashes = {path.name: sha256_of(path) for path in _inputs(folder)}
    if is_adapter(folder):
        hashes |= {f"base/{path.name}": sha256_of(path) for path in _inputs(base or find_base(folder))}
    return {"folder": str(folder.resolve()), "sha256": hashes}


def _inputs(folder: Path) -> list[Path]:
    names = {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    names.add("adapter_config.json")
    return sorted(path for path in folder.iterdir() if path.suffix == ".safetensors" or path.name in names)


def source_key(source: Mapping[str, Any]) -> str:
    """Return one hash of a source's files, which does not depend on its folder's path."""
    return hashlib.sha256(json.dumps(source["sha256"], sort_keys=True).encode()).hexdigest()


def tools() -> dict[str, str]:
    """Return the versions of the packages that a file depends on."""
    found = {}
    for name in _TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def licence_chain(provenance: Provenance, recipe: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the licences of the model itself, its bases, the teacher's output and the problems.

    A licence that nobody stated is `not stated`, so that whoever publishes the file knows what to ask.
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
    """Return the sampling settings of a checkpoint's generation config; greedy if it has none."""
    try:
        config = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    if not config.get("do_sample"):
        return {"temperature": 0.0}
    return {name: float(config[name]) for name in ("temperature", "top_p", "top_k", "min_p") if config.get(name)}
