"""The engine against llama-cpp-python's own loop, its texts and tokens, and broken files."""

from __future__ import annotations

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
from deepdistill.localrun.core.generation import Sampling
from deepdistill.localrun.engine import engine as engine_module
from deepdistill.localrun.engine.engine import Engine
from deepdistill.localrun.engine.llama import model_params
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


def test_an_answer_may_be_dropped_after_the_engine_was_closed(random_gguf: Path) -> None:
    with Engine(random_gguf, n_seq=2, n_threads=1) as engine:
        answers = engine.generate_many([prompt_of(engine, question) for question in QUESTIONS], GREEDY)
        steps = engine.stream(prompt_of(engine, "why?"), GREEDY)
        next(steps)
        next(answers)
    answers.close()  # type: ignore[attr-defined]
    steps.close()  # type: ignore[attr-defined]


def test_seed_decides_the_draw(random_engine: Engine) -> None:
    prompt = prompt_of(random_engine, "draw")
    runs = [
        tokens_of(list(random_engine.stream(prompt, Sampling(1.0, seed=seed, max_tokens=20)))) for seed in (1, 2, 1)
    ]
    assert runs[0] == runs[2] != runs[1]


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
    with pytest.raises(ModelError, check=lambda e: e.code == "load-failed" and "lhama" in e.message) as caught:
        Engine(strange)
    one_line(caught.value)


def test_a_missing_tensor_is_named(build_gguf: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError, check=lambda error: error.code == "gguf-broken" and "blk.1.ffn_up.weight" in error.message
    ) as caught:
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
