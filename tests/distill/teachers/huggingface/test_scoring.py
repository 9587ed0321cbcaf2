"""Scores of given texts against one plain pass over each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import ask

from deepdistill.distill.teachers.huggingface.scoring import score_rows
from deepdistill.distill.teachers.huggingface.teacher import TransformersTeacher
from deepdistill.errors import ModelError


def test_many_given_texts_are_scored_as_each_alone(teacher: TransformersTeacher) -> None:
    texts = ["12 + 30 = 42, twelve", "7", "4, 5 and 6 and so on, up to nine or ten or more", "", "<think>5</think>"]
    made = [(ask(1)[0].messages, teacher.tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    made.append(([{"role": "user", "content": "A longer question, of which more stands before the answer."}], [9, 8]))
    rows = [(teacher.tokenize(teacher.render(messages)), answer) for messages, answer in made]
    for most in (1, 100, 10_000):
        scored = dict(score_rows(teacher.model, rows, k=5, pad_id=0, max_tokens=most))
        assert sorted(scored) == list(range(len(made)))
        for i, (messages, answer) in enumerate(made):
            alone = teacher.score(messages, answer, top_logprobs=5)
            np.testing.assert_allclose(scored[i].values, alone.values, atol=1e-4)
            assert scored[i].ids.shape == alone.ids.shape == (len(answer), 5)
    many = dict(teacher.score_many(made, top_logprobs=5))
    for i in range(len(made)):
        np.testing.assert_allclose(many[i].values, scored[i].values, atol=1e-4)


def test_a_text_that_is_too_long_for_a_pass_is_scored_among_short_ones(
    teacher: TransformersTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [(ask(1)[0].messages, answer) for answer in ([5, 6], [7] * 30, [8])]
    expected = [teacher.score(messages, answer, top_logprobs=3).values for messages, answer in made]
    monkeypatch.setattr(teacher, "pass_tokens", len(teacher.tokenize(teacher.render(made[0][0]))) + 5)
    scored = dict(teacher.score_many(made, top_logprobs=3))
    for i in range(3):
        np.testing.assert_allclose(scored[i].values, expected[i], atol=1e-4)


def test_a_given_text_is_scored_in_passes_of_any_size(
    teacher: TransformersTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages, text = ask(1)[0].messages, "12 + 30 = 42, twelve"
    made = teacher.tokenizer(text, add_special_tokens=False).input_ids
    prompt = teacher.tokenizer(teacher.render(messages), add_special_tokens=False).input_ids
    with torch.inference_mode():
        logits = teacher.model(torch.tensor([[*prompt, *made]])).logits[0, len(prompt) - 1 : -1]
    everything = torch.log_softmax(logits.float(), -1)
    ids, values = (part.clone() for part in everything.topk(5)[::-1])
    for i, token in enumerate(made):  # the answer's own token is among them, in the last place if need be
        if token not in ids[i]:
            ids[i, -1], values[i, -1] = token, everything[i, token]
    assert bool((values[:, -1] < everything.topk(5).values[:, -1]).any())
    for n in (1024, 1, 3, len(prompt) - 1, len(prompt), len(prompt) + 1):
        monkeypatch.setattr(teacher, "pass_tokens", n)
        for answer in (text, made):
            scored = teacher.score(messages, answer, top_logprobs=5)
            np.testing.assert_allclose(scored.values, values.numpy(), atol=1e-4)
            assert (scored.ids == ids.numpy()).mean() > 0.9
            assert all(token in row for token, row in zip(made, scored.ids, strict=True))
    with pytest.raises(ModelError, check=lambda error: error.code == "context-too-small"):
        teacher.score(messages, made * 20, top_logprobs=5)
