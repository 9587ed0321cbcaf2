"""Output tokens/s of the in-process teacher against transformers' `generate`, in turn, on the same prompts.

    python benchmarks/bench_teacher.py [pocket | smollm2 | FOLDER] [--n 96] [--batch-size 48] [--rounds 3]

`generate` gets what a careful user would give it: prompts sorted by length, the same batch size, dtype and limit,
greedy. Both stop at the model's own end of turn; tokens are counted up to it.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from deepdistill.distill.evaluate import messages_of
from deepdistill.distill.problems import load_problems
from deepdistill.distill.student import student_dir
from deepdistill.distill.teachers import Request, open_teacher
from deepdistill.distill.teachers.transformers_model import TransformersTeacher
from deepdistill.localrun.generation import Sampling

SPEC = "gym:chain_sum?min_terms=2&max_terms=4&min_digits=1&max_digits=2"


def run_ours(teacher: TransformersTeacher, conversations: list[list[dict[str, str]]], limit: int) -> tuple[int, float]:
    """Return (output tokens, seconds)."""
    started = time.monotonic()
    done = [completion for _, completion in teacher.generate(map(Request, conversations), Sampling(max_tokens=limit))]
    return sum(completion.completion_tokens for completion in done), time.monotonic() - started


@torch.inference_mode()
def run_generate(
    teacher: TransformersTeacher, conversations: list[list[dict[str, str]]], limit: int
) -> tuple[int, float]:
    """Return (output tokens, seconds) of `model.generate` in batches of the same size, sorted by length."""
    started, n_tokens = time.monotonic(), 0
    tokenizer = teacher.tokenizer
    tokenizer.padding_side = "left"
    prompts = sorted((teacher.render(messages) for messages in conversations), key=len)
    for start in range(0, len(prompts), teacher.n_parallel):
        batch = tokenizer(
            prompts[start : start + teacher.n_parallel], return_tensors="pt", padding=True, add_special_tokens=False
        ).to(teacher.device)
        out = teacher.model.generate(
            **batch,
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=sorted(teacher.eos_ids),
            pad_token_id=tokenizer.pad_token_id,
        )
        for row in out[:, batch["input_ids"].shape[1] :].tolist():
            ends = [i for i, token in enumerate(row) if token in teacher.eos_ids]
            n_tokens += ends[0] + 1 if ends else len(row)
    return n_tokens, time.monotonic() - started


def main() -> None:
    """Print a line a round, then all of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="pocket")
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    spec = str(student_dir("smollm2")) if arguments.model == "smollm2" else arguments.model
    conversations = [messages_of(problem) for problem in load_problems(SPEC, "test", arguments.n, 0)]
    rounds = []
    with open_teacher(spec, batch_size=arguments.batch_size) as teacher:
        assert isinstance(teacher, TransformersTeacher)
        run_ours(teacher, conversations[:8], 8)  # warm up
        for _ in range(arguments.rounds):
            ours, peer = (f(teacher, conversations, arguments.max_tokens) for f in (run_ours, run_generate))
            rates = ours[0] / ours[1], peer[0] / peer[1]
            rounds.append({"ours": rates[0], "generate": rates[1], "ratio": rates[0] / rates[1], "tokens": ours[0]})
            print(f"ours {rates[0]:.0f}, generate {rates[1]:.0f} tokens/s: {rates[0] / rates[1]:.2f} times", flush=True)
        record = {"model": arguments.model, "n": arguments.n, "batch_size": teacher.n_parallel, "rounds": rounds}
    print(json.dumps(record))


if __name__ == "__main__":
    main()
