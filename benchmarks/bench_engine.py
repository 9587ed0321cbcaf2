"""The engine against its peers on one GGUF, in turn in one run: one bar at a time, or all.

    python benchmarks/bench_engine.py MODEL.gguf [depth stream batch speculate turns attention start]
        [--rounds 3] [--out FILE.json]

depth      decoding at position 8,000 against a bare llama_decode loop there
stream     4,000 tokens: ours, llama-cpp-python's create_chat_completion, llama.cpp's server (wheel xllamacpp)
batch      16 sequences in one batch against one
speculate  n-gram drafts on text that copies, text that does not, and worked sums, beside the ceiling: every draft right
turns      first token of the second turn of a 2,000-token conversation, in the same process and resumed from disk
attention  one sequence after 2,048 tokens, with and without flash attention: processor seconds, on one thread
start      `deepdistill chat -p` as a whole process against loading and answering alone

Every finished bar is added to FILE.json, and bars that stand there are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import llama_cpp

from deepdistill.distill.problems.load import load_problems
from deepdistill.localrun.core.generation import Guidance, Sampling
from deepdistill.localrun.engine import engine
from deepdistill.localrun.engine.engine import Engine
from deepdistill.localrun.engine.library import has_amx
from deepdistill.localrun.engine.llama import Context, Entry, Model
from deepdistill.localrun.engine.speculation import Latch

SPEC = "gym:chain_sum?min_terms=2&max_terms=4&min_digits=1&max_digits=2"
ROUNDS = 3
PARAGRAPH = (
    "The house stands at the end of the lane, and behind it a river goes slowly to the sea. In spring the meadows are "
    "full of flowers, and the children run down to the water with their boats of bark and paper. "
)


def median(values: list[float]) -> float:
    """Return the median, rounded for people."""
    return round(statistics.median(values), 3)


@contextmanager
def endless(model: Path, **keywords: Any) -> Iterator[Engine]:
    """Open an engine that never ends its turn by itself, so that lengths are equal."""
    with Engine(model, **keywords) as opened:
        opened.model.__dict__["eog"] = frozenset()
        yield opened


def ask(opened: Engine, text: str) -> str:
    """Return the rendered prompt of a question."""
    return opened.prompt([{"role": "user", "content": text}])


def decode_bare(opened: Engine, n: int) -> float:
    """Return the tokens/s of a bare llama_decode loop that goes on from what the cache holds, always with one token."""
    batch = llama_cpp.llama_batch_init(1, 0, 1)
    batch.n_tokens, batch.n_seq_id[0], batch.seq_id[0][0], batch.logits[0] = 1, 1, 0, 1
    position, handle = len(opened._cache.tokens), opened._context.handle
    started = time.monotonic()
    for i in range(n):
        batch.token[0], batch.pos[0] = 1000 + i, position + i
        assert llama_cpp.llama_decode(handle, batch) == 0
    seconds = time.monotonic() - started
    llama_cpp.llama_batch_free(batch)
    opened._context.forget(0, position)
    return n / seconds


def bar_depth(model: Path) -> dict[str, Any]:
    """Bar: at least 0.90."""
    n, position = 128, 8000
    rounds = []
    with endless(model, n_ctx=8192 + 256) as opened:
        prompt = (opened.tokenize(PARAGRAPH) * (position // 20))[: position - n]
        for _ in opened.stream(prompt, Sampling(max_tokens=1)):
            pass
        for _ in range(ROUNDS):
            seconds, last = 0.0, time.monotonic()
            for step in opened.stream(prompt, Sampling(max_tokens=n + 2)):
                now = time.monotonic()
                seconds += now - last if step.n_generated > 2 else 0.0
                last = now
            rounds.append((n / seconds, decode_bare(opened, n)))
    return {
        "position": position,
        "ours": median([a for a, _ in rounds]),
        "bare": median([b for _, b in rounds]),
        "ratio": median([a / b for a, b in rounds]),
    }


def bar_stream(model: Path) -> dict[str, Any]:
    """Bars: at least 1.5 times create_chat_completion, at least 1.0 times llama.cpp's server."""
    n, question = 4000, "Write a very long story about a river."
    rates: dict[str, list[float]] = {"ours": [], "llama_cpp_python": [], "server": []}
    with endless(model, n_ctx=4608) as opened:
        n_threads = opened.n_threads
    for _ in range(min(ROUNDS, 2)):
        with endless(model, n_ctx=4608, n_threads=n_threads) as opened:
            started = time.monotonic()
            for _ in opened.stream(ask(opened, question), Sampling(max_tokens=n)):
                pass
            rates["ours"].append(n / (time.monotonic() - started))
        with amx_aside():
            peer = llama_cpp.Llama(str(model), n_ctx=4608, n_threads=n_threads, verbose=False)
        bias = {
            token: -1e9 for token in range(peer.n_vocab()) if llama_cpp.llama_vocab_is_eog(peer._model.vocab, token)
        }
        started, n_made = time.monotonic(), 0
        messages = [{"role": "user", "content": question}]
        for chunk in peer.create_chat_completion(  # type: ignore[union-attr, arg-type]
            messages, max_tokens=n, temperature=0.0, repeat_penalty=1.0, logit_bias=bias, stream=True
        ):
            n_made += bool(chunk["choices"][0]["delta"].get("content"))
        rates["llama_cpp_python"].append(n_made / (time.monotonic() - started))
        peer.close()
        with serving(model, n_threads) as address:
            started = time.monotonic()
            body = {"messages": messages, "max_tokens": n, "temperature": 0, "ignore_eos": True, "stream": True}
            with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=600) as reply:
                n_made = sum(line.startswith("data: {") for line in reply.iter_lines())
            rates["server"].append(min(n_made, n) / (time.monotonic() - started))
    middle = {name: median(values) for name, values in rates.items()}
    return middle | {
        "threads": n_threads,
        "over_llama_cpp_python": round(middle["ours"] / middle["llama_cpp_python"], 3),
        "over_server": round(middle["ours"] / middle["server"], 3),
    }


@contextmanager
def amx_aside() -> Iterator[None]:
    """Let llama-cpp-python load a model as we do: with AMX it would crash, see `llama.has_amx`."""
    default = llama_cpp.llama_cpp.llama_model_default_params

    def without_amx() -> Any:
        params = default()
        if has_amx():
            params.use_extra_bufts = False
        return params

    llama_cpp.llama_cpp.llama_model_default_params = without_amx
    try:
        yield
    finally:
        llama_cpp.llama_cpp.llama_model_default_params = default


SERVER = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.hostnames, params.port = ["127.0.0.1"], int(sys.argv[2])
params.n_ctx, params.n_parallel = 4608, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[3])
server = xllamacpp.Server(params)
print("ready", flush=True)
time.sleep(3600)
"""


@contextmanager
def serving(model: Path, n_threads: int) -> Iterator[str]:
    """Run llama.cpp's own server; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVER, str(model), str(port), str(n_threads)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        while "ready" not in (line := process.stdout.readline()):
            assert line, "the server did not start"
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def bar_batch(model: Path) -> dict[str, Any]:
    """Bar: at least 2.4 times on 2 cores, Q8_0."""
    n = 128
    ratios, single, many = [], [], []
    with endless(model, n_seq=16, n_ctx=4096) as opened:
        prompts = [ask(opened, f"Write a story about the number {i}.") for i in range(16)]
        for _ in range(ROUNDS):
            started = time.monotonic()
            for _ in opened.stream(prompts[0], Sampling(max_tokens=n)):
                pass
            single.append(n / (time.monotonic() - started))
            started = time.monotonic()
            for _ in opened.generate_many(prompts, Sampling(max_tokens=n)):
                pass
            many.append(16 * n / (time.monotonic() - started))
            ratios.append(many[-1] / single[-1])
    return {"single": median(single), "sixteen": median(many), "ratio": median(ratios)}


def bar_speculate(model: Path) -> dict[str, Any]:
    """Bars: at least 1.2 times on text that copies, never under 0.97 times where it cannot help."""
    copied = f"Repeat this text word by word, twice:\n\n{PARAGRAPH * 2}"
    sums = [problem.question for problem in load_problems(SPEC, "test", n=40, seed=1)]
    result: dict[str, Any] = {}
    with Engine(model, n_ctx=2048) as opened:
        story = ask(opened, "Write a story about a fox.")
        cases = {
            # The model is made to copy: its answer is begun for it with what it is to repeat.
            "copies": ([ask(opened, copied) + PARAGRAPH * 3], Sampling(max_tokens=256)),
            "sums": ([ask(opened, question) for question in sums], Sampling(max_tokens=128)),
            "does_not_copy": ([story], Sampling(temperature=1.5, seed=1, max_tokens=256)),
        }
        for name, (prompts, sampling) in cases.items():
            rounds = []
            for _ in range(ROUNDS):
                plain, said = timed(opened, prompts, sampling, Guidance())
                guessed, same = timed(opened, prompts, sampling, Guidance(speculate=True))
                with oracle(opened, said):
                    ceiling, _ = timed(opened, prompts, sampling, Guidance(speculate=True))
                rounds.append((plain / guessed, plain / ceiling, sum(a == b for a, b in zip(said, same, strict=True))))
            result[name] = {
                "times": median([a for a, _, _ in rounds]),
                "all": [round(a, 3) for a, _, _ in rounds],
                "ceiling": median([b for _, b, _ in rounds]),
                "same_output": f"{rounds[-1][2]} of {len(prompts)}",
            }
    return result


def timed(
    opened: Engine, prompts: list[str], sampling: Sampling, guidance: Guidance
) -> tuple[float, list[tuple[int, ...]]]:
    """Return the seconds after each first token, and what was said."""
    seconds, said = 0.0, []
    for prompt in prompts:
        tokens, started = [], 0.0
        for step in opened.stream(prompt, sampling, guidance=guidance):
            if step.n_generated == 1:
                started = time.monotonic()
            tokens.append(step.token)
        seconds += time.monotonic() - started
        said.append(tuple(token for token in tokens if token >= 0))
    return seconds, said


@contextmanager
def oracle(opened: Engine, said: list[tuple[int, ...]]) -> Iterator[None]:
    """Let the drafts be what will be said: the most that any drafting could bring."""
    answers = iter(said)

    class Oracle:
        def __init__(self) -> None:
            self._answer, self._start = next(answers), -1

        def __call__(self, tokens: list[int], n: int) -> list[int]:
            if self._start < 0:
                # Called first with the prompt and a few tokens of the answer.
                self._start = next(
                    len(tokens) - i for i in range(1, len(tokens)) if tuple(tokens[-i:]) == self._answer[:i]
                )
            at = len(tokens) - self._start
            return list(self._answer[at : at + n])

    before, latch = engine.NgramDrafts, opened._latch
    engine.NgramDrafts, opened._latch = Oracle, Latch()  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        engine.NgramDrafts, opened._latch = before, latch  # type: ignore[misc]


def bar_turns(model: Path) -> dict[str, Any]:
    """Bars: the second turn's first token at most 0.05 of the first's; resumed from disk at most 0.10."""
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        for _ in range(ROUNDS):
            with Engine(model, n_ctx=4096) as opened:
                turns = [{"role": "user", "content": PARAGRAPH * 49}]
                first, answer, n_prompt = first_token(opened, opened.prompt(turns))
                turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And then?"}]
                opened.save_state(state)
                n_bytes = state.stat().st_size
                second, _, _ = first_token(opened, opened.prompt(turns))
            with Engine(model, n_ctx=4096) as opened:
                prompt = opened.prompt(turns)
                started = time.monotonic()
                assert opened.load_state(state)
                resumed = time.monotonic() - started + first_token(opened, prompt)[0]
            rounds.append((first, second, resumed))
    return {
        "prompt_tokens": n_prompt,
        "first_s": median([a for a, _, _ in rounds]),
        "second": median([b / a for a, b, _ in rounds]),
        "resumed": median([c / a for a, _, c in rounds]),
        "state_mb": round(n_bytes / 1e6, 1),
    }


def first_token(opened: Engine, prompt: str) -> tuple[float, str, int]:
    """Return the seconds to the first token, the answer and the prompt's tokens."""
    started, seconds, answer = time.monotonic(), 0.0, ""
    for step in opened.stream(prompt, Sampling(max_tokens=60)):
        seconds = seconds or time.monotonic() - started
        answer += step.text if step.part == "answer" else ""
    return seconds, answer, step.n_prompt


def bar_attention(model: Path) -> dict[str, Any]:
    """Reported: what decides that one sequence on the processor does without."""
    depth, loaded = 2048, Model(model)
    contexts = {name: Context(loaded, 4096, flash=name == "flash") for name in ("flash", "without")}
    result: dict[str, Any] = {"depth": depth}
    for name, context in contexts.items():
        context.set_threads(1)
        started = time.process_time()
        for start in range(0, depth, 512):
            context.decode([Entry(5 + (start + i) * 7 % 9000, start + i, 0, i == 511) for i in range(512)])
        result[f"prefill_per_s_{name}"] = round(depth / (time.process_time() - started), 1)
    for n in (1, 5):
        seconds: dict[str, list[float]] = {name: [] for name in contexts}
        for _ in range(8 * ROUNDS):
            for name, context in contexts.items():
                started = time.process_time()
                context.decode([Entry(1000 + i, depth + i, 0, True) for i in range(n)])
                seconds[name].append(time.process_time() - started)
                context.forget(0, depth)
        result |= {f"ms_of_{n}_{name}": round(1000 * statistics.median(taken), 1) for name, taken in seconds.items()}
    for context in contexts.values():
        context.close()
    loaded.close()
    return result


def bar_start(model: Path) -> dict[str, Any]:
    """Bar: at most 0.4 s more than loading and answering take."""
    bare = (
        "import sys, time, llama_cpp\n"
        "from pathlib import Path\n"
        "from deepdistill.localrun.engine.engine import Engine\n"
        "from deepdistill.localrun.core.generation import Sampling\n"
        "started = time.monotonic()\n"
        "with Engine(sys.argv[1], n_threads=int(sys.argv[2])) as e:\n"
        "    n = sum(1 for _ in e.stream(e.prompt([{'role': 'user', 'content': 'hi'}]), Sampling(max_tokens=32)))\n"
        "    print(time.monotonic() - started)\n"
    )
    with Engine(model) as opened:
        n_threads = opened.n_threads
    rounds = []
    for _ in range(5):
        alone = float(subprocess.check_output([sys.executable, "-c", bare, str(model), str(n_threads)]))
        started = time.monotonic()
        command = [sys.executable, "-m", "deepdistill", "chat", str(model), "-p", "hi", "--max-tokens", "32"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, env=os.environ)
        rounds.append(time.monotonic() - started - alone)
    return {"adds_s": median(rounds), "all": [round(value, 3) for value in rounds]}


BARS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "depth": bar_depth,
    "stream": bar_stream,
    "batch": bar_batch,
    "speculate": bar_speculate,
    "turns": bar_turns,
    "attention": bar_attention,
    "start": bar_start,
}


def main() -> None:
    """Print a line a bar, then all of them as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("bars", nargs="*", choices=[*BARS, []], default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    globals()["ROUNDS"] = arguments.rounds
    done = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    for name in arguments.bars or BARS:
        if name not in done:
            done[name] = BARS[name](arguments.model)
            print(name, json.dumps(done[name]), flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(done, indent=2) + "\n")
    print(json.dumps({"model": arguments.model.name} | done))


if __name__ == "__main__":
    main()
