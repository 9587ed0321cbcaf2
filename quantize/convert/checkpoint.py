"""A Hugging Face checkpoint folder, read without torch: its config and its weights, with an adapter merged in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import ArtifactError, ModelError
from .lora_adapter import find_base, is_adapter, merge
from .safetensors import Blocks, Tensor, Weight, read_header, read_json

_SCALE = "_scale_inv"


class Checkpoint:
    """A folder with config.json, tokenizer.json and safetensors; or a LoRA adapter's folder, backed by its base's."""

    def __init__(self, folder: Path, base: Path | None = None) -> None:
        """Read the config and the index of the tensors; no weights yet.

        Args:
            folder: the checkpoint, or an adapter that peft wrote.
            base: an adapter's base model; the one that its adapter_config.json names if not given.

        Raises:
            ArtifactError: `code` "no-checkpoint", "not-an-adapter", "no-config", "no-weights", or of a broken file.
            ModelError: `code` "already-quantized", "scales-missing" or "adapter-not-plain".
        """
        self.folder, self.base = folder, base
        if not folder.is_dir():
            raise ArtifactError(
                f"no checkpoint folder at {folder}", "deepdistill teach makes one", code="no-checkpoint"
            )
        if is_adapter(folder):
            self.base = base or find_base(folder)
        elif base:
            raise ArtifactError(f"{folder} is not a LoRA adapter", "leave out --base", code="not-an-adapter")
        self.config = self.json("config.json")
        if not self.config:
            raise ArtifactError(f"{self.base or folder} is not a model: it has no config.json", code="no-config")
        self.tensors: dict[str, Weight] = self._dequantized(self._index(self.base or folder))
        if is_adapter(folder):
            self.tensors = merge(folder, self.tensors)

    def find(self, name: str) -> Path | None:
        """Return the path of a file in the folder, or else in the base's."""
        folders = (self.folder, self.base) if self.base else (self.folder,)
        return next((folder / name for folder in folders if (folder / name).is_file()), None)

    def json(self, name: str) -> dict[str, Any]:
        """Return a JSON file of the folder or of the base, or an empty dict if there is none.

        Raises:
            ArtifactError: `code` "json-broken".
        """
        path = self.find(name)
        return read_json(path) if path else {}

    def _index(self, folder: Path) -> dict[str, Tensor]:
        index = folder / "model.safetensors.index.json"
        files = set(read_json(index).get("weight_map", {}).values()) if index.is_file() else set()
        paths = [folder / name for name in sorted(files)] or sorted(folder.glob("model*.safetensors"))
        paths = paths or sorted(folder.glob("*.safetensors"))
        if not paths:
            is_pickled = any(folder.glob("*.bin"))
            hint = "load it in transformers and call save_pretrained, which writes safetensors" if is_pickled else ""
            raise ArtifactError(f"{folder} has no weights in safetensors", hint, code="no-weights")
        tensors: dict[str, Tensor] = {}
        for path in paths:
            if not path.is_file():
                hint = "the index names it: copy the whole checkpoint"
                raise ArtifactError(f"{path} is missing", hint, code="no-weights")
            tensors |= read_header(path)
        return tensors

    def _dequantized(self, tensors: dict[str, Tensor]) -> dict[str, Weight]:
        """Join each fp8 matrix and its scales; refuse every other quantization."""
        quantized = self.config.get("quantization_config") or {}
        method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else "?"
        block = quantized.get("weight_block_size") if isinstance(quantized, dict) else None
        if quantized and (method != "fp8" or not block):
            hint = "use the unquantized checkpoint"
            raise ModelError(f"{self.folder} is already quantized ({method})", hint, code="already-quantized")
        found: dict[str, Weight] = {}
        for name, tensor in tensors.items():
            scale = tensors.get(name + _SCALE)
            if scale and block:
                n_blocks = tuple(-(-n // size) for n, size in zip(tensor.shape, block, strict=False))
                if scale.shape != n_blocks:
                    raise ArtifactError(
                        f"{scale.name} is {list(scale.shape)}, but there are {list(n_blocks)} blocks",
                        "config.json belongs to another checkpoint",
                        code="tensor-mismatch",
                    )
                found[name] = Blocks(name, tensor.shape, tensor, scale, (block[0], block[1]))
            elif tensor.dtype == "F8_E4M3":
                raise ModelError(
                    f"{name} in {tensor.path.name} is F8_E4M3 without scales",
                    "config.json needs a quantization_config with weight_block_size",
                    code="scales-missing",
                )
            elif not (name.endswith(_SCALE) and block):
                found[name] = tensor
        return found
