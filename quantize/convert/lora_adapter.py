"""A LoRA adapter that peft wrote, merged into its base on the way: `W + scale * B A` in float32, block by block.

Merging in the base's bf16 would round away changes that are small against their weight. Adapters of embeddings and
whole trained modules (`modules_to_save`) are merged too. DoRA, trained biases and everything else beyond plain LoRA are
refused.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import ArtifactError, ModelError
from .safetensors import Tensor, Weight, read_header, read_json

_PREFIX = "base_model.model."
_MERGE_FIRST = "merge it first: call peft's merge_and_unload, then save_pretrained"
_OTHER_BASE = "the adapter may belong to another base model: check --base"
_WRAPPED = re.compile(r"\.(modules_to_save|base_layer)\.")  # peft also saves the embeddings that it adapts
_LORA = re.compile(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?")


@dataclass(frozen=True)
class Merged(Weight):
    """A weight with an adapter's product added: `left` [n_rows, r] times `right` [r, n_per_row]."""

    weight: Weight
    left: npt.NDArray[np.float32]
    right: npt.NDArray[np.float32]

    def rows(self, part: slice = slice(None)) -> npt.NDArray[np.float32]:
        """Return a range of its rows as float32."""
        return np.asarray(self.weight.rows(part) + self.left[part] @ self.right, dtype=np.float32)


def is_adapter(folder: Path) -> bool:
    """Say whether a folder is a LoRA adapter and not a model."""
    return (folder / "adapter_config.json").exists() and not (folder / "config.json").exists()


def find_base(folder: Path) -> Path:
    """Return the folder of the base model that an adapter names.

    Raises:
        ArtifactError: `code` "base-missing": this machine has no such model folder.
    """
    named = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or ""
    for path in (Path(named), folder / named):
        if named and (path / "config.json").is_file():
            return path
    raise ArtifactError(
        f"{folder} is a LoRA adapter, and there is no folder of its base model {named or '(not named)'}",
        "give the base model's folder with --base",
        code="base-missing",
    )


def merge(folder: Path, tensors: dict[str, Weight]) -> dict[str, Weight]:
    """Return the base's tensors with the adapter's added to them or put in their place.

    Raises:
        ArtifactError: `code` "no-weights", "adapter-mismatch": it belongs to another base, or of a broken file.
        ModelError: `code` "adapter-not-plain".
    """
    config = read_json(folder / "adapter_config.json")
    _check(config, folder)
    merged, factors = dict(tensors), dict[str, dict[str, Tensor]]()
    for name, tensor in read_header(folder / "adapter_model.safetensors").items():
        plain = name.removeprefix(_PREFIX)
        if found := _LORA.fullmatch(plain):
            module, embedding, side, _ = found.groups()
            factors.setdefault(module, {})[f"{embedding or ''}{side}"] = tensor
        elif (whole := _WRAPPED.sub(".", plain)) in tensors:
            merged[whole] = tensor
        else:
            raise ModelError(f"deepdistill cannot merge the adapter's {name}", _MERGE_FIRST, code="adapter-not-plain")
    for module, pair in factors.items():
        left, right = _factors(pair, module, folder)
        left *= np.float32(_scale(config, module, left.shape[1]))
        weight = merged.get(f"{module}.weight")
        if weight is None or (left.shape[0], right.shape[1]) != weight.shape or left.shape[1] != right.shape[0]:
            base_shape = list(weight.shape) if weight else "missing"
            message = f"the adapter's {module} is {left.shape[0]} x {right.shape[1]}, and the base's is {base_shape}"
            raise ArtifactError(message, _OTHER_BASE, code="adapter-mismatch")
        left, right = np.ascontiguousarray(left), np.ascontiguousarray(right)
        merged[f"{module}.weight"] = Merged(weight.name, weight.shape, weight, left, right)
    return merged


def _check(config: dict[str, Any], folder: Path) -> None:
    faults = {
        f"is {config.get('peft_type')}": config.get("peft_type") != "LORA",
        "is DoRA": config.get("use_dora"),
        "has trained biases": config.get("bias", "none") != "none" or config.get("lora_bias"),
        "is transposed (fan_in_fan_out)": config.get("fan_in_fan_out"),
        "has target_parameters": config.get("target_parameters"),
    }
    for fault, is_there in faults.items():
        if is_there:
            message = f"the adapter in {folder} {fault}, which deepdistill cannot merge"
            raise ModelError(message, _MERGE_FIRST, code="adapter-not-plain")
    if not (folder / "adapter_model.safetensors").is_file():
        hint = "save the adapter again, with peft"
        raise ArtifactError(f"{folder} has no adapter_model.safetensors", hint, code="no-weights")


def _factors(
    pair: dict[str, Tensor], module: str, folder: Path
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return a module's B `[n_rows, r]` and A `[r, n_per_row]`."""
    kind = "" if "A" in pair else "embedding_"
    if f"{kind}A" not in pair or f"{kind}B" not in pair:
        message = f"the adapter in {folder} has only one of the two factors of {module}"
        raise ArtifactError(message, "save the adapter again, with peft", code="adapter-mismatch")
    left, right = pair[f"{kind}B"].rows(), pair[f"{kind}A"].rows()
    return (right.T, left.T) if kind else (left, right)  # peft stores an embedding's factors transposed


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """Return what a product is multiplied by; the first pattern that matches a module's name or its end decides."""
    alpha = float(config.get("lora_alpha") or rank)
    patterns = (config.get("alpha_pattern") or {}).items()
    alpha = next((value for key, value in patterns if re.match(rf"(.*\.)?({key})$", module)), alpha)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
