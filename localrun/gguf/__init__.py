"""GGUF files: their header, their parts, and ggml's own (de)quantization.

The rest of localrun takes the format's constants from here: the package `gguf` would load numpy and yaml for them.
"""

from ..core.lazy import import_part

import_part("gguf", "constants")  # before anything imports the rest of it
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType  # noqa: E402

__all__ = ["GGML_QUANT_SIZES", "GGMLQuantizationType", "LlamaFileType"]
