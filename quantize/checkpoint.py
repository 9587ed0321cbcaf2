"""Read a Hugging Face checkpoint folder without torch: its config, and tensors mapped from safetensors when asked for.

bf16 has no numpy type: its 16 bits are the upper half of a float32, so it is widened by a shift, without loss.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArtifactError, ModelError

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_HEADER_LIMIT = 100_000_000  # bytes; safetensors' own


@dataclass(frozen=True)
class Tensor:
    """Where a tensor stands in a file. `shape` is the checkpoint's own, rows first."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    path: Path
    offset: int

    def rows(self, part: slice = slice(None)) -> npt.NDArray[np.float32]:
        """Return a range of its first axis as float32, read from the file now."""
        mapped = np.memmap(self.path, _DTYPES[self.dtype], "r", self.offset, self.shape)[part]
        if self.dtype == "BF16":
            return (mapped.astype(np.uint32) << 16).view(np.float32)
        return np.asarray(mapped, dtype=np.float32).copy()


class Checkpoint:
    """A folder with config.json, tokenizer.json and safetensors."""

    def __init__(self, folder: Path) -> None:
        """Read the config and the index of the tensors; no weights yet.

        Raises:
            ArtifactError: a file is missing, cut short or broken.
            ModelError: an adapter, a quantized checkpoint, or weights in another format.
        """
        self.folder = folder
        if not folder.is_dir():
            raise ArtifactError(f"no checkpoint folder at {folder}", "deepdistill teach makes one")
        if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
            raise ModelError(
                f"{folder} is a LoRA adapter, not a whole model",
                "merge it into its base first: peft's merge_and_unload, then save_pretrained; "
                "the student/ folder of a run is merged already",
            )
        self.config = self.json("config.json")
        if not self.config:
            raise ArtifactError(f"{folder} is no model folder: it has no config.json")
        if quantized := self.config.get("quantization_config"):
            method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else "?"
            raise ModelError(f"{folder} is quantized already ({method})", "give the unquantized checkpoint")
        self.tensors = self._index()

    def json(self, name: str) -> dict[str, Any]:
        """Return a JSON file of the folder, or an empty dict if it is not there.

        Raises:
            ArtifactError: it is not a JSON object.
        """
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise ArtifactError(f"{path} is broken: {error}") from error
        if not isinstance(read, dict):
            raise ArtifactError(f"{path} is broken: it is no JSON object")
        return read

    def _index(self) -> dict[str, Tensor]:
        files = set(self.json("model.safetensors.index.json").get("weight_map", {}).values())
        paths = [self.folder / name for name in sorted(files)] or sorted(self.folder.glob("*.safetensors"))
        if not paths:
            other = next(iter(self.folder.glob("*.bin")), None)
            hint = "load it in transformers and save_pretrained: that writes safetensors" if other else ""
            raise ArtifactError(f"{self.folder} has no weights in safetensors", hint)
        tensors: dict[str, Tensor] = {}
        for path in paths:
            if not path.is_file():
                raise ArtifactError(f"{path} is missing", "the index names it: copy the whole checkpoint")
            tensors |= read_header(path)
        return tensors


def read_header(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        ArtifactError: it is no safetensors file, or cut short.
        ModelError: a tensor has a type that cannot be converted, such as fp8.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            if not 2 <= n_header <= min(_HEADER_LIMIT, size - 8):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(n_header))
        header.pop("__metadata__", None)
        entries = [(name, tuple(e["shape"]), e["dtype"], *e["data_offsets"]) for name, e in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is no whole safetensors file: {error}", "copy it again") from error
    tensors = {}
    for name, shape, dtype, start, end in entries:
        if 8 + n_header + end > size:
            raise ArtifactError(f"{path} is cut short: {name} ends after the file", "copy it again")
        if dtype not in _DTYPES:
            raise ModelError(f"{name} in {path.name} is {dtype}", f"weights must be {', '.join(sorted(_DTYPES))}")
        if end - start != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
            raise ArtifactError(f"{path} is broken: {name} has the wrong number of bytes", "copy it again")
        tensors[name] = Tensor(name, shape, dtype, path, 8 + n_header + start)
    return tensors
