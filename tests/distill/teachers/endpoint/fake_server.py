"""A server that answers with the question in capitals, and fails on purpose where a test says so."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from deepdistill.distill.teachers import Request
from deepdistill.distill.teachers.endpoint.teacher import EndpointTeacher
from deepdistill.localrun.core.generation import Completion, Sampling


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
            self.server.paths.append(self.path)
            self.server.requests.append((time.monotonic(), question, body, dict(self.headers)))
            failures = self.server.failures.get(question, [])
            failure = failures.pop(0) if failures else None
        (failure or stream())(self, question)

    def key(self) -> str:
        return self.headers.get("Authorization", "")

    def send(self, status: int, body: Any, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content_Type": "application/json"} | headers).items():
            self.send_header(name.replace("_", "-"), value)
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

    def __init__(self, port: int = 0, host: str = "127.0.0.1") -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)
        self.lock = threading.Lock()
        self.models, self.models_status = ["toy"], 200
        self.failures: dict[str, list[Failure]] = {}
        self.requests: list[tuple[float, str, dict[str, Any], dict[str, str]]] = []
        self.paths: list[str] = []
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/v1"

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
def serving(port: int = 0, host: str = "127.0.0.1") -> Iterator[FakeServer]:
    server = FakeServer(port, host)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        close(server)


def close(server: FakeServer) -> None:
    server.shutdown()
    server.server_close()


def ask(n: int) -> list[Request]:
    return [Request([{"role": "user", "content": f"question {i}"}], seed=40 + i) for i in range(n)]


def answer_one(server: FakeServer, teacher: EndpointTeacher, answer: Failure) -> Completion:
    server.failures["question 0"] = [answer]
    ((index, completion),) = teacher.generate(ask(1), Sampling())
    assert index == 0
    return completion
