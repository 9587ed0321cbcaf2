"""What a GGUF says about itself, for people and as JSON, from the file alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...localrun.core.text import format_bytes, shorten
from ...localrun.gguf.header import StoredTensor, read_gguf
from ...localrun.machine.memory import Footprint
from ..convert.files import shard_paths
from .card import as_text

_N_MEMORY_CTX = 2048  # tokens


def own_metadata(path: Path) -> dict[str, Any]:
    """Return a file's `deepdistill.*` metadata without the prefix, with JSON parsed.

    Raises:
        ArtifactError: see `header.read_gguf`.
    """
    found: dict[str, Any] = {}
    for key, value in read_gguf(path).metadata.items():
        if key.startswith("deepdistill."):
            found[key.removeprefix("deepdistill.")] = _parsed(value)
    return found


def stored_tensors(path: Path) -> dict[str, tuple[Path, StoredTensor]]:
    """Return every tensor of a file with the path of its part; `path` is the first part of a split file.

    Raises:
        ArtifactError: see `header.read_gguf`.
    """
    n_parts = int(read_gguf(path).metadata.get("split.count") or 1)
    parts = shard_paths(path.with_name(path.name.replace(f"-00001-of-{n_parts:05d}", "")), n_parts)
    parts = parts if path in parts else [path]  # a later part knows only its own tensors
    return {name: (part, tensor) for part in parts for name, tensor in read_gguf(part).tensors.items()}


def _parsed(value: Any) -> Any:
    if isinstance(value, str) and value.strip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def inspect_gguf(path: Path) -> dict[str, Any]:
    """Return a file's name, size, licence and types, and what deepdistill wrote into it.

    Raises:
        ArtifactError: see `header.read_gguf`.
    """
    types: Counter[str] = Counter()
    n_bytes = 0
    stored = stored_tensors(path)
    for _, tensor in stored.values():
        types[tensor.type.name] += math.prod(tensor.shape)
        n_bytes += tensor.n_bytes
    n_weights = sum(types.values())
    about = read_gguf(path).metadata
    return {
        "path": str(path),
        "bytes": sum(part.stat().st_size for part in {part for part, _ in stored.values()}),
        "name": about.get("general.name"),
        "architecture": about.get("general.architecture"),
        "licence": about.get("general.license"),
        "weights": n_weights,
        "bits_per_weight": 8 * n_bytes / max(n_weights, 1),
        "types": dict(types.most_common()),
        "memory_bytes": memory_bytes(path),
        "deepdistill": own_metadata(path),
    }


def memory_bytes(path: Path) -> int:
    """Return the bytes that running a file takes, with a context of 2,048 tokens or the longest that it knows."""
    footprint = Footprint.of(path)
    return footprint.total_bytes(min(_N_MEMORY_CTX, footprint.n_ctx_train or _N_MEMORY_CTX))


def summary(found: dict[str, Any]) -> list[str]:
    """Return lines for people."""
    share = {name: n / max(found["weights"], 1) for name, n in found["types"].items()}
    lines = [
        f"{found['name'] or found['path']}: {found['architecture']}, {found['weights'] / 1e6:.1f} M weights, "
        f"{found['bytes'] / 1e6:.1f} MB, {found['bits_per_weight']:.2f} bits a weight",
        "types: " + ", ".join(f"{100 * part:.1f} % {name}" for name, part in share.items()),
        f"licence: {found['licence'] or 'not stated'}",
        f"memory: {format_bytes(found['memory_bytes'])} with a context of {_N_MEMORY_CTX:,} tokens or less",
    ]
    others = dict(found["deepdistill"])
    lines += measured_lines(others.pop("measured", None) or {})
    for name, value in others.items():
        lines.append(f"{name.replace('_', ' ')}: {as_text(value, lambda part: shorten(str(part), 72))}")
    return lines if found["deepdistill"] else [*lines, "no metadata of deepdistill: another tool made it"]


def measured_lines(measured: Mapping[str, Any]) -> list[str]:
    """Return a line for a file's fidelity and one for its answers, as far as there are any."""
    lines = []
    if kl := measured.get("fidelity"):
        lines.append(
            f"fidelity on {kl['n_tokens']:,} held-out tokens: KL {kl['kl_mean']:.4f} ± {kl['kl_error']:.4f} nats, 99 % "
            f"{kl['kl_p99']:.3f}, same top {100 * kl['same_top']:.2f} %, perplexity {kl['perplexity']:.4f} "
            f"(unquantized {kl['reference_perplexity']:.4f})"
        )
    if flips := measured.get("paired"):
        low, high = flips["interval"]
        share = measured["answers"].get("unknown")
        unknown = "" if share is None else f" ({100 * share:.1f} % unknown)"
        lines.append(
            f"answers: {100 * measured['answers']['accuracy']:.1f} % of {flips['n']}{unknown}, {flips['lost']} lost "
            f"and {flips['gained']} gained against unquantized: {100 * flips['difference']:+.1f} points "
            f"({100 * low:+.1f} to {100 * high:+.1f}), p {flips['p_value']:.3f}"
        )
    return lines
