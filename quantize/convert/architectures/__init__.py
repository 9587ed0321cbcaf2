"""How each architecture becomes a GGUF, one a file: its tensors' names and order, changed rows, parameters."""

from __future__ import annotations

from ....errors import ArtifactError
from ..checkpoint import Checkpoint
from .base import PART_SIZE, Architecture, Planned, use_llama_cpp
from .deepseek2 import DeepSeek2
from .gemma3 import Gemma3
from .llama import Llama
from .qwen2 import Qwen2
from .qwen3 import Qwen3
from .qwen3moe import Qwen3Moe

__all__ = ["PART_SIZE", "Architecture", "Planned", "read_architecture", "use_llama_cpp"]

ARCHITECTURES: dict[str, type[Architecture]] = {
    "LlamaForCausalLM": Llama,
    "Qwen2ForCausalLM": Qwen2,
    "Qwen3ForCausalLM": Qwen3,
    "Qwen3MoeForCausalLM": Qwen3Moe,
    "Gemma3ForCausalLM": Gemma3,
    "DeepseekV2ForCausalLM": DeepSeek2,
    "DeepseekV3ForCausalLM": DeepSeek2,
}
"""The architectures that can be converted, by transformers' names."""


def read_architecture(checkpoint: Checkpoint) -> Architecture:
    """Return a checkpoint's architecture, after checking its config.

    Raises:
        ModelError: `code` "not-convertible": another architecture, or a setting that the format or llama.cpp lacks.
        ArtifactError: `code` "config-broken", "tensor-missing" or "tensor-mismatch".
    """
    config = checkpoint.config
    try:
        name = (config.get("architectures") or [config.get("model_type", "an unnamed architecture")])[0]
        if name not in ARCHITECTURES:
            raise use_llama_cpp(str(name), checkpoint.folder)
        return ARCHITECTURES[name](checkpoint)
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        message = f"{checkpoint.folder}/config.json is broken: {error!r}"[:200]
        raise ArtifactError(message, code="config-broken") from error
