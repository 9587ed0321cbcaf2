"""The endpoint teacher against a server that fails, and its concurrency against servers of a known capacity.

    python benchmarks/bench_endpoint.py [--n 1000] [--seconds 60] [--skip-levels]

Real HTTP to a server in this process, on a thread of its own. First `--n` problems with 30 % errors (429 with and
without Retry-After, 500, 503, streams that are cut, broken JSON) and 10 % hangs (before the headers, in the middle of a
stream), drawn anew for each attempt: every answer has to come, and to be the right one. Then a server that answers 32
requests at once, half a second each, and refuses more (429) or lets them wait: answers a second with 1, 8 and 64
requests at once and with the level that the teacher finds. 32 places that are never empty give 64 answers a second.
Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from deepdistill.distill.teachers import Request
from deepdistill.distill.teachers.endpoint.teacher import EndpointTeacher
from deepdistill.localrun.core.generation import Sampling

CAPACITY, ANSWER_S, N_PIECES = 32, 0.5, 10


class FakeServer:
    """Answers a question with its own words in capitals, `capacity` at once; sometimes it fails, sometimes it hangs."""

    def __init__(
        self, *, capacity: int | None = None, refuses: bool = True, errors: float = 0, hangs: float = 0
    ) -> None:
        self.capacity, self.refuses, self.errors, self.hangs = capacity, refuses, errors, hangs
        self.rng, self.sent, self.n_running, self.n_most = random.Random(0), Counter[str](), 0, 0
        self.loop, self.url = asyncio.new_event_loop(), ""

    def __enter__(self) -> FakeServer:
        ready = threading.Event()
        self.thread = threading.Thread(target=self._serve, args=(ready,), daemon=True)
        self.thread.start()
        ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._stop)
        self.thread.join()

    def _stop(self) -> None:
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.call_later(0.1, self.loop.stop)

    def _serve(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self.loop)
        self.places = asyncio.Semaphore(self.capacity or 10_000)
        server = self.loop.run_until_complete(asyncio.start_server(self._talk, "127.0.0.1", 0, backlog=1024))
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        ready.set()
        self.loop.run_forever()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = head.partition("content-length:")[2].split("\r\n")[0].strip()
                body = await reader.readexactly(int(length or 0))
                if not body:
                    self._whole(writer, 200, {"data": [{"id": "toy"}]})
                elif not await self._answer(writer, json.loads(body)["messages"][-1]["content"]):
                    break
        writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, question: str) -> bool:
        """Answer or fail; say whether the connection may go on."""
        self.n_running += 1
        self.n_most = max(self.n_most, self.n_running)
        try:
            kind = self._kind()
            self.sent[kind] += 1
            if kind == "hang":
                await asyncio.sleep(3600)
            if kind.startswith(("429", "500", "503")):
                self._whole(writer, int(kind[:3]), {"error": {"message": "no"}}, "retry" in kind)
                return True
            async with self.places:
                return await self._stream(writer, question.upper(), kind)
        finally:
            self.n_running -= 1

    def _kind(self) -> str:
        if self.capacity and self.refuses and self.n_running > self.capacity:
            return "429 full"
        drawn = self.rng.random()
        if drawn < self.errors:
            return self.rng.choice(["429", "429 retry-after", "500", "503", "cut", "no json"])
        if drawn < self.errors + self.hangs:
            return self.rng.choice(["hang", "hang amid"])
        return "answer"

    def _whole(self, writer: asyncio.StreamWriter, status: int, body: Any, retry_after: bool = False) -> None:
        data = json.dumps(body).encode()
        extra = "Retry-After: 1\r\n" if retry_after else ""
        head = f"HTTP/1.1 {status} Any\r\nContent-Type: application/json\r\n{extra}Content-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)

    async def _stream(self, writer: asyncio.StreamWriter, text: str, kind: str) -> bool:
        def send(data: str) -> None:
            chunk = f"data: {data}\n\n".encode()
            writer.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")

        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        size = -(-len(text) // N_PIECES)
        for i in range(0, len(text), size):
            await asyncio.sleep(ANSWER_S * size / len(text))
            if kind != "answer" and i > len(text) / 2:
                if kind == "hang amid":
                    await asyncio.sleep(3600)
                send('{"choices": [{' if kind == "no json" else "{}")
                return False
            send(json.dumps({"choices": [{"index": 0, "delta": {"content": text[i : i + size]}}]}))
        send(json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}))
        send(json.dumps({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": N_PIECES}}))
        send("[DONE]")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


def question(i: int) -> str:
    """Return the text of problem i."""
    return f"question {i}: what is the capital of country number {i}?"


def ask(n: int, until: float = float("inf")) -> Iterator[Request]:
    """Yield n requests, or as many as are drawn until a time."""
    for i in range(n):
        if time.monotonic() > until:
            return
        yield Request([{"role": "user", "content": question(i)}], seed=i)


def faults(n: int) -> dict[str, Any]:
    """Ask a failing server; return what came."""
    with FakeServer(errors=0.3, hangs=0.1) as server:
        with EndpointTeacher(server.url, timeout_s=5) as teacher:
            started, most = time.monotonic(), 0
            right, wrong = set(), 0
            for i, answer in teacher.generate(ask(n), Sampling(max_tokens=1000)):
                most = max(most, teacher.n_parallel)
                if answer.finish_reason == "stop" and answer.content == question(i).upper():
                    right.add(i)
                else:
                    wrong += 1
            seconds = time.monotonic() - started
        record = {"n": n, "all_traces": len(right), "failed": wrong, "seconds": round(seconds, 1)}
        return record | {"attempts": server.sent.total(), "sent": dict(server.sent), "highest_level": most}


def level(seconds: float, concurrency: int | None, refuses: bool) -> dict[str, Any]:
    """Return the answers a second, in all and in the second half, and how often the server refused."""
    with FakeServer(capacity=CAPACITY, refuses=refuses) as server:
        with EndpointTeacher(server.url, concurrency=concurrency, timeout_s=60) as teacher:
            started = time.monotonic()
            levels, times = [], []
            for _, answer in teacher.generate(ask(10**9, started + seconds), Sampling(max_tokens=1000)):
                times.append(time.monotonic() - started)
                levels.append(teacher.n_parallel)
                assert answer.finish_reason == "stop", answer.error
        late = [t for t in times if seconds / 2 <= t < seconds]
        return {
            "concurrency": concurrency or "auto",
            "beyond": "429" if refuses else "queue",
            "answers_per_s": round(sum(t < seconds for t in times) / seconds, 1),
            "late_answers_per_s": round(len(late) / (seconds / 2), 1),
            "late_level": round(sum(levels[-len(late) :]) / len(late), 1),
            "refused": server.sent["429 full"],
            "most_at_once": server.n_most,
        }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--skip-levels", action="store_true")
    arguments = parser.parse_args()
    record: dict[str, Any] = {"faults": faults(arguments.n)}
    print(record["faults"], flush=True)
    if not arguments.skip_levels:
        record["levels"] = []
        for concurrency, refuses in [(1, True), (8, True), (64, True), (None, True), (64, False), (None, False)]:
            record["levels"].append(level(arguments.seconds, concurrency, refuses))
            print(record["levels"][-1], flush=True)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
