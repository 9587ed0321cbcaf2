"""transformers' paged cache, on the CPU too, against `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import ask, generated_alone

from deepdistill.distill.teachers import Request
from deepdistill.distill.teachers.huggingface.paged import Pages, can_page
from deepdistill.distill.teachers.huggingface.teacher import TransformersTeacher
from deepdistill.localrun.core.generation import Sampling

# So small that rows hold several pages, and that the cache runs full.
PAGES = Pages(12, 16)


@pytest.mark.parametrize("kind", ["llama", "sliding"])
def test_the_paged_cache_answers_as_generate_does(folders: dict[str, Path], kind: str) -> None:
    teacher = TransformersTeacher(folders[kind], device="cpu", batch_size=4, pages=PAGES)
    notes: list[str] = []
    teacher.on_note = notes.append
    conversations = [*ask(9), Request([{"role": "user", "content": "12 " * 200}])]
    answers = dict(teacher.generate(iter(conversations), Sampling(max_tokens=16)))
    assert teacher.pages, notes
    assert answers[9].finish_reason == "error"
    for i in range(9):
        assert answers[i].token_ids == generated_alone(teacher, list(conversations[i].messages), 16)
        assert answers[i].finish_reason == ("stop" if answers[i].token_ids[-1] in teacher.eos_ids else "length")


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 5, "min_p": 0.1}])
def test_the_paged_cache_samples_with_each_rows_own_seed(
    llama: TransformersTeacher, folders: dict[str, Path], filters: dict[str, Any]
) -> None:
    sampling = Sampling(temperature=1.0, max_tokens=12, **filters)
    expected = dict(llama.generate(ask(9), sampling))
    teacher = TransformersTeacher(folders["llama"], device="cpu", batch_size=4, pages=PAGES)
    answers = dict(teacher.generate(ask(9), sampling))
    assert teacher.pages
    assert [answers[i].token_ids for i in range(9)] == [expected[i].token_ids for i in range(9)]


def test_what_the_paged_cache_refuses_is_batched_here_with_one_note(folders: dict[str, Path]) -> None:
    teacher = TransformersTeacher(folders["deepseek_v3"], device="cpu", batch_size=4, pages=PAGES)
    assert not can_page(teacher.model)
    notes: list[str] = []
    teacher.on_note = notes.append
    for _ in range(2):
        answers = dict(teacher.generate(ask(11), Sampling(max_tokens=8)))
        for i, request in enumerate(ask(11)):
            assert answers[i].token_ids == generated_alone(teacher, list(request.messages), 8)
    assert len(notes) == 1
    assert "\n" not in notes[0]
