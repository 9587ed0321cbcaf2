"""V3 to R1, small: a pocket teacher that was stopped early improves by reinforcement alone, without another trace.

`python benchmarks/pocket/train.py --out EARLY --minutes 15` stops one early (20 to 60 % of its problems are right
then), and `python benchmarks/pocket/reinforce.py --start EARLY --out OUT --minutes 60` continues from it: the model
answers problems of the training bucket, the graders that verify traces reward it, and GRPO makes right answers more
probable. Only problems that it solves now and then are used. The experts' biases, which balance them in the recipe,
stay as they are.

Source: DeepSeek-R1, arXiv 2501.12948, section 2.2 (R1-Zero: reinforcement on the base model, no supervised data).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from card import expert_load, held_out_texts, score_families, spec_of

from deepdistill.distill.graders.pool import Grader
from deepdistill.distill.pocket.families import FAMILIES
from deepdistill.distill.problems.load import load_problems
from deepdistill.distill.records import Problem
from deepdistill.distill.teachers import open_teacher
from deepdistill.distill.teachers.huggingface.loading import load_tokenizer
from deepdistill.distill.training.pass_rate import measure_pass_rates
from deepdistill.distill.training.rl.grpo import GrpoReport, GrpoSettings, grpo
from deepdistill.distill.training.rl.stage import sometimes_solved
from deepdistill.distill.training.train import TrainPaths
from deepdistill.localrun.core.atomic import write_text
from deepdistill.localrun.core.bars import Bars
from deepdistill.localrun.core.generation import Sampling
from deepdistill.localrun.core.reporter import SILENT, Reporter

LONGEST = 192  # tokens of an answer; the recipe's longest chains have about 150
_N_TEXTS = 50  # a family, for the experts' load
_N_TRIES, _ROWS = 4, 256  # answers to a problem, and at once, while problems are chosen
_N_SAMPLES = 4  # of a problem, at the temperature of the training


def training_problems(n: int, seed: int, families: Sequence[str] = tuple(FAMILIES)) -> list[Problem]:
    """Return up to n problems of each family's training bucket, in turn."""
    drawn = [load_problems(spec_of(family), "train", n=n, seed=seed) for family in families]
    longest = max(map(len, drawn))
    return [some[i] for i in range(longest) for some in drawn if i < len(some)]


def reinforce(
    start: Path,
    out: Path,
    *,
    settings: GrpoSettings,
    n_problems: int = 1500,
    families: Sequence[str] = tuple(FAMILIES),
    report: Reporter = SILENT,
) -> GrpoReport:
    """Improve the checkpoint in start by reward and write it to out; the same call resumes.

    Of n_problems of each family those are taken that it solves now and then; finding them counts as time.
    """
    problems, began = training_problems(n_problems, settings.seed, families), time.monotonic()
    sampling = Sampling(settings.temperature, max_tokens=settings.max_tokens, seed=settings.seed)
    with Grader() as grader:
        with open_teacher(str(start), batch_size=_ROWS) as model:
            problems = sometimes_solved(
                problems,
                measure_pass_rates(model, problems, grader=grader, sampling=sampling, n_tries=_N_TRIES, report=report),
            )
        if settings.minutes is not None:
            settings = replace(settings, minutes=settings.minutes - (time.monotonic() - began) / 60)
        return grpo(
            TrainPaths(start, out.with_name(f"{out.name}-checkpoints"), out),
            problems,
            tokenizer=load_tokenizer(start),
            grader=grader,
            settings=settings,
            report=report,
        )


def measure(folder: Path, n: int) -> dict[str, Any]:
    """Return a checkpoint's accuracy and answer length on each family's held-out problems, and its experts' load.

    `accuracy` is that of greedy answers, `sampled` the mean of answers at temperature 1, as GRPO trains.
    """
    from deepdistill.distill.teachers.huggingface.teacher import TransformersTeacher

    teacher = TransformersTeacher(folder, name="pocket", backend="pocket")
    scores = score_families(teacher, n)
    drawn = score_families(teacher, n, sampling=Sampling(temperature=1.0, max_tokens=LONGEST), n_samples=_N_SAMPLES)
    load = expert_load(teacher, held_out_texts(teacher, min(n, _N_TEXTS)))
    return {
        "accuracy": sum(score.accuracy for score in scores.values()) / len(scores),
        "sampled": sum(score.accuracy for score in drawn.values()) / len(drawn),
        "tokens_per_answer": sum(score.tokens_per_answer for score in scores.values()) / len(scores),
        "looped": sum(score.looped for score in scores.values()) / len(scores),
        "busiest_expert": round(float(load.max()), 3),
        "idlest_expert": round(float(load.min()), 3),
        "families": {family: vars(score) for family, score in scores.items()},
        "sampled_families": {family: vars(score) for family, score in drawn.items()},
    }


def main() -> None:
    """Parse the command line, reinforce, measure before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--problems-per-step", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n-eval", type=int, default=200)
    arguments = parser.parse_args()
    settings = GrpoSettings(
        steps=10**6,
        minutes=arguments.minutes,
        problems_per_step=arguments.problems_per_step,
        max_tokens=LONGEST,
        lr=arguments.lr,
        seed=arguments.seed,
    )
    with Bars(quiet=False) as bars:
        report = reinforce(arguments.start, arguments.out, settings=settings, report=bars)
    found = {
        "settings": asdict(settings),
        "before": measure(arguments.start, arguments.n_eval),
        "after": measure(arguments.out, arguments.n_eval),
        "report": asdict(report),
    }
    write_text(arguments.out / "reinforced.json", json.dumps(found, indent=1))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
