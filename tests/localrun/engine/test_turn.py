"""What a turn is held to: budgets, loops, stop strings and grammars, on models that say anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepdistill.errors import UsageError
from deepdistill.localrun.core.generation import FREE, Guidance, Sampling
from deepdistill.localrun.core.loops import LEAST_TOKENS, LoopDetector
from deepdistill.localrun.engine.engine import Engine
from deepdistill.localrun.engine.sampler import Sampler
from deepdistill.localrun.engine.stream import Step
from deepdistill.localrun.engine.turn import StopStrings

BuildGGUF = Callable[..., Path]

relaxed = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))

# Tokens that are tags, parts of tags, parts of characters: what a stream must never mix up.
AWKWARD = [b"<think>", b"</think>", b"</th", b"ink>", b"</think>\n\n", b"\n\n", b"\xf0\x9f", b"\xa6\x99", b" so"]


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory, build_gguf: BuildGGUF) -> Iterator[Engine]:
    """An engine on a model that says tags, parts of tags and anything else at random."""
    path = build_gguf(tmp_path_factory.mktemp("awkward") / "m.gguf", script=AWKWARD, then="random")
    with Engine(path, n_threads=1, n_seq=3) as engine:
        yield engine


@pytest.fixture(scope="module")
def looping(tmp_path_factory: pytest.TempPathFactory, build_gguf: BuildGGUF) -> Iterator[Engine]:
    """An engine on a model that thinks the same five tokens for ever."""
    script = [b" wait", b" let", b" me", b" see", b"\nso"]
    with Engine(build_gguf(tmp_path_factory.mktemp("loop") / "m.gguf", script=script, then="loop"), n_threads=1) as e:
        yield e


def ask(engine: Engine, sampling: Sampling, guidance: Guidance = FREE, question: str = "why?") -> list[Step]:
    prompt = engine.prompt([{"role": "user", "content": question}])
    return list(engine.stream(prompt, sampling, guidance=guidance))


def text_of(steps: list[Step], part: str) -> str:
    return "".join(step.text for step in steps if step.part == part)


def notes_of(steps: list[Step]) -> str:
    return "; ".join(step.note for step in steps if step.note)


@relaxed
@given(st.integers(0, 10_000), st.integers(0, 120), st.integers(60, 220), st.booleans(), st.sampled_from([(), ("7",)]))
def test_with_a_budget_there_is_an_answer_and_no_tag_in_it(
    awkward: Engine, seed: int, budget: int, limit: int, guard: bool, stop: tuple[str, ...]
) -> None:
    guidance = Guidance(think_budget=budget, loop_guard=guard, stop=stop)
    steps = ask(awkward, Sampling(temperature=1.0, seed=seed, max_tokens=limit), guidance)
    last, answer = steps[-1], text_of(steps, "answer")
    assert last.closed is True
    assert last.n_reasoning <= max(budget, len(awkward.model.tokenize("\n</think>\n\n", whole=False)))
    assert last.n_reasoning < last.n_generated <= limit
    assert answer.strip() or stop, "only a stop string may leave the answer empty"
    assert "<think>" not in answer
    assert "</think>" not in answer
    assert "</think>" not in text_of(steps, "thinking")
    assert not any(string in answer for string in stop)
    assert [step.part for step in steps] == sorted((step.part for step in steps), reverse=True)


@relaxed
@given(st.integers(0, 10_000))
def test_with_thinking_off_no_tag_leaks(awkward: Engine, seed: int) -> None:
    prompt = awkward.prompt([{"role": "user", "content": "why?"}], "off")
    assert prompt.endswith("</think>\n\n")
    steps = list(awkward.stream(prompt, Sampling(temperature=1.0, seed=seed, max_tokens=60)))
    assert not any(tag in text_of(steps, part) for tag in ("<think>", "</think>") for part in ("answer", "thinking"))


def test_a_model_that_closes_closed_thinking_again_is_forgiven(tmp_path: Path, build_gguf: BuildGGUF) -> None:
    with Engine(build_gguf(tmp_path / "m.gguf", script=[b"</th", b"ink>", b"\n\n7"]), n_threads=1) as engine:
        prompt = engine.prompt([{"role": "user", "content": "why?"}], "off")
        steps = list(engine.stream(prompt, Sampling()))
        assert (text_of(steps, "thinking"), text_of(steps, "answer")) == ("", "7")
        assert steps[-1].closed is None


def test_a_batch_is_held_to_the_same(awkward: Engine) -> None:
    prompts = [awkward.prompt([{"role": "user", "content": f"{i}?"}]) for i in range(7)]
    guidance = Guidance(think_budget=30, stop=("7",))
    done = dict(awkward.generate_many(prompts, Sampling(max_tokens=90), guidance=guidance))
    for i, prompt in enumerate(prompts):
        steps = list(awkward.stream(prompt, Sampling(max_tokens=90), guidance=guidance))
        assert done[i].content == text_of(steps, "answer")
        assert done[i].reasoning_tokens == steps[-1].n_reasoning <= 30
        assert done[i].finish_reason == steps[-1].finish_reason


def test_the_hint_comes_before_the_closing_tag_and_is_said(looping: Engine) -> None:
    free = ask(looping, Sampling(max_tokens=60))
    assert free[-1].finish_reason == "length"
    assert text_of(free, "answer") == ""
    steps = ask(looping, Sampling(max_tokens=160), Guidance(think_budget=100))
    thinking = text_of(steps, "thinking")
    assert thinking.count("I have to answer now.") == 1
    assert thinking.startswith(text_of(free, "thinking")[:100])
    assert "told to end after" in notes_of(steps)
    assert steps[-1].n_reasoning <= 100


def test_the_guard_answers_a_loop_with_dry_and_the_thinking_goes_on(looping: Engine) -> None:
    guarded = ask(looping, Sampling(max_tokens=300), Guidance(loop_guard=True))
    assert "circles of 5 tokens" in notes_of(guarded)
    tokens = [step.token for step in guarded if step.token >= 0]
    noticed = next(i for i, step in enumerate(guarded) if step.note)
    assert noticed == LEAST_TOKENS - 1
    assert tokens[:59] == tokens[5:64], "it was one"
    assert tokens[noticed + 1 : noticed + 21] != tokens[noticed - 19 : noticed + 1], "it goes on otherwise"
    assert guarded[-1].closed is True
    assert text_of(guarded, "answer").strip()


def test_where_dry_does_not_help_the_thinking_is_wound_down_and_the_answer_ended(
    looping: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sampler, "fight_loops", lambda self, history: None)
    steps = ask(looping, Sampling(max_tokens=450), Guidance(loop_guard=True))
    thinking, answer = text_of(steps, "thinking"), text_of(steps, "answer")
    assert thinking.endswith("\nI have to answer now.\n")
    assert thinking.count(" wait") == 2 * LEAST_TOKENS // 5, "noticed twice"
    assert "</think>" not in thinking + answer
    assert " let me see" in answer
    assert (steps[-1].finish_reason, steps[-1].closed) == ("loop", True)
    assert notes_of(steps).split("; ") == [
        "the thinking goes in circles of 5 tokens",
        "repetition is penalized from here",
        "the thinking still goes in circles and was closed",
        "the answer still goes in circles and was ended",
    ]


def test_a_loop_that_varies_under_dry_is_ended_in_the_part_that_looped(
    looping: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model says five tokens for ever: here they count as a loop once, and from then on as a pattern."""
    found = LoopDetector.add
    n_found: list[int] = []

    def add_once(self: LoopDetector, token: int) -> int | None:
        period = found(self, token)
        n_found.extend([period] if period else [])
        return period if len(n_found) == 1 else None

    monkeypatch.setattr(Sampler, "fight_loops", lambda self, history: None)
    monkeypatch.setattr(LoopDetector, "add", add_once)
    steps = ask(looping, Sampling(max_tokens=470), Guidance(loop_guard=True))
    closed = next(step for step in steps if step.note == "the thinking still goes in circles and was closed")
    assert closed.n_generated == LEAST_TOKENS + 256
    assert steps[-1].finish_reason == "length", "an answer that did not loop before may be a table of numbers"


@relaxed
@given(
    st.text("ab<>x", max_size=40), st.lists(st.text("ab<>", min_size=1, max_size=4), min_size=1, max_size=3), st.data()
)
def test_stop_strings_cut_at_the_first_wherever_the_stream_is_cut(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    found = StopStrings(stops)
    out = "".join(found.feed(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)) + found.finish()
    if found.found:
        assert any(out == text[: len(out)] and text[len(out) :].startswith(s) for s in stops)
        assert not any(s in out for s in stops)
    else:
        assert out == text
    assert found.found == any(s in text for s in stops)


SCHEMA_GRAMMAR = r'''root ::= "{" "\"answer\":" [1-9] [0-9]? [0-9]? "}"'''


@pytest.mark.parametrize("budget", [None, 20])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_holds_the_answer_and_not_the_thinking(
    awkward: Engine, budget: int | None, temperature: float
) -> None:
    guidance = Guidance(grammar=SCHEMA_GRAMMAR, think_budget=budget, loop_guard=True)
    for seed in range(8):
        steps = ask(awkward, Sampling(temperature=temperature, seed=seed, max_tokens=150), guidance)
        assert steps[-1].finish_reason == "stop"
        assert 0 <= json.loads(text_of(steps, "answer"))["answer"] <= 999
        assert text_of(steps, "thinking") == "" or not text_of(steps, "thinking").startswith("{")


def test_without_thinking_the_grammar_holds_from_the_first_token(tmp_path: Path, build_gguf: BuildGGUF) -> None:
    plain = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    with Engine(build_gguf(tmp_path / "m.gguf", template=plain), n_threads=1) as engine:
        steps = ask(engine, Sampling(temperature=1.0, seed=3), Guidance(grammar='root ::= "yes" | "no"'))
        assert text_of(steps, "answer") in ("yes", "no")


def test_a_grammar_that_is_none_is_told(awkward: Engine) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "grammar-broken"):
        ask(awkward, Sampling(max_tokens=80), Guidance(grammar="root ::= (", think_budget=5))


def test_penalties_are_off_unless_asked_for(looping: Engine) -> None:
    plain = [s.token for s in ask(looping, Sampling(max_tokens=60))]
    assert plain[:50] == plain[5:55]
    for guidance in (Guidance(repeat_penalty=1000.0), Guidance(dry_multiplier=2.0)):
        assert [s.token for s in ask(looping, Sampling(max_tokens=60), guidance)] != plain
