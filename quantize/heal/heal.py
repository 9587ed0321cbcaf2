"""Quantization-aware distillation, short: under their types, the weights learn to give the answers they gave without.

The forward pass sees every weight as ggml's quantizer leaves it, with the types and the importance of the export; the
gradient goes straight through to the full-precision weights. The teacher is the unquantized student: its most probable
tokens at every position of its own replies, computed once. The result is a checkpoint whose quantization is exactly the
blocks that the last forward pass saw.

Quantizing a model takes seconds, so the change that it makes is kept for `refresh` steps: forward = weight + change,
which equals the quantized weight at the refresh and moves with the weight until the next one.

Source: straight-through estimation as in Bengio et al. (arXiv 1308.3432); the loss is forward KL over the teacher's top
tokens with one bucket for the rest. Vectors (norms, biases) stay F32 in the file and learn too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type

from ...errors import ModelError
from ...localrun.core.reporter import SILENT, Reporter
from ..convert.origins import origins
from ..convert.writer import TypedTensor
from ..measure.texts import Text
from ..recipe import HealRecipe
from .fake_quantize import Quantizer
from .model import load_model, save_model, tensors_of
from .teacher import teach
from .training import Divergence, Healing

_RECORD = "healing.json"  # in the healed folder: the key of its inputs, and its report


def heal(
    student_dir: Path,
    out: Path,
    *,
    tensors: Sequence[TypedTensor],
    texts: Sequence[Text],
    divergence: Divergence,
    settings: HealRecipe,
    report: Reporter = SILENT,
) -> dict[str, Any]:
    """Train a checkpoint under the types of a file's tensors, and write the result in float32.

    Every few minutes the state is kept beside `out`, and the same call resumes from there to the same weights. If the
    same healing is already there, it is only reported.

    Returns:
        Steps, seconds, the loss over the first and the last tenth, the share of sampled rows whose blocks stay the same
        when they are quantized once more, and the number of tensors that the forward pass did not see quantized,
        because the file arranges their rows differently.

    Raises:
        ModelError: `code` "torch-missing" or "load-failed".
        ArtifactError: `code` "write-failed".
    """
    try:
        import torch
    except ImportError as error:
        raise ModelError("healing needs torch", "pip install 'deepdistill[teach]'", code="torch-missing") from error
    key = _key(student_dir, tensors, texts=texts, settings=settings)
    if (known := _known(out, key)) is not None:
        return known
    torch.manual_seed(settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(student_dir, device)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}
    wanted = {one.tensor.name: one for one in tensors if one.got != Type.F32}
    found = origins(student_dir, wanted, shapes)
    quantizer = Quantizer(model, [(wanted[name], where) for name, where in found.items()])
    taught = teach(model, texts, top_k=settings.top_k, batch_tokens=settings.batch_tokens, device=device, report=report)
    healing = Healing(quantizer, taught, divergence=divergence, settings=settings, device=device)
    state_path = out.with_name(f".{out.name}.partial.pt")
    healing.run(state_path, key, report)
    summary = _summary(healing, quantizer) | {"tensors_not_seen": len(wanted) - len(found)}
    record = json.dumps({"key": key, "report": summary}) + "\n"
    save_model(model, out, student_dir=student_dir, extra={_RECORD: record})
    state_path.unlink(missing_ok=True)
    return summary


def _known(out: Path, key: str) -> dict[str, Any] | None:
    """Return the report of an earlier healing with the same key, if there is one."""
    try:
        record = json.loads((out / _RECORD).read_text(encoding="utf-8"))
        return dict(record["report"]) if record["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _summary(healing: Healing, quantizer: Quantizer) -> dict[str, Any]:
    tenth = max(1, len(healing.losses) // 10)
    return {
        "steps": len(healing.losses),
        "seconds": round(healing.seconds, 1),
        "loss_before": float(f"{np.mean(healing.losses[:tenth]):.4g}"),
        "loss_after": float(f"{np.mean(healing.losses[-tenth:]):.4g}"),
        "requantized_same": float(f"{quantizer.stability():.4g}"),
    }


def _key(student_dir: Path, tensors: Sequence[TypedTensor], *, texts: Sequence[Text], settings: HealRecipe) -> str:
    """Return a hash that tells one healing from another."""
    digest = hashlib.sha256(repr((texts, settings)).encode())
    for path in sorted(student_dir.glob("*.safetensors")):
        digest.update(repr((path.name, path.stat().st_size, path.stat().st_mtime_ns)).encode())
    for one in tensors:
        digest.update(f"{one.tensor.name} {one.got.name} ".encode())
        digest.update(b"" if one.importance is None else one.importance.tobytes())
    return digest.hexdigest()
