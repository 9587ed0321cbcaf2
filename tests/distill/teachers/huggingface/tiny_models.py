"""Tiny models with random weights, whose answers end at different lengths."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from train import make_tokenizer

from deepdistill.distill.teachers import Request
from deepdistill.distill.teachers.huggingface.teacher import TransformersTeacher
from deepdistill.localrun.core.generation import Message

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": 96}


MODELS: dict[str, Callable[[int], Any]] = {
    "llama": lambda v: transformers.LlamaConfig(vocab_size=v, num_hidden_layers=2, num_key_value_heads=2, **SMALL),
    "deepseek_v3": lambda v: transformers.DeepseekV3Config(
        vocab_size=v,
        num_hidden_layers=2,
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=12,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=8,
        **SMALL,
    ),
    # Its cache forgets columns by itself, so that rows cannot be cut out and put in.
    "sliding": lambda v: transformers.MistralConfig(
        vocab_size=v, num_hidden_layers=2, num_key_value_heads=2, sliding_window=16, **SMALL
    ),
}


def write_model(folder: Path, kind: str) -> Path:
    """Write a model with random weights, with end-of-turn tokens that make its answers end at different lengths."""
    tokenizer = make_tokenizer(["State the final answer: 12 + 30 = 42, twelve woodlouses and 8 tigers"] * 3, 300)
    torch.manual_seed(0)
    config = MODELS[kind](len(tokenizer))
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, None, tokenizer.eos_token_id
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 1.0)
    model.generation_config.eos_token_id = -1
    model.generation_config.pad_token_id = 0
    model.eval()
    answers = []
    for request in ask(8) + ask(8, seed=1, shared=""):
        turns = list(request.messages)
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt").input_ids
        answers.append(model.generate(prompt, max_new_tokens=24, do_sample=False)[0, prompt.shape[1] :].tolist())
    early = {token for answer in answers for token in answer[:2]}
    ends = {tokenizer.eos_token_id}
    for i, answer in enumerate(answers):
        ends |= set([token for token in answer[1 + i :] if token not in early][:1])
    model.generation_config.eos_token_id = sorted(ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def ask(n: int, seed: int = 0, shared: str = "State the final answer: ") -> list[Request]:
    """Return conversations of very different lengths."""
    rng = random.Random(seed)
    questions = [shared + " + ".join(str(rng.randint(0, 99)) for _ in range(rng.randint(1, 9))) for _ in range(n)]
    return [Request([{"role": "user", "content": q}], seed + i) for i, q in enumerate(questions)]


def generated_alone(teacher: TransformersTeacher, messages: list[Message], max_tokens: int) -> tuple[int, ...]:
    ids = teacher.tokenizer(teacher.render(messages), add_special_tokens=False, return_tensors="pt").input_ids
    output = teacher.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
    )
    return tuple(output[0, ids.shape[1] :].tolist())
