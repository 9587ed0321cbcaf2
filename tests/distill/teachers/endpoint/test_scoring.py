"""Scores of a given text over vLLM's API, against the same model in this process."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch

from deepdistill.distill.teachers import open_teacher, pocket_dir
from deepdistill.distill.teachers.capabilities import probe
from deepdistill.distill.teachers.huggingface.teacher import TransformersTeacher
from deepdistill.errors import ModelError, TeacherError

QUESTION = [{"role": "user", "content": "State the final answer to the following arithmetic problem: 14 + 21 ="}]
ANSWER = "14+21=34+1=35\n</think>\n\n35"


class Handler(BaseHTTPRequestHandler):
    """vLLM's `/tokenize` and `prompt_logprobs`, with the pocket teacher behind them; `server.fails` come first."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": "toy"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        if self.server.fails:
            return self.reply(*self.server.fails.pop(0))
        ours = self.server.ours
        if self.path == "/tokenize":
            text = ours.render(body["messages"]) if "messages" in body else body["prompt"]
            tokens = ours.tokenizer(text, add_special_tokens=False).input_ids
            return self.reply(200, {"count": len(tokens), "max_model_len": 2048, "tokens": tokens})
        if self.path == "/v1/completions" and "prompt_logprobs" in body:
            return self.reply(200, {"choices": [{"text": "x", "prompt_logprobs": self.score(**body)}]})
        return self.reply(404, {"detail": "Not Found"})

    @torch.inference_mode()
    def score(self, prompt: list[int], prompt_logprobs: int, max_tokens: int, **_: Any) -> list[Any]:
        assert max_tokens == 1
        logprobs = self.server.ours.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        places: list[Any] = [None]
        for at, token in enumerate(prompt[1:]):
            best = logprobs[at].topk(prompt_logprobs).indices.tolist()
            # Those that are best, and the one that is there, in no order.
            places.append({str(i): {"logprob": float(logprobs[at, i]), "rank": 1} for i in {*best, token}})
        return places

    def reply(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, ours: TransformersTeacher) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ours, self.fails = ours, list[tuple[int, Any]]()
        self.asked: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


@pytest.fixture(scope="module")
def ours() -> Iterator[TransformersTeacher]:
    with TransformersTeacher(pocket_dir(), name="pocket", backend="pocket") as teacher:
        yield teacher


@pytest.fixture
def server(ours: TransformersTeacher, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("DEEPDISTILL_API_KEY", "sk-secret")
    server = Server(ours)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("as_text", [True, False], ids=["text", "ids"])
def test_a_servers_scores_are_the_models(server: Server, ours: TransformersTeacher, as_text: bool) -> None:
    ids = ours.tokenizer(ANSWER, add_special_tokens=False).input_ids
    expected = ours.score(QUESTION, ids, top_logprobs=5)
    with open_teacher(server.url) as teacher:
        assert teacher.tokenize(ANSWER) == ids
        got = teacher.score(QUESTION, ANSWER if as_text else ids, top_logprobs=5)
    np.testing.assert_array_equal(got.ids, expected.ids)
    np.testing.assert_allclose(got.values, expected.values, atol=1e-4)
    assert all(own in row for own, row in zip(ids, got.ids, strict=True)), "34 is wrong, and takes the last place"
    assert {path for path, _ in server.asked} == {"/tokenize", "/v1/completions"}
    assert {key for _, key in server.asked} == {"Bearer sk-secret"}


def test_many_are_scored_at_once(server: Server, ours: TransformersTeacher) -> None:
    answers = [ours.tokenizer(f"14+21={i}", add_special_tokens=False).input_ids for i in range(12)]
    with open_teacher(f"{server.url},{server.url}/", concurrency=3) as teacher:
        got = dict(teacher.score_many([(QUESTION, ids) for ids in answers], top_logprobs=3))
    assert sorted(got) == list(range(12))
    for i, ids in enumerate(answers):
        np.testing.assert_array_equal(got[i].ids, ours.score(QUESTION, ids, top_logprobs=3).ids)


def test_passing_errors_are_waited_for_and_lasting_ones_raised(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    with open_teacher(server.url) as teacher:
        server.fails = [(503, {})] * 9
        with pytest.raises(TeacherError, check=lambda error: error.code == "server-keeps-failing"):
            teacher.score(QUESTION, "35", top_logprobs=2)
        assert len(server.fails) == 7, "a server that never gave tokens is not waited for"
        server.fails = []
        assert teacher.tokenize("35")
        server.fails = [(503, {}), (429, {}), (500, {})]
        assert teacher.score(QUESTION, "35", top_logprobs=2).ids.shape == (2, 2)
        server.fails = [(503, {"error": "busy"})] * 9
        with pytest.raises(TeacherError, check=lambda error: error.code == "server-keeps-failing"):
            teacher.score(QUESTION, "35", top_logprobs=2)
        too_long = {"error": {"message": "This model's maximum context length is 2048 tokens."}}
        server.fails = [(200, {"tokens": [1, 2]}), (200, {"tokens": [3]}), (400, too_long)]
        with pytest.raises(ModelError, check=lambda error: error.code == "context-too-small"):
            teacher.score(QUESTION, "35", top_logprobs=2)


@pytest.mark.parametrize(
    "answers",
    [
        [(404, {"detail": "Not Found"})],
        [(200, {"tokens": []})],  # llama-server has another /tokenize
        [(200, {"tokens": [1, 2]}), (200, {"tokens": [3]}), (200, {"choices": [{"text": "x"}]})],
        [(200, {"tokens": [1, 2]}), (200, {"tokens": [3]}), (404, {})],
        [(200, ["no object"])],
    ],
    ids=["no_tokenize", "no_tokens", "no_scores", "no_completions", "nonsense"],
)
def test_a_server_that_cannot_is_on_a_lower_rung(server: Server, answers: list[tuple[int, Any]]) -> None:
    with open_teacher(server.url) as teacher:
        server.fails = list(answers)
        with pytest.raises(TeacherError, check=lambda error: error.code == "cannot-score") as caught:
            teacher.score(QUESTION, "35", top_logprobs=2)
        assert "vLLM" in caught.value.hint
        server.fails = [(404, {})]
        assert teacher.tokenize("35") is None


def test_the_probe_sees_the_highest_rung(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_teacher(server.url) as teacher:
        monkeypatch.setattr(teacher, "generate", lambda *_, **__: iter([(0, _said())]))
        assert probe(teacher).rung == "given"
        server.fails = [(404, {})]
        assert probe(teacher).rung == "text"


def _said() -> Any:
    from deepdistill.localrun.core.generation import Completion

    return Completion("5", None, None, "stop", 3, 1, 0, 0.1)
