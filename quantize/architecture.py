"""What a checkpoint's architecture becomes in a GGUF: tensor names and order, row permutation, hyper-parameters, RoPE.

llama, Qwen2 and Qwen3 are converted. Whatever a config asks for that the GGUF architecture cannot say is refused: a
file that loads and computes something else is worse than none.

llama.cpp rotates neighbouring pairs of a llama head's rows, transformers the two halves: q and k rows change places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter, RopeScalingType

from ..errors import ArtifactError, ModelError
from .checkpoint import Checkpoint, Tensor
from .ftypes import Shape

_ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
_ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
_MLP = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
_BIASES = {  # what llama.cpp loads
    "llama": frozenset({*_ATTENTION.values(), *_MLP.values()}),
    "qwen2": frozenset({"attn_q", "attn_k", "attn_v"}),
    "qwen3": frozenset({"attn_q", "attn_k", "attn_v"}),
}
_PART = 1 << 24  # elements read, permuted and quantized at a time: 64 MiB of float32
Rows = Iterator[npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Planned:
    """One tensor of the file to be written: its name, numpy shape, and how to read it in parts of whole rows."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Rows]


def use_llama_cpp(what: str, folder: object) -> ModelError:
    """Return the error for what this converter does not know, saying how llama.cpp's does it."""
    return ModelError(
        f"{what} cannot be converted here: llama, Qwen2 and Qwen3 with a byte-level BPE tokenizer can",
        f"llama.cpp's own converter may know it: git clone https://github.com/ggml-org/llama.cpp && "
        f"python llama.cpp/convert_hf_to_gguf.py {folder} --outfile model.gguf --outtype f16",
    )


class Architecture:
    """A checkpoint's dense transformer, as GGUF names it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Check that everything the config asks for can be said in a GGUF.

        Raises:
            ModelError: another architecture, or a setting that the format or llama.cpp does not have.
            ArtifactError: the config lacks a number, or the tensors do not fit it.
        """
        self.checkpoint, self.config = checkpoint, checkpoint.config
        names = self.config.get("architectures") or [self.config.get("model_type", "an unnamed architecture")]
        if names[0] not in _ARCHITECTURES:
            raise use_llama_cpp(f"{names[0]}", checkpoint.folder)
        self.name = _ARCHITECTURES[names[0]]
        self.n_layers, self.n_heads = self._number("num_hidden_layers"), self._number("num_attention_heads")
        self.n_embd, self.n_ff = self._number("hidden_size"), self._number("intermediate_size")
        self.n_kv_heads = int(self.config.get("num_key_value_heads") or self.n_heads)
        self.head_dim = int(self.config.get("head_dim") or self.n_embd // self.n_heads)
        self.tied = bool(self.config.get("tie_word_embeddings", False))
        self.rope = _rope(self.config)
        self._check_settings()
        self.n_vocab = self._find("model.embed_tokens.weight").shape[0]

    @property
    def shape(self) -> Shape:
        """What the type mixtures look at."""
        return Shape(self.name, self.n_layers, self.n_heads, self.n_kv_heads, self.tied)

    def _number(self, key: str) -> int:
        value = self.config.get(key)
        if not isinstance(value, int) or value <= 0:
            raise ArtifactError(f"{self.checkpoint.folder}/config.json has no {key}")
        return value

    def _check_settings(self) -> None:
        layers = self.config.get("layer_types") or []
        faults = {
            "hidden_act": self.config.get("hidden_act", "silu") != "silu",
            "sliding-window attention": bool(self.config.get("use_sliding_window")) or "sliding_attention" in layers,
            "partial_rotary_factor": float(self.rope.get("partial_rotary_factor") or 1) != 1,
            f"RoPE scaling {self.rope['rope_type']!r}": self.rope["rope_type"] not in self._rope_types(),
            "YaRN's mscale": bool(self.rope.get("mscale") or self.rope.get("mscale_all_dim")),
            "a head size that is not hidden_size / heads": self.name == "qwen2"
            and self.head_dim * self.n_heads != self.n_embd,
        }
        for what, found in faults.items():
            if found:
                raise use_llama_cpp(f"{self.name} with {what}", self.checkpoint.folder)

    def _rope_types(self) -> set[str]:
        # Only llama's graph reads the per-frequency factors that llama3's scaling becomes.
        return {"default", "linear", "yarn"} | ({"llama3"} if self.name == "llama" else set())

    def _find(self, name: str) -> Tensor:
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
        planned, used = [], {"lm_head.weight"} if self.tied else set[str]()
        for name, source, shape in self._layout():
            biased = source.endswith(".bias")
            if biased and source not in self.checkpoint.tensors:
                continue
            tensor = self._find(source)
            if tensor.shape != shape:
                raise ArtifactError(
                    f"{source} is {list(tensor.shape)} and config.json makes it {list(shape)}",
                    "config.json belongs to another checkpoint",
                )
            used.add(source)
            planned.append(Planned(name, shape, self._reader(tensor, name)))
        unknown = [n for n in self.checkpoint.tensors if n not in used and not n.endswith("rotary_emb.inv_freq")]
        if unknown:
            raise use_llama_cpp(f"{self.name} with a tensor {unknown[0]}", self.checkpoint.folder)
        if self.rope["rope_type"] == "llama3":
            factors = llama3_factors(self.rope, self.head_dim)
            planned.insert(1, Planned("rope_freqs.weight", factors.shape, lambda: iter([factors])))
        return planned

    def _layout(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Yield (GGUF name, checkpoint name, shape), biases included whether or not they are there."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        rows = {"attn_q": q, "attn_k": kv, "attn_v": kv, "attn_output": self.n_embd}
        rows |= {"ffn_gate": self.n_ff, "ffn_up": self.n_ff, "ffn_down": self.n_embd}
        columns = {"attn_output": q, "ffn_down": self.n_ff}
        yield "token_embd.weight", "model.embed_tokens.weight", (self.n_vocab, self.n_embd)
        for i in range(self.n_layers):
            old, new = f"model.layers.{i}", f"blk.{i}"
            yield f"{new}.attn_norm.weight", f"{old}.input_layernorm.weight", (self.n_embd,)
            for block, parts in (("self_attn", _ATTENTION), ("mlp", _MLP)):
                if block == "mlp":
                    yield f"{new}.ffn_norm.weight", f"{old}.post_attention_layernorm.weight", (self.n_embd,)
                for source, part in parts.items():
                    yield (
                        f"{new}.{part}.weight",
                        f"{old}.{block}.{source}.weight",
                        (
                            rows[part],
                            columns.get(part, self.n_embd),
                        ),
                    )
                    if part in _BIASES[self.name]:
                        yield f"{new}.{part}.bias", f"{old}.{block}.{source}.bias", (rows[part],)
            if self.name == "qwen3":
                for norm in ("q", "k"):
                    yield f"{new}.attn_{norm}_norm.weight", f"{old}.self_attn.{norm}_norm.weight", (self.head_dim,)
        yield "output_norm.weight", "model.norm.weight", (self.n_embd,)
        if not self.tied:
            yield "output.weight", "lm_head.weight", (self.n_vocab, self.n_embd)

    def _reader(self, tensor: Tensor, name: str) -> Callable[[], Rows]:
        part = name.split(".")[-2]
        n_heads = {"attn_q": self.n_heads, "attn_k": self.n_kv_heads}.get(part) if self.name == "llama" else None
        n_per_row = tensor.shape[-1] if len(tensor.shape) > 1 else 1
        step = max(1, _PART // n_per_row)
        if n_heads:  # whole heads, so that a part can be permuted by itself
            step = max(1, step // self.head_dim) * self.head_dim

        def read() -> Rows:
            for start in range(0, tensor.shape[0], step):
                rows = tensor.rows(slice(start, start + step))
                yield permute(rows, rows.shape[0] // self.head_dim) if n_heads else rows

        return read

    def write_parameters(self, writer: GGUFWriter) -> None:
        """Add the architecture's numbers to a file's metadata."""
        writer.add_block_count(self.n_layers)
        if n_ctx := self.config.get("max_position_embeddings"):
            writer.add_context_length(n_ctx)
        writer.add_embedding_length(self.n_embd)
        writer.add_feed_forward_length(self.n_ff)
        writer.add_head_count(self.n_heads)
        writer.add_head_count_kv(self.n_kv_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_layer_norm_rms_eps(float(self.config.get("rms_norm_eps", 1e-6)))
        writer.add_vocab_size(self.n_vocab)
        writer.add_rope_freq_base(float(self.rope.get("rope_theta") or 10000.0))
        self._write_rope(writer)

    def _write_rope(self, writer: GGUFWriter) -> None:
        kind = self.rope["rope_type"]
        if kind not in ("linear", "yarn"):
            return
        factor = float(self.rope["factor"])
        writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        if kind == "yarn":
            original = self.rope.get("original_max_position_embeddings") or self.config["max_position_embeddings"]
            writer.add_rope_scaling_orig_ctx_len(int(original))
            writer.add_rope_scaling_yarn_beta_fast(float(self.rope.get("beta_fast") or 32))
            writer.add_rope_scaling_yarn_beta_slow(float(self.rope.get("beta_slow") or 1))
            if attention := self.rope.get("attention_factor"):
                # transformers takes it as the whole factor; llama.cpp multiplies it with YaRN's own.
                own = 1 + 0.1 * math.log(factor) if factor > 1 else 1.0
                writer.add_rope_scaling_attn_factors(float(attention) / own)


def permute(rows: npt.NDArray[np.float32], n_heads: int) -> npt.NDArray[np.float32]:
    """Interleave the two halves of each head's rows `[n_heads * head_dim, ...]`: 0, d/2, 1, d/2 + 1, …"""
    halves = rows.reshape(n_heads, 2, rows.shape[0] // n_heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return the RoPE settings as transformers 5 writes them, from either generation of config."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    found.setdefault("rope_theta", config.get("rope_theta"))
    found.setdefault("partial_rotary_factor", config.get("partial_rotary_factor"))
    if found["rope_type"] in ("linear", "yarn", "llama3") and not found.get("factor"):
        raise ArtifactError(f"config.json asks for {found['rope_type']} RoPE scaling without a factor")
    return found


def llama3_factors(rope: dict[str, Any], head_dim: int) -> npt.NDArray[np.float32]:
    """Return what divides each RoPE frequency `[head_dim / 2]` under Llama 3's scaling.

    Long waves are slowed by `factor`, short ones kept, those between interpolated.

    Source: transformers, modeling_rope_utils._compute_llama3_parameters.
    """
    low, high = float(rope.get("low_freq_factor", 1)), float(rope.get("high_freq_factor", 4))
    original, factor = float(rope.get("original_max_position_embeddings", 8192)), float(rope["factor"])
    base = float(rope.get("rope_theta") or 10000.0)
    frequencies = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    waves = 2 * np.pi / frequencies
    smooth = np.clip((original / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
