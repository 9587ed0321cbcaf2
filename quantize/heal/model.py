"""The student in transformers: loaded, run under other weights, and saved under its checkpoint's own names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ModelError
from ...localrun.core.atomic import replacing_folder
from ...localrun.core.text import first_line

if TYPE_CHECKING:
    import torch

_LARGE = 256  # hidden size: smaller models lose digits in bf16 and gain nothing


def load_model(folder: Path, device: torch.device) -> Any:
    """Load a checkpoint in float32.

    Raises:
        ModelError: `code` "load-failed".
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # On a CPU the backward pass of fused attention is slower than plain products, for texts of this length.
    attention = "sdpa" if device.type == "cuda" else "eager"
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation=attention,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"transformers cannot load {folder}: {first_line(error)}", code="load-failed") from error
    model.config.use_cache = False
    return model.to(device).eval()  # without dropout, like the teacher


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    """Return the parameters, each once, and the buffers that a checkpoint keeps, such as DeepSeek's routing bias."""
    kept = model.state_dict().keys()
    return dict(model.named_parameters()) | {name: one for name, one in model.named_buffers() if name in kept}


def uses_bf16(model: Any, device: torch.device) -> bool:
    """Say whether bf16 products are native there, and the model large enough to profit."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    is_native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bool(is_native) and model.config.hidden_size >= _LARGE


def states_of(
    model: Any, tokens: torch.Tensor, *, wanted: torch.Tensor, weights: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Return the states `[N, H]` at the N wanted positions of `[B, T]`, with `weights` in place of parameters."""
    import torch
    from torch.func import functional_call

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> torch.Tensor:
            hidden: torch.Tensor = self.model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
            return hidden[wanted]

    states: torch.Tensor = functional_call(Decoder(), {f"model.{name}": one for name, one in weights.items()}, ())
    return states


def save_model(model: Any, out: Path, *, student_dir: Path, extra: Mapping[str, str]) -> None:
    """Write a folder with the weights in float32, the student's other files, and `extra` texts by file name.

    Raises:
        ArtifactError: `code` "write-failed".
    """
    from safetensors.torch import save_file

    with replacing_folder(out) as folder:
        for path in student_dir.iterdir():
            if path.is_file() and path.suffix not in (".safetensors", ".bin") and "index.json" not in path.name:
                shutil.copy(path, folder / path.name)
        weights = {name: p.detach().float().cpu().contiguous() for name, p in tensors_of(model).items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = {name: value for name, value in config.items() if name != "torch_dtype"} | {"dtype": "float32"}
        texts = {"config.json": json.dumps(config, indent=2) + "\n", **extra}
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)  # what another healing left there
