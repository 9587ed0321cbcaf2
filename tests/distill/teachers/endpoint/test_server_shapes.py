"""What each server that docs/teachers.md names sends, as it arrives: one question with thinking and answer.

llama-server (xllamacpp 2026.10) and `transformers serve` (5.23) were recorded, with other words put in; the others are
written as their sources and pages have them, keep-alive comments, nulls, odd boundaries and all.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from deepdistill.distill.teachers import Request, open_teacher, pocket_dir
from deepdistill.distill.teachers.endpoint.stream import StreamedReply, read_reply
from deepdistill.localrun.core.generation import Completion, Sampling


def sse(*events: dict[str, Any] | str) -> bytes:
    """Write events as a stream; a text stands for itself."""
    return "".join(e if isinstance(e, str) else f"data: {json.dumps(e)}\n\n" for e in events).encode()


def chunk(choice: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1795634866, "model": "r1"}
    return head | {"choices": [] if choice is None else [{"index": 0} | choice]} | more


def vllm_token(text: str, id_: int, **delta: Any) -> dict[str, Any]:
    """A token as vLLM sends it when asked for token ids and two log-probabilities."""
    top = [{"token": f"token_id:{id_}", "logprob": -0.25, "bytes": None}]
    top += [{"token": "token_id:7", "logprob": -2.0, "bytes": None}]
    entry = top[0] | {"token": f"token_id:{id_}", "bytes": list(text.encode()), "top_logprobs": top}
    return chunk({"delta": delta, "logprobs": {"content": [entry]}, "finish_reason": None, "token_ids": None})


_SGLANG = {"role": None, "content": None, "reasoning_content": None, "tool_calls": None}
_DONE = "data: [DONE]\n\n"

STREAMS: dict[str, tuple[bytes, int, int, tuple[int, ...] | None]] = {
    # name: (stream, completion tokens, reasoning tokens, token ids that are kept)
    "llama-server": (
        sse(
            chunk({"finish_reason": None, "delta": {"role": "assistant", "content": None}}),
            chunk({"finish_reason": None, "delta": {"reasoning_content": "12+30"}}),
            chunk({"finish_reason": None, "delta": {"reasoning_content": "=42"}}),
            chunk({"finish_reason": None, "delta": {"content": "42"}}),
            chunk({"finish_reason": "stop", "delta": {}}),
            chunk(
                None,
                usage={
                    "completion_tokens": 10,
                    "prompt_tokens": 31,
                    "total_tokens": 41,
                    "prompt_tokens_details": {"cached_tokens": 24},
                },
                timings={"cache_n": 24, "prompt_n": 7, "prompt_ms": 169.763, "predicted_n": 10},
            ),
            _DONE,
        ),
        10,
        8,  # of ten, eight of ten characters
        None,
    ),
    "transformers serve": (  # tags as plain text, the opening one in the prompt; the usage beside the end; no [DONE]
        sse(
            chunk({"delta": {"role": "assistant"}}, system_fingerprint=""),
            *(chunk({"delta": {"content": text}}) for text in ("12", "+30", "=42", "\n", "</think>", "\n\n", "42")),
            chunk(
                {"delta": {}, "finish_reason": "stop"},
                usage={"completion_tokens": 10, "prompt_tokens": 31, "total_tokens": 41},
            ),
        ),
        10,
        8,
        None,
    ),
    "vLLM": (  # one delta may end the reasoning and begin the answer; the tags' own tokens are not sent
        sse(
            chunk({"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}),
            vllm_token("12+30", 11, reasoning="12+30"),
            vllm_token("=4", 12, reasoning="=4"),
            vllm_token("2", 13, reasoning="2", content="4"),
            vllm_token("2", 14, content="2"),
            chunk({"delta": {"content": ""}, "logprobs": None, "finish_reason": "stop", "stop_reason": None}),
            chunk(None, usage={"prompt_tokens": 31, "total_tokens": 36, "completion_tokens": 5}),
            _DONE,
        ),
        5,
        4,
        (11, 12, 13, 14),
    ),
    "vLLM before 0.12": (
        sse(
            chunk({"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}),
            chunk({"delta": {"reasoning_content": "12+30=42"}, "logprobs": None, "finish_reason": None}),
            chunk({"delta": {"content": "42"}, "logprobs": None, "finish_reason": "stop", "stop_reason": None}),
            chunk(None, usage={"prompt_tokens": 31, "total_tokens": 41, "completion_tokens": 10}),
            _DONE,
        ),
        10,
        8,
        None,
    ),
    "SGLang": (  # everything there is stands in each delta, as null; the reasoning tokens in the usage itself
        sse(
            chunk({"delta": _SGLANG | {"role": "assistant", "content": ""}, "finish_reason": None}, usage=None),
            chunk({"delta": _SGLANG | {"reasoning_content": "12+30=42\n"}, "matched_stop": None}, usage=None),
            chunk(
                {
                    "delta": _SGLANG | {"content": "42"},
                    "logprobs": {"content": [{"token": "42", "bytes": [52, 50], "logprob": -0.1, "top_logprobs": []}]},
                    "finish_reason": None,
                    "matched_stop": None,
                },
                usage=None,
            ),
            chunk({"delta": _SGLANG, "logprobs": None, "finish_reason": "stop", "matched_stop": 1}, usage=None),
            chunk(
                None,
                usage={
                    "prompt_tokens": 31,
                    "total_tokens": 41,
                    "completion_tokens": 10,
                    "prompt_tokens_details": None,
                    "reasoning_tokens": 9,
                },
            ),
            _DONE,
        ),
        10,
        9,
        None,
    ),
    "mlx-lm": (  # comments while it reads the prompt; ids, but only of the most probable tokens
        sse(
            ": keepalive 512/2048\n\n",
            chunk({"finish_reason": None, "delta": {"role": "assistant", "reasoning": "12+30"}}),
            ": keepalive 2048/2048\n\n",
            chunk(
                {
                    "finish_reason": None,
                    "delta": {"role": "assistant", "reasoning": "=42\n"},
                    "logprobs": {"content": [{"id": 3, "token": "=42", "logprob": -0.5, "top_logprobs": []}]},
                }
            ),
            chunk({"finish_reason": None, "delta": {"role": "assistant", "content": "42"}}),
            chunk({"finish_reason": "stop", "delta": {"role": "assistant", "content": ""}}),
            chunk(
                None,
                usage={
                    "prompt_tokens": 31,
                    "completion_tokens": 10,
                    "total_tokens": 41,
                    "prompt_tokens_details": {"cached_tokens": 0},
                },
            ),
            _DONE,
        ),
        10,
        8,
        None,
    ),
    "DeepSeek": (  # comments while the request waits; the usage beside the end
        sse(
            ": keep-alive\n\n",
            ": keep-alive\n\n",
            chunk(
                {"delta": {"role": "assistant", "content": None, "reasoning_content": ""}, "logprobs": None}, usage=None
            ),
            chunk({"delta": {"content": None, "reasoning_content": "12+30=42"}, "finish_reason": None}, usage=None),
            chunk({"delta": {"content": "42", "reasoning_content": None}, "finish_reason": None}, usage=None),
            chunk(
                {"delta": {"content": "", "reasoning_content": None}, "logprobs": None, "finish_reason": "stop"},
                usage={
                    "prompt_tokens": 31,
                    "completion_tokens": 10,
                    "total_tokens": 41,
                    "prompt_tokens_details": {"cached_tokens": 0},
                    "completion_tokens_details": {"reasoning_tokens": 7},
                    "prompt_cache_hit_tokens": 0,
                    "prompt_cache_miss_tokens": 31,
                },
            ),
            _DONE,
        ),
        10,
        7,
        None,
    ),
}


class Pieces(httpx.AsyncByteStream):
    """A body that arrives a few bytes at a time, wherever that cuts it."""

    def __init__(self, data: bytes, size: int) -> None:
        self.data, self.size = data, size

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self.data), self.size):
            yield self.data[start : start + self.size]


def read(data: bytes, size: int) -> tuple[Completion, list[int]]:
    """Read a stream; return the answer and how many tokens were heard of as it came."""
    response = httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Pieces(data, size))
    reply, heard = StreamedReply(), list[int]()
    asyncio.run(read_reply(response, reply, max_tokens=100, on_tokens=heard.append))
    return reply.completion(1.0, n_prompt=999), heard


@pytest.mark.parametrize("size", [7, 1 << 20], ids=["in_pieces", "at_once"])
@pytest.mark.parametrize("name", STREAMS)
def test_each_server_is_understood(name: str, size: int) -> None:
    data, n_completion, n_reasoning, token_ids = STREAMS[name]
    answer, heard = read(data, size)
    assert (answer.reasoning_content, answer.content) == ("12+30=42", "42")
    assert (answer.closed, answer.finish_reason) == (True, "stop")
    assert (answer.prompt_tokens, answer.completion_tokens) == (31, n_completion)
    assert answer.reasoning_tokens == n_reasoning
    assert answer.token_ids == token_ids
    assert (answer.logprobs is not None) == (token_ids is not None)
    if answer.logprobs is not None:
        assert answer.logprobs.ids.tolist() == [[id_, 7] for id_ in token_ids or ()]
    assert sum(heard) >= n_completion


@pytest.fixture(scope="module")
def transformers_serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`transformers serve` with the pocket teacher's weights; yields its address."""
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason=f'transformers serve needs {name}: pip install "transformers[serving]"')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(pocket_dir())]
    with log.open("w") as out, subprocess.Popen([*command, "--port", str(port)], stdout=out, stderr=out) as process:
        try:
            started = time.monotonic()
            while "Uvicorn running" not in log.read_text() and time.monotonic() - started < 120:
                assert process.poll() is None, log.read_text()[-2000:]
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()


@pytest.mark.slow
def test_transformers_serve_for_real(transformers_serve: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers as the same weights do in this process, and says why it refuses."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    sums = [f"State the final answer to the following arithmetic problem: {i} + {2 * i} - 4 =" for i in range(11, 17)]
    asks = [Request([{"role": "user", "content": text}]) for text in sums]
    sampling = Sampling(max_tokens=64)
    with open_teacher("pocket") as here:
        expected = dict(here.generate(asks, sampling))
    with open_teacher(transformers_serve, model=str(pocket_dir()), concurrency=2) as there:
        answers = dict(there.generate(asks, sampling, top_logprobs=5))
    assert [answers[i].content for i in range(6)] == [expected[i].content for i in range(6)]
    assert [answers[i].reasoning_content for i in range(6)] == [expected[i].reasoning_content for i in range(6)]
    assert [answers[i].prompt_tokens for i in range(6)] == [expected[i].prompt_tokens for i in range(6)]
    assert all(answer.logprobs is None for answer in answers.values()), "it ignores the question for them"
    with open_teacher(transformers_serve, model="another") as there:
        ((_, refused),) = there.generate(asks[:1], sampling)
    assert refused.finish_reason == "error"
    assert "another" in (refused.error or "")
