"""A LoRA adapter that peft wrote, merged into its base on the way: `W + scale * B A` in float32, block by block.

Merging in the base's bf16 would round away what the adapter learned where it is small against the weight. An
embedding's adapter and whole modules that were trained beside it (`modules_to_save`) are merged too. What is no plain
LoRA, such as DoRA or trained biases, is refused.
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
_HOW = "merge it first: peft's merge_and_unload, then save_pretrained"
_WRAPPED = re.compile(r"\.(modules_to_save|base_layer)\.")  # peft keeps the embeddings, too, that it adds to
_LORA = re.compile(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?")


@dataclass(frozen=True)
class Merged:
    """A weight with an adapter's product added: `left` [n_rows, r] times `right` [r, n_per_row]."""

    weight: Weight
    left: npt.NDArray[np.float32]
    right: npt.NDArray[np.float32]

    @property
    def name(self) -> str:
        """The checkpoint's name of it."""
        return self.weight.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, rows first."""
        return self.weight.shape

    def rows(self, part: slice = slice(None)) -> npt.NDArray[np.float32]:
        """Return a range of its rows as float32."""
        return np.asarray(self.weight.rows(part) + self.left[part] @ self.right, dtype=np.float32)


def is_adapter(folder: Path) -> bool:
    """Say whether a folder holds a LoRA adapter and no model."""
    return (folder / "adapter_config.json").exists() and not (folder / "config.json").exists()


def find_base(folder: Path) -> Path:
    """Return the folder of the base that an adapter names.

    Raises:
        ArtifactError: it is not on this machine, or no model folder.
    """
    named = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or ""
    for place in (Path(named), folder / named):
        if named and (place / "config.json").is_file():
            return place
    raise ArtifactError(
        f"{folder} is a LoRA adapter, and its base model {named or '(not named)'} is no folder here",
        "give the base's folder with --base",
    )


def merge(folder: Path, tensors: dict[str, Weight]) -> dict[str, Weight]:
    """Return the base's tensors with the adapter's added or put in their place.

    Raises:
        ArtifactError: the adapter is broken, or of another base.
        ModelError: it is no plain LoRA.
    """
    config = read_json(folder / "adapter_config.json")
    _check(config, folder)
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise ArtifactError(f"{folder} has no adapter_model.safetensors", "save the adapter again, with peft")
    merged, factors = dict(tensors), dict[str, dict[str, Tensor]]()
    for name, tensor in read_header(path).items():
        plain = name.removeprefix(_PREFIX)
        if found := _LORA.fullmatch(plain):
            module, embedding, side, _ = found.groups()
            factors.setdefault(module, {})[f"{embedding or ''}{side}"] = tensor
        elif (whole := _WRAPPED.sub(".", plain)) in tensors:
            merged[whole] = tensor
        else:
            raise ModelError(f"the adapter's {name} cannot be merged here", _HOW)
    for module, pair in factors.items():
        merged[f"{module}.weight"] = _merged(config, module, pair, merged, folder)
    return merged


def _check(config: dict[str, Any], folder: Path) -> None:
    faults = {
        f"is {config.get('peft_type')}": config.get("peft_type") != "LORA",
        "is DoRA": config.get("use_dora"),
        "trained biases": config.get("bias", "none") != "none" or config.get("lora_bias"),
        "is transposed (fan_in_fan_out)": config.get("fan_in_fan_out"),
        "has target_parameters": config.get("target_parameters"),
    }
    for what, found in faults.items():
        if found:
            raise ModelError(f"the adapter in {folder} {what}, which cannot be merged here", _HOW)


def _merged(
    config: dict[str, Any], module: str, pair: dict[str, Tensor], tensors: dict[str, Weight], folder: Path
) -> Merged:
    weight = tensors.get(f"{module}.weight")
    sides = (pair.get("B"), pair.get("A")) if "A" in pair else (pair.get("embedding_B"), pair.get("embedding_A"))
    if weight is None or sides[0] is None or sides[1] is None:
        raise ArtifactError(f"the adapter in {folder} does not fit its base: {module}", "is it another base's?")
    left, right = sides[0].rows(), sides[1].rows()
    if "embedding_A" in pair:  # peft keeps an embedding's factors the other way round
        left, right = right.T, left.T
    if left.shape[1] != right.shape[0] or (left.shape[0], right.shape[1]) != weight.shape:
        raise ArtifactError(
            f"the adapter's {module} is {left.shape[0]} x {right.shape[1]} and the base's {list(weight.shape)}",
            "is it another base's?",
        )
    rank = left.shape[1]
    alpha = _by_pattern(config.get("alpha_pattern") or {}, module, float(config.get("lora_alpha") or rank))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Merged(weight, np.ascontiguousarray(left * np.float32(scale)), np.ascontiguousarray(right))


def _by_pattern(patterns: dict[str, float], module: str, default: float) -> float:
    """Return what the first pattern that matches a module's name or the end of it says."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
