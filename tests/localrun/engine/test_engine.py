"""The engine against llama-cpp-python's own loop, against itself in other orders, and against broken files."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepdistill.errors import ArtifactError, DeepDistillError, ModelError, UsageError
from deepdistill.localrun.core.generation import Completion, Sampling
from deepdistill.localrun.engine import engine as engine_module
from deepdistill.localrun.engine.engine import Engine
from deepdistill.localrun.engine.llama import Context, Entry, model_params
from deepdistill.localrun.engine.logprobs import top_of
from deepdistill.localrun.engine.stream import Step
from deepdistill.localrun.machine import memory

GREEDY, LONG = Sampling(max_tokens=40), Sampling(max_tokens=120)
QUESTIONS = [f"what is {i} + {i * i}? {'so ' * (7 * i)}" for i in range(11)]


def tokens_of(steps: list[Step]) -> list[int]:
    return [step.token for step in steps if step.token >= 0]


def text_of(steps: list[Step], part: str) -> str:
    return "".join(step.text for step in steps if step.part == part)


@pytest.fixture(scope="module")
def peer(random_gguf: Path) -> Iterator[llama_cpp.Llama]:
    peer = llama_cpp.Llama(str(random_gguf), n_ctx=512, n_threads=1, logits_all=True, verbose=False)
    yield peer
    peer.close()


def prompt_of(engine: Engine, question: str) -> str:
    return engine.render([{"role": "user", "content": question}])


def fresh(path: Path, prompt: str, sampling: Sampling, n_seq: int = 1) -> list[Step]:
    with Engine(path, n_threads=1, n_seq=n_seq) as engine:
        return list(engine.stream(prompt, sampling))


def watch_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that each batch's number of entries is put into, as it is decoded."""
    lengths: list[int] = []
    decode = Context.decode

    def watched(context: Context, entries: list[Entry]) -> bool:
        lengths.append(len(entries))
        return decode(context, entries)

    monkeypatch.setattr(Context, "decode", watched)
    return lengths


@pytest.mark.parametrize("question", QUESTIONS[:4])
def test_greedy_stream_equals_the_peers_loop(random_engine: Engine, peer: llama_cpp.Llama, question: str) -> None:
    prompt = random_engine.tokenize(prompt_of(random_engine, question))
    wanted = []
    for token in peer.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0, reset=True):
        wanted.append(token)
        if token == peer.token_eos() or len(wanted) == GREEDY.max_tokens:
            break
    steps = list(random_engine.stream(prompt, GREEDY))
    assert tokens_of(steps) == wanted
    assert len(set(wanted)) > 5, "a model that repeats one token proves nothing"
    assert steps[-1].finish_reason == ("stop" if wanted[-1] == peer.token_eos() else "length")
    assert [step.finish_reason for step in steps[:-1]] == [None] * (len(steps) - 1)
    assert (steps[-1].n_prompt, steps[-1].n_generated) == (len(prompt), len(wanted))


def test_logits_equal_the_peers_and_lead_to_the_streams_next_token(
    random_engine: Engine, peer: llama_cpp.Llama
) -> None:
    prompt = random_engine.tokenize(prompt_of(random_engine, "why?"))
    made = tokens_of(list(random_engine.stream(prompt, GREEDY)))
    rows = random_engine.logits(prompt + made[:-1])
    assert rows.shape == (len(prompt) + len(made) - 1, random_engine.n_vocab)
    assert rows.argmax(axis=1)[len(prompt) - 1 :].tolist() == made
    peer.reset()
    peer.eval(prompt)
    np.testing.assert_allclose(rows[: len(prompt)], peer.scores[: len(prompt)], atol=0.05)  # other kernels, f16 cache


def test_logits_of_a_long_sequence_go_over_batches(random_gguf: Path) -> None:
    tokens = [3 + i * i % 250 for i in range(700)]  # a batch holds 512
    with Engine(random_gguf, n_ctx=1024, n_threads=1) as engine:
        whole, start = engine.logits(tokens), engine.logits(tokens[:600])
        np.testing.assert_allclose(whole[:600], start, atol=0.05)
        with pytest.raises(ModelError, check=lambda error: error.code == "prompt-too-long"):
            engine.logits(tokens * 2)


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


def test_an_answer_may_be_dropped_after_the_engine_was_closed(random_gguf: Path) -> None:
    with Engine(random_gguf, n_seq=2, n_threads=1) as engine:
        answers = engine.generate_many([prompt_of(engine, question) for question in QUESTIONS], GREEDY)
        steps = engine.stream(prompt_of(engine, "why?"), GREEDY)
        next(steps)
        next(answers)
    answers.close()  # type: ignore[attr-defined]
    steps.close()  # type: ignore[attr-defined]


def test_a_later_prompt_need_not_begin_as_the_first_did(random_gguf: Path) -> None:
    with Engine(random_gguf, n_seq=2, n_threads=1) as engine:
        shared = [prompt_of(engine, f"{'be kind ' * 4}{i}?") for i in range(3)]
        prompts = [*shared[:2], "other words " * 8, shared[0][:-9], shared[2], "so"]
        done = dict(engine.generate_many(iter(prompts), GREEDY))
        for index, prompt in enumerate(prompts):
            assert done[index].token_ids == tuple(tokens_of(list(engine.stream(prompt, GREEDY))))


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_top_logprobs_are_those_of_the_models_own_logits(random_gguf: Path, temperature: float) -> None:
    """At any temperature: they are the model's, not the sampler's."""
    with Engine(random_gguf, n_ctx=256, n_seq=4, n_threads=1) as engine:
        prompts = [prompt_of(engine, f"{i} {'and ' * 15}") for i in range(6)] + ["", prompt_of(engine, "so?")]
        sampling = Sampling(temperature, top_k=3, max_tokens=60)
        done = dict(engine.generate_many(prompts, sampling, top_logprobs=7))
        plain = dict(engine.generate_many(prompts, sampling))
        assert done[6].logprobs is None
        for i in (0, 1, 2, 3, 4, 5, 7):
            top, made = done[i].logprobs, done[i].token_ids
            assert (plain[i].logprobs, plain[i].token_ids) == (None, made)
            assert top is not None
            assert made is not None
            assert top.ids.shape == top.values.shape == (len(made), 7)
            tokens = engine.tokenize(prompts[i])
            logits = engine.logits([*tokens, *made])[len(tokens) - 1 : -1].astype(np.float64)
            expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            np.testing.assert_allclose(
                top.values, np.take_along_axis(expected, top.ids, 1), atol=0.05
            )  # other kernels, f16 cache
            np.testing.assert_allclose(top.values, -np.sort(-expected)[:, :7], atol=0.05)
            again = engine.top_logprobs([*tokens, *made], 7, len(tokens))
            np.testing.assert_allclose(again.values, top.values, atol=0.05)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([5, 64, 129, 3000]), st.sampled_from([1, 4, 40, 4000]))
def test_the_highest_logits_are_found_whatever_their_order(seed: int, n_vocab: int, k: int) -> None:
    row = np.random.default_rng(seed).normal(0, 5, n_vocab).astype(np.float32)
    row[:: 1 + seed % 7] -= np.inf if seed % 2 else 0
    row[-1] = 1
    ids, values = top_of(row, k)
    order = np.argsort(-row, kind="stable")[:k]
    assert np.array_equal(row[ids], row[order])
    assert len(set(ids.tolist())) == min(k, n_vocab)
    exact = row.astype(np.float64)
    np.testing.assert_allclose(values, exact[ids] - np.log(np.exp(exact - exact.max()).sum()) - exact.max(), atol=1e-4)


def test_seed_decides_the_draw(random_engine: Engine) -> None:
    prompt = prompt_of(random_engine, "draw")
    runs = [
        tokens_of(list(random_engine.stream(prompt, Sampling(1.0, seed=seed, max_tokens=20)))) for seed in (1, 2, 1)
    ]
    assert runs[0] == runs[2] != runs[1]


def test_the_kept_cache_changes_nothing(random_gguf: Path) -> None:
    with Engine(random_gguf, n_threads=1) as engine:
        first = prompt_of(engine, "one " * 50)
        stopped = engine.stream(first, GREEDY)
        for _ in range(3):
            next(stopped)
        stopped.close()  # as Ctrl-C does
        grown = first + "so 1+1\n</think>\n\n2<|im_end|>\n" + prompt_of(engine, "and then?")
        for prompt in (grown, first, grown, grown, prompt_of(engine, "another")):
            assert tokens_of(list(engine.stream(prompt, GREEDY))) == tokens_of(fresh(random_gguf, prompt, GREEDY))


def test_the_kept_cache_saves_the_prefill(random_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(random_gguf, n_threads=1) as engine:
        prompt = prompt_of(engine, "one " * 100)
        list(engine.stream(prompt, Sampling(max_tokens=1)))
        batches = watch_batches(monkeypatch)
        list(engine.stream(prompt + "ab", Sampling(max_tokens=1)))
    assert batches == [2]


def test_a_saved_state_goes_on_without_prefill_and_says_the_same(
    random_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    with Engine(random_gguf, n_threads=1) as engine:
        prompt = prompt_of(engine, "one " * 100)
        wanted = tokens_of(list(engine.stream(prompt, GREEDY)))
        engine.save_state(state)
        n_kept = len(engine.tokenize(prompt)) + len(wanted) - 1
    with Engine(random_gguf, n_threads=1) as engine:
        assert engine.load_state(state) == n_kept
        batches = watch_batches(monkeypatch)
        assert tokens_of(list(engine.stream(prompt, GREEDY))) == wanted
        assert batches[0] == 1, "only the last token, for its logits"


def test_a_state_of_another_model_cache_or_context_or_a_broken_one_is_not_taken(
    random_gguf: Path, scripted_gguf: Path, tmp_path: Path
) -> None:
    state, cut = tmp_path / "state", tmp_path / "cut"
    with Engine(random_gguf, n_threads=1) as engine:
        prompt = prompt_of(engine, "why? " * 60)
        wanted = tokens_of(list(engine.stream(prompt, GREEDY)))
        engine.save_state(state)
        whole = state.read_bytes()
        for n in (0, 10, 30, len(whole) // 2, len(whole) - 1):
            cut.write_bytes(whole[:n])
            assert engine.load_state(cut) == 0
            assert tokens_of(list(engine.stream(prompt, GREEDY))) == wanted, "and it still answers"
        assert engine.load_state(tmp_path / "none") == 0
        with pytest.raises(ArtifactError, check=lambda error: error.code == "write-failed"):
            engine.save_state(tmp_path / "no" / "folder")
    for path, keywords in ((scripted_gguf, {}), (random_gguf, {"n_ctx": 256})):
        with Engine(path, n_threads=1, **keywords) as engine:  # type: ignore[arg-type]
            assert engine.load_state(state) == 0


def test_what_many_prompts_begin_with_is_computed_once(random_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(random_gguf, n_seq=3, n_threads=1) as engine:
        system = {"role": "system", "content": "be " * 60}
        prompts = [engine.render([system, {"role": "user", "content": f"{i}?"}]) for i in range(8)]
        n_prompts = sum(len(engine.tokenize(prompt)) for prompt in prompts)
        batches = watch_batches(monkeypatch)
        done = dict(engine.generate_many(prompts, Sampling(max_tokens=5)))
        assert sum(batches) < n_prompts / 3 + 8 * 5
        monkeypatch.undo()
        for i, prompt in enumerate(prompts):
            assert done[i].token_ids == tuple(tokens_of(list(engine.stream(prompt, Sampling(max_tokens=5)))))


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_a_smaller_cache_is_nearly_the_same(smollm2_gguf: Path, kv_type: str) -> None:
    with Engine(smollm2_gguf, n_ctx=256) as engine:
        tokens = engine.tokenize("The capital of France is Paris, and that of Italy is")
        exact = engine.logits(tokens)
    with Engine(smollm2_gguf, n_ctx=256, kv_type=kv_type) as engine:
        rounded = engine.logits(tokens)
    assert 0 < np.abs(exact - rounded).mean() < (0.05 if kv_type == "q8_0" else 0.6) * exact.std()


def test_a_cache_type_that_is_none_or_does_not_fit_the_model_is_told(random_gguf: Path) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "no-such-kv-type"):
        Engine(random_gguf, n_threads=1, kv_type="q5")
    with pytest.raises(UsageError, check=lambda error: error.code == "kv-type-unfit"):
        Engine(random_gguf, n_threads=1, kv_type="q8_0")


def test_what_does_not_fit_the_memory_is_told_before_loading(
    random_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "room_bytes", lambda: 3_000_000)
    monkeypatch.setattr(llama_cpp, "llama_model_load_from_file", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(ModelError, check=lambda error: error.code == "not-enough-memory") as caught:
        Engine(random_gguf, n_ctx=100_000, n_threads=1)
    assert "--context" in caught.value.hint


def test_a_prompt_too_long_is_refused_and_a_long_answer_is_cut_at_the_context(random_gguf: Path) -> None:
    with Engine(random_gguf, n_ctx=256, n_threads=1) as engine:
        with pytest.raises(ModelError, check=lambda error: error.code == "prompt-too-long"):
            list(engine.stream(prompt_of(engine, "x" * 300), GREEDY))
        with pytest.raises(ModelError, check=lambda error: error.code == "prompt-empty"):
            list(engine.stream("", GREEDY))
        tokens = engine.tokenize(prompt_of(engine, "x" * 200))
        last = list(engine.stream(tokens, Sampling(temperature=1.0, seed=3, max_tokens=10_000)))[-1]
        assert last.finish_reason == "length"
        assert last.n_prompt + last.n_generated == engine.n_ctx


@settings(deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text())
def test_text_survives_its_tokens(random_engine: Engine, text: str) -> None:
    assert random_engine.detokenize(random_engine.tokenize(text)) == text


@pytest.mark.parametrize("text", ["", "日本語 ünïcode 🦙🏽‍♀️", "a\x00b", "<|im_start|>user\n<|im_end|>", "   \n\t 12 "])
def test_odd_text_survives_its_tokens(random_engine: Engine, text: str) -> None:
    assert random_engine.detokenize(random_engine.tokenize(text)) == text


def test_streamed_text_is_that_of_the_tokens_even_where_a_character_takes_several(random_engine: Engine) -> None:
    steps = list(
        random_engine.stream(prompt_of(random_engine, "🦙"), Sampling(temperature=1.0, seed=1, max_tokens=200))
    )
    made = [token for token in tokens_of(steps) if token not in random_engine.eog]
    thinking, answer = text_of(steps, "thinking"), text_of(steps, "answer")
    assert answer == ""
    assert len(made) > 50
    assert thinking.strip("\n") == random_engine.detokenize(made).strip("\n")


def test_a_lone_surrogate_is_no_crash(random_engine: Engine) -> None:
    assert random_engine.detokenize(random_engine.tokenize("a\udcffb")) == "a?b"


def one_line(error: DeepDistillError) -> str:
    assert "\n" not in error.message + error.hint
    assert error.hint, error.message
    return error.message


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.03, 0.1, 0.5, 0.9, 0.999999])
def test_a_file_cut_short_is_told(random_gguf: Path, tmp_path: Path, share: float) -> None:
    whole = random_gguf.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: max(5, int(len(whole) * share))])
    with pytest.raises(ArtifactError) as caught:
        Engine(cut)
    assert "cut short" in one_line(caught.value)


def test_files_that_are_no_gguf(tmp_path: Path, random_gguf: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello, I am no model")
    (tmp_path / "empty.gguf").write_bytes(b"")
    for name, code in [
        ("text.gguf", "not-gguf"),
        ("empty.gguf", "not-gguf"),
        ("none.gguf", "no-such-model"),
        (".", "no-such-model"),
    ]:
        with pytest.raises(ArtifactError) as refused:
            Engine(tmp_path / name)
        assert refused.value.code == code
    strange = tmp_path / "strange.gguf"
    strange.write_bytes(random_gguf.read_bytes().replace(b"llama", b"lhama"))
    with pytest.raises(ModelError, match="lhama") as caught:
        Engine(strange)
    one_line(caught.value)


def test_a_missing_tensor_is_named(build_gguf: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"short: tensor 'blk\.1\.ffn_up\.weight' not found") as caught:
        Engine(build_gguf(tmp_path / "m.gguf", without="blk.1.ffn_up"))
    one_line(caught.value)


def test_without_llama_cpp_there_is_a_hint(random_gguf: Path) -> None:
    code = (
        "import sys\nsys.modules['llama_cpp'] = None\nfrom deepdistill.cli import main\n"
        f"sys.exit(main(['chat', {str(random_gguf)!r}, '-p', 'hi']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: llama-cpp-python does not work here")
    assert "--extra-index-url" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "said", [b"CPU : AVX512 = 1 | AMX_INT8 = 1 | OPENMP = 1 | ", b"CPU : AVX2 = 1 | OPENMP = 1 | "]
)
def test_amx_is_left_aside_and_only_that(monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    """The other buffers, which hold weights repacked for the processor, are llama.cpp's own choice."""
    monkeypatch.setattr(llama_cpp, "llama_print_system_info", lambda: said)
    default = llama_cpp.llama_model_default_params().use_extra_bufts
    assert model_params().use_extra_bufts == (default and b"AMX" not in said)


def test_attention_is_the_same_without_flash_attention(random_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [5 + 7 * i % 250 for i in range(300)]  # more than a micro-batch
    with Engine(random_gguf, n_threads=1) as without:
        assert without.flash is False
        plain = without.logits(tokens)
    monkeypatch.setattr(engine_module, "flash_attention", lambda *_, **__: True)
    with Engine(random_gguf, n_threads=1) as with_flash:
        flash = with_flash.logits(tokens)
    assert np.abs(plain - flash).max() < 0.02 * plain.std()
    assert not np.array_equal(plain, flash), "it was another computation"
    with Engine(random_gguf, n_threads=1, n_seq=2) as several:
        assert several.flash is None, "llama.cpp's own choice skips what other sequences hold"
