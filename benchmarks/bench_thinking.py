"""The thinking budget and the loop guard on a GGUF that thinks, each against the model left alone.

    python benchmarks/bench_thinking.py MODEL.gguf [budget | loops] [--n 1000] [--budget 24] [--out FILE.json]

budget  N random problems: how many think longer than the budget when left alone, and that with it every one has an
        answer and none a tag in it; accuracy both ways
loops   looks for prompts whose greedy output loops to the limit (benchmarks/loop_prompts.txt keeps what it found), then
        asks them again with the guard; one at a time, as rounding in a batch decides whether some of them loop
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from deepdistill.distill.evaluation.evaluate import is_loop
from deepdistill.distill.graders.pool import Grader
from deepdistill.distill.problems.load import load_problems
from deepdistill.localrun.core.generation import FREE, Completion, Guidance, Sampling
from deepdistill.localrun.engine.engine import Engine

SPEC = "gym:chain_sum?min_terms=2&max_terms=4&min_digits=1&max_digits=2"
SEED = 30_000_000
LOOP_PROMPTS = Path(__file__).parent / "loop_prompts.txt"
LIMIT = 512  # tokens: the design's limit for a loop
TASKS = ("Write a long story about", "List all you know about", "Describe in great detail", "Explain step by step")
THINGS = (
    "a cat", "the sea", "a city at night", "numbers", "the moon", "a river", "trains", "bread", "winter", "a garden",
    "music", "a castle", "birds", "the desert", "a market", "clocks", "a forest", "the colour blue", "horses", "rain",
    "a lighthouse", "mountains", "tea", "an old book", "stars", "a bridge", "fish", "snow", "a village", "wind",
    "a ship", "apples", "a mirror", "the sun", "a school", "bees", "a road", "stones", "a dream", "paper",
)  # fmt: skip


def ask_alone(opened: Engine, question: str, sampling: Sampling, guidance: Guidance) -> Completion:
    """Return the completion of a question that shares its batch with no other."""
    return ask_all(opened, [question], sampling, guidance)[0]


def ask_all(opened: Engine, questions: list[str], sampling: Sampling, guidance: Guidance) -> list[Completion]:
    """Return the completions in the order of the questions."""
    prompts = [opened.prompt([{"role": "user", "content": question}]) for question in questions]
    done = dict(opened.generate_many(prompts, sampling, guidance=guidance))
    return [done[i] for i in range(len(questions))]


def measure_budget(opened: Engine, n: int, budget: int) -> dict[str, Any]:
    """Bar: at least 300 of 1,000 think longer than the budget when left alone; with it all answer and no tag leaks."""
    problems = load_problems(SPEC, "test", n=n, seed=SEED)
    questions, sampling = [problem.question for problem in problems], Sampling(max_tokens=LIMIT)
    result: dict[str, Any] = {"n": len(problems), "budget": budget}
    with Grader() as grader:
        for name, guidance in (("free", FREE), ("budget", Guidance(think_budget=budget, loop_guard=True))):
            done = ask_all(opened, questions, sampling, guidance)
            right = sum(grader.grade(p, c.content).verdict == "right" for p, c in zip(problems, done, strict=True))
            result[name] = {
                "longer_than_budget": sum(c.reasoning_tokens > budget for c in done),
                "longest_thinking": max(c.reasoning_tokens for c in done),
                "answered": sum(bool(c.content.strip()) for c in done),
                "leaked_tags": sum("<think>" in c.content or "</think>" in c.content for c in done),
                "looped": sum(is_loop(c) for c in done),
                "right": right,
            }
    return result


def measure_loops(opened: Engine) -> dict[str, Any]:
    """Bar: of 100 prompts that loop to the limit when left alone, none does with the guard, and all answer."""
    sampling = Sampling(max_tokens=LIMIT)
    if not LOOP_PROMPTS.exists():
        LOOP_PROMPTS.write_text("".join(f"{prompt}\n" for prompt in find_loops(opened, sampling)), encoding="utf-8")
    prompts = LOOP_PROMPTS.read_text(encoding="utf-8").splitlines()
    result: dict[str, Any] = {"n": len(prompts)}
    for name, guidance in (("free", FREE), ("guarded", Guidance(loop_guard=True))):
        done = [ask_alone(opened, prompt, sampling, guidance) for prompt in prompts]
        result[name] = {
            "to_the_limit": sum(c.finish_reason == "length" for c in done),
            "looped": sum(is_loop(c) for c in done),
            "answered": sum(bool(c.content.strip()) for c in done),
            "ended_by_guard": sum(c.finish_reason == "loop" for c in done),
            "tokens": sum(c.completion_tokens for c in done),
        }
    return result


def find_loops(opened: Engine, sampling: Sampling) -> list[str]:
    """Return the first 100 prompts of a fixed list whose output goes round in circles up to the limit."""
    candidates = [f"{task} {thing}." for task, thing in itertools.product(TASKS, THINGS)]
    candidates += [f"{task} {a} and {b}." for task, (a, b) in itertools.product(TASKS, itertools.pairwise(THINGS))]
    found: list[str] = []
    for prompt in candidates:
        done = ask_alone(opened, prompt, sampling, FREE)
        found += [prompt] if is_loop(done) and done.finish_reason == "length" else []
        if len(found) == 100:
            break
    n_asked = candidates.index(found[-1]) + 1 if found else len(candidates)
    print(f"{len(found)} loops among {n_asked} prompts", flush=True)
    return found


def main() -> None:
    """Print each part as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("parts", nargs="*", default=["budget", "loops"])
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--budget", type=int, default=24)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"model": arguments.model.name}
    with Engine(arguments.model, n_ctx=16 * 768, n_seq=16) as opened:
        for part in arguments.parts:
            result[part] = (
                measure_budget(opened, arguments.n, arguments.budget) if part == "budget" else measure_loops(opened)
            )
            print(part, json.dumps(result[part]), flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
