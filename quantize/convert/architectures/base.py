"""What every dense or sparse decoder has in common: reading a checkpoint's tensors in parts, and the usual parameters.

An architecture says which tensors it has, under which GGUF names, and what happens to their rows on the way. Whatever a
config asks for that the GGUF architecture cannot say is refused: a file that loads and computes something else is worse
than none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
_PART = 1 << 22  # elements read, changed and quantized at a time: 16 MiB of float32
Floats = npt.NDArray[np.float32]
Rows = Iterator[Floats]


@dataclass(frozen=True)
class Planned:
    """One tensor of the file to be written: its name, numpy shape, and how to read it in parts of whole rows.

    A part is `[n_rows, n_per_row]`, of a stack of matrices too, or `[n]` of a vector.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Rows]


def use_llama_cpp(what: str, folder: object) -> ModelError:
    """Return the error for what this converter does not know, saying how llama.cpp's does it."""
    return ModelError(
        f"{what} cannot be converted here: llama, Qwen2, Qwen3, Qwen3-MoE, Gemma 3 (text) and DeepSeek V2 and V3 can",
        f"llama.cpp's own converter may know it: git clone https://github.com/ggml-org/llama.cpp && "
        f"python llama.cpp/convert_hf_to_gguf.py {folder} --outfile model.gguf --outtype f16",
    )


class Architecture:
    """A checkpoint's decoder, as GGUF names it: this class is a llama's without what is a llama's own."""

    name: ClassVar[str]
    biases: ClassVar[frozenset[str]] = frozenset()  # of the parts that llama.cpp loads one for
    activation: ClassVar[str] = "silu"
    rope_types: ClassVar[frozenset[str]] = frozenset({"default", "linear", "yarn"})
    default_theta: ClassVar[float] = 10000.0
    n_experts = 0

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Check that everything the config asks for can be said in a GGUF.

        Raises:
            ModelError: a setting that the format or llama.cpp does not have.
            ArtifactError: the config lacks a number, or the tensors do not fit it.
        """
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.n_layers, self.n_heads = self.number("num_hidden_layers"), self.number("num_attention_heads")
        self.n_embd, self.n_ff = self.number("hidden_size"), self.number("intermediate_size")
        self.n_kv_heads = int(self.config.get("num_key_value_heads") or self.n_heads)
        self.head_dim = int(self.config.get("head_dim") or self.n_embd // self.n_heads)
        self.tied = bool(self.config.get("tie_word_embeddings", False))
        self.rope = rope_settings(self.config)
        for what, found in self.faults().items():
            if found:
                raise use_llama_cpp(f"{self.name} with {what}", checkpoint.folder)
        self.n_vocab = self.find("model.embed_tokens.weight").shape[0]
        self._used = {"lm_head.weight"} if self.tied else set[str]()

    @property
    def shape(self) -> Shape:
        """What the type mixtures look at."""
        return Shape(self.name, self.n_layers, self.n_heads, self.n_kv_heads, self.tied, self.n_experts)

    def number(self, key: str) -> int:
        """Return a positive whole number of the config.

        Raises:
            ArtifactError: it is not there.
        """
        value = self.config.get(key)
        if not isinstance(value, int) or value <= 0:
            raise ArtifactError(f"{self.checkpoint.folder}/config.json has no {key}")
        return value

    def faults(self) -> dict[str, Any]:
        """Return what GGUF or llama.cpp could not say, and whether this config asks for it."""
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
            ArtifactError: it is not there.
        """
        if name not in self.checkpoint.tensors:
            hint = "set tie_word_embeddings in config.json if it shares the embeddings" if "lm_head" in name else ""
            raise ArtifactError(f"{self.checkpoint.folder} has no tensor {name}", hint)
        return self.checkpoint.tensors[name]

    def tensors(self) -> list[Planned]:
        """Return every tensor of the file in order.

        Raises:
            ArtifactError: one is missing or has another shape than the config says.
            ModelError: the checkpoint holds one that this architecture does not have.
        """
        planned = list(self.layout())
        unknown = [n for n in self.checkpoint.tensors if n not in self._used and not self.ignores(n)]
        if unknown:
            raise use_llama_cpp(f"{self.name} with a tensor {unknown[0]}", self.checkpoint.folder)
        return planned

    def ignores(self, name: str) -> bool:
        """Say whether a tensor of the checkpoint is of no use in a GGUF."""
        return name.endswith("rotary_emb.inv_freq")

    def layout(self) -> Iterator[Planned]:
        """Yield the tensors of the file."""
        yield from self.take("token_embd.weight", "model.embed_tokens.weight", (self.n_vocab, self.n_embd))
        for i in range(self.n_layers):
            old, new = f"model.layers.{i}", f"blk.{i}"
            yield from self.norm(f"{new}.attn_norm.weight", f"{old}.input_layernorm.weight")
            yield from self.attention(f"{new}.", f"{old}.self_attn.")
            yield from self.norm(f"{new}.ffn_norm.weight", f"{old}.post_attention_layernorm.weight")
            yield from self.mlp(i, f"{new}.", f"{old}.mlp.")
        yield from self.norm("output_norm.weight", "model.norm.weight")
        if not self.tied:
            yield from self.take("output.weight", "lm_head.weight", (self.n_vocab, self.n_embd))

    def norm(self, name: str, source: str, n: int = 0) -> Iterator[Planned]:
        """Yield the weight of a norm over n numbers, the model's width if not given."""
        yield from self.take(name, source, (n or self.n_embd,))

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
        yield from self.take(f"{name}.weight", f"{source}.weight", shape)
        if name.rpartition(".")[2] in self.biases and f"{source}.bias" in self.checkpoint.tensors:
            yield from self.take(f"{name}.bias", f"{source}.bias", shape[:1])

    def take(
        self,
        name: str,
        source: str,
        shape: tuple[int, ...],
        change: Callable[[Floats], Floats] | None = None,
        *,
        stored: tuple[int, ...] | None = None,
        unit: int = 1,
    ) -> Iterator[Planned]:
        """Yield one tensor of the checkpoint, of the shape that it has there unless `stored` says another.

        `change` is given rows in whole units of `unit` rows and returns `[n_rows, n_per_row]`.

        Raises:
            ArtifactError: it is missing, or its shape is not what the config says.
        """
        weight = self.find(source)
        self._check(weight, stored or shape)
        self._used.add(source)
        yield Planned(name, shape, partial(read_parts, weight, 0, weight.shape[0], change, unit))

    def _check(self, weight: Weight, shape: tuple[int, ...]) -> None:
        if weight.shape != shape:
            raise ArtifactError(
                f"{weight.name} is {list(weight.shape)} and config.json makes it {list(shape)}",
                "config.json belongs to another checkpoint",
            )

    def experts(self, new: str, old: str, n_ff: int) -> Iterator[Planned]:
        """Yield a layer's experts as three stacks, from one matrix an expert or from transformers' fused tensors."""
        wide, tall = (n_ff, self.n_embd), (self.n_embd, n_ff)
        for source, part in MLP.items():
            shape, fused = (tall if part == "ffn_down" else wide), self._fused(old, source, n_ff)
            spans = fused or list(self._single(old, source, shape))
            yield Planned(f"{new}{part}_exps.weight", (self.n_experts, *shape), partial(read_spans, spans))

    def _single(self, old: str, source: str, shape: tuple[int, int]) -> Iterator[tuple[Weight, int, int]]:
        for i in range(self.n_experts):
            weight = self.find(f"{old}experts.{i}.{source}.weight")
            self._check(weight, shape)
            self._used.add(weight.name)
            yield weight, 0, shape[0]

    def _fused(self, old: str, source: str, n_ff: int) -> list[tuple[Weight, int, int]] | None:
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
        writer.add_rope_freq_base(float(self.rope.get("rope_theta") or self.default_theta))
        write_rope(writer, self.rope, self.config)

    def write_heads(self, writer: GGUFWriter) -> None:
        """Add the sizes of the heads."""
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_rope_dimension_count(self.head_dim)


def read_parts(
    weight: Weight, start: int, stop: int, change: Callable[[Floats], Floats] | None = None, unit: int = 1
) -> Rows:
    """Yield rows of a weight in parts of whole units, changed on the way."""
    n_per_row = weight.shape[-1] if len(weight.shape) > 1 else 1
    step = max(1, _PART // n_per_row // unit) * unit
    for at in range(start, stop, step):
        rows = weight.rows(slice(at, min(stop, at + step)))
        yield change(rows) if change else rows


def read_spans(spans: list[tuple[Weight, int, int]]) -> Rows:
    """Yield the rows of several weights, one after the other."""
    for weight, start, stop in spans:
        yield from read_parts(weight, start, stop)
