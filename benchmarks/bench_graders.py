"""How many verdicts a second each grader gives, one worker process for each core.

    python benchmarks/bench_graders.py [--trials 5] [--n 2000]

A trial grades n answers on as many threads and workers as cores: half of n for reasoning-gym, a tenth
where a verdict takes sympy, a fiftieth where it starts confined interpreters. Half the answers are wrong, but for the
formulas, whose right ones cost most. A trial before the others loads the libraries and is not counted.
The last line is one JSON object: the median and the range of verdicts/s for each kind.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from deepdistill.distill.graders.code.sandbox import confinement
from deepdistill.distill.graders.pool import Grader
from deepdistill.distill.problems.load import load_problems
from deepdistill.distill.records import Problem

Item = tuple[Problem, str]


def main() -> None:
    """Measure every kind and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--n", type=int, default=2000)
    arguments = parser.parse_args()
    results = {}
    for name, items in workloads(arguments.n).items():
        with Grader() as grader:
            rates = [rate(grader, items) for _ in range(arguments.trials + 1)][1:]
        results[name] = {"median": round(statistics.median(rates)), "range": [round(min(rates)), round(max(rates))]}
        print(f"{name:18} {results[name]['median']:>6} verdicts/s  ({round(min(rates))} to {round(max(rates))})")
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "layers": list(confinement())}
    print(json.dumps({"verdicts_per_s": results, "n": arguments.n, "trials": arguments.trials} | machine))


def workloads(n: int) -> dict[str, list[Item]]:
    """Return problems with contents for each kind."""
    gym = load_problems("gym:chain_sum", None, n=n // 2)
    return {
        "number": [(_problem("number", f"{i} m"), f"It is {(i + i % 2) / 1000} km.") for i in range(n)],
        "math, numbers": [(_problem("math", str(i)), f"The answer is {i + i % 2}.") for i in range(n)],
        "math, formulas": [(_problem("math", f"x+{i}/2"), rf"\boxed{{\frac{{{i}}}{{2}}+x}}") for i in range(n // 10)],
        "gym:chain_sum": [(p, f"So it is {p.answer}{'1' * (i % 2)}.") for i, p in enumerate(gym)],
        "python, asserts": [_code(i, "assert f({i}) == {square}") for i in range(n // 50)],
        "python, program": [_program(i) for i in range(n // 50)],
    }


def rate(grader: Grader, items: list[Item]) -> float:
    """Return the verdicts a second over one pass; none may be unknown."""
    started = time.perf_counter()
    with ThreadPoolExecutor(grader.n_workers) as threads:
        verdicts = [grade.verdict for grade in threads.map(lambda item: grader.grade(*item), items)]
    seconds = time.perf_counter() - started
    assert set(verdicts) <= {"right", "wrong"}, verdicts
    return len(items) / seconds


def _problem(grader: str, answer: str | None, **metadata: object) -> Problem:
    return Problem("id", "question?", answer, "bench", grader, metadata)


def _code(i: int, test: str) -> Item:
    tests = test.format(i=i, square=i * i)
    return _problem("python", None, tests=tests), f"def f(x):\n    return x * x + {i % 2}"


def _program(i: int) -> Item:
    tests = [{"input": f"{i}\n", "output": f"{i * i}\n"}]
    return _problem("python", None, tests=tests), f"print(int(input()) ** 2 + {i % 2})"


if __name__ == "__main__":
    main()
