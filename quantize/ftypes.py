"""Which type each tensor of a file gets: llama.cpp's mixtures, and its fallbacks where a row has no whole blocks.

A file type such as Q4_K_M is a recipe: most matrices take the base type, sensitive ones more bits. A row that the
chosen type's block (256 for the K types) does not divide takes a larger 32-block type, which is never silent here.

Source: https://github.com/ggml-org/llama.cpp, src/llama-quant.cpp, the rules for dense llama and Qwen models without an
importance matrix. Left out: mixtures for experts, and the types that need an importance matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType

from ..errors import UsageError
from ..localrun import ggml

FTYPES: dict[str, tuple[LlamaFileType, Type]] = {
    "F32": (LlamaFileType.ALL_F32, Type.F32),
    "F16": (LlamaFileType.MOSTLY_F16, Type.F16),
    "BF16": (LlamaFileType.MOSTLY_BF16, Type.BF16),
    "Q8_0": (LlamaFileType.MOSTLY_Q8_0, Type.Q8_0),
    "Q6_K": (LlamaFileType.MOSTLY_Q6_K, Type.Q6_K),
    "Q5_K_M": (LlamaFileType.MOSTLY_Q5_K_M, Type.Q5_K),
    "Q5_K_S": (LlamaFileType.MOSTLY_Q5_K_S, Type.Q5_K),
    "Q4_K_M": (LlamaFileType.MOSTLY_Q4_K_M, Type.Q4_K),
    "Q4_K_S": (LlamaFileType.MOSTLY_Q4_K_S, Type.Q4_K),
    "Q4_0": (LlamaFileType.MOSTLY_Q4_0, Type.Q4_0),
    "IQ4_XS": (LlamaFileType.MOSTLY_IQ4_XS, Type.IQ4_XS),
    "Q3_K_M": (LlamaFileType.MOSTLY_Q3_K_M, Type.Q3_K),
    "Q2_K": (LlamaFileType.MOSTLY_Q2_K, Type.Q2_K),
}
"""File types by name: the number that the file carries, and the type that most of its matrices get."""

UNQUANTIZED = frozenset({"F32", "F16", "BF16"})
_SMALLER_BLOCK = {
    Type.IQ4_XS: Type.IQ4_NL,
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}


@dataclass(frozen=True)
class Shape:
    """What the mixtures look at beside a tensor's name."""

    arch: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    tied: bool

    @property
    def n_gqa(self) -> int:
        """Query heads a KV head."""
        return self.n_heads // self.n_kv_heads

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes it for a 70B model, whose few value heads get more bits."""
        return self.n_layers == 80 and (self.arch == "qwen2" or (self.arch == "llama" and self.n_gqa > 1))


def check_ftype(name: str) -> str:
    """Return the name as FTYPES has it.

    Raises:
        UsageError: no such type, or one that needs an importance matrix.
    """
    wanted = name.upper()
    if wanted in FTYPES:
        return wanted
    if wanted.startswith(("IQ1", "IQ2", "IQ3")):
        raise UsageError(f"{name} needs an importance matrix", f"without one: {' '.join(FTYPES)}")
    raise UsageError(f"no type {name!r}", f"one of {' '.join(FTYPES)}")


def choose(ftype: str, name: str, shape: tuple[int, ...], model: Shape) -> tuple[Type, Type]:
    """Return (the type that the recipe asks for, the type that fits) of a tensor of numpy shape `[..., n_per_row]`."""
    base = FTYPES[ftype][1]
    if len(shape) < 2 or not name.endswith(".weight") or name.endswith("_norm.weight"):
        return Type.F32, Type.F32
    if ftype in UNQUANTIZED:
        return base, base
    asked = _mixture(ftype, base, name, model)
    return asked, _fitting(asked, shape[-1])


def _fitting(asked: Type, n_per_row: int) -> Type:
    if n_per_row % ggml.block_size(asked) == 0:
        return asked
    smaller = _SMALLER_BLOCK.get(asked, asked)
    return smaller if n_per_row % ggml.block_size(smaller) == 0 else Type.F16


def _mixture(ftype: str, base: Type, name: str, model: Shape) -> Type:
    if name == "output.weight" or (name == "token_embd.weight" and model.tied):
        return base if base == Type.Q8_0 else Type.Q6_K
    if not name.startswith("blk."):
        return base
    layer, part = int(name.split(".")[1]), name.split(".")[2]
    if part == "attn_v":
        return _value(ftype, base, layer, model)
    if part == "ffn_down":
        return _down(ftype, base, layer, model.n_layers)
    if part == "attn_output":
        return {"Q2_K": Type.Q3_K, "Q3_K_M": Type.Q4_K}.get(ftype, base)
    return base


def _value(ftype: str, base: Type, layer: int, model: Shape) -> Type:
    chosen = base
    if ftype == "Q2_K":
        chosen = Type.Q4_K if model.n_gqa >= 4 else Type.Q3_K
    elif ftype == "Q3_K_M":
        chosen = Type.Q5_K if layer < 2 else Type.Q4_K
    elif ftype == "IQ4_XS" and model.n_gqa >= 4:
        chosen = Type.Q5_K
    elif ftype in ("Q4_K_M", "Q5_K_M") and _use_more_bits(layer, model.n_layers):
        chosen = Type.Q6_K
    elif ftype == "Q4_K_S" and layer < 4:
        chosen = Type.Q5_K
    return Type.Q5_K if model.is_70b and chosen in (Type.Q3_K, Type.Q4_K) else chosen


def _down(ftype: str, base: Type, layer: int, n_layers: int) -> Type:
    if ftype == "Q2_K":
        return Type.Q3_K
    if ftype == "Q3_K_M":
        return Type.Q5_K if layer < n_layers // 16 else Type.Q4_K
    if ftype in ("Q4_K_M", "Q5_K_M") and _use_more_bits(layer, n_layers):
        return Type.Q6_K
    if ftype in ("IQ4_XS", "Q4_K_S") and layer < n_layers // 8:
        return Type.Q5_K
    return base


def _use_more_bits(layer: int, n_layers: int) -> bool:
    """Say whether a layer is one of the first or last eighth, or every third between them."""
    first = n_layers // 8
    return layer < first or layer >= 7 * n_layers // 8 or (layer - first) % 3 == 2
