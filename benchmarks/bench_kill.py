"""Kill writers of one store with `kill -9` at random moments and count what was lost, doubled or torn.

    python benchmarks/bench_kill.py [--kills 200] [--seed 0]

Four writers work on the same store in turn: one adds plain traces, one traces with log-probabilities, two add
judgements too. Faults are injected: writes that take a part of the bytes and pause, a file-size limit (RLIMIT_FSIZE)
that is met in the middle of a record and lifted later, a second writer that tries to get in. A writer says on stdout
what it has been promised (`append` returned). At the end everything promised must be there, once, with the values that
were written, and no line may be torn. The files are read here without the store's code, save for the log-probabilities.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from deepdistill.distill.records import Grade, Judgement, Problem, Trace
from deepdistill.distill.teachers import TeacherInfo
from deepdistill.distill.traces.logprobs import Logprobs, logprobs_path
from deepdistill.distill.traces.store import TraceStore, verdicts_path
from deepdistill.errors import ArtifactError
from deepdistill.localrun.core.generation import Completion, Sampling, TopLogprobs

N_WRITERS = 4
K = 8


def completion_of(index: int, with_logprobs: bool) -> Completion:
    """Return what the teacher says to a problem: always the same."""
    rng = np.random.default_rng(index)
    n_tokens = 1 + index % 60
    text = f"{index} ✓ " * (1 + index * 37 % 700)
    top = None
    if with_logprobs:
        values = -np.sort(rng.exponential(1.0, (n_tokens, K)), axis=1) - 3
        top = TopLogprobs(rng.integers(0, 150_000, (n_tokens, K), np.int32), values.astype(np.float32))
    tokens = tuple(rng.integers(0, 150_000, n_tokens).tolist())
    return Completion(text, text[:50], True, "stop", 5, n_tokens, 2, 0.1, token_ids=tokens, logprobs=top)


def trace_of(index: int, completion: Completion) -> Trace:
    """Return the trace of a problem."""
    problem = Problem(f"p{index}", f"question {index}?", None, "made", "none")
    return Trace.make(
        problem,
        completion,
        grade=Grade(None, "unknown", "none", None),
        info=TeacherInfo("t", "gguf"),
        teacher="t",
        sampling=Sampling(),
    )


def has_logprobs(index: int) -> bool:
    """Say whether the trace of a problem has log-probabilities: it depends on nothing but its number."""
    return index % 2 == 1


def slow_writes(rng: random.Random) -> None:
    """Make `os.write` take a part of the bytes and pause, so that a kill in the middle of a record is likely."""
    real = os.write

    def write(file: int, data: bytes) -> int:
        if file > 2 and len(data) > 1 and rng.random() < 0.5:
            data = data[: rng.randrange(1, len(data))]
            time.sleep(rng.random() * 0.004)
        return real(file, data)

    os.write = write


def work(path: Path, role: int, seed: int) -> None:
    """Add traces until killed; print each promise."""
    rng = random.Random(seed)
    slow_writes(rng)
    print("ready", flush=True)
    with TraceStore(path, sync_every_s=rng.choice([0.0, 0.01, 5.0])) as store:
        print("open", len(store), flush=True)
        stored = [trace.id for trace in store]
        for name in store.repairs:
            print("repaired", name, flush=True)
        # The writers disagree about where to go on, and every one of them asks for traces that are there already.
        for index in range(max(0, len(store) - rng.randrange(60)), 10**7):
            if rng.random() < 0.05:
                size = max((p.stat().st_size for p in (path, logprobs_path(path)) if p.exists()), default=0)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size + rng.randrange(3000), resource.RLIM_INFINITY))
            completion = completion_of(index, has_logprobs(index) and role != 0)
            try:
                trace = trace_of(index, completion)
                store.append(trace, completion)
                print("trace", trace.id, flush=True)
                stored.append(trace.id)
                if role >= 2 and rng.random() < 0.3:
                    judged = [Judgement(rng.choice(stored), "vote", rng.randrange(100) / 100) for _ in range(3)]
                    print("judging", json.dumps([[one.id, one.agreement] for one in judged]), flush=True)
                    store.append_judgements(judged)
                    print("judged", json.dumps([[one.id, one.agreement] for one in judged]), flush=True)
            except ArtifactError as error:
                print("failed", error, flush=True)
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def run_and_kill(path: Path, role: int, rng: random.Random) -> tuple[list[str], bool]:
    """Start a writer, kill it at a random moment; return what it said, and whether a second one was kept out."""
    command = [sys.executable, __file__, "--work", str(path), "--role", str(role), "--seed", str(rng.randrange(2**31))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        said = [writer.stdout.readline().strip()]
        refused = True
        if rng.random() < 0.8:  # else it is killed while it opens the store
            said.append(writer.stdout.readline().strip())
            if rng.random() < 0.25:
                refused = is_refused(path, writer.pid)
        time.sleep(rng.random() ** 2 * 0.3)
        writer.send_signal(signal.SIGKILL)
        said += writer.stdout.read().splitlines()
    return said, refused


def is_refused(path: Path, pid: int) -> bool:
    """Try to write while another does; say whether that was refused with the other's name."""
    try:
        TraceStore(path).close()
    except ArtifactError as error:
        return f"process {pid} on " in error.message
    return False


class Promises:
    """What the writers were promised."""

    def __init__(self) -> None:
        self.traces: set[str] = set()
        self.judged: dict[str, set[float]] = {}  # the last value promised, and what may stand there after a kill
        self.counts: Counter[str] = Counter()

    def note(self, said: list[str]) -> None:
        """Take in what a writer said; its last line may be cut."""
        for line in said:
            if line.startswith("judg") and not line.endswith("]]"):
                continue
            word, _, rest = line.partition(" ")
            self.counts[word] += 1
            if word == "trace":
                self.traces.add(rest)
            elif word == "judging":
                attempt = dict(json.loads(rest))
                for name in attempt.keys() & self.judged.keys():
                    self.judged[name].add(attempt[name])
            elif word == "judged":
                self.judged |= {name: {value} for name, value in json.loads(rest)}


def check(path: Path, promises: Promises) -> dict[str, Any]:
    """Count what is lost, doubled or torn, reading the JSONL files with nothing but json."""
    lines = path.read_bytes().split(b"\n")
    torn = lines.pop() != b""
    records = [json.loads(line) for line in lines]
    ids = Counter(record["id"] for record in records)
    wrong = 0
    with Logprobs(logprobs_path(path)) as stored:
        for record in records:
            index = int(record["problem_id"][1:])
            expected = completion_of(index, has_logprobs(index))
            is_good = record["content"] == expected.content
            if record["n_logprobs"]:
                found = stored.get(record["id"])
                is_good &= found is not None and found[0].tolist() == list(expected.token_ids or ())
                if found is not None and expected.logprobs is not None:
                    is_good &= bool((found[1].ids == expected.logprobs.ids).all())
                    is_good &= np.allclose(found[1].values, expected.logprobs.values, rtol=2e-3, atol=2e-3)
            wrong += not is_good
    with_logprobs = sum(record["n_logprobs"] > 0 for record in records)
    verdicts = verdicts_path(path).read_bytes().split(b"\n")
    torn |= verdicts.pop() != b""
    said = {record["id"]: record["agreement"] for record in map(json.loads, verdicts)}
    return {
        "traces": len(records),
        "with_logprobs": with_logprobs,
        "judgements": len(verdicts),
        "lost": len(promises.traces - ids.keys()),
        "doubled": sum(count - 1 for count in ids.values()),
        "torn": int(torn),
        "wrong_content": wrong,
        "judgements_lost": sum(said.get(name) not in may for name, may in promises.judged.items()),
    }


def kill_writers(n_kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill that many writers of one store and return what was found."""
    rng, path, promises, let_in = random.Random(seed), folder / "traces.jsonl", Promises(), 0
    started = time.monotonic()
    torn_on_disk = 0
    for kill in range(n_kills):
        said, refused = run_and_kill(path, kill % N_WRITERS, rng)
        promises.note(said)
        let_in += not refused
        if path.exists() and path.stat().st_size:
            with path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                torn_on_disk += file.read() != b"\n"
    with TraceStore(path) as store:  # a last repair
        n_stored = len(store)
    result = {"kills": n_kills, "seed": seed} | check(path, promises)
    result |= {"second_writer_let_in": let_in, "promised": len(promises.traces)}
    result |= {"torn_by_kills": torn_on_disk, "refused_writes": promises.counts["failed"]}
    result |= {"repairs_said": promises.counts["repaired"], "seconds": round(time.monotonic() - started, 1)}
    assert n_stored == result["traces"]
    result["ok"] = not any(
        result[key] for key in ("lost", "doubled", "torn", "wrong_content", "judgements_lost", "second_writer_let_in")
    )
    return result


def main() -> None:
    """Kill and print one JSON line; exit 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--role", type=int, default=0)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.role, options.seed)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = kill_writers(options.kills, options.seed, Path(folder))
    print(json.dumps(result))
    sys.exit(0 if result["ok"] else 1)


if __name__ == "__main__":
    main()
