"""Guessing ahead never changes what is said, and stops where it does not pay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdistill.errors import ModelError
from deepdistill.localrun.core.generation import Guidance, Sampling
from deepdistill.localrun.engine.engine import Engine
from deepdistill.localrun.engine.speculation import Latch, NgramDrafts

BuildGGUF = Callable[..., Path]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft whatever it costs: these models are too small for it to pay."""
    monkeypatch.setattr(Latch, "n_wanted", lambda self: 4)


def tokens_of(engine: Engine, prompt: str, sampling: Sampling, guidance: Guidance) -> tuple[list[int], int]:
    steps = list(engine.stream(prompt, sampling, guidance=guidance))
    return [step.token for step in steps if step.token >= 0], steps[-1].n_drafted_right


@pytest.fixture(scope="module")
def looping(tmp_path_factory: pytest.TempPathFactory, build_gguf: BuildGGUF) -> Iterator[Engine]:
    """A model that is easy to guess."""
    path = build_gguf(tmp_path_factory.mktemp("loop") / "m.gguf", script=[b" so", b" 1", b"+1", b"\n="], then="loop")
    with Engine(path, n_threads=1) as engine:
        yield engine


@pytest.mark.parametrize("limit", [1, 2, 7, 30, 100])
@pytest.mark.parametrize("guidance", [{}, {"think_budget": 25}, {"stop": ("=",)}, {"loop_guard": True}])
@pytest.mark.usefixtures("always")
def test_what_is_said_stays_the_same(
    looping: Engine, random_engine: Engine, limit: int, guidance: dict[str, object]
) -> None:
    for engine in (looping, random_engine):
        for question in ("why?", "so 1+1\n= so 1+1\n="):
            prompt = engine.prompt([{"role": "user", "content": question}])
            free, guessing = (Guidance(**guidance, speculate=s) for s in (False, True))  # type: ignore[arg-type]
            wanted, _ = tokens_of(engine, prompt, Sampling(max_tokens=limit), free)
            got, n_right = tokens_of(engine, prompt, Sampling(max_tokens=limit), guessing)
            assert got == wanted
            if engine is looping and limit == 100 and not guidance:
                assert n_right > 60
            # And what the cache is left with serves the next turn.
            assert tokens_of(engine, prompt, Sampling(max_tokens=limit), free)[0] == wanted


@pytest.mark.usefixtures("always")
def test_draws_at_a_temperature_stay_the_same(looping: Engine) -> None:
    prompt = looping.prompt([{"role": "user", "content": "1"}])
    total = 0
    for seed in range(6):
        sampling = Sampling(temperature=3.0, seed=seed, max_tokens=60)
        plain, _ = tokens_of(looping, prompt, sampling, Guidance())
        guessed, n_right = tokens_of(looping, prompt, sampling, Guidance(speculate=True))
        assert guessed == plain
        total += n_right
    assert 0 < total < 6 * 60


@pytest.mark.usefixtures("always")
def test_a_draft_model_guesses_and_one_with_another_vocabulary_is_refused(
    random_gguf: Path, tmp_path: Path, build_gguf: BuildGGUF
) -> None:
    with Engine(random_gguf, n_threads=1, draft_path=random_gguf) as engine:
        prompt = engine.prompt([{"role": "user", "content": "why?"}])
        wanted, _ = tokens_of(engine, prompt, Sampling(max_tokens=50), Guidance())
        got, n_right = tokens_of(engine, prompt, Sampling(max_tokens=50), Guidance(speculate=True))
        assert got == wanted
        assert n_right >= 35, "a model guesses itself right, four of five tokens"
    other = build_gguf(tmp_path / "other.gguf", script=[b"another token"])
    with pytest.raises(ModelError, check=lambda error: error.code == "vocabulary-mismatch"):
        Engine(random_gguf, n_threads=1, draft_path=other)


@settings(deadline=None, database=None)
@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 6))
def test_the_guess_is_what_followed_the_longest_ending_last(text: list[int], n: int) -> None:
    propose = NgramDrafts()
    for end in range(len(text) + 1):
        expected: list[int] = []
        for size in (4, 3):
            tail = text[end - size : end] if end >= size else []
            earlier = [i for i in range(size, end) if text[i - size : i] == tail]
            if tail and earlier:
                expected = text[earlier[-1] : end][:n]
                break
        assert propose(text[:end], n) == expected


def run(latch: Latch, right: float, cost: float, n: int = 2000) -> tuple[int, float]:
    """Play a model that guesses right with a probability; return tokens drafted and the time against plain decoding."""
    seconds, made, drafted, credit = 0.0, 0, 0, 0.0
    while made < n:
        k = latch.n_wanted()
        accepted = 0
        while accepted < k:
            credit += right
            if credit < 1:
                break
            credit -= 1
            accepted += 1
        took = 1.0 + cost * k
        latch.record(k, accepted, took)
        seconds, made, drafted = seconds + took, made + 1 + accepted, drafted + k
    return drafted, made / seconds


def test_the_latch_drafts_where_it_pays_and_hardly_where_it_does_not() -> None:
    drafted, gain = run(Latch(), right=0.95, cost=0.15)
    assert gain > 1.5
    assert drafted > 500
    drafted, gain = run(Latch(), right=0.0, cost=0.3)
    assert drafted > 0, "it was tried"
    assert gain > 0.97


def test_the_latch_tries_again_when_the_text_changes() -> None:
    latch = Latch()
    run(latch, right=0.0, cost=0.3)
    _, gain = run(latch, right=0.95, cost=0.15, n=4000)
    assert gain > 1.3
