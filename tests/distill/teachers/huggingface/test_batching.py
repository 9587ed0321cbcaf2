"""The batched decoder against `model.generate` one prompt at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import MODELS, ask, generated_alone

from deepdistill.distill.teachers import Request
from deepdistill.distill.teachers.huggingface.teacher import TransformersTeacher
from deepdistill.localrun.core.generation import Sampling


@pytest.mark.parametrize("shared", ["State the final answer: ", ""])
def test_greedy_equals_generate_one_prompt_at_a_time(teacher: TransformersTeacher, shared: str) -> None:
    conversations = ask(11, shared=shared)
    answers = dict(teacher.generate(conversations, Sampling(max_tokens=24)))
    assert sorted(answers) == list(range(11))
    lengths = set()
    for i, request in enumerate(conversations):
        messages = list(request.messages)
        expected = generated_alone(teacher, messages, 24)
        assert answers[i].token_ids == expected
        assert answers[i].completion_tokens == len(expected)
        assert answers[i].prompt_tokens == len(teacher.tokenizer(teacher.render(messages)).input_ids)
        assert answers[i].finish_reason == ("stop" if expected[-1] in teacher.eos_ids else "length")
        lengths.add(len(expected))
    assert len(lengths) > 3, "rows must end at different steps, or nothing was refilled"


def test_requests_are_drawn_in_windows_and_need_no_end(teacher: TransformersTeacher) -> None:
    conversations = ask(30)
    n_drawn = 0

    def endless() -> Iterator[Request]:
        nonlocal n_drawn
        for request in itertools.cycle(conversations):
            n_drawn += 1
            yield request

    answers = teacher.generate(endless(), Sampling(max_tokens=12))
    done = {}
    for n_done, (index, completion) in enumerate(itertools.islice(answers, 24)):
        assert n_drawn <= n_done + 4 * teacher.n_parallel
        done[index] = completion
    answers.close()  # type: ignore[attr-defined]
    for index, completion in done.items():
        assert completion.token_ids == generated_alone(teacher, list(conversations[index % 30].messages), 12)


def test_a_later_prompt_need_not_begin_as_the_first_did(llama: TransformersTeacher) -> None:
    conversations = [*ask(9), *ask(9, seed=1, shared="and "), *ask(9)]
    answers = dict(llama.generate(iter(conversations), Sampling(max_tokens=16)))
    for i, request in enumerate(conversations):
        assert answers[i].token_ids == generated_alone(llama, list(request.messages), 16)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_top_logprobs_are_those_of_one_pass_over_the_text(teacher: TransformersTeacher, temperature: float) -> None:
    """At any temperature: they are the model's, not the sampler's."""
    conversations, sampling = ask(11), Sampling(temperature, top_k=3, max_tokens=24)
    answers = dict(teacher.generate(conversations, sampling, top_logprobs=6))
    for i, request in enumerate(conversations):
        made, top = answers[i].token_ids, answers[i].logprobs
        assert made is not None
        assert top is not None
        assert top.ids.dtype == np.int32
        assert top.ids.shape == top.values.shape == (len(made), 6)
        prompt = teacher.tokenizer(teacher.render(request.messages), add_special_tokens=False).input_ids
        with torch.inference_mode():
            logits = teacher.model(torch.tensor([[*prompt, *made]])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits.float(), -1).numpy()
        np.testing.assert_allclose(top.values, -np.sort(-expected)[:, :6], atol=1e-4)
        np.testing.assert_allclose(top.values, np.take_along_axis(expected, top.ids, 1), atol=1e-4)
    plain = dict(teacher.generate(conversations, sampling))
    assert all(plain[i].logprobs is None and plain[i].token_ids == answers[i].token_ids for i in range(11))


def test_samples_depend_on_seed_and_index_but_not_on_the_batch(llama: TransformersTeacher) -> None:
    sampling = Sampling(temperature=1.0, top_p=0.95, max_tokens=12)

    def sample(batch_size: int, seed: int) -> list[Any]:
        llama.n_parallel = batch_size
        answers = dict(llama.generate([replace(r, seed=seed + i) for i, r in enumerate(ask(9))], sampling))
        return [answers[i].token_ids for i in range(9)]

    alone = sample(1, 7)
    assert alone == sample(4, 7) == sample(9, 7)
    assert alone != sample(4, 8)
    same = [Request(ask(1)[0].messages, seed) for seed in range(6)]
    assert len({answer.token_ids for _, answer in llama.generate(same, sampling)}) > 1


@pytest.mark.parametrize("kind", MODELS)
def test_a_prompt_is_computed_once_for_all_its_answers(folders: dict[str, Path], kind: str) -> None:
    teacher = TransformersTeacher(folders[kind], device="cpu", batch_size=6)
    sampling = Sampling(temperature=1.0, max_tokens=12)
    requests = [Request(ask(2)[i % 2].messages, seed=i) for i in range(6)]
    alone = [next(iter(teacher.generate([request], sampling)))[1].token_ids for request in requests]
    prefilled: list[int] = []
    hook = teacher.model.register_forward_pre_hook(
        lambda _, args, given: prefilled.append(given["input_ids"].shape[0] * (given["input_ids"].shape[1] > 1)),
        with_kwargs=True,
    )
    answers = dict(teacher.generate(requests, sampling))
    hook.remove()
    assert [answers[i].token_ids for i in range(6)] == alone
    assert len(set(alone)) > 2
    # what all prompts begin with, then the rest of both; a cache that cannot be cut by row takes all six
    assert [n for n in prefilled if n] == ([6] if kind == "sliding" else [1, 2])
