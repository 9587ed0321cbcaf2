"""The shape of a decoder and its parameters, computed from its config.json alone.

It covers decoders of gated feed-forward layers (SwiGLU) with multi-head, grouped-query or latent attention, dense or
with routed and shared experts: the Llama, Qwen and DeepSeek families and what is built like them. Multi-token
prediction modules are left out: serving a teacher does not need them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ...errors import ArtifactError, UsageError
from .catalogue import MODELS
from .kv_cache import kv_numbers

_C = TypeVar("_C", dict[str, Any], list[Any])
Dtype = Literal["bf16", "fp8", "int8", "int4", "nvfp4", "mxfp4"]

BITS: dict[Dtype, float] = {  # a weight, with its share of the block's scale
    "bf16": 16,
    "fp8": 8 + 32 / 128**2,  # DeepSeek's blocks of 128 × 128
    "int8": 8 + 16 / 128,
    "int4": 4 + 20 / 128,  # AWQ and GPTQ, groups of 128: a scale and a zero point
    "nvfp4": 4 + 8 / 16,
    "mxfp4": 4 + 8 / 32,
}
_CHECKED = {"llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3"}


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (arXiv 2405.04434): each token has one compressed key-value for all heads."""

    kv_rank: int
    q_rank: int | None
    nope_dim: int
    rope_dim: int
    v_dim: int


@dataclass(frozen=True)
class Experts:
    """Routed experts in `n_layers` layers: a token takes `n_active` of `n`, and `shared_width` always works."""

    n: int
    n_active: int
    width: int
    shared_width: int
    n_layers: int
    has_bias: bool


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder. `latent` and `experts` are None where it has none.

    The KV cache holds `kv_numbers` for a token over all layers; it would hold `plain_kv_numbers` if every head kept a
    key and a value of its own.
    """

    model_type: str
    n_layers: int
    hidden: int
    vocab: int
    width: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    tied: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    latent: Latent | None
    experts: Experts | None
    context: int | None
    published_dtype: Dtype
    kv_numbers: int
    plain_kv_numbers: int

    @property
    def is_checked(self) -> bool:
        """Whether the counts of this model type were compared with a reference implementation."""
        return self.model_type in _CHECKED


@dataclass(frozen=True)
class Parameters:
    """How many parameters each part of a decoder has. `vectors` are norms and biases."""

    embedding: int
    head: int
    attention: int
    dense: int
    experts: int
    routers: int
    vectors: int
    active_experts: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.head + self.in_blocks + self.routers + self.vectors

    @property
    def active(self) -> int:
        """The parameters that a token is multiplied with: looking up its embedding is no product."""
        return self.total - self.experts + self.active_experts - (self.embedding if self.head else 0)

    @property
    def in_blocks(self) -> int:
        """The matrices that quantization touches: embedding, head, routers and vectors stay in 16 bits."""
        return self.attention + self.dense + self.experts

    def bytes(self, dtype: Dtype) -> float:
        """Return the bytes of all weights."""
        return (self.in_blocks * BITS[dtype] + (self.total - self.in_blocks) * 16) / 8

    def expert_bytes(self, dtype: Dtype) -> float:
        """Return the bytes of the routed experts."""
        return self.experts * BITS[dtype] / 8


def load_shape(teacher: str) -> tuple[str, str, DecoderShape]:
    """Return (name, source of the config, shape) of a known model, a config.json or a folder that holds one.

    Raises:
        UsageError: `code` "no-such-model".
        ArtifactError: `code` "config-broken" or "model-not-covered".
    """
    key = teacher.removeprefix("hf:").rstrip("/").lower()
    for model in MODELS:
        if key in (model.repo.lower(), model.repo.partition("/")[2].lower()):
            return model.repo.partition("/")[2], model.source, read_shape(model.config, model.source)
    path = Path(teacher)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        names = ", ".join(model.repo.partition("/")[2] for model in MODELS)
        raise UsageError(
            f"{teacher!r} is neither a known model nor a file",
            f"give a config.json, or one of {names}",
            code="no-such-model",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _broken(f"cannot read {path}: {error}") from error
    if not isinstance(config, dict):
        raise _broken(f"{path} holds no JSON object")
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return name, str(path), read_shape(config, str(path))


def read_shape(config: Mapping[str, Any], where: str) -> DecoderShape:
    """Return the shape that a config.json describes: the text part of a multimodal model.

    Raises:
        ArtifactError: `code` "config-broken" or "model-not-covered".
    """
    fields = _Fields(config, where)
    fields = _Fields({**config, **fields.container("text_config", dict)}, where)
    _refuse_uncovered(fields)
    model_type = str(fields.values.get("model_type", ""))
    n_layers, hidden, n_heads = fields["num_hidden_layers"], fields["hidden_size"], fields["num_attention_heads"]
    is_fp8 = fields.container("quantization_config", dict).get("quant_method") == "fp8"
    has_bias = bool(fields.values.get("attention_bias", False))
    latent = _latent(fields)
    n_kv_heads = fields.get("num_key_value_heads") or n_heads
    cached, plain = kv_numbers(fields.values)
    return DecoderShape(
        model_type=model_type,
        n_layers=n_layers,
        hidden=hidden,
        vocab=fields["vocab_size"],
        width=fields["intermediate_size"],
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=fields.get("head_dim") or hidden // n_heads,
        tied=bool(fields.values.get("tie_word_embeddings", True)),
        qkv_bias=has_bias or model_type.startswith("qwen2"),
        o_bias=has_bias,
        qk_norm=model_type.startswith("qwen3"),
        latent=latent,
        experts=_experts(fields, n_layers),
        context=fields.get("max_position_embeddings"),
        published_dtype="fp8" if is_fp8 else "bf16",
        kv_numbers=cached,
        plain_kv_numbers=plain,
    )


def count_parameters(shape: DecoderShape) -> Parameters:
    """Return how many parameters a decoder of this shape has."""
    experts = shape.experts
    n_sparse = experts.n_layers if experts else 0
    attention, vectors = _attention(shape)
    one_expert = 3 * shape.hidden * experts.width if experts else 0
    shared = 3 * shape.hidden * experts.shared_width if experts else 0
    return Parameters(
        embedding=shape.vocab * shape.hidden,
        head=0 if shape.tied else shape.vocab * shape.hidden,
        attention=shape.n_layers * attention,
        dense=(shape.n_layers - n_sparse) * 3 * shape.hidden * shape.width + n_sparse * shared,
        experts=n_sparse * experts.n * one_expert if experts else 0,
        routers=n_sparse * experts.n * (shape.hidden + experts.has_bias) if experts else 0,
        vectors=shape.n_layers * (vectors + 2 * shape.hidden) + shape.hidden,
        active_experts=n_sparse * experts.n_active * one_expert if experts else 0,
    )


def _attention(shape: DecoderShape) -> tuple[int, int]:
    """Return (matrices, vectors) of one layer's attention."""
    hidden, latent = shape.hidden, shape.latent
    if latent:
        queries = shape.n_heads * (latent.nope_dim + latent.rope_dim)
        down = hidden * (latent.q_rank or 0) + hidden * (latent.kv_rank + latent.rope_dim)
        up = (latent.q_rank or hidden) * queries
        up += latent.kv_rank * shape.n_heads * (latent.nope_dim + latent.v_dim)
        return down + up + shape.n_heads * latent.v_dim * hidden, (latent.q_rank or 0) + latent.kv_rank
    queries, keys = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    vectors = shape.qkv_bias * (queries + 2 * keys) + shape.o_bias * hidden + shape.qk_norm * 2 * shape.head_dim
    return 2 * hidden * queries + 2 * hidden * keys, vectors


class _Fields:
    """The whole numbers of a config; an error names the missing field."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def __getitem__(self, name: str) -> int:
        value = self.get(name)
        if value is None:
            raise _broken(f"{self.where} has no {name}")
        if value == 0:
            raise _broken(f"{self.where}: {name} is 0")
        return value

    def get(self, *names: str) -> int | None:
        """Return the first of these fields that is present and not null."""
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise _broken(f"{self.where}: {name} is {value!r}, not a count")
            return value
        return None

    def container(self, name: str, kind: type[_C]) -> _C:
        """Return a field that is an object or a list; an empty one if it is missing or null."""
        value = self.values.get(name) or kind()
        if not isinstance(value, kind):
            raise _broken(f"{self.where}: {name} is {value!r}, not a {kind.__name__}")
        return value


def _refuse_uncovered(fields: _Fields) -> None:
    kinds = set(map(str, fields.container("layer_types", list))) - {"full_attention", "sliding_attention"}
    if kinds or fields.values.get("is_encoder_decoder") or "ssm_cfg" in fields.values:
        what = ", ".join(sorted(kinds)) or "not a plain decoder"
        raise ArtifactError(
            f"{fields.where} describes layers that a plan does not cover: {what}",
            "a plan covers decoders with attention in every layer: the Llama, Qwen and DeepSeek families",
            code="model-not-covered",
        )


def _broken(message: str) -> ArtifactError:
    return ArtifactError(message, "a plan needs the config.json of a whole decoder", code="config-broken")


def _latent(fields: _Fields) -> Latent | None:
    if fields.get("kv_lora_rank") is None:
        return None
    return Latent(
        fields["kv_lora_rank"],
        fields.get("q_lora_rank"),
        fields["qk_nope_head_dim"],
        fields["qk_rope_head_dim"],
        fields["v_head_dim"],
    )


def _experts(fields: _Fields, n_layers: int) -> Experts | None:
    n = fields.get("n_routed_experts", "num_experts", "num_local_experts")
    if not n:
        return None
    width = fields.get("moe_intermediate_size") or fields["intermediate_size"]
    step = fields.get("decoder_sparse_step", "moe_layer_freq") or 1
    first = fields.get("first_k_dense_replace") or 0
    dense = fields.container("mlp_only_layers", list)
    offset = 1 if "decoder_sparse_step" in fields.values else 0
    n_sparse = sum(i >= first and i not in dense and (i + offset) % step == 0 for i in range(n_layers))
    shared = fields.get("shared_expert_intermediate_size") or (fields.get("n_shared_experts") or 0) * width
    is_v3 = fields.values.get("model_type") in ("deepseek_v3", "kimi_k2")
    return Experts(n, fields["num_experts_per_tok"], width, shared, n_sparse, has_bias=is_v3)
