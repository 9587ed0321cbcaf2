"""Training speed and memory against TRL's `SFTTrainer`: the same rows in the same order, the same adapter, in turn.

    python benchmarks/bench_train.py --traces runs/demo/traces.jsonl
    python benchmarks/bench_train.py --traces … --full                 # all weights
    python benchmarks/bench_train.py --traces … --processor-time       # on a busy machine
    python benchmarks/bench_train.py --device cuda --length 4096 --at-once 4 --steps 40 --student random:qwen2-1.5b

The rows are the demo's: the pocket teacher's traces in SmolLM2's template. Each cell is a process of its own, so that
its peak memory is its own; every finished cell is kept in --out, and the same command goes on where it stopped. TRL's
best CPU setting is found first, each candidate for a few steps. Rates count the rows' tokens, not padding; `computed`
counts what rows share only once. On a GPU both also tell which share of its peak FLOPs the model's own take (MFU);
`random:` students have a known model's shape and random weights. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WARM_UP = {"cpu": 2, "cuda": 10}  # steps that are not counted; on a GPU the curve has a point every tenth
SHAPES = {
    "qwen2-1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True,
    }
}
LORA = {"r": 32, "lora_alpha": 32, "task_type": "CAUSAL_LM"}
TRL: dict[str, dict[str, Any]] = {
    "trl bf16 autocast": {"bf16": True},
    "trl bf16 weights": {"weights": "bfloat16"},
    "trl fp32": {},
    "trl packed, bf16 autocast": {"bf16": True, "packing": True},
    "trl packed, bf16 weights": {"weights": "bfloat16", "packing": True},
    "trl padding-free, bf16 weights": {"weights": "bfloat16", "padding_free": True},
}


def main() -> None:
    """Parse, run the cells that are missing, print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, help="a traces.jsonl of the pocket teacher; made if not given")
    parser.add_argument("--student", default="smollm2")
    parser.add_argument("--steps", type=int, default=12, help="of a cell, the warm-up included")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="train all weights")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--length", type=int, default=0, help="make rows of so many random tokens instead")
    parser.add_argument("--rows-a-step", type=int, default=16)
    parser.add_argument("--at-once", type=int, default=0, help="rows of a pass, if not all of a step")
    parser.add_argument(
        "--processor-time", action="store_true", help="one thread, rates by its time: for busy machines"
    )
    parser.add_argument("--trl", help="this setting of TRL instead of the best")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_train.json"))
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and options.steps % 10:
        parser.error("on a GPU the steps have to be a multiple of ten")
    if options.cell:
        print(json.dumps(run_cell(options)))
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = make_rows(options)
    cells = json.loads(options.out.read_text()) if options.out.exists() else {}
    peer = options.trl or choose_trl(options, rows, cells)
    if not options.rounds:
        print(json.dumps({"peer": peer}))
        return
    names = ["ours", peer]
    for i in range(options.rounds):
        for name in names:
            measure(options, rows, cells, name, f"{name} #{i}", options.steps)
    report(options, cells, names)


def measure(options: Any, rows: Path, cells: dict[str, Any], name: str, key: str, steps: int) -> dict[str, Any]:
    """Run a cell in a process of its own unless it is there."""
    key += suffix_of(options)
    if key not in cells:
        command = [sys.executable, __file__, "--cell", name, "--rows", str(rows), "--steps", str(steps)]
        command += ["--student", options.student, "--device", options.device] + ["--full"] * options.full
        command += ["--rows-a-step", str(options.rows_a_step), "--at-once", str(options.at_once)]
        command += ["--length", str(options.length)]
        command += ["--processor-time"] * options.processor_time
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            cells[key] = {"error": (done.stderr.strip().splitlines() or ["?"])[-1]}
        else:
            cells[key] = json.loads(done.stdout.strip().splitlines()[-1])
        options.out.write_text(json.dumps(cells))
        shown = {name: value for name, value in cells[key].items() if name != "losses"}
        print(f"{key}: {shown}", file=sys.stderr, flush=True)
    return cells[key]  # type: ignore[no-any-return]


def suffix_of(options: Any) -> str:
    """Return what sets the cells of these options apart."""
    parts = [options.full and "full", options.length and f"length {options.length}"]
    parts.append(options.processor_time and "processor time")
    parts.append(options.student != "smollm2" and options.student)
    parts.append(options.device == "cuda" and f"cuda, {options.rows_a_step} rows, {options.at_once} at once")
    return "".join(f" {part}" for part in parts if part)


def choose_trl(options: Any, rows: Path, cells: dict[str, Any]) -> str:
    """Return the setting of TRL that trains fastest; on a GPU bf16 weights, or autocast where all are trained."""
    if options.device == "cuda":
        return "trl bf16 autocast" if options.full else "trl bf16 weights"
    short = {name: measure(options, rows, cells, name, f"try {name}", WARM_UP["cpu"] + 2) for name in TRL}
    return max(short, key=lambda name: float(short[name].get("tokens_per_s", 0.0)))


def report(options: Any, cells: dict[str, Any], names: list[str]) -> None:
    """Print a row for each arm and what they come to."""
    suffix = suffix_of(options)
    runs = {name: [cells[f"{name} #{i}{suffix}"] for i in range(options.rounds)] for name in names}
    summary: dict[str, Any] = {}
    for name, found in runs.items():
        if errors := [cell["error"] for cell in found if "error" in cell]:
            raise SystemExit(f"{name}: {errors[0]}")
        rates = sorted(cell["tokens_per_s"] for cell in found)
        summary[name] = {
            "tokens_per_s": statistics.median(rates),
            "spread": [rates[0], rates[-1]],
            "computed_tokens_per_s": statistics.median(cell["computed_tokens_per_s"] for cell in found),
            "peak_gb": max(cell.get("peak_training_gb", cell["peak_gb"]) for cell in found),
            "losses": found[0]["losses"],
            **{key: found[0][key] for key in ("pass", "dtype", "threads", "mfu") if key in found[0]},
        }
        print({key: value for key, value in summary[name].items() if key != "losses"} | {"arm": name})
    if len(names) == 2:
        ours, peer = (summary[name] for name in names)
        pairs = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(runs[names[0]], runs[names[1]], strict=True)]
        exact = cells.get(f"try trl fp32{suffix}", {}).get("losses", [])  # what bf16 should come to
        summary["ratios"] = [round(ratio, 2) for ratio in pairs]
        summary["ratio"] = round(statistics.median(pairs), 2)
        summary["memory"] = round(ours["peak_gb"] / peer["peak_gb"], 2)
        summary["loss_gap"] = gap(ours["losses"], peer["losses"])
        summary["loss_gap_to_fp32"] = {"ours": gap(ours["losses"], exact), "peer": gap(peer["losses"], exact)}
    print(json.dumps(summary))


def gap(losses: list[float], others: list[float]) -> dict[str, float]:
    """Return how far two loss curves are apart, in nats."""
    gaps = [abs(a - b) for a, b in zip(losses, others, strict=False)]
    if not gaps:
        return {}
    return {"mean": round(statistics.mean(gaps), 4), "largest": round(max(gaps), 4), "steps": len(gaps)}


def make_rows(options: Any) -> Path:
    """Write the token rows that every cell reads, in the order of training."""
    path = Path(tempfile.mkdtemp()) / "rows.json"
    n_rows = options.steps * options.rows_a_step
    if options.length:
        import random

        rng = random.Random(0)
        rows = [([rng.randrange(1000, 40000) for _ in range(options.length)], 64) for _ in range(n_rows)]
        path.write_text(json.dumps(rows))
        return path
    from deepdistill.distill.teachers.huggingface.loading import load_tokenizer
    from deepdistill.distill.traces.store import TraceStore
    from deepdistill.distill.training.rows import make_row
    from deepdistill.distill.training.student import teach_template

    traces = options.traces or make_traces(options.out.parent / "bench_train_traces", n_rows)
    tokenizer = load_tokenizer(base_of(options))
    teach_template(tokenizer)
    right = (trace for trace in TraceStore.read(traces) if trace.verdict == "right")
    made = [make_row(tokenizer, t.messages, reasoning=t.reasoning_content or "", content=t.content) for t in right][
        :n_rows
    ]
    if len(made) < n_rows:
        raise SystemExit(f"{traces} holds {len(made)} right traces, {n_rows} are needed")
    path.write_text(json.dumps([(list(row.input_ids), row.n_prompt) for row in made]))
    return path


def make_traces(folder: Path, n_rows: int) -> Path:
    """Ask the pocket teacher."""
    command = [sys.executable, "-m", "deepdistill", "teach", "--stop-after", "traces", "--quiet", "--out", str(folder)]
    command += ["--problems", "gym:chain_sum?min_terms=2&max_terms=4&min_digits=1&max_digits=2"]
    subprocess.run([*command, "--n-traces", str(n_rows + n_rows // 8)], check=True, stdout=subprocess.DEVNULL)
    return folder / "traces.jsonl"


def run_cell(options: Any) -> dict[str, Any]:
    """Train for the steps and return the figures."""
    rows = json.loads(options.rows.read_text())[: options.steps * options.rows_a_step]
    if options.processor_time:
        import torch

        torch.set_num_threads(1)
        time.monotonic = time.process_time
    with tempfile.TemporaryDirectory() as scratch:
        cell = ours(options, rows, Path(scratch)) if options.cell == "ours" else trl(options, rows, scratch)
    counted = sum(len(ids) for ids, _ in rows[WARM_UP[options.device] * options.rows_a_step :])
    if "packing" in TRL.get(options.cell, {}):  # its steps hold other numbers of rows
        counted = cell.pop("real_tokens")
    rate = counted / cell.pop("seconds")
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if options.device == "cuda":
        peak_gb = cell.pop("peak_gpu_gb")
        cell["mfu"] = round(rate * flops_a_token(options) / peak_flops(), 3)
    share = cell.pop("computed_share", 1.0)
    return cell | {
        "tokens_per_s": round(rate, 1),
        "computed_tokens_per_s": round(rate * share, 1),
        "peak_gb": round(peak_gb, 3),
    }


def ours(options: Any, rows: list[Any], scratch: Path) -> dict[str, Any]:
    """Train with `deepdistill`'s loop."""
    from deepdistill.distill.recipe.training import TrainingRecipe
    from deepdistill.distill.records import CURVE_FILE, CurvePoint
    from deepdistill.distill.teachers.huggingface.loading import load_tokenizer
    from deepdistill.distill.training import train as training
    from deepdistill.distill.training.rows import Row
    from deepdistill.distill.training.student import teach_template
    from deepdistill.localrun.core.record_log import read_records
    from deepdistill.localrun.core.reporter import Reporter

    base = base_of(options)
    tokenizer = load_tokenizer(base)
    teach_template(tokenizer)
    settings = TrainingRecipe(
        weights=options.full,
        learning_rate=1e-05 if options.full else 0.0006,
        batch_size=options.rows_a_step,
        micro_batch=options.at_once or None,
        epochs=1,
        warmup=0.0,
        final_lr=1.0,
        max_length=1 << 20,
        save_every_s=1000000000.0,
        patience=0,
        threads=1 if options.processor_time else None,
    )
    rows_ = [Row(ids, n_prompt) for ids, n_prompt in rows]
    peak = {}

    class Watch(Reporter):
        def progress(self, *_: Any, **__: Any) -> None:  # saving and merging come after the training
            peak["peak_training_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3)
            if options.device == "cuda":
                peak.pop("peak_training_gb")
                peak["peak_gpu_gb"] = peak_gpu_gb()

    paths = training.TrainPaths(base, scratch / "checkpoints", scratch / "student")
    training.merge_adapter = lambda *_, **__: 0.0  # type: ignore[assignment]  # nothing of it is measured
    report = training.train(paths, rows_, tokenizer=tokenizer, settings=settings, device=options.device, report=Watch())
    points = list(read_records(scratch / CURVE_FILE, CurvePoint))
    seconds = {point.step: point.seconds for point in points}
    return {
        "seconds": seconds[options.steps] - seconds[WARM_UP[options.device]],
        "losses": [round(point.loss, 4) for point in points],
        "computed_share": report.computed_tokens_per_s / report.tokens_per_s,
        **peak,
        "pass": report.pass_,
        "dtype": report.dtype,
        "threads": report.threads,
    }


def trl(options: Any, rows: list[Any], scratch: str) -> dict[str, Any]:
    """Train with TRL's SFTTrainer."""
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from deepdistill.distill.teachers.huggingface.loading import load_tokenizer

    setting = dict(TRL[options.cell])
    base = base_of(options)
    weights = getattr(torch, setting.pop("weights", "float32"))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=weights, trust_remote_code=False)
    torch.manual_seed(0)
    if not options.full:
        targets = "all-linear"
        model = get_peft_model(model, LoraConfig(target_modules=targets, **LORA))
    packing = setting.get("packing", False)
    longest = max(len(ids) for ids, _ in rows)
    mean_tokens = sum(len(ids) for ids, _ in rows) / len(rows)
    width = 512 if packing else None  # a packed step holds as many tokens as the rows of another
    at_once = options.at_once or options.rows_a_step
    at_once = max(1, round(options.rows_a_step * mean_tokens / 512)) if packing else at_once
    args = SFTConfig(
        output_dir=scratch,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=1 if packing else options.rows_a_step // at_once,
        max_length=max(width, longest) if width else None,
        max_steps=options.steps,
        learning_rate=1e-5 if options.full else 6e-4,
        lr_scheduler_type="constant",
        adam_beta2=0.99,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        logging_steps=1 if options.device == "cpu" else 10,
        save_strategy="no",
        report_to=[],
        use_cpu=options.device == "cpu",
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        completion_only_loss=True,
        disable_tqdm=True,
        **({"bf16": False} | setting),
    )
    data = Dataset.from_list([{"input_ids": ids, "completion_mask": [0] * n + [1] * (len(ids) - n)} for ids, n in rows])
    ends: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if options.device == "cuda" and len(ends) + 1 in (WARM_UP["cuda"], options.steps):
                torch.cuda.synchronize()
            ends.append(time.monotonic())

    trainer = SFTTrainer(
        model=model, args=args, train_dataset=data, processing_class=load_tokenizer(base), callbacks=[Watch()]
    )
    trainer.train()
    losses = [point["loss"] for point in trainer.state.log_history if "loss" in point]
    warm_up = WARM_UP[options.device]
    cell = {"seconds": ends[-1] - ends[warm_up - 1], "losses": losses, "threads": torch.get_num_threads()}
    if packing:
        seen = trainer.train_dataset[: len(ends) * args.per_device_train_batch_size]["input_ids"]
        cell["real_tokens"] = sum(len(ids) for ids in seen[warm_up * args.per_device_train_batch_size :])
    if options.device == "cuda":
        cell["peak_gpu_gb"] = peak_gpu_gb()
    return cell


def base_of(options: Any) -> Path:
    """Return the student's folder; one of `SHAPES` is made once, with random weights in bf16."""
    from deepdistill.distill.teachers.huggingface.loading import load_tokenizer
    from deepdistill.distill.training.student import cache_dir, student_dir

    if not options.student.startswith("random:"):
        return student_dir(options.student)
    shape = options.student.removeprefix("random:")
    folder = cache_dir() / f"random-{shape}"
    if not (folder / "model.safetensors").exists():
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(0)
        with torch.device(options.device):
            model = Qwen2ForCausalLM(Qwen2Config(**SHAPES[shape])).to(torch.bfloat16)
        load_tokenizer(student_dir("smollm2")).save_pretrained(folder)
        model.save_pretrained(folder, max_shard_size="100GB")
    return folder


def peak_gpu_gb() -> float:
    """Return the most GPU memory that tensors have taken so far."""
    import torch

    return round(torch.cuda.max_memory_allocated() / 1e9, 3)


def flops_a_token(options: Any) -> float:
    """Return the model's own FLOPs a trained token: 2 a weight forward, 2 backward, 2 more where the weight learns."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base_of(options), trust_remote_code=False)
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    kv = width * config.num_key_value_heads // config.num_attention_heads
    weights = layers * (2 * width * width + 2 * width * kv + 3 * width * inner) + config.vocab_size * width
    attention = 2 * 2 * layers * width * max(options.length, 1) / 2  # causal: half of the square, forward
    return (6 if options.full else 4) * weights + 3 * attention


def peak_flops() -> float:
    """Return the GPU's dense bf16 peak, FLOP/s."""
    import torch

    name = torch.cuda.get_device_name()
    known = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12}
    return next((flops for part, flops in known.items() if part in name), float("nan"))


if __name__ == "__main__":
    main()
