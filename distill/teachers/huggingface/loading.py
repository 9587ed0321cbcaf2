"""Load a Hugging Face checkpoint, its tokenizer and its weights, in the right format and place, or say why not.

No code from a checkpoint is ever run.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError

from ....errors import ModelError
from ...device import inference_dtype, quiet_transformers
from ...tokenizer import Tokenizer

_HASHED_BLOCKS, _BLOCK_BYTES = 16, 1 << 20
_WEIGHTS_SHARE = 0.8  # of a GPU's free memory: the rest is for the KV cache


def check_folder(path: Path) -> None:
    """Return if a folder holds a config, a tokenizer and weights.

    Raises:
        ModelError: `code` "no-such-model", "lora-adapter" or "model-incomplete".
    """
    if not path.is_dir():
        raise ModelError(f"there is no model folder at {path}", "check the path", code="no-such-model")
    code = "model-incomplete"
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        what, hint, code = "is a LoRA adapter, not a whole model", "merge it into its base model first", "lora-adapter"
    elif not (path / "config.json").is_file():
        what, hint = "is not a model folder: it has no config.json", "check the path"
    elif not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        what, hint = "has no tokenizer", "copy tokenizer.json and tokenizer_config.json from the base model"
    elif not any(path.glob("*.safetensors")):
        what, hint = "has no weights", "add model.safetensors or its shards"
    else:
        return
    raise ModelError(f"{path} {what}", hint, code=code)


def weights_hash(path: Path) -> str:
    """Return a short hash of a checkpoint: whole configs, and the size and 16 spread blocks of each weight file."""
    digest = hashlib.sha256()
    for file in sorted([*path.glob("*.json"), *path.glob("*.jinja"), *path.glob("*.safetensors")]):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as data:
            for i in range(_HASHED_BLOCKS if file.suffix == ".safetensors" else 1):
                data.seek((size - _BLOCK_BYTES) * i // (_HASHED_BLOCKS - 1) if size > _BLOCK_BYTES else 0)
                digest.update(data.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]


def load_tokenizer(source: str | Path, offline: bool = True) -> Tokenizer:
    """Return the tokenizer of a checkpoint folder, or of a hub id.

    Raises:
        ModelError: there is none, or it is corrupt: see `load_model`.
    """
    quiet_transformers()
    try:
        found = transformers.AutoTokenizer.from_pretrained(source, local_files_only=offline, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot read
        raise loading_error(error, source, part="tokenizer", offline=offline) from error
    return cast(Tokenizer, found)


def load_model(source: str | Path, device: torch.device, offline: bool = True) -> Any:
    """Return a causal model in the format that runs fastest on a device; on CUDA over all GPUs if one is too small.

    Raises:
        ModelError: `code` "no-such-model", "model-incomplete", "model-corrupt", "model-too-large",
            "architecture-unknown", "needs-own-code" or "model-unloadable".
    """
    quiet_transformers()
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            local_files_only=offline,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **(_placement(source, device, offline) if device.type == "cuda" else {"dtype": "auto"}),
        )
        model, report = loaded
        _check_complete(source, report)
        if device.type != "cuda":
            model = model.to(device=device, dtype=inference_dtype(model.num_parameters(), device))
        return model.eval()
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{source} does not fit in the memory of {device}",
            "give --device cpu or a smaller model",
            code="model-too-large",
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, ImportError) as error:
        raise loading_error(error, source, part="model", offline=offline) from error


def _check_complete(source: str | Path, report: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that lacks weights: transformers would fill them with random numbers and carry on."""
    missing = sorted(report["missing_keys"]) + sorted(str(key[0]) for key in report["mismatched_keys"])
    if missing:
        raise ModelError(
            f"{source} lacks {len(missing)} of its weights, {missing[0]} first",
            "download or copy the whole checkpoint again",
            code="model-incomplete",
        )


def _placement(source: str | Path, device: torch.device, offline: bool) -> dict[str, Any]:
    """Return the number format and the GPUs that `from_pretrained` is to load the weights into, shard by shard."""
    config = transformers.AutoConfig.from_pretrained(source, local_files_only=offline, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        return {"dtype": "auto", "device_map": "auto"}  # its own format decides its size
    with torch.device("meta"):
        n_parameters = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False).num_parameters()
    dtype = inference_dtype(n_parameters, device)
    asked = range(torch.cuda.device_count()) if device.index is None else [device.index]
    free = {index: torch.cuda.mem_get_info(index)[0] for index in asked}
    return {"dtype": dtype, "device_map": device_map_for(n_parameters * dtype.itemsize, free)}


def device_map_for(n_bytes: int, free: Mapping[int, int]) -> str | dict[str, int]:
    """Return where weights of n_bytes go, given the free bytes of each GPU: all on one, or over all of them.

    Raises:
        ModelError: `code` "model-too-large": accelerate would put the rest on the CPU, and every token would wait.
    """
    roomiest = max(free, key=lambda index: free[index])
    if n_bytes <= _WEIGHTS_SHARE * free[roomiest]:
        return {"": roomiest}
    if len(free) > 1 and n_bytes <= _WEIGHTS_SHARE * sum(free.values()):
        return "auto"
    raise ModelError(
        f"the weights take {n_bytes / 2**30:.1f} GiB, and {sum(free.values()) / 2**30:.1f} GiB of GPU memory are free",
        "give a smaller model, or serve this one over more GPUs and give its https://…/v1 as the teacher",
        code="model-too-large",
    )


def loading_error(error: Exception, source: str | Path, *, part: str, offline: bool) -> ModelError:
    """Translate what transformers, safetensors and the hub raise into one line and a hint."""
    text = " ".join(str(error).split())
    if "custom code" in text:  # transformers' words where it would have to run a file of the checkpoint's
        return ModelError(
            f"{source} needs Python code of its own, and deepdistill runs none that comes with a model",
            "give a checkpoint that transformers loads without it; of a teacher, also its server's https://…/v1",
            code="needs-own-code",
        )
    if isinstance(error, SafetensorError) or ("safetensors" in text.lower() and "header" in text.lower()):
        return ModelError(
            f"the weights of {source} are corrupt: {text[:200]}", "copy or download them again", code="model-corrupt"
        )
    if isinstance(error, (ValueError, KeyError)) and re.search("model_type|model type|Unrecognized", text):
        return ModelError(
            f"transformers {transformers.__version__} does not know the architecture of {source}",
            "a newer transformers may; or serve the model elsewhere and give its https://…/v1 as the teacher",
            code="architecture-unknown",
        )
    if isinstance(error, OSError) and not Path(source).exists():
        if offline or os.environ.get("HF_HUB_OFFLINE"):
            what, hint = f"{source} is not in the local cache", "leave out --offline to download it"
        else:
            what, hint = f"cannot get {source} from the hub: {text[:200]}", "check the id and the connection"
        return ModelError(what, hint, code="no-such-model")
    return ModelError(
        f"cannot load the {part} of {source}: {text[:300]}", "check that it is whole", code="model-unloadable"
    )
