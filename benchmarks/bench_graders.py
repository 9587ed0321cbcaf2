"""How often each grader is wrong, and how many verdicts a second it gives, one worker process for each core.

    python benchmarks/bench_graders.py [--trials 5] [--n 2000] [--cases tests/data/verdicts*.jsonl]

The cases are replies whose verdict a person wrote down. Of each grader the first lines say how many wrong replies it
called right and how many of the right ones it called right; beside them math-verify alone (its `parse` on both sides)
and TRL's `accuracy_reward` (if TRL is installed), on the same cases of mathematics, the reference between dollars.

A trial grades n answers on as many threads and workers as cores: half of n for reasoning-gym, a tenth
where a verdict takes sympy, a fiftieth where it starts confined interpreters. Half the answers are wrong, but for the
formulas, whose right ones cost most. A trial before the others loads the libraries and is not counted.
The last line is one JSON object: the median and the range of verdicts/s for each kind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deepdistill.distill.graders.code.sandbox import confinement
from deepdistill.distill.graders.pool import Grader
from deepdistill.distill.problems.load import load_problems
from deepdistill.distill.records import Problem

CASES = sorted((Path(__file__).resolve().parent.parent / "tests" / "data").glob("verdicts*.jsonl"))

Item = tuple[Problem, str]
Case = dict[str, Any]
Judge = Callable[[Case], bool]


def main() -> None:
    """Measure every kind and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--cases", type=Path, nargs="*", default=CASES)
    arguments = parser.parse_args()
    cases = [json.loads(line) for path in arguments.cases for line in path.read_text(encoding="utf-8").splitlines()]
    accuracy = {name: counts(judge, some) for name, judge, some in judges(cases)}
    for name, found in accuracy.items():
        print(f"{name:24} {found['wrong called right']:>3} of {found['wrong']} wrong called right", end="")
        print(f", {found['right called right']:>3} of {found['right']} right called right")
    results = {}
    for name, items in workloads(arguments.n).items():
        with Grader() as grader:
            rates = [rate(grader, items) for _ in range(arguments.trials + 1)][1:]
        results[name] = {"median": round(statistics.median(rates)), "range": [round(min(rates)), round(max(rates))]}
        print(f"{name:18} {results[name]['median']:>6} verdicts/s  ({round(min(rates))} to {round(max(rates))})")
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "layers": list(confinement())}
    print(
        json.dumps(
            {"cases": accuracy, "verdicts_per_s": results, "n": arguments.n, "trials": arguments.trials} | machine
        )
    )


def judges(cases: list[Case]) -> Iterator[tuple[str, Judge, list[Case]]]:
    """Yield what is compared: its name, a function that says whether a case's reply is right, and its cases."""
    mathematics = [case for case in cases if case["grader"] == "math"]
    with Grader() as grader:
        for kind in sorted({case["grader"].partition(":")[0] for case in cases}):
            some = [case for case in cases if case["grader"].partition(":")[0] == kind]
            yield kind, lambda case: grader.grade(problem_of(case), case["reply"]).verdict == "right", some
    yield "math-verify alone", by_math_verify, mathematics
    with contextlib.suppress(ImportError):
        from trl.rewards import accuracy_reward

        yield "TRL's accuracy_reward", lambda case: by_reward(accuracy_reward, case), mathematics


def problem_of(case: Case) -> Problem:
    """Return the problem of a case."""
    metadata = {"choices": case["choices"]} if "choices" in case else {}
    return Problem("id", case.get("question", "question?"), case["reference"], "bench", case["grader"], metadata)


def by_math_verify(case: Case) -> bool:
    """Say whether math-verify calls a reply right."""
    from math_verify import parse, verify

    return bool(verify(parse(f"${case['reference']}$"), parse(case["reply"])))


def by_reward(reward: Callable[..., list[float | None]], case: Case) -> bool:
    """Say whether a reward function of TRL calls a reply right."""
    completion = [{"role": "assistant", "content": case["reply"]}]
    return reward(completions=[completion], solution=[f"${case['reference']}$"]) == [1.0]


def counts(judge: Judge, cases: list[Case]) -> dict[str, int]:
    """Return how many cases of either verdict there are, and how many of them are called right."""
    called = {verdict: [judge(case) for case in cases if case["verdict"] == verdict] for verdict in ("right", "wrong")}
    return {
        name: value
        for verdict, said in called.items()
        for name, value in ((verdict, len(said)), (f"{verdict} called right", sum(said)))
    }


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
