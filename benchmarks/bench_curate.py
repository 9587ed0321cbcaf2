"""Curation of many traces: time and memory, every filter on, near-duplicates among them.

    python benchmarks/bench_curate.py [--n 200000] [--samples 4]

Traces of about 2 KB of JSON are made as they are read, `--samples` to a problem, one in twenty nearly a copy of another
problem's; 200 evaluation questions. Memory is the process's peak over what it had before the first trace. The first
pass is most of the time, so time and memory grow with the number of traces. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import resource
import time
from collections.abc import Iterator

from deepdistill.distill.curation.curate import select
from deepdistill.distill.problems.split import bucket_of, question_hash
from deepdistill.distill.recipe.gathering import CurationRecipe
from deepdistill.distill.records import TeacherInfo, Trace, Usage
from deepdistill.localrun.core.generation import Sampling
from deepdistill.localrun.core.record_log import to_json

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "r", "st", "ld", "ck", "m", "ve", "th")]


def make_traces(n: int, samples: int, seed: int = 0) -> Iterator[Trace]:
    """Yield n traces, the same at every call."""
    rng = random.Random(seed)
    settings, info = Sampling(), TeacherInfo("teacher", "endpoint")
    problem, question, reasoning = "", "", ""
    for i in range(n):
        if i % samples == 0:
            question = " ".join(rng.choices(WORDS, k=40)) + f" {rng.randrange(10**6)}?"
            while bucket_of(question) != "train":
                question += " now"
            problem = question_hash(question)[:16]
        copies = rng.random() < 0.05
        words = reasoning.split() if copies and reasoning else rng.choices(WORDS, k=250)
        words[rng.randrange(len(words))] = "changed"
        reasoning = " ".join(words)
        yield Trace(
            id=f"{i:032x}",
            problem_id=problem,
            messages=[{"role": "user", "content": question}],
            reasoning_content=reasoning,
            content="so it is 7",
            answer="7",
            verdict="wrong" if rng.random() < 0.2 else "right",
            verdict_by="grader",
            finish_reason="stop",
            usage=Usage(60, 350, 340),
            teacher=info,
            sampling=vars(settings),
            seconds=5.0,
        )


def peak_mb() -> float:
    """Return the process's largest resident size so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=200_000)
    parser.add_argument("--samples", type=int, default=4)
    arguments = parser.parse_args()
    evaluation = [trace.messages[0]["content"] for trace in make_traces(200, 1, seed=1)]
    select(lambda: make_traces(2000, arguments.samples), evaluation=evaluation)  # warm
    started = time.monotonic()
    n_bytes = sum(len(to_json(trace)) for trace in make_traces(2000, arguments.samples))
    for _ in make_traces(arguments.n, arguments.samples):
        pass
    making, before = time.monotonic() - started, peak_mb()
    started = time.monotonic()
    settings = dataclasses.replace(CurationRecipe(), keep=2, long_share=0.2, per_source=arguments.n)
    selection = select(lambda: make_traces(arguments.n, arguments.samples), settings, evaluation=evaluation)
    seconds = time.monotonic() - started - making
    record = selection.record
    result = {
        "traces": record["traces"],
        "problems": record["problems"],
        "bytes_a_trace": n_bytes // 2000,
        "kept": record["kept"],
        "dropped": record["dropped"],
        "seconds": round(seconds, 1),
        "traces_per_s": round(arguments.n / seconds),
        "memory_mb": round(peak_mb() - before),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
