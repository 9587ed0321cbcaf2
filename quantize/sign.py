"""The `deepdistill.*` metadata of a file, put together from what is known before it is written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .choose.workbench import Desk
from .convert.writer import Conversion, Value
from .measure.texts import Text
from .provenance.metadata import MEASURED, licence_chain, placeholder, sampler_of, source_of, tools
from .recipe import ReleaseSettings

_RECORDED = ("type", "size", "bpw", "target", "heal")


def sign(
    desk: Desk,
    conversion: Conversion,
    settings: ReleaseSettings,
    source_dir: Path,
    folder: Path,
    recipe: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what a file in a folder says of itself, by name without the prefix. Paths are relative to the folder."""
    is_student = source_dir == desk.student_dir
    source = dict(desk.source if is_student else source_of(source_dir))
    source["folder"] = os.path.relpath(source_dir, folder.resolve())
    if settings.base and is_student:
        source["base"] = os.path.relpath(settings.base, folder.resolve())
    own: dict[str, Any] = {
        "quantization": _how(settings),
        "source": source,
        "licences": licence_chain(conversion.provenance, recipe),
        "tools": tools(),
        "sampling": sampler_of(source_dir),
    }
    if conversion.provenance.base_models:
        own["base_model"] = conversion.provenance.base_models[0]
    if teacher := recipe.get("teacher"):
        own["teacher"] = str(teacher)
    if desk.imatrix is not None:
        own["imatrix"] = {
            "file": os.path.relpath(desk.imatrix_file, folder.resolve()),
            "sha256": desk.imatrix.hash(),
            "tokens": desk.imatrix.n_tokens,
            "datasets": list(desk.imatrix.datasets),
        }
    if settings.reads_traces:
        own["think_budget"] = str(think_budget(desk.texts.calibrate))
    return own


def as_metadata(own: Mapping[str, Any]) -> dict[str, Value]:
    """Return it as a GGUF holds it, text or JSON, with room for what is measured on the finished file."""
    plain = {f"deepdistill.{k}": v if isinstance(v, str) else json.dumps(v) for k, v in own.items()}
    return {**plain, MEASURED: placeholder()}


def think_budget(texts: Sequence[Text]) -> int:
    """Return half as much again as 99 % of the traces' thinking takes, in tokens, rounded up to a multiple of 32."""
    lengths = sorted(text.n_thinking for text in texts)
    wanted = 3 * lengths[int(0.99 * (len(lengths) - 1))] // 2
    return max(32, -(-wanted // 32) * 32)


def _how(settings: ReleaseSettings) -> dict[str, Any]:
    how = {key: value for key, value in asdict(settings).items() if key in _RECORDED and value}
    if settings.has_budget:
        how.pop("type")
    return how | ({"gate": str(settings.gate)} if settings.gate else {})
