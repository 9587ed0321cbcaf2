"""Tiny checkpoints with random weights, written by transformers as a student's folder is.

Everything here is collected without torch; the tests that need a checkpoint are skipped then.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from deepdistill.quantize.convert.writer import plan, write
from deepdistill.quantize.measure.proofs import STRESS
from deepdistill.quantize.recipe import CalibrationRecipe

ROOT = Path(__file__).resolve().parent.parent.parent
TEMPLATE = (ROOT / "distill" / "pocket" / "chat_template.jinja").read_text()
CARD = "---\nlicense: apache-2.0\nbase_model: some-org/Some-Base-1B\n---\nA test model.\n"
CONFIGS = {
    "llama": "LlamaConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "qwen3moe": "Qwen3MoeConfig",
    "gemma3": "Gemma3TextConfig",
    "deepseek2": "DeepseekV2Config",
    "deepseek3": "DeepseekV3Config",
}
"""transformers' config of each architecture."""
_LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "routed_scaling_factor": 1.5,
}
OWN: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 32},
    "qwen3moe": {
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    "gemma3": {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 24,
        "num_hidden_layers": 7,
        "tie_word_embeddings": True,
    },
    "deepseek2": _LATENT | {"n_group": 1, "topk_group": 1, "topk_method": "greedy", "norm_topk_prob": False},
    "deepseek3": _LATENT | {"n_group": 2, "topk_group": 1, "norm_topk_prob": True},
}
"""What an architecture needs beside the sizes that all share."""
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)

MakeCheckpoint = Callable[..., Path]


def split(*patterns: str) -> Any:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def pre_tokenizer(name: str) -> Any:
    """Return what llama.cpp calls by this name, as tokenizer.json says it."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return {
        "gpt-2": lambda: gpt2,
        "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
        "qwen2": lambda: split(WORDS % ""),
        "llama-bpe": lambda: split(WORDS % "{1,3}"),
        "smaug-bpe": lambda: split(WORDS % "{1,3}"),
        "deepseek-v3": lambda: split(*DEEPSEEK),
    }[name]()


def make_tokenizer(pre: str = "smollm", n_vocab: int = 400) -> Any:
    """Train a byte-level BPE on the stress text, so that merges reach across whatever is left whole."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([STRESS * 3], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )
    fast.add_tokens(["<think>", "</think>"])
    return fast


def write_checkpoint(
    folder: Path, arch: str = "llama", pre: str = "smollm", dtype: str = "float32", **settings: Any
) -> None:
    """Write a checkpoint with random weights; settings beside the named ones go to its config."""
    import torch
    import transformers

    tokenizer = make_tokenizer(pre)
    sizes = {
        "vocab_size": len(tokenizer) + 6,  # padded, as many models are
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "initializer_range": 0.15,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    sizes |= OWN.get(arch, {})
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, CONFIGS[arch])(**(sizes | settings))
        )
        with torch.no_grad():
            for name, weight in model.named_parameters():  # biases and norms start as constants, which hide errors
                if name.endswith("bias") or "norm" in name:
                    weight += 0.2 * torch.randn_like(weight)
                if "mlp.gate.weight" in name:  # zero at first: every expert would be the same
                    weight.normal_(std=0.5)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer += 0.1 * torch.randn_like(buffer)
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)


FIXED: dict[str, dict[str, Any]] = {
    "llama": {
        "dtype": "bfloat16",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2": {"pre": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"pre": "qwen2", "dtype": "float16"},
    "qwen3moe": {"pre": "qwen2"},
    "gemma3": {"dtype": "bfloat16", "vocab_size": 402},  # not padded: llama.cpp's converter cuts rows without a token
    "deepseek2": {"pre": "deepseek-v3", "dtype": "bfloat16"},
    "deepseek3": {"pre": "deepseek-v3", "q_lora_rank": None},
}
"""One checkpoint of every architecture whose weights are the same on every machine."""


def write_fixed(folder: Path, arch: str) -> None:
    """Write one of FIXED: its weights come from numpy's generator, which gives the same numbers everywhere."""
    import torch
    from safetensors.torch import load_file, save_file

    write_checkpoint(folder, arch, **FIXED[arch])
    path = folder / "model.safetensors"
    tensors = {}
    for name, weight in load_file(path).items():
        rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
        values = 0.1 * rng.standard_normal(weight.shape, np.float32) + ("norm" in name)
        tensors[name] = torch.from_numpy(values.astype(np.float32)).to(weight.dtype)
    save_file(tensors, path, {"format": "pt"})


def _need_torch() -> None:
    """Skip a test where torch and transformers are missing; else make them quiet."""
    torch = pytest.importorskip("torch")
    logging = pytest.importorskip("transformers.utils").logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(1)


@pytest.fixture(scope="session", name="write_fixed")
def _write_fixed() -> Callable[[Path, str], None]:
    _need_torch()
    return write_fixed


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Return a function that writes a checkpoint as write_checkpoint does, and returns its folder."""
    _need_torch()

    def make(arch: str = "llama", pre: str = "smollm", dtype: str = "float32", **settings: Any) -> Path:
        folder = tmp_path_factory.mktemp(f"{arch}-student")
        write_checkpoint(folder, arch, pre, dtype, **settings)
        return folder

    return make


@pytest.fixture(scope="session")
def student(make_checkpoint: MakeCheckpoint) -> Path:
    """A tiny llama in bfloat16. Tests copy it before they break it."""
    return make_checkpoint(dtype="bfloat16")


@pytest.fixture(scope="session")
def tied(make_checkpoint: Callable[..., Path]) -> Path:
    """A tied student with rows that K types fit (512) and rows that they do not (64)."""
    return make_checkpoint("llama", tie_word_embeddings=True, intermediate_size=512)


@pytest.fixture(scope="session")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred verified traces, and one that is wrong."""
    path = tmp_path_factory.mktemp("traces") / "traces.jsonl"
    lines = [
        {
            "messages": [{"role": "user", "content": f"What is {i} + {2 * i}?"}],
            "reasoning_content": f"{i} + {2 * i} = {3 * i}",
            "content": str(3 * i),
            "verdict": "right",
            "finish_reason": "stop",
        }
        for i in range(100)
    ]
    lines.insert(0, lines[0] | {"content": "0", "verdict": "wrong"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def small() -> CalibrationRecipe:
    """Few tokens of each part, for tests that need any."""
    return CalibrationRecipe(n_calibrate=600, n_choose=60, n_measure=120)


@pytest.fixture(scope="session")
def f16(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The F16 file of the tied student."""
    path = tmp_path_factory.mktemp("f16") / "f16.gguf"
    write(plan(tied, "F16"), path, n_threads=1)
    return path
