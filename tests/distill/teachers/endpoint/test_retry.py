"""What one request goes through: retries, limits, log-probabilities as each server takes them."""

from __future__ import annotations

import random
import time

import pytest
from fake_server import (
    Failure,
    FakeServer,
    Handler,
    ask,
    cut,
    delta,
    error_event,
    hang,
    invalid_body,
    invalid_json,
    reset,
    status,
    stream,
)

from deepdistill.distill.teachers.endpoint.retry import ATTEMPTS
from deepdistill.distill.teachers.endpoint.teacher import EndpointTeacher
from deepdistill.errors import TeacherError, UsageError
from deepdistill.localrun.core.generation import Completion, Sampling


@pytest.mark.parametrize(
    "failure",
    [status(500), status(503), status(408), status(409), hang, cut, invalid_json, invalid_body, reset, error_event],
    ids=["500", "503", "408", "409", "hang", "cut", "invalid_json", "invalid_body", "reset", "error_event"],
)
def test_what_can_succeed_later_is_tried_again_and_nothing_is_lost(
    server: FakeServer, teacher: EndpointTeacher, failure: Failure
) -> None:
    server.failures["question 2"] = [failure, failure]
    answers = dict(teacher.generate(ask(5), Sampling()))
    assert {i: answer.content for i, answer in answers.items()} == {i: f"QUESTION {i}!" for i in range(5)}
    assert [len(server.tries(f"question {i}")) for i in range(5)] == [1, 1, 3, 1, 1]
    assert all(answer.finish_reason == "stop" and answer.error is None for answer in answers.values())


def test_retry_after_is_kept_to(server: FakeServer, teacher: EndpointTeacher) -> None:
    server.failures["question 0"] = [status(429, Retry_After="1")]
    assert len(dict(teacher.generate(ask(2), Sampling()))) == 2
    first, second = server.tries("question 0")
    assert 0.95 < second - first < 3


def test_a_request_that_never_succeeds_fails_alone(server: FakeServer, teacher: EndpointTeacher) -> None:
    server.failures["question 1"] = [status(500, "boom")] * 100
    server.failures["question 2"] = [status(400, "too long")] * 100
    answers = dict(teacher.generate(ask(4), Sampling()))
    assert [answers[i].finish_reason for i in range(4)] == ["stop", "error", "error", "stop"]
    assert "boom" in (answers[1].error or "")
    assert "too long" in (answers[2].error or "")
    assert len(server.tries("question 1")) == ATTEMPTS
    assert len(server.tries("question 2")) == 1, "a request that is refused is not sent again"


def test_a_server_that_dies_stops_the_teacher_after_handing_over_what_came(
    server: FakeServer, teacher: EndpointTeacher
) -> None:
    server.failures |= {f"question {i}": [status(500, "down")] * 100 for i in range(3, 60)}
    answers = teacher.generate(ask(60), Sampling())
    got: dict[int, Completion] = {}
    with pytest.raises(TeacherError, check=lambda error: error.code == "server-keeps-failing"):
        got.update(answers)
    assert {i for i, answer in got.items() if answer.finish_reason == "stop"} == {0, 1, 2}
    assert len({question for _, question, *_ in server.requests}) < 20


@pytest.mark.parametrize("code", [401, 403, 404])
def test_what_no_request_survives_stops_at_once_with_a_hint(
    server: FakeServer, teacher: EndpointTeacher, code: int
) -> None:
    server.failures = {f"question {i}": [status(code)] * 9 for i in range(1, 40)}
    with pytest.raises(TeacherError, check=lambda error: error.code == "server-refuses") as caught:
        list(teacher.generate(ask(40), Sampling()))
    assert str(code) in caught.value.message
    assert caught.value.hint
    assert len(server.requests) <= 5


def test_the_request_says_how_to_sample(server: FakeServer, teacher: EndpointTeacher) -> None:
    list(teacher.generate(ask(2), Sampling(temperature=0.5, top_p=0.9, max_tokens=99)))
    bodies = {question: body for _, question, body, _ in server.requests}
    body = bodies["question 1"]
    wanted = {"model": "toy", "temperature": 0.5, "top_p": 0.9, "max_tokens": 99, "seed": 41, "stream": True}
    assert {key: body[key] for key in wanted} == wanted
    assert body["stream_options"] == {"include_usage": True}
    assert "top_k" not in body
    assert "min_p" not in body
    list(teacher.generate(ask(1), Sampling(temperature=0.5, top_k=20, min_p=0.1)))
    assert (server.requests[-1][2]["top_k"], server.requests[-1][2]["min_p"]) == (20, 0.1)


def test_what_breaks_off_for_good_says_what_it_took(server: FakeServer, teacher: EndpointTeacher) -> None:
    server.failures["question 1"] = [cut] * ATTEMPTS
    answers = dict(teacher.generate(ask(2), Sampling()))
    assert (answers[1].finish_reason, answers[1].completion_tokens) == ("error", 0)
    assert answers[1].lost_tokens == (4 * ATTEMPTS, ATTEMPTS)  # the prompt's estimated
    assert f"after {ATTEMPTS} attempts: the stream was cut before its end" in (answers[1].error or "")
    assert len(server.tries("question 1")) == ATTEMPTS


def test_what_broke_off_before_an_answer_counts_as_paid_for(server: FakeServer, teacher: EndpointTeacher) -> None:
    filtered = stream({"content": "I can"}, finish="content_filter")
    server.failures = {"question 0": [cut, status(500), cut], "question 1": [filtered]}
    answers = dict(teacher.generate(ask(3), Sampling()))
    assert (answers[0].content, answers[0].prompt_tokens, answers[0].completion_tokens) == ("QUESTION 0!", 5, 7)
    assert answers[0].lost_tokens == (8, 2)
    assert answers[1].lost_tokens == (5, 7), "the server's own count"
    assert answers[2].lost_tokens == (0, 0)


def test_who_waits_is_told_for_what(server: FakeServer) -> None:
    notes: list[str] = []
    server.failures = {"question 0": [status(503, "Loading model")] * 4, "question 1": [status(503, "busy")] * 5}
    with EndpointTeacher(server.url, concurrency=1, max_backoff_s=0.01) as teacher:
        teacher.on_note = notes.append
        assert len(list(teacher.generate(ask(2), Sampling()))) == 2
        assert notes == [f"{server.url[7:-3]}: HTTP 503: Loading model; asking again"]
    server.failures["question 0"] = [status(503, "CB worker is dead")] * 99
    with EndpointTeacher(server.url, concurrency=1, max_backoff_s=0.01) as teacher:
        ((_, answer),) = teacher.generate(ask(1), Sampling())
    assert "after 10 attempts: HTTP 503: CB worker is dead" in (answer.error or "")


def test_one_in_three_fails_and_one_in_ten_hangs_and_all_answers_come(server: FakeServer) -> None:
    rng = random.Random(5)
    faults = [status(429, Retry_After="0"), status(500), status(503), cut, invalid_json]
    for i in range(150):
        failures: list[Failure] = []
        while rng.random() < 0.4:
            failures.append(hang if rng.random() < 0.25 else rng.choice(faults))
        server.failures[f"question {i}"] = failures
    n_faults = sum(map(len, server.failures.values()))
    assert n_faults > 60
    with EndpointTeacher(server.url, concurrency=24, timeout_s=1.5, max_backoff_s=0.05) as teacher:
        answers = list(teacher.generate(ask(150), Sampling()))
    assert sorted(i for i, _ in answers) == list(range(150))
    assert {answer.content for _, answer in answers} == {f"QUESTION {i}!" for i in range(150)}
    assert len(server.requests) == 150 + n_faults


def test_limits_a_minute_hold_for_attempts_and_tokens(server: FakeServer) -> None:
    server.failures["question 1"] = [status(500)]
    with EndpointTeacher(server.url, max_rpm=2400, max_backoff_s=0.01) as teacher:
        assert len(list(teacher.generate(ask(9), Sampling()))) == 9
    times = sorted(at for at, *_ in server.requests)
    assert len(times) == 10
    assert times[-1] - times[0] > 0.2
    with EndpointTeacher(server.url, max_tpm=6000) as teacher:
        # 3 tokens of prompt and 7 of answer; before the first answer the most allowed is expected of each.
        started = time.monotonic()
        assert len(list(teacher.generate(ask(3), Sampling(max_tokens=20)))) == 3
        assert time.monotonic() - started > 0.17
    for name in ("concurrency", "max_rpm", "max_tpm"):
        with pytest.raises(UsageError, check=lambda error: error.code == "number-out-of-range") as caught:
            EndpointTeacher(server.url, **{name: 0})  # type: ignore[arg-type]
        assert name in caught.value.message


def with_logprobs(handler: Handler, _: str) -> None:
    """Answer as vLLM does when asked for token ids."""
    entries = [
        {"token": f"token_id:{i}", "logprob": -0.5, "top_logprobs": [{"token": f"token_id:{i}", "logprob": -0.5}]}
        for i in (11, 12)
    ]
    parts = [{**delta(content="4")["choices"][0], "logprobs": {"content": entries}}]
    usage = {"prompt_tokens": 5, "completion_tokens": 3}
    handler.events({"choices": parts}, delta("stop"), {"choices": [], "usage": usage}, "[DONE]")


def test_logprobs_are_asked_for_as_each_server_takes_it(server: FakeServer, teacher: EndpointTeacher) -> None:
    notes: list[str] = []
    teacher.on_note = notes.append
    too_many = status(400, "Requested sample logprobs of 64, which is greater than max allowed: 20")
    server.failures = {"question 0": [too_many, with_logprobs], "question 1": [with_logprobs]}
    answers = [dict(teacher.generate([request], Sampling(), top_logprobs=64))[0] for request in ask(2)]
    asked = [(body["top_logprobs"], body["return_tokens_as_token_ids"]) for _, _, body, _ in server.requests]
    assert asked == [(64, True), (20, True), (20, True)]
    assert len(notes) == 1
    assert "20 log-probabilities a token, not 64" in notes[0]
    for answer in answers:
        assert answer.token_ids == (11, 12)
        assert answer.logprobs is not None
        assert answer.logprobs.ids.tolist() == [[11], [12]]


def test_a_server_without_logprobs_is_asked_without(server: FakeServer, teacher: EndpointTeacher) -> None:
    notes: list[str] = []
    teacher.on_note = notes.append
    server.failures = {"question 0": [status(400, "unknown parameter")] * 2, "question 1": []}
    answers = [dict(teacher.generate([request], Sampling(), top_logprobs=8))[0] for request in ask(2)]
    assert [(answer.content, answer.logprobs) for answer in answers] == [("QUESTION 0!", None), ("QUESTION 1!", None)]
    assert ["logprobs" in body for _, _, body, _ in server.requests] == [True, True, False, False]
    assert notes == [f"{server.url[7:-3]} refuses log-probabilities: deepdistill asks without them"]


def test_a_server_that_hangs_up_on_logprobs_is_asked_without(server: FakeServer, teacher: EndpointTeacher) -> None:
    server.failures = {"question 0": [reset] * 3}
    answers = dict(teacher.generate(ask(1), Sampling(), top_logprobs=64))
    assert answers[0].content == "QUESTION 0!"
    assert [body.get("top_logprobs") for _, _, body, _ in server.requests] == [64, 20, 20, None]


def test_a_request_refused_for_itself_does_not_cost_the_others_their_logprobs(
    server: FakeServer, teacher: EndpointTeacher
) -> None:
    server.failures = {"question 0": [status(400, "too long")] * 9, "question 1": [with_logprobs]}
    answers = dict(teacher.generate(ask(2), Sampling(), top_logprobs=8))
    assert answers[0].finish_reason == "error"
    assert answers[1].logprobs is not None
