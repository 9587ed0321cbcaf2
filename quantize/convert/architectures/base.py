"""What every decoder has in common: reading a checkpoint's tensors in parts, and the usual parameters.

An architecture says which tensors it has, under which GGUF names, and how their rows change on the way. It refuses
whatever a config asks for that the GGUF architecture cannot express: a file that loads and computes something else is
worse than none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter

from ....errors import ArtifactError, ModelError
from ..checkpoint import Checkpoint
from ..ftypes import Shape
from ..safetensors import Tensor, Weight
from .rope import rope_settings, write_rope

ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
MLP = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
PART_SIZE = 1 << 22
"""How many numbers are read, changed and quantized at a time: 16 MiB of float32."""

Floats = npt.NDArray[np.float32]
Rows = Iterator[Floats]
Span = tuple[Weight, int, int]
"""A weight of the checkpoint, and the first and last of its rows that are meant, the last excluded."""


@dataclass(frozen=True)
class Planned:
    """One tensor of the file to be written: its name, its numpy shape, and `source`, which reads it."""

    name: str
    shape: tuple[int, ...]
    source: Callable[[int], Rows]

    def read(self, part_size: int = PART_SIZE) -> Rows:
        """Yield it in parts of about so many numbers: `[n_rows, n_per_row]`, of a stack too, or `[n]` of a vector."""
        return self.source(part_size)


def use_llama_cpp(what: str, folder: object) -> ModelError:
    """Return the error for something that this converter does not know, with llama.cpp's converter in the hint."""
    return ModelError(
        f"deepdistill cannot convert {what}; it converts llama, Qwen2, Qwen3, Qwen3-MoE, Gemma 3 (text) and DeepSeek "
        "V2 and V3",
        f"llama.cpp's own converter may know it: git clone https://github.com/ggml-org/llama.cpp && "
        f"python llama.cpp/convert_hf_to_gguf.py {folder} --outfile model.gguf --outtype f16",
        code="not-convertible",
    )


class Architecture:
    """A checkpoint's decoder, as GGUF names it. This class is a llama without a llama's peculiarities."""

    name: ClassVar[str]
    biases: ClassVar[frozenset[str]] = frozenset()  # matrices whose bias llama.cpp loads
    activation: ClassVar[str] = "silu"
    rope_types: ClassVar[frozenset[str]] = frozenset({"default", "linear", "yarn"})
    default_theta: ClassVar[float] = 10000.0
    n_experts = n_ff_expert = 0

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Check that a GGUF can express everything that the config asks for.

        Raises:
            ModelError: `code` "not-convertible": the format or llama.cpp lacks a setting.
            ArtifactError: `code` "config-broken", "tensor-missing" or "tensor-mismatch".
        """
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.n_layers, self.n_heads = self.number("num_hidden_layers"), self.number("num_attention_heads")
        self.n_embd, self.n_ff = self.number("hidden_size"), self.number("intermediate_size")
        self.n_kv_heads = int(self.config.get("num_key_value_heads") or self.n_heads)
        self.head_dim = int(self.config.get("head_dim") or self.n_embd // self.n_heads)
        self.tied = bool(self.config.get("tie_word_embeddings", False))
        self.rope = rope_settings(self.config)
        for fault, is_there in self.faults().items():
            if is_there:
                raise use_llama_cpp(f"{self.name} with {fault}", checkpoint.folder)
        self.n_vocab = self.find("model.embed_tokens.weight").shape[0]
        self._used = {"lm_head.weight"} if self.tied else set[str]()

    @property
    def shape(self) -> Shape:
        """The numbers that the type mixtures look at."""
        return Shape(self.name, self.n_layers, self.n_heads, self.n_kv_heads, self.tied, self.n_experts)

    def number(self, key: str) -> int:
        """Return a positive whole number of the config.

        Raises:
            ArtifactError: `code` "config-broken": there is none.
        """
        value = self.config.get(key)
        if not isinstance(value, int) or value <= 0:
            raise ArtifactError(f"{self.checkpoint.folder}/config.json has no {key}", code="config-broken")
        return value

    def faults(self) -> dict[str, Any]:
        """Return the settings that GGUF or llama.cpp lacks, each with whether this config asks for it."""
        layers = self.config.get("layer_types") or []
        kind = self.rope["rope_type"]
        return {
            "hidden_act": self.config.get("hidden_act", self.activation) != self.activation,
            "sliding-window attention": self.config.get("use_sliding_window") or "sliding_attention" in layers,
            "partial_rotary_factor": float(self.rope.get("partial_rotary_factor") or 1) != 1,
            f"RoPE scaling {kind!r}": kind not in self.rope_types,
            "YaRN's mscale": self.rope.get("mscale") or self.rope.get("mscale_all_dim"),
        }

    def find(self, name: str) -> Weight:
        """Return a tensor of the checkpoint.

        Raises:
            ArtifactError: `code` "tensor-missing".
        """
        if name not in self.checkpoint.tensors:
            hint = "set tie_word_embeddings in config.json if it shares the embeddings" if "lm_head" in name else ""
            raise ArtifactError(f"{self.checkpoint.folder} has no tensor {name}", hint, code="tensor-missing")
        return self.checkpoint.tensors[name]

    def tensors(self) -> list[Planned]:
        """Return every tensor of the file in order.

        Raises:
            ArtifactError: `code` "tensor-missing", or "tensor-mismatch": its shape is not the config's.
            ModelError: `code` "not-convertible": the checkpoint has a tensor that this architecture does not have.
        """
        planned = list(self.layout())
        unknown = [n for n in self.checkpoint.tensors if n not in self._used and not self.ignores(n)]
        if unknown:
            raise use_llama_cpp(f"{self.name} with the tensor {unknown[0]}", self.checkpoint.folder)
        return planned

    def ignores(self, name: str) -> bool:
        """Say whether a GGUF has no use for a tensor of the checkpoint."""
        return name.endswith("rotary_emb.inv_freq")

    def layout(self) -> Iterator[Planned]:
        """Yield the tensors of the file."""
        yield from self.take("token_embd.weight", "model.embed_tokens.weight", shape=(self.n_vocab, self.n_embd))
        for i in range(self.n_layers):
            yield from self.layer(i, f"blk.{i}.", f"model.layers.{i}.")
        yield from self.norm("output_norm.weight", "model.norm.weight")
        if not self.tied:
            yield from self.take("output.weight", "lm_head.weight", shape=(self.n_vocab, self.n_embd))

    def layer(self, i: int, new: str, old: str) -> Iterator[Planned]:
        """Yield the tensors of a layer."""
        yield from self.norm(f"{new}attn_norm.weight", f"{old}input_layernorm.weight")
        yield from self.attention(new, f"{old}self_attn.")
        yield from self.norm(f"{new}ffn_norm.weight", f"{old}post_attention_layernorm.weight")
        yield from self.mlp(i, new, f"{old}mlp.")

    def norm(self, name: str, source: str, n: int = 0) -> Iterator[Planned]:
        """Yield the weight of a norm over n numbers, the model's width if not given."""
        yield from self.take(name, source, shape=(n or self.n_embd,))

    def attention(self, new: str, old: str) -> Iterator[Planned]:
        """Yield a layer's attention."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        shapes = {"attn_q": (q, self.n_embd), "attn_k": (kv, self.n_embd), "attn_v": (kv, self.n_embd)}
        for source, part in ATTENTION.items():
            yield from self.linear(new + part, old + source, shapes.get(part, (self.n_embd, q)))

    def mlp(self, i: int, new: str, old: str) -> Iterator[Planned]:
        """Yield a layer's feed-forward network."""
        for source, part in MLP.items():
            shape = (self.n_embd, self.n_ff) if part == "ffn_down" else (self.n_ff, self.n_embd)
            yield from self.linear(new + part, old + source, shape)

    def linear(self, name: str, source: str, shape: tuple[int, int]) -> Iterator[Planned]:
        """Yield a matrix, and its bias where there is one and llama.cpp loads it."""
        yield from self.take(f"{name}.weight", f"{source}.weight", shape=shape)
        if name.rpartition(".")[2] in self.biases and f"{source}.bias" in self.checkpoint.tensors:
            yield from self.take(f"{name}.bias", f"{source}.bias", shape=shape[:1])

    def take(
        self,
        name: str,
        source: str,
        *,
        shape: tuple[int, ...],
        change: Callable[[Floats], Floats] | None = None,
        stored: tuple[int, ...] | None = None,
        unit: int = 1,
    ) -> Iterator[Planned]:
        """Yield one tensor of the checkpoint, whose shape there is `stored` if it differs.

        `change` takes rows in multiples of `unit` and returns `[n_rows, n_per_row]`.

        Raises:
            ArtifactError: `code` "tensor-missing", or "tensor-mismatch": its shape is not the config's.
        """
        weight = self._use(source, stored or shape)
        yield Planned(name, shape, partial(_read, [(weight, 0, weight.shape[0])], change=change, unit=unit))

    def _use(self, source: str, shape: tuple[int, ...]) -> Weight:
        """Return a tensor of the checkpoint, checked, and remember that the file has it."""
        weight = self.find(source)
        self._check(weight, shape)
        self._used.add(source)
        return weight

    def _check(self, weight: Weight, shape: tuple[int, ...]) -> None:
        if weight.shape != shape:
            raise ArtifactError(
                f"{weight.name} is {list(weight.shape)}, but config.json makes it {list(shape)}",
                "config.json belongs to another checkpoint",
                code="tensor-mismatch",
            )

    def experts(self, new: str, old: str, n_ff: int) -> Iterator[Planned]:
        """Yield a layer's experts as three stacks, from one matrix an expert or from transformers' fused tensors."""
        wide, tall = (n_ff, self.n_embd), (self.n_embd, n_ff)
        for source, part in MLP.items():
            shape, fused = (tall if part == "ffn_down" else wide), self._fused(old, source, n_ff)
            names = [f"{old}experts.{i}.{source}.weight" for i in range(self.n_experts)]
            spans = fused or [(self._use(name, shape), 0, shape[0]) for name in names]
            yield Planned(f"{new}{part}_exps.weight", (self.n_experts, *shape), partial(_read, spans))

    def _fused(self, old: str, source: str, n_ff: int) -> list[Span] | None:
        down = source == "down_proj"
        weight = self.checkpoint.tensors.get(f"{old}experts.{source if down else 'gate_up_proj'}")
        if not isinstance(weight, Tensor):
            return None
        n_rows = self.n_embd if down else 2 * n_ff
        self._check(weight, (self.n_experts, n_rows, n_ff if down else self.n_embd))
        self._used.add(weight.name)
        start, n = (n_ff if source == "up_proj" else 0), (n_rows if down else n_ff)
        return [(weight.flat(), i * n_rows + start, i * n_rows + start + n) for i in range(self.n_experts)]

    def write_parameters(self, writer: GGUFWriter) -> None:
        """Add the architecture's numbers to a file's metadata."""
        writer.add_block_count(self.n_layers)
        if n_ctx := self.config.get("max_position_embeddings"):
            writer.add_context_length(n_ctx)
        writer.add_embedding_length(self.n_embd)
        writer.add_feed_forward_length(self.n_ff)
        writer.add_head_count(self.n_heads)
        writer.add_head_count_kv(self.n_kv_heads)
        self.write_heads(writer)
        writer.add_layer_norm_rms_eps(float(self.config.get("rms_norm_eps", 1e-6)))
        writer.add_vocab_size(self.n_vocab)
        if self.n_experts:
            writer.add_expert_count(self.n_experts)
            writer.add_expert_used_count(self.number("num_experts_per_tok"))
            writer.add_expert_feed_forward_length(self.n_ff_expert)
        writer.add_rope_freq_base(float(self.rope.get("rope_theta") or self.default_theta))
        write_rope(writer, self.rope, self.config)

    def write_heads(self, writer: GGUFWriter) -> None:
        """Add the sizes of the heads."""
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_rope_dimension_count(self.head_dim)


def _read(
    spans: Iterable[Span], part_size: int, *, change: Callable[[Floats], Floats] | None = None, unit: int = 1
) -> Rows:
    """Yield the rows of several weights, in parts of whole units, changed on the way."""
    for weight, start, stop in spans:
        n_per_row = weight.shape[-1] if len(weight.shape) > 1 else 1
        step = max(1, part_size // n_per_row // unit) * unit
        for at in range(start, stop, step):
            rows = weight.rows(slice(at, min(stop, at + step)))
            yield change(rows) if change else rows
