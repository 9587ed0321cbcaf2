"""A Hugging Face checkpoint folder without torch: its config, and its weights, an adapter's merged on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import ArtifactError, ModelError
from .lora_adapter import find_base, is_adapter, merge
from .safetensors import Blocks, Tensor, Weight, read_header, read_json

_SCALE = "_scale_inv"


class Checkpoint:
    """A folder with config.json, tokenizer.json and safetensors; or a LoRA adapter's, and its base's behind it."""

    def __init__(self, folder: Path, base: Path | None = None) -> None:
        """Read the config and the index of the tensors; no weights yet.

        Args:
            folder: the checkpoint, or an adapter that peft wrote.
            base: an adapter's base model; what its adapter_config.json names if not given.

        Raises:
            ArtifactError: a file is missing, cut short or broken.
            ModelError: a quantized checkpoint, weights in another format, or an adapter that is no plain LoRA.
        """
        self.folder, self.base = folder, base
        if not folder.is_dir():
            raise ArtifactError(f"no checkpoint folder at {folder}", "deepdistill teach makes one")
        if is_adapter(folder):
            self.base = base or find_base(folder)
        elif base:
            raise ArtifactError(f"{folder} is no LoRA adapter, so it has no base", "leave out --base")
        self.config = self.json("config.json")
        if not self.config:
            raise ArtifactError(f"{self.base or folder} is no model folder: it has no config.json")
        self.tensors: dict[str, Weight] = self._dequantized(self._index(self.base or folder))
        if is_adapter(folder):
            self.tensors = merge(folder, self.tensors)

    def find(self, name: str) -> Path | None:
        """Return a file of the folder, or else of the base."""
        folders = (self.folder, self.base) if self.base else (self.folder,)
        return next((folder / name for folder in folders if (folder / name).is_file()), None)

    def json(self, name: str) -> dict[str, Any]:
        """Return a JSON file of the folder or the base, or an empty dict if it is not there.

        Raises:
            ArtifactError: it is not a JSON object.
        """
        path = self.find(name)
        return read_json(path) if path else {}

    def _index(self, folder: Path) -> dict[str, Tensor]:
        index = folder / "model.safetensors.index.json"
        files = set(read_json(index).get("weight_map", {}).values()) if index.is_file() else set()
        paths = [folder / name for name in sorted(files)] or sorted(folder.glob("model*.safetensors"))
        paths = paths or sorted(folder.glob("*.safetensors"))
        if not paths:
            other = next(iter(folder.glob("*.bin")), None)
            hint = "load it in transformers and save_pretrained: that writes safetensors" if other else ""
            raise ArtifactError(f"{folder} has no weights in safetensors", hint)
        tensors: dict[str, Tensor] = {}
        for path in paths:
            if not path.is_file():
                raise ArtifactError(f"{path} is missing", "the index names it: copy the whole checkpoint")
            tensors |= read_header(path)
        return tensors

    def _dequantized(self, tensors: dict[str, Tensor]) -> dict[str, Weight]:
        """Join each fp8 matrix with its scales; refuse every other quantization."""
        quantized = self.config.get("quantization_config") or {}
        method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else "?"
        block = quantized.get("weight_block_size") if isinstance(quantized, dict) else None
        if quantized and (method != "fp8" or not block):
            raise ModelError(f"{self.folder} is quantized already ({method})", "give the unquantized checkpoint")
        found: dict[str, Weight] = {}
        for name, tensor in tensors.items():
            scale = tensors.get(name + _SCALE)
            if scale and block:
                n_blocks = tuple(-(-n // size) for n, size in zip(tensor.shape, block, strict=False))
                if scale.shape != n_blocks:
                    raise ArtifactError(f"{scale.name} is {list(scale.shape)}, and its blocks are {list(n_blocks)}")
                found[name] = Blocks(tensor, scale, (block[0], block[1]))
            elif tensor.dtype == "F8_E4M3":
                raise ModelError(f"{name} in {tensor.path.name} is F8_E4M3 without scales", "its config names none")
            elif not (name.endswith(_SCALE) and block):
                found[name] = tensor
        return found
