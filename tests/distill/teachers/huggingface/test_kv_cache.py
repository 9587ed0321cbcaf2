"""What the cache holds, and attention to its latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ask, generated_alone
from transformers.cache_utils import DynamicCache

from deepdistill.distill.planning.kv_cache import kv_numbers
from deepdistill.distill.teachers.huggingface.teacher import TransformersTeacher
from deepdistill.localrun.core.generation import Sampling


def test_a_step_looks_at_the_latents_themselves(folders: dict[str, Path]) -> None:
    """Multi-head latent attention: only the prompt's latents are expanded to keys and values, once."""
    teacher = TransformersTeacher(folders["deepseek_v3"], device="cpu", batch_size=4)
    attention = teacher.model.model.layers[1].self_attn
    if not hasattr(attention, "expand_kv"):
        pytest.skip("this transformers keeps whole keys and values")
    conversations, widths = ask(4), list[int]()
    expected = [generated_alone(teacher, list(request.messages), 12) for request in conversations]
    hook = attention.kv_b_proj.register_forward_hook(lambda _, args, output: widths.append(output.shape[-2]))
    answers = dict(teacher.generate(conversations, Sampling(max_tokens=12)))
    assert [answers[i].token_ids for i in range(4)] == expected
    assert len(widths) == 2  # the shared words, then the rest
    assert teacher.model.config._attn_implementation == "sdpa"

    # a wrapped projection may not be what its weight says
    class Wrapped(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> Any:
            return self.inner(x)

    attention.kv_b_proj = Wrapped(attention.kv_b_proj)
    widths.clear()
    answers = dict(teacher.generate(conversations, Sampling(max_tokens=12)))
    assert [answers[i].token_ids for i in range(4)] == expected
    assert len(widths) > 2
    hook.remove()


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3"])
def test_the_cache_of_a_token_is_reckoned_as_large_as_it_is(folders: dict[str, Path], kind: str) -> None:
    model = TransformersTeacher(folders[kind], device="cpu").model
    cache: Any = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache, use_cache=True)
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert kv_numbers(model.config.to_dict())[0] == held // 3
