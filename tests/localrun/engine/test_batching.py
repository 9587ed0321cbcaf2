"""Many prompts in one batch against one at a time: the same answers, none lost, and what is shared computed once."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

from deepdistill.localrun.core.generation import Completion, Sampling
from deepdistill.localrun.engine.engine import Engine
from deepdistill.localrun.engine.stream import Step

GREEDY, LONG = Sampling(max_tokens=40), Sampling(max_tokens=120)


QUESTIONS = [f"what is {i} + {i * i}? {'so ' * (7 * i)}" for i in range(11)]


def tokens_of(steps: list[Step]) -> list[int]:
    return [step.token for step in steps if step.token >= 0]


def text_of(steps: list[Step], part: str) -> str:
    return "".join(step.text for step in steps if step.part == part)


def prompt_of(engine: Engine, question: str) -> str:
    return engine.render([{"role": "user", "content": question}])


def fresh(path: Path, prompt: str, sampling: Sampling, n_seq: int = 1) -> list[Step]:
    with Engine(path, n_threads=1, n_seq=n_seq) as engine:
        return list(engine.stream(prompt, sampling))


def test_many_at_once_equal_one_at_a_time(random_gguf: Path) -> None:
    with Engine(random_gguf, n_seq=3, n_threads=1) as engine:
        prompts = [prompt_of(engine, question) for question in QUESTIONS]
        done = dict(engine.generate_many(prompts, LONG))
        assert sorted(done) == list(range(len(prompts))), "more prompts than places: each place is filled again"
        assert {completion.finish_reason for completion in done.values()} == {"stop", "length"}
        for index, prompt in enumerate(prompts):
            assert_same(done[index], list(engine.stream(prompt, LONG)))


def test_request_i_is_drawn_with_the_seed_plus_i(random_gguf: Path) -> None:
    drawn = Sampling(temperature=1.0, seed=5, max_tokens=1)
    with Engine(random_gguf, n_seq=3, n_threads=1) as engine:
        prompts = [prompt_of(engine, question) for question in QUESTIONS]
        done = dict(engine.generate_many(prompts, drawn))

        def n_equal(shift: int) -> int:
            return sum(
                done[i].token_ids
                == tuple(tokens_of(list(engine.stream(prompt, dataclasses.replace(drawn, seed=5 + i + shift)))))
                for i, prompt in enumerate(prompts)
            )

        # Rounding differs with the batch, and now and then tips a draw.
        assert n_equal(0) >= len(prompts) - 2
        assert n_equal(1) < len(prompts) // 2


def assert_same(completion: Completion, steps: list[Step]) -> None:
    assert completion.token_ids == tuple(tokens_of(steps))
    assert completion.finish_reason == steps[-1].finish_reason
    assert (completion.reasoning_content or "") == text_of(steps, "thinking")
    assert completion.content == text_of(steps, "answer")
    assert completion.closed == (steps[-1].part == "answer")
    assert (completion.prompt_tokens, completion.completion_tokens, completion.reasoning_tokens) == (
        steps[-1].n_prompt,
        steps[-1].n_generated,
        steps[-1].n_reasoning,
    )


def test_many_share_a_small_context_without_losing_one(random_gguf: Path) -> None:
    with Engine(random_gguf, n_ctx=256, n_seq=4, n_threads=1) as engine:
        prompts = [prompt_of(engine, f"{i} {'and ' * 15}") for i in range(6)] + [prompt_of(engine, "long " * 400), ""]
        done = dict(engine.generate_many(prompts, Sampling(max_tokens=100)))
        assert sorted(done) == list(range(8))
        assert [done[i].finish_reason for i in (6, 7)] == ["error", "error"]
        assert f"context holds {engine.n_ctx}" in (done[6].error or "")
        for i in range(6):
            # An engine for one sequence attends, and so rounds, otherwise.
            alone = fresh(random_gguf, prompts[i], Sampling(max_tokens=100), n_seq=2)
            assert done[i].token_ids == tuple(tokens_of(alone))


def test_prompts_are_drawn_as_places_come_free_and_need_no_end(random_gguf: Path) -> None:
    n_drawn = 0

    def endless(engine: Engine) -> Iterator[str]:
        nonlocal n_drawn
        for i in itertools.count():
            n_drawn += 1
            yield prompt_of(engine, f"{i} {'so ' * (i % 5)}")

    with Engine(random_gguf, n_seq=3, n_threads=1) as engine:
        answers = engine.generate_many(endless(engine), LONG)
        done = {}
        for n_done, (index, completion) in enumerate(itertools.islice(answers, 12)):
            assert n_drawn <= n_done + 3
            done[index] = completion
        answers.close()  # type: ignore[attr-defined]
        n_drawn = 0
        for index, prompt in enumerate(itertools.islice(endless(engine), max(done) + 1)):
            if index in done:
                assert_same(done[index], list(engine.stream(prompt, LONG)))
        assert list(engine.generate_many(iter([]), LONG)) == []


def test_a_later_prompt_need_not_begin_as_the_first_did(random_gguf: Path) -> None:
    with Engine(random_gguf, n_seq=2, n_threads=1) as engine:
        shared = [prompt_of(engine, f"{'be kind ' * 4}{i}?") for i in range(3)]
        prompts = [*shared[:2], "other words " * 8, shared[0][:-9], shared[2], "so"]
        done = dict(engine.generate_many(iter(prompts), GREEDY))
        for index, prompt in enumerate(prompts):
            assert done[index].token_ids == tuple(tokens_of(list(engine.stream(prompt, GREEDY))))


def test_what_many_prompts_begin_with_is_computed_once(random_gguf: Path, batches: list[int]) -> None:
    with Engine(random_gguf, n_seq=3, n_threads=1) as engine:
        system = {"role": "system", "content": "be " * 60}
        prompts = [engine.render([system, {"role": "user", "content": f"{i}?"}]) for i in range(8)]
        n_prompts = sum(len(engine.tokenize(prompt)) for prompt in prompts)
        batches.clear()
        done = dict(engine.generate_many(prompts, Sampling(max_tokens=5)))
        assert sum(batches) < n_prompts / 3 + 8 * 5
        for i, prompt in enumerate(prompts):
            assert done[i].token_ids == tuple(tokens_of(list(engine.stream(prompt, Sampling(max_tokens=5)))))
