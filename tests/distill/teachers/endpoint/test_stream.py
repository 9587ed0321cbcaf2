"""What is read off a server's reply: loops however the text is cut into pieces, and log-probabilities with ids."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdistill.distill.teachers.endpoint.stream import LoopWatch, StreamedReply, read_logprobs


def found_after(text: str, sizes: list[int]) -> int | None:
    """Return how many characters were read when a loop was found."""
    watch, start, sizes = LoopWatch(), 0, sizes or [1]
    for i in range(len(text)):
        size = sizes[i % len(sizes)]
        if watch.add(text[start : start + size]):
            return min(len(text), start + size)
        start += size
    return None


LOOPS = {
    "sentence": "Wait, let me think about this again. ",
    "word": "the ",
    "paragraph": "So the answer is 42.\n\nBut wait, what if x = 3? Then y = 5 and we are done. Hmm.\n\n" * 3,
    "digits": "142857",
    "Chinese": "等等,让我再想一想。",
    "line ends": "\n",
    "no spaces": "abcdefg",
    "dashes": "-",
}


@pytest.mark.parametrize("unit", LOOPS.values(), ids=LOOPS.keys())
@pytest.mark.parametrize("sizes", [[1], [3], [7, 2, 40], [1000]], ids=str)
def test_loops_are_found_whatever_the_pieces(unit: str, sizes: list[int]) -> None:
    text = "First we set x to 7 and look. " + unit * 6000
    found = found_after(text[:12000], sizes)
    assert found is not None
    alone = found_after(text[:12000], [1])
    assert alone is not None
    assert alone <= found < alone + max(sizes)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=20))
def test_text_that_goes_on_is_no_loop(sizes: list[int]) -> None:
    rng = random.Random(1)
    words = [f"{rng.choice(['so', 'then', 'x =', 'thus', '结果'])} {rng.randrange(10_000)}," for _ in range(700)]
    table = "\n|---|---|\n" + "-" * 100 + "\n" + "=" * 80 + "\n" + "\n".join(f"| {i} | {i * i} |" for i in range(40))
    assert found_after(" ".join(words) + table, sizes) is None


def entry(token: dict[str, Any], *top: tuple[dict[str, Any], float]) -> dict[str, Any]:
    return {**token, "logprob": -0.5, "top_logprobs": [{**t, "logprob": value} for t, value in top]}


@pytest.mark.parametrize(
    "form",
    [lambda i: {"id": i, "token": "x", "bytes": [120]}, lambda i: {"token": f"token_id:{i}", "bytes": None}],
    ids=["llama-server", "vLLM"],
)
def test_ids_and_logprobs_are_read_in_both_forms(form: Any) -> None:
    entries = [
        entry(form(7), (form(7), -0.25), (form(9), -1.5)),
        entry(form(8), (form(1), -2.0), (form(8), -0.5)),  # out of order
        entry(form(3), (form(3), -0.125)),  # fewer than the others
    ]
    token_ids, top = read_logprobs(entries)
    assert token_ids == (7, 8, 3)
    assert top is not None
    assert top.ids.dtype == np.int32
    assert top.values.dtype == np.float32
    assert top.ids.tolist() == [[7, 9], [8, 1], [3, -1]]
    assert top.values.tolist() == [[-0.25, -1.5], [-0.5, -2.0], [-0.125, -math.inf]]


def test_where_there_are_no_ids_there_is_nothing() -> None:
    text = {"token": "Hello", "bytes": [72]}
    assert read_logprobs([entry(text, (text, -0.1))]) == (None, None)
    assert read_logprobs([]) == (None, None)
    assert read_logprobs([None]) == (None, None)
    assert read_logprobs([{"id": 5, "bytes": [], "logprob": -1.0}]) == ((5,), None)
    mlx = {"id": 5, "token": "x", "logprob": -1.0}  # the most probable token, not the one chosen
    assert read_logprobs([mlx | {"top_logprobs": [mlx]}]) == (None, None)


def reply_of(n_entries: int, n_tokens: int) -> StreamedReply:
    reply = StreamedReply(content=["x"], finish_reason="stop", usage={"completion_tokens": n_tokens})
    ids: list[dict[str, Any]] = [{"id": i, "bytes": [65]} for i in range(n_entries)]
    reply.logprobs = [entry(token, (token, -0.1)) for token in ids]
    return reply


def test_logprobs_with_holes_are_not_kept() -> None:
    whole, without_end, holey = (reply_of(n, 10).completion(0, 0) for n in (10, 9, 8))
    assert whole.token_ids == tuple(range(10))
    assert without_end.token_ids == tuple(range(9))
    assert (holey.token_ids, holey.logprobs) == (None, None)


def test_reasoning_tokens_stand_in_the_usage_or_in_its_details() -> None:
    for usage in ({"reasoning_tokens": 6}, {"completion_tokens_details": {"reasoning_tokens": 6}}):
        reply = StreamedReply(
            reasoning=["a"], content=["b"], finish_reason="stop", usage={"completion_tokens": 10, **usage}
        )
        assert reply.completion(0, 0).reasoning_tokens == 6
