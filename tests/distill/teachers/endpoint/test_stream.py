"""What is read off a server's reply: loops however the text is cut into pieces, and log-probabilities with ids."""

from __future__ import annotations

import gzip
import json
import math
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_server import (
    Failure,
    FakeServer,
    Handler,
    answer_one,
    ask,
    delta,
    stream,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdistill.distill.teachers import Request
from deepdistill.distill.teachers.endpoint.stream import LoopWatch, StreamedReply, read_logprobs
from deepdistill.distill.teachers.endpoint.teacher import EndpointTeacher
from deepdistill.localrun.core.generation import Sampling


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


@pytest.mark.parametrize(
    "parts",
    [
        [{"reasoning_content": "12+30"}, {"reasoning_content": "=42\n"}, {"content": "\n\n4"}, {"content": "2"}],
        [{"reasoning": "12+30=42"}, {"content": "42"}],
        [{"content": "<thi"}, {"content": "nk>\n12+30=42\n</thi"}, {"content": "nk>\n\n42"}],
        [{"content": "12+30=42\n</think>\n\n42"}],
        [{"role": "assistant", "content": None}, {"reasoning_content": "12+30=42", "content": ""}, {"content": "42"}],
    ],
    ids=["reasoning_content", "reasoning", "tags", "closing_tag_alone", "nulls"],
)
def test_the_reasoning_is_found_wherever_it_stands(
    server: FakeServer, teacher: EndpointTeacher, parts: list[dict[str, Any]]
) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 20, "completion_tokens_details": {"reasoning_tokens": 15}}
    answer = answer_one(server, teacher, stream(*parts, usage=usage))
    assert (answer.reasoning_content, answer.content, answer.closed) == ("12+30=42", "42", True)
    assert (answer.prompt_tokens, answer.completion_tokens, answer.reasoning_tokens) == (9, 20, 15)


CASES = [
    json.loads(line)
    for line in (Path(__file__).parents[3] / "data" / "replies.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.mark.parametrize("case", [c for c in CASES if "content" in c], ids=lambda case: case["from"])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_the_shapes_of_many_servers(
    server: FakeServer, teacher: EndpointTeacher, case: dict[str, Any], is_streamed: bool
) -> None:
    def whole(handler: Handler, _: str) -> None:
        handler.send(200, {"choices": [{"message": case["message"], "finish_reason": "stop"}], "usage": {}})

    answer = answer_one(server, teacher, stream(case["message"]) if is_streamed else whole)
    assert (answer.reasoning_content, answer.content, answer.closed) == (case["reasoning"], case["content"], True)


def test_an_answer_that_is_all_in_the_reasoning_is_said_once(server: FakeServer, teacher: EndpointTeacher) -> None:
    notes: list[str] = []
    teacher.on_note = notes.append
    silent = stream({"content": None, "reasoning_content": "4-1=3. It is 3."})
    for i in range(2):
        server.failures[f"question {i}"] = [silent]
    answers = [answer for _, answer in teacher.generate(ask(2), Sampling())]
    assert [(answer.reasoning_content, answer.content) for answer in answers] == [("4-1=3. It is 3.", "")] * 2
    assert ["reasoning parser" in note for note in notes] == [True]
    summary = {"content": "3", "reasoning_details": [{"type": "reasoning.summary", "summary": "subtract"}]}
    answer_one(server, teacher, stream(summary))
    assert "summary" in notes[-1]


@pytest.mark.parametrize(
    ("usage", "billed"),
    [
        ({"completion_tokens": 10, "completion_tokens_details": {"reasoning_tokens": 1000}}, 1010),
        ({"completion_tokens": 1010, "completion_tokens_details": {"reasoning_tokens": 1000}}, 1010),
        ({"prompt_tokens": 20, "completion_tokens": 10, "total_tokens": 1030}, 1010),
        ({"prompt_tokens": 20, "completion_tokens": 10, "total_tokens": 10}, 10),
        ({"completion_tokens": 10**400, "prompt_tokens": True, "total_tokens": -1}, 2),
    ],
)
def test_all_tokens_that_are_paid_for_count(
    server: FakeServer, teacher: EndpointTeacher, usage: dict[str, Any], billed: int
) -> None:
    answer = answer_one(server, teacher, stream({"reasoning": "x"}, {"content": "y"}, usage=usage))
    assert answer.completion_tokens == billed


@pytest.mark.parametrize(
    ("reason", "taken_as"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("eos_token", "stop"),
        ("STOP", "stop"),
        ("max_tokens", "length"),
    ],
)
def test_names_for_the_end_of_an_answer(
    server: FakeServer, teacher: EndpointTeacher, reason: str, taken_as: str
) -> None:
    assert answer_one(server, teacher, stream({"content": "x"}, finish=reason)).finish_reason == taken_as


@pytest.mark.parametrize(("n_tokens", "taken_as"), [(7, "stop"), (2048, "length")])
def test_done_without_a_finish_reason_ends_an_answer(
    server: FakeServer, teacher: EndpointTeacher, n_tokens: int, taken_as: str
) -> None:
    def unfinished(handler: Handler, _: str) -> None:
        handler.events(delta(content="42"), {"choices": [], "usage": {"completion_tokens": n_tokens}}, "[DONE]")

    server.failures["question 0"] = [unfinished]
    [(_, answer)] = teacher.generate(ask(1), Sampling(max_tokens=2048))
    assert (answer.content, answer.finish_reason) == ("42", taken_as)


NESTED = "[" * 100_000
HOSTILE: dict[str, Any] = {
    "nesting": NESTED,
    "a message that is text": {"choices": [{"message": "x", "delta": "x"}]},
    "a choice that is text": {"choices": ["x"]},
    "choices that are text": {"choices": "x"},
    "content that is a number": {"choices": [{"delta": {"content": 4}}]},
    "reasoning that is an object": {"choices": [{"delta": {"reasoning": {"a": 1}}}]},
    "a number of many digits": '{"choices": [{"delta": {"content": "x"}, "index": ' + "9" * 5000 + "}]}",
    "a line that does not end": "x" * (5 << 20),
}


@pytest.mark.parametrize("event", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_reply_fails_alone(server: FakeServer, event: Any) -> None:
    def hostile(handler: Handler, _: str) -> None:
        handler.events(event)

    teacher = EndpointTeacher(server.url, max_backoff_s=0.001)
    server.failures["bad"] = [hostile] * 20
    answers = dict(teacher.generate([Request([{"role": "user", "content": q}]) for q in ("good", "bad")], Sampling()))
    assert (answers[0].content, answers[0].finish_reason) == ("GOOD!", "stop")
    assert answers[1].finish_reason == "error"


def test_only_the_first_choice_counts(server: FakeServer, teacher: EndpointTeacher) -> None:
    def two(handler: Handler, _: str) -> None:
        other = {"choices": [{"index": 1, "delta": {"content": "other"}, "finish_reason": "length"}]}
        handler.events(delta(content="mine"), other, delta("stop"), "[DONE]")

    answer = answer_one(server, teacher, two)
    assert (answer.content, answer.finish_reason) == ("mine", "stop")


def test_a_reply_without_end_is_bounded(server: FakeServer) -> None:
    def bomb(handler: Handler, _: str) -> None:
        data = gzip.compress(json.dumps({"choices": [], "x": "x" * (80 << 20)}).encode())
        handler.send(200, data, Content_Encoding="gzip")

    teacher = EndpointTeacher(server.url, max_backoff_s=0.001)
    server.failures["q"] = [bomb] * 20
    [(_, answer)] = teacher.generate([Request([{"role": "user", "content": "q"}])], Sampling())
    assert answer.finish_reason == "error"
    assert "64 MiB" in (answer.error or "")


def test_answers_without_thinking_and_without_an_end(server: FakeServer, teacher: EndpointTeacher) -> None:
    plain = answer_one(server, teacher, stream({"content": "42"}, usage={"prompt_tokens": 1, "completion_tokens": 3}))
    assert (plain.reasoning_content, plain.content, plain.closed, plain.reasoning_tokens) == (None, "42", None, 0)
    cut_off = answer_one(server, teacher, stream({"reasoning_content": "12+"}, finish="length"))
    assert (cut_off.content, cut_off.closed, cut_off.finish_reason) == ("", False, "length")
    assert cut_off.reasoning_tokens == cut_off.completion_tokens == 7
    filtered = answer_one(server, teacher, stream({"content": "I can"}, finish="content_filter"))
    assert filtered.finish_reason == "error"
    assert "content_filter" in (filtered.error or "")


def test_a_server_that_does_not_stream(server: FakeServer, teacher: EndpointTeacher) -> None:
    def whole(handler: Handler, _: str) -> None:
        message = {"role": "assistant", "content": "42", "reasoning_content": "40+2"}
        handler.send(200, {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {}})

    answer = answer_one(server, teacher, whole)
    assert (answer.reasoning_content, answer.content, answer.closed) == ("40+2", "42", True)


def endless(pieces: Callable[[int], dict[str, Any]], ended: threading.Event) -> Failure:
    """Stream without end, until the client hangs up: then `ended` is set."""

    def answer(handler: Handler, _: str) -> None:
        try:
            handler.events(delta(role="assistant", content=""))
            for i in range(1_000_000):
                handler.wfile.write(f"data: {json.dumps(delta(**pieces(i)))}\n\n".encode())
        except OSError:
            ended.set()

    return answer


def test_a_server_that_ignores_the_limit_is_cut_and_what_came_is_kept(
    server: FakeServer, teacher: EndpointTeacher
) -> None:
    ended = threading.Event()
    number = endless(lambda i: {"content": f"{i} "} if i >= 10 else {"reasoning_content": f"{i} "}, ended)
    server.failures["question 0"] = [number]
    ((_, answer),) = teacher.generate(ask(1), Sampling(max_tokens=40))
    assert (answer.finish_reason, answer.error) == ("length", None)
    assert answer.reasoning_content == "0 1 2 3 4 5 6 7 8 9 "
    assert answer.content.split() == [str(i) for i in range(10, 10 + len(answer.content.split()))]
    assert 40 < answer.completion_tokens == 10 + len(answer.content.split()) < 60
    assert 0 < answer.prompt_tokens < 10, "estimated, since the usage never came"
    assert ended.wait(5), "the connection is closed, which tells the server to stop"
    assert len(server.requests) == 1


def test_a_loop_is_cut_while_it_streams(server: FakeServer, teacher: EndpointTeacher) -> None:
    ended = threading.Event()
    words = ["But", "wait,", "is", "that", "right?", "Let", "me", "check", "it", "again.", ""]
    server.failures["question 0"] = [endless(lambda i: {"reasoning_content": words[i % len(words)] + " "}, ended)]
    ((_, answer),) = teacher.generate(ask(1), Sampling(max_tokens=100_000))
    assert (answer.finish_reason, answer.content, answer.closed) == ("loop", "", False)
    assert (answer.reasoning_content or "").startswith("But wait, is that right?")
    assert 3 * len(words) <= answer.completion_tokens < 100
    assert answer.reasoning_tokens == answer.completion_tokens
    assert ended.wait(5)


def test_an_answer_whose_usage_never_comes_is_not_asked_again(server: FakeServer, teacher: EndpointTeacher) -> None:
    def without_end(handler: Handler, _: str) -> None:
        handler.events(delta(content="4"), delta("stop", content="2"), "{broken")

    answer = answer_one(server, teacher, without_end)
    assert (answer.content, answer.finish_reason, answer.completion_tokens) == ("42", "stop", 2)
    assert len(server.requests) == 1


def test_any_character_may_stand_in_the_stream(server: FakeServer, teacher: EndpointTeacher) -> None:
    text = "a\u2028b\u0085c\x1cd ✓ 😀"

    def raw(handler: Handler, _: str) -> None:
        handler.events(json.dumps(delta("stop", content=text), ensure_ascii=False))

    assert answer_one(server, teacher, raw).content == text
