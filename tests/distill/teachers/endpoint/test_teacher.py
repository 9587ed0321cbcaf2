"""The endpoint teacher as a whole: its model, how much it asks at once, how it ends."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from fake_server import (
    FakeServer,
    Handler,
    ask,
    close,
    hang,
    status,
    stream,
)

from deepdistill.distill.teachers import Request, open_teacher
from deepdistill.distill.teachers.endpoint.concurrency import AdaptiveConcurrency
from deepdistill.distill.teachers.endpoint.teacher import EndpointTeacher
from deepdistill.errors import TeacherError, UsageError
from deepdistill.localrun.core.generation import Sampling


def test_a_teacher_that_is_down_says_so_in_seconds() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(TeacherError, check=lambda error: error.code == "server-down") as caught:
        open_teacher(f"http://127.0.0.1:{port}/v1", model="toy")
    assert time.monotonic() - started < 8
    assert "running" in caught.value.hint


def model_at(url: str, model: str | None = None) -> str:
    with EndpointTeacher(url, model=model) as teacher:
        return teacher.model


def test_the_model_is_the_only_one_or_has_to_be_named(server: FakeServer) -> None:
    assert model_at(server.url) == "toy"
    server.models = ["a", "b"]
    with pytest.raises(TeacherError, check=lambda error: error.code == "model-unclear") as caught:
        model_at(server.url)
    assert "2 models, a and b" in caught.value.message
    assert "--model" in caught.value.hint
    assert model_at(server.url, "b") == "b"
    server.models_status = 404
    assert model_at(server.url + "/chat/completions", "c") == "c"
    with pytest.raises(TeacherError, check=lambda error: error.code == "model-unclear"):
        model_at(server.url)
    server.models_status = 500
    assert model_at(server.url, "d") == "d", "transformers serve fails to list where its cache folder is missing"
    with pytest.raises(TeacherError, check=lambda error: error.code == "models-not-listed") as caught:
        model_at(server.url)
    assert "--model" in caught.value.hint


def test_answers_come_as_they_finish_and_closing_does_not_wait(server: FakeServer) -> None:
    server.failures["question 0"] = [hang]
    with EndpointTeacher(server.url, concurrency=2, timeout_s=30) as teacher:
        answers = teacher.generate(ask(3), Sampling())
        started = time.monotonic()
        assert {next(answers)[0], next(answers)[0]} == {1, 2}
        answers.close()  # type: ignore[attr-defined]
        assert time.monotonic() - started < 2


def test_no_more_than_concurrency_requests_at_once(server: FakeServer, teacher: EndpointTeacher) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def slow(handler: Handler, question: str) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        stream()(handler, question)

    server.failures = {f"question {i}": [slow] for i in range(9)}
    assert len(list(teacher.generate(ask(9), Sampling()))) == 9
    assert most == 3


def test_no_more_is_drawn_than_the_caller_has_seen_the_answers_of(server: FakeServer) -> None:
    drawn, done = 0, 0

    def requests() -> Iterator[Request]:
        nonlocal drawn
        for request in ask(30):
            assert drawn - done < 3
            drawn += 1
            yield request

    with EndpointTeacher(server.url, concurrency=3) as teacher:
        for _ in teacher.generate(requests(), Sampling()):
            time.sleep(0.01)
            done += 1
            if done == 20:
                break
    assert 20 <= drawn <= 23


def test_an_error_of_the_callers_own_reaches_the_caller_after_what_was_paid_for(server: FakeServer) -> None:
    def requests() -> Iterator[Request]:
        yield from ask(2)
        raise ValueError("out of problems")

    with EndpointTeacher(server.url, concurrency=1) as teacher:
        got = []
        with pytest.raises(ValueError, match="out of problems"):
            got.extend(teacher.generate(requests(), Sampling()))
    assert sorted(i for i, _ in got) == [0, 1]


def test_an_address_that_is_down_from_the_beginning(server: FakeServer, second: FakeServer) -> None:
    close(second)
    with EndpointTeacher(f"{second.url},{server.url}", max_backoff_s=0.05) as teacher:
        assert teacher.model == "toy"
        assert len(list(teacher.generate(ask(5), Sampling()))) == 5


def test_addresses_have_to_serve_one_model_and_offline_means_all(server: FakeServer, second: FakeServer) -> None:
    second.models = ["other"]
    with pytest.raises(TeacherError, check=lambda error: error.code == "model-unclear"):
        EndpointTeacher(f"{server.url},{second.url}")
    with pytest.raises(UsageError, check=lambda error: error.code == "offline"):
        open_teacher(f"{server.url},https://example.com/v1", offline=True)


def test_concurrency_finds_its_level(server: FakeServer) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def answers_16_at_once(handler: Handler, question: str) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most, is_full = max(most, running), running > 16
        try:
            if is_full:
                return status(429)(handler, question)
            time.sleep(0.05)
            stream()(handler, question)
        finally:
            with lock:
                running -= 1

    server.failures = {f"question {i}": [answers_16_at_once] * 99 for i in range(300)}
    concurrency = AdaptiveConcurrency(window_s=0.1)
    with EndpointTeacher(server.url, concurrency=concurrency, max_backoff_s=0.05) as teacher:
        assert len(list(teacher.generate(ask(300), Sampling()))) == 300
        assert teacher.n_parallel != 8
    assert most > 12
