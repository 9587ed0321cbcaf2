"""Mutated replies of servers, rows of problems and rows of traces: none may end in anything but its own error.

    python benchmarks/fuzz_inputs.py [--n 100000] [--seed 0]

Each input is one of tests/data with some of its values replaced, dropped, nested, cut or blown up. A reply may be read,
broken or refused; a row is taken or named with a reason. The last line is JSON: what became of them, the slowest in
seconds, and the largest memory in MB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from deepdistill.distill.problems.rows import Intake
from deepdistill.distill.teachers.endpoint.stream import BrokenReply, RefusedReply, StreamedReply, read_reply
from deepdistill.distill.traces.importing import import_traces
from deepdistill.errors import ArtifactError, UsageError

DATA = Path(__file__).resolve().parent.parent / "tests" / "data"
ODD: list[Any] = [
    None, True, -1, 10**30, 1e308, float("inf"), float("nan"), "", " ", "\0", "\ud800", "[" * 3000, "9" * 5000,
    "x" * 70000, [], {}, [[]], [None], {"role": "user"}, [{"role": "user", "content": None}], [{"type": "text"}],
    {"text": 1}, b"\xff", "\\boxed{", "<think>", "</think>", "####", "{" * 500, "[1, 2]",
    '{"ground_truth": {}}', "x[/INST]\x1b[2J",
]  # fmt: skip


def mutated(value: Any, rng: random.Random, rate: float = 0.15) -> Any:
    """Return a copy of a JSON value in which some parts are another value, missing, repeated or nested."""
    if rng.random() < rate:
        choice = rng.randrange(4)
        if choice == 0:
            return rng.choice(ODD)
        if choice == 1:
            return [value, value]
        if choice == 2:
            return {"content": value, "text": value}
        return value[: rng.randrange(len(value) + 1)] * rng.choice((0, 1, 3)) if isinstance(value, str) else [value]
    if isinstance(value, dict):
        kept = {key: mutated(item, rng) for key, item in value.items() if rng.random() > 0.05}
        return kept | ({rng.choice(list(kept)): rng.choice(ODD)} if kept and rng.random() < 0.1 else {})
    if isinstance(value, list):
        return [mutated(item, rng) for item in value if rng.random() > 0.05]
    return value


def cases(name: str, key: str) -> list[Any]:
    """Return one part of each case in a file of tests/data."""
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [case[key] for case in map(json.loads, lines) if key in case]


def replies(rng: random.Random) -> Callable[[], str]:
    """Return a function that reads one mutated reply and says what became of it."""
    messages = cases("replies.jsonl", "message")

    def read() -> str:
        message = mutated(rng.choice(messages), rng)
        is_stream = rng.random() < 0.5
        usage = mutated({"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}, rng)
        choice = {"index": 0, "delta" if is_stream else "message": message, "finish_reason": "stop"}
        event = json.dumps(mutated({"choices": [choice], "usage": usage}, rng), default=repr)
        event = event[: rng.randrange(len(event) + 1)] if rng.random() < 0.1 else event
        body = f"data: {event}\n\n" + ("data: [DONE]\n\n" if rng.random() < 0.7 else "")
        kind = "text/event-stream" if is_stream else "application/json"
        content = (body if is_stream else event).encode("utf-8", "surrogatepass")
        response = httpx.Response(200, headers={"content-type": kind}, content=content)
        reply = StreamedReply()
        try:
            asyncio.run(read_reply(response, reply, max_tokens=64, on_tokens=lambda n: None))
            reply.completion(0.1, 3)
        except (BrokenReply, RefusedReply) as error:
            return type(error).__name__
        return "read"

    return read


def rows(rng: random.Random) -> Callable[[], str]:
    """Return a function that reads one mutated row of problems and says what became of it."""
    known = cases("problem_rows.jsonl", "row")

    def read() -> str:
        row = mutated(rng.choice(known), rng)
        if not isinstance(row, dict):
            return "no row"
        intake = Intake("fuzz", {})
        try:
            intake.find_labels(iter([("row 1", row)] * 2))
            list(intake.problems(iter([("row 1", row)])))
            list(intake.notes())
        except (ArtifactError, UsageError) as error:
            return error.code
        return "taken"

    return read


def traces(rng: random.Random, n: int, folder: Path) -> Counter[str]:
    """Import a file of mutated rows and count what became of them."""
    known = cases("trace_rows.jsonl", "row")
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8", errors="surrogatepass") as file:
        for _ in range(n):
            file.write(json.dumps(mutated(rng.choice(known), rng), default=repr) + "\n")
    found = Counter[str]()

    def skip(where: str, why: str) -> None:
        found["skipped"] += 1

    found["taken"] = sum(1 for _ in import_traces(path, on_skip=skip))
    return found


def main() -> None:
    """Mutate, read, count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, slowest = random.Random(arguments.seed), 0.0
    found: dict[str, Counter[str]] = {}
    for name, read in (("replies", replies(rng)), ("problems", rows(rng))):
        found[name] = Counter()
        for _ in range(arguments.n // 3):
            started = time.perf_counter()
            found[name][read()] += 1
            slowest = max(slowest, time.perf_counter() - started)
    with tempfile.TemporaryDirectory() as folder:
        found["traces"] = traces(rng, arguments.n // 3, Path(folder))
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(json.dumps({**found, "slowest_s": round(slowest, 3), "peak_mb": round(megabytes), "n": arguments.n}))


if __name__ == "__main__":
    main()
