"""Measure a pocket teacher and write its card: `python benchmarks/pocket/card.py DIR`.

The questions come from the test bucket of the split, which the recipe never draws from.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import torch
from train import TRAINING_PARAMS, ExpertBalance

from deepdistill.distill.evaluation.evaluate import Score, evaluate, format_score
from deepdistill.distill.graders.pool import Grader
from deepdistill.distill.planning.kv_cache import kv_numbers
from deepdistill.distill.pocket.families import FAMILIES
from deepdistill.distill.problems.load import load_problems
from deepdistill.distill.records import Request, messages_of
from deepdistill.distill.teachers.huggingface.teacher import TransformersTeacher
from deepdistill.localrun.core.atomic import write_text
from deepdistill.localrun.core.generation import Sampling

SEED = 20_000_000  # held-out problems that nobody looked at while the recipe was made
GREEDY = Sampling()


def spec_of(family: str) -> str:
    """Return the problem spec of a family as the teacher was trained on it."""
    params = TRAINING_PARAMS[family]
    return f"gym:{family}" + (f"?{urlencode(params)}" if params else "")


def score_families(
    teacher: TransformersTeacher, n: int, *, sampling: Sampling = GREEDY, n_samples: int = 1
) -> dict[str, Score]:
    """Return the teacher's score on n held-out problems of every family, each answered n_samples times."""
    problems = {family: load_problems(spec_of(family), "test", n=n, seed=SEED) * n_samples for family in FAMILIES}
    with Grader() as grader:
        return {
            family: evaluate(teacher, asked, grader=grader, sampling=sampling) for family, asked in problems.items()
        }


def held_out_texts(teacher: TransformersTeacher, n: int) -> list[str]:
    """Return n held-out questions of every family with the teacher's own answers, as the template renders them."""
    texts = []
    for family in FAMILIES:
        conversations = [messages_of(p) for p in load_problems(spec_of(family), "test", n=n, seed=SEED)]
        for index, completion in teacher.generate(map(Request, conversations), Sampling()):
            turn = {"role": "assistant", "content": completion.content}
            turn["reasoning_content"] = completion.reasoning_content or ""
            texts.append(teacher.tokenizer.apply_chat_template([*conversations[index], turn], tokenize=False))
    return texts


@torch.inference_mode()
def expert_load(teacher: TransformersTeacher, texts: list[str]) -> torch.Tensor:
    """Return how often each expert was chosen `[layers, experts]` over the mean of its layer, on these texts."""
    balance = ExpertBalance(teacher.model)
    for text in texts:
        teacher.model(torch.tensor([teacher.tokenizer(text).input_ids]))
    share: torch.Tensor = balance.load / balance.load.mean(dim=1, keepdim=True)
    return share


def count_parameters(model: Any) -> tuple[int, int]:
    """Return (all parameters, those that work on one token)."""
    config = model.config
    total = sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    return total, total - routed + routed * config.num_experts_per_tok // config.n_routed_experts


def write_card(folder: Path, n: int) -> str:
    """Measure the teacher in a folder, write its README.md and return it."""
    teacher = TransformersTeacher(folder, name="pocket", backend="pocket")
    stages = json.loads((folder / "curve.json").read_text(encoding="utf-8"))
    lines = [
        "---",
        "license: mit",
        "---",
        "# The pocket teacher",
        "",
        "A DeepSeek-V3 (multi-head latent attention, sparse experts balanced without an auxiliary loss, shared expert)",
        "small enough for any CPU. It answers four families of reasoning-gym problems with a worked chain of short",
        "steps. It is trained on the training bucket of deepdistill's split alone. It knows nothing else.",
        "",
        f"## Scores, greedy, on {n} held-out problems a family",
        "",
        *_score_lines(score_families(teacher, n)),
        "",
        "## Size",
        "",
        *_size_lines(teacher),
        "",
        "## How it was made",
        "",
        "`python benchmarks/pocket/train.py --out DIR`, then with `--start` from the stage before:",
        "",
        *_stage_lines(stages),
        "",
        "The whole curve of every stage is in curve.json.",
        "",
        "Card: `python benchmarks/pocket/card.py DIR`.",
        "",
    ]
    text = "\n".join(lines)
    write_text(folder / "README.md", text)
    return text


def _score_lines(scores: dict[str, Score]) -> list[str]:
    return [
        "| problems | accuracy | 95 % interval | tokens an answer |",
        "|---|---|---|---|",
        *(
            f"| `{spec_of(family)}` | {100 * score.accuracy:.1f} % | {format_score(score.interval)} % "
            f"| {score.tokens_per_answer:.0f} |"
            for family, score in scores.items()
        ),
    ]


def _size_lines(teacher: TransformersTeacher) -> list[str]:
    config = teacher.model.config
    load = expert_load(teacher, held_out_texts(teacher, 100))
    total, active = count_parameters(teacher.model)
    latent, plain = (4 * n for n in kv_numbers(config.to_dict()))  # bytes, in float32
    return [
        f"{total:,} parameters, {active:,} active on a token ({config.n_routed_experts} routed experts of which "
        f"{config.num_experts_per_tok} work, {config.n_shared_experts} shared). KV cache: {latent} bytes a token in "
        f"float32, against {plain} with plain multi-head attention ({plain / latent:.1f} times as much).",
        "",
        f"Expert load on held-out text: the busiest expert of any layer gets {load.max():.2f} times the mean, "
        f"the idlest {load.min():.2f} times.",
    ]


def _stage_lines(stages: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| stage | settings | steps | minutes | threads | loss: first, middle, last |",
        "|---|---|---|---|---|---|",
    ]
    for number, stage in enumerate(stages, 1):
        curve, recipe = stage["curve"], stage["recipe"]
        losses = ", ".join(f"{curve[i]['loss']:.4f}" for i in (0, len(curve) // 2, -1))
        drill = f", drill {recipe['drill']}" if recipe.get("drill") else ""
        lines.append(
            f"| {number} | seed {recipe['seed']}, peak lr {recipe['peak_lr']:g}, {recipe['minutes']:g} min{drill} "
            f"| {curve[-1]['step']} | {curve[-1]['minutes']} | {stage['threads']} | {losses} |"
        )
    return [
        *lines,
        *(f"\nStage {number}: {stage['note']}" for number, stage in enumerate(stages, 1) if "note" in stage),
    ]


def main() -> None:
    """Parse the command line, measure, write README.md into the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, default=500, help="held-out problems a family")
    arguments = parser.parse_args()
    print(write_card(arguments.folder, arguments.n))


if __name__ == "__main__":
    main()
