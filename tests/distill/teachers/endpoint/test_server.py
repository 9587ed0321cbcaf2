"""Servers: their addresses, keys and silences, and which of several is asked."""

from __future__ import annotations

import json
import socket
import threading
import time

import httpx
import pytest
from fake_server import (
    FakeServer,
    Handler,
    answer_one,
    ask,
    close,
    delta,
    error_event,
    serving,
    status,
    stream,
)

from deepdistill.distill.teachers import open_teacher
from deepdistill.distill.teachers.endpoint.server import Server, api_key, retry_after
from deepdistill.distill.teachers.endpoint.teacher import EndpointTeacher
from deepdistill.errors import TeacherError, UsageError
from deepdistill.localrun.core.generation import Completion, Sampling

KEY = "sk-very-secret-123"


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


def test_addresses_in_azures_style_and_their_key(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Server("https://mine.openai.azure.com/openai/deployments/r1/chat/completions?api-version=2026-10-01")
    assert made.url == "https://mine.openai.azure.com/openai/deployments/r1"
    monkeypatch.setenv("DEEPDISTILL_API_KEY", KEY)
    assert Server("https://mine.openai.azure.com/openai/v1").headers == {"api-key": KEY}
    with EndpointTeacher(f"{server.url}/chat/completions?api-version=1", model="toy") as teacher:
        assert [answer.content for _, answer in teacher.generate(ask(1), Sampling())] == ["QUESTION 0!"]
    assert server.paths[-1] == "/v1/chat/completions?api-version=1"


@pytest.mark.parametrize("key", ["sk-café", "sk-a\nb"])
def test_a_key_that_can_be_none(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPDISTILL_API_KEY", key)
    with pytest.raises(UsageError, check=lambda error: error.code == "bad-key"):
        Server("http://127.0.0.1:9/v1")


def test_a_web_page_and_a_move_are_said(server: FakeServer) -> None:
    def page(handler: Handler, _: str) -> None:
        handler.send(200, b"<html>Welcome</html>", Content_Type="text/html")

    def moved(handler: Handler, _: str) -> None:
        handler.send(301, b"", Location="https://elsewhere/v1")

    for failure, code, named in ((page, "not-an-api", server.url), (moved, "server-moved", "https://elsewhere/v1")):
        server.failures["question 0"] = [failure]
        with EndpointTeacher(server.url) as teacher, pytest.raises(TeacherError) as caught:
            list(teacher.generate(ask(1), Sampling()))
        assert (caught.value.code, named in caught.value.message) == (code, True)


def test_proxies_that_do_not_work_are_named(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("HTTP_PROXY", "http://user:secret@127.0.0.1:9")
    with pytest.raises(TeacherError) as caught:
        EndpointTeacher(server.url, max_backoff_s=0.01)
    assert (caught.value.code, "proxy 127.0.0.1:9" in caught.value.message) == ("server-down", True)
    assert "secret" not in f"{caught.value} {caught.value.hint}"
    monkeypatch.delenv("HTTP_PROXY")
    monkeypatch.setenv("ALL_PROXY", "ftp://127.0.0.1:9")
    with pytest.raises(TeacherError, check=lambda error: error.code == "proxy-unusable"):
        EndpointTeacher(server.url, max_backoff_s=0.01)
    monkeypatch.setenv("NO_PROXY", "::1,127.0.0.1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    EndpointTeacher(server.url).close()


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
@pytest.mark.parametrize("no_proxy", ["[::1]", "::1", "localhost,::1", "a.org, [::1]:{port}", "*"])
@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
def test_a_server_on_ipv6_is_reached_past_the_proxy(name: str, no_proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with serving(host="::1") as server:
        monkeypatch.setenv(name, no_proxy.format(port=server.server_address[1]))
        with EndpointTeacher(server.url, max_backoff_s=0.01) as teacher:
            ((_, completion),) = teacher.generate(ask(1), Sampling())
        assert completion.content == "QUESTION 0!"
    with pytest.raises(TeacherError) as caught:  # nobody is there now, and no proxy is blamed
        EndpointTeacher(server.url, max_backoff_s=0.01)
    assert (caught.value.code, "proxy" in caught.value.message) == ("server-down", False)


def test_retry_after_is_counted_by_the_servers_own_clock() -> None:
    headers = {"retry-after": "Tue, 01 Dec 2026 12:00:30 GMT", "date": "Tue, 01 Dec 2026 12:00:00 GMT"}
    assert retry_after(httpx.Headers(headers)) == 30.0
    assert retry_after(httpx.Headers({"retry-after": "7200"})) == 7200.0
    assert retry_after(httpx.Headers({"retry-after": "soon"})) is None


def test_a_wait_of_hours_is_said_at_once(server: FakeServer) -> None:
    notes: list[str] = []
    server.failures["question 0"] = [status(429, "quota", Retry_After="7200")]
    with EndpointTeacher(server.url) as teacher:
        teacher.on_note = notes.append
        run = teacher.generate(ask(1), Sampling())
        threading.Thread(target=lambda: next(run, None), daemon=True).start()
        ended = time.monotonic() + 20
        while not notes and time.monotonic() < ended:
            time.sleep(0.01)
    assert "asking again at" in notes[0]
