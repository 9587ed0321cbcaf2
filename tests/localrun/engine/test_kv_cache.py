"""A cache that is kept, in memory or on disk, changes no answer and saves the prefill."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepdistill.errors import ArtifactError
from deepdistill.localrun.core.generation import Sampling
from deepdistill.localrun.engine.engine import Engine
from deepdistill.localrun.engine.stream import Step

GREEDY, LONG = Sampling(max_tokens=40), Sampling(max_tokens=120)


def tokens_of(steps: list[Step]) -> list[int]:
    return [step.token for step in steps if step.token >= 0]


def prompt_of(engine: Engine, question: str) -> str:
    return engine.render([{"role": "user", "content": question}])


def fresh(path: Path, prompt: str, sampling: Sampling, n_seq: int = 1) -> list[Step]:
    with Engine(path, n_threads=1, n_seq=n_seq) as engine:
        return list(engine.stream(prompt, sampling))


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


def test_the_kept_cache_saves_the_prefill(random_gguf: Path, batches: list[int]) -> None:
    with Engine(random_gguf, n_threads=1) as engine:
        prompt = prompt_of(engine, "one " * 100)
        list(engine.stream(prompt, Sampling(max_tokens=1)))
        batches.clear()
        list(engine.stream(prompt + "ab", Sampling(max_tokens=1)))
    assert batches == [2]


def test_a_saved_state_goes_on_without_prefill_and_says_the_same(
    random_gguf: Path, tmp_path: Path, batches: list[int]
) -> None:
    state = tmp_path / "state"
    with Engine(random_gguf, n_threads=1) as engine:
        prompt = prompt_of(engine, "one " * 100)
        wanted = tokens_of(list(engine.stream(prompt, GREEDY)))
        engine.save_state(state)
        n_kept = len(engine.tokenize(prompt)) + len(wanted) - 1
    with Engine(random_gguf, n_threads=1) as engine:
        assert engine.load_state(state) == n_kept
        batches.clear()
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
