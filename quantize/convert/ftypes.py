"""Which type each tensor of a file gets: llama.cpp's type mixtures, and its fallbacks for rows without whole blocks.

A file type (ftype) such as Q4_K_M is a mixture: most matrices take the base type, sensitive ones more bits. Where the
block of a type (256 for the K and IQ types) does not divide a row, a larger type with blocks of 32 takes its place, and
the report says so.

Source: https://github.com/ggml-org/llama.cpp, src/llama-quant.cpp. Left out: the rules of architectures that are not
converted here, and ternary and MXFP4 files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType

from ...errors import UsageError
from ...localrun.gguf import ggml

_NAMES = """
F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q5_K_S Q5_1 Q5_0 Q4_K_M Q4_K_S Q4_1 Q4_0 IQ4_NL IQ4_XS
Q3_K_L Q3_K_M Q3_K_S IQ3_M IQ3_S IQ3_XS IQ3_XXS Q2_K Q2_K_S IQ2_M IQ2_S IQ2_XS IQ2_XXS
"""
_IQ_BASES = {"IQ3_M": Type.IQ3_S, "IQ3_XS": Type.IQ3_S, "IQ2_M": Type.IQ2_S, "IQ2_S": Type.IQ2_XS}
FTYPES: dict[str, tuple[LlamaFileType, Type]] = {
    name: (
        LlamaFileType[f"{'ALL' if name == 'F32' else 'MOSTLY'}_{name}"],
        _IQ_BASES.get(name) or Type[re.sub(r"_K_[LMS]$", "_K", name)],
    )
    for name in _NAMES.split()
}
"""File types by name: the format's number of it, and the type that most of the file's matrices get."""

UNQUANTIZED = frozenset({"F32", "F16", "BF16"})
NEED_IMATRIX = frozenset({"IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS"})
"""Mixtures that are refused without an importance matrix: their files would be garbage."""
_BITS_2 = frozenset({"IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS"})
_RICH_2 = frozenset({"IQ2_M", "IQ2_S"})
_SMALLER_BLOCK = {
    **dict.fromkeys((Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S, Type.IQ4_XS), Type.IQ4_NL),
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}
# The type of the attention's output: with 8 experts it is Q5_K in these mixtures; otherwise see _OUTPUT.
_OUTPUT_8 = _BITS_2 | {
    "Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS",
}  # fmt: skip
_OUTPUT = {
    "Q2_K": Type.Q3_K,
    "IQ3_XXS": Type.IQ3_S,
    "Q3_K_M": Type.Q4_K,
    "Q3_K_L": Type.Q5_K,
    "IQ3_M": Type.Q4_K,
    "IQ2_M": Type.IQ3_S,
    "IQ2_S": Type.IQ3_S,
}
_EMBEDDING = {
    "IQ2_XXS": Type.Q2_K,
    "IQ2_XS": Type.Q2_K,
    "IQ2_S": Type.IQ3_S,
    "IQ2_M": Type.IQ3_S,
    "IQ3_XXS": Type.IQ3_S,
}


@dataclass(frozen=True)
class Shape:
    """The model's numbers that the mixtures look at."""

    arch: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    tied: bool
    n_experts: int = 0

    @property
    def n_gqa(self) -> int:
        """Query heads per KV head."""
        return self.n_heads // self.n_kv_heads

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes it for a 70B model, whose few value heads it gives more bits."""
        return self.n_layers == 80 and (self.arch == "qwen2" or (self.arch == "llama" and self.n_gqa > 1))


def check_ftype(name: str, *, has_imatrix: bool = False) -> str:
    """Return the name of a type mixture as FTYPES has it.

    Raises:
        UsageError: `code` "no-such-type" or "needs-imatrix".
    """
    ftype = name.upper()
    if ftype not in FTYPES:
        raise UsageError(f"no type {name!r}", f"choose one of {' '.join(FTYPES)}", code="no-such-type")
    if ftype in NEED_IMATRIX and not has_imatrix:
        others = " ".join(one for one in FTYPES if one not in NEED_IMATRIX)
        hint = f"give traces to make one from; these types need none: {others}"
        raise UsageError(f"{name} needs an importance matrix", hint, code="needs-imatrix")
    return ftype


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Say whether a tensor may have fewer bits than float32: every matrix may, except norms and expert routers."""
    if len(shape) < 2 or not name.endswith(".weight") or name.endswith("_norm.weight"):
        return False
    return not name.endswith("ffn_gate_inp.weight")


def fitting(asked: Type, n_per_row: int) -> Type:
    """Return a type, or if its block does not divide a row, the one that llama.cpp takes instead."""
    if n_per_row % ggml.block_size(asked) == 0:
        return asked
    smaller = _SMALLER_BLOCK.get(asked, asked)
    return smaller if n_per_row % ggml.block_size(smaller) == 0 else Type.F16


def assign(
    ftype: str, tensors: Mapping[str, tuple[int, ...]], *, model: Shape, has_imatrix: bool = False
) -> dict[str, tuple[Type, Type]]:
    """Return for each tensor, given by its numpy shape, (the type that a mixture asks for, the type that fits)."""
    base = FTYPES[ftype][1]
    mixture = _Mixture(ftype, model, has_imatrix)
    found: dict[str, tuple[Type, Type]] = {}
    for name in _in_order(tensors):
        if not is_quantizable(name, tensors[name]):
            found[name] = Type.F32, Type.F32
        elif ftype in UNQUANTIZED:
            found[name] = base, base
        else:
            asked = mixture.choose(name, tensors[name][-1])
            found[name] = asked, fitting(asked, tensors[name][-1])
    return found


def _in_order(names: Iterable[str]) -> list[str]:
    """Return names in llama.cpp's order, by layer and then by name: some rules count the tensors before."""

    def key(name: str) -> tuple[int, str]:
        layer = re.match(r"blk\.(\d+)\.", name)
        return (int(layer[1]) if layer else -1), name

    return sorted(names, key=key)


class _Mixture:
    """A mixture's rules, applied to one tensor after the other."""

    def __init__(self, ftype: str, model: Shape, has_imatrix: bool) -> None:
        self.ftype, self.base, self.model, self.has_imatrix = ftype, FTYPES[ftype][1], model, has_imatrix
        self.n_values = self.n_downs = 0  # so far

    def choose(self, name: str, n_per_row: int) -> Type:
        """Return the type that the mixture asks for, whether or not it fits."""
        if name == "output.weight" or (name == "token_embd.weight" and self.model.tied):
            return self._head(n_per_row)
        if name == "token_embd.weight":
            return _EMBEDDING.get(self.ftype, self.base)
        if not name.startswith("blk."):
            return self.base
        layer, part = int(name.split(".")[1]), name.split(".")[2]
        few = self.ftype in _BITS_2
        if part == "attn_v":
            self.n_values += 1
            return self._value_of_2() if few else self._value(self.n_values - 1)
        if part in ("attn_q", "attn_k"):
            return self._query_or_key(part)
        if part.startswith("ffn_down"):
            self.n_downs += 1
            return self._down_of_2(self.n_downs - 1) if few else self._down(layer, self.n_downs - 1)
        if part == "attn_output":
            return self._attention_output()
        if part.startswith(("ffn_up", "ffn_gate")):
            return self._up_or_gate(layer)
        return self.base

    def _head(self, n_per_row: int) -> Type:
        if self.base == Type.Q8_0:
            return self.base
        whole = n_per_row % ggml.block_size(self.base) == 0
        # For rows without whole blocks llama.cpp takes Q8_0, and Q6_K falls back to that.
        return Type.Q5_K if whole and self.ftype in _BITS_2 | {"IQ3_XXS"} else Type.Q6_K

    def _value_of_2(self) -> Type:
        if self.model.n_gqa >= 4 or self.model.n_experts >= 4:
            return Type.Q4_K
        return Type.IQ3_S if self.ftype in _RICH_2 else Type.Q2_K

    def _value(self, i: int) -> Type:
        ftype, many = self.ftype, self.model.n_gqa >= 4
        chosen = self.base
        if ftype == "Q2_K":
            chosen = Type.Q4_K if many else Type.Q3_K
        elif ftype == "IQ3_XXS":
            chosen = Type.Q4_K if many else (Type.IQ3_XXS if self.has_imatrix else Type.IQ3_S)
        elif ftype == "IQ3_M" or (ftype in ("Q2_K_S", "IQ3_XS", "IQ3_S") and many):
            chosen = Type.Q4_K
        elif ftype == "Q3_K_M":
            chosen = Type.Q5_K if i < 2 else Type.Q4_K
        elif ftype == "Q3_K_L" or (ftype in ("IQ4_NL", "IQ4_XS") and many) or (ftype == "Q4_K_S" and i < 4):
            chosen = Type.Q5_K
        elif ftype in ("Q4_K_M", "Q5_K_M") and _use_more_bits(i, self.model.n_layers):
            chosen = Type.Q6_K
        if self.model.is_70b and chosen in (Type.Q3_K, Type.Q4_K):
            chosen = Type.Q5_K
        return Type.Q8_0 if self.model.n_experts == 8 else chosen

    def _query_or_key(self, part: str) -> Type:
        if self.ftype in _BITS_2:
            return Type.Q4_K if part == "attn_k" and self.model.n_experts == 8 else self.base
        if part == "attn_k" and self.model.n_experts == 8:
            return Type.Q8_0
        return {"IQ3_XS": Type.IQ3_XXS, "IQ3_XXS": Type.IQ2_S}.get(self.ftype, self.base)

    def _down_of_2(self, i: int) -> Type:
        if i >= self.model.n_layers // 8:
            return self.base
        return Type.IQ3_S if self.ftype in _RICH_2 else Type.Q2_K

    def _down(self, layer: int, i: int) -> Type:
        ftype, n_layers = self.ftype, self.model.n_layers
        layer = layer if self.model.n_experts > 1 else i
        early = layer < n_layers // 8
        if ftype == "Q2_K":
            return Type.Q3_K
        if ftype == "Q2_K_S":
            return Type.Q4_K if early else self.base
        if ftype == "IQ3_XXS" and not self.has_imatrix:
            return Type.Q4_K if early else Type.Q3_K
        if ftype == "Q3_K_M":
            return Type.Q5_K if layer < n_layers // 16 else Type.Q4_K
        if ftype == "IQ3_M" and (early or (self.model.n_experts == 8 and _use_more_bits(layer, n_layers))):
            return Type.Q4_K
        if ftype == "Q3_K_L":
            return Type.Q5_K
        if ftype in ("Q4_K_M", "Q5_K_M") and _use_more_bits(layer, n_layers):
            return Type.Q6_K
        if early and (ftype == "Q4_K_S" or (ftype in ("IQ4_NL", "IQ4_XS") and not self.has_imatrix)):
            return Type.Q5_K
        if early and self.has_imatrix and ftype in ("Q4_0", "Q5_0"):
            return Type.Q4_1 if ftype == "Q4_0" else Type.Q5_1
        return self.base

    def _attention_output(self) -> Type:
        if self.model.n_experts == 8:
            return Type.Q5_K if self.ftype in _OUTPUT_8 else self.base
        return _OUTPUT.get(self.ftype, self.base)

    def _up_or_gate(self, layer: int) -> Type:
        """IQ3_XS spends fewer bits in the middle layers."""
        n_layers = self.model.n_layers
        middle = n_layers // 8 <= layer < 7 * n_layers // 8
        return Type.IQ3_XXS if self.ftype == "IQ3_XS" and middle else self.base


def _use_more_bits(layer: int, n_layers: int) -> bool:
    """Say whether a layer is one of the first or last eighth, or every third between them."""
    first = n_layers // 8
    return layer < first or layer >= 7 * n_layers // 8 or (layer - first) % 3 == 2
