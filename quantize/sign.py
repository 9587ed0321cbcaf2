"""The `deepdistill.*` metadata of a file, as far as it is known before the file is written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .choose.workbench import Workbench
from .convert.writer import Conversion, Value
from .measure.gate import Gate
from .measure.texts import Text
from .provenance.metadata import MEASURED, licence_chain, placeholder, sampler_of, source_of, tools
from .recipe import QuantizeRecipe

_RECORDED = ("type", "size", "bpw", "target")


def sign(
    workbench: Workbench,
    conversion: Conversion,
    *,
    source_dir: Path,
    folder: Path,
    recipe: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what a file in `folder` says about itself, by key without the prefix; paths are relative to the folder."""
    settings, is_student = workbench.settings, source_dir == workbench.student_dir
    source = dict(workbench.source if is_student else source_of(source_dir))
    source["folder"] = os.path.relpath(source_dir, folder.resolve())
    if settings.base and is_student:
        source["base"] = os.path.relpath(settings.base, folder.resolve())
    signed: dict[str, Any] = {
        "quantization": _how(settings),
        "source": source,
        "licences": licence_chain(conversion.provenance, recipe),
        "tools": tools(),
        "sampling": sampler_of(source_dir),
    }
    if conversion.provenance.base_models:
        signed["base_model"] = conversion.provenance.base_models[0]
    if teacher := recipe.get("teacher"):
        signed["teacher"] = str(teacher)
    if workbench.imatrix is not None:
        signed["imatrix"] = {
            "file": os.path.relpath(workbench.imatrix_file, folder.resolve()),
            "sha256": workbench.imatrix.hash(),
            "tokens": workbench.imatrix.n_tokens,
            "datasets": list(workbench.imatrix.datasets),
        }
    if settings.reads_traces:
        signed["think_budget"] = str(think_budget(workbench.texts.calibrate))
    return signed


def as_metadata(signed: Mapping[str, Any]) -> dict[str, Value]:
    """Return it as a GGUF has it, text or JSON, with space for the measurements of the finished file."""
    plain = {f"deepdistill.{k}": v if isinstance(v, str) else json.dumps(v) for k, v in signed.items()}
    return {**plain, MEASURED: placeholder()}


def think_budget(texts: Sequence[Text]) -> int:
    """Return 1.5 times the 99th percentile of the traces' thinking, in tokens, rounded up to a multiple of 32."""
    lengths = sorted(text.n_thinking for text in texts)
    wanted = 3 * lengths[int(0.99 * (len(lengths) - 1))] // 2
    return max(32, -(-wanted // 32) * 32)


def _how(settings: QuantizeRecipe) -> dict[str, Any]:
    how = {key: value for key in _RECORDED if (value := getattr(settings, key))}
    if settings.heal.steps:
        how["heal"] = settings.heal.steps
    if settings.has_budget:
        how.pop("type")
    return how | ({"gate": str(Gate.parse(settings.gate))} if settings.gate else {})
