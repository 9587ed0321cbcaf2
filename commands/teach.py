"""`deepdistill teach`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .shared import (
    AsJson,
    BatchSize,
    Concurrency,
    Device,
    Offline,
    Problems,
    Quiet,
    Seed,
    ServerModel,
    bars,
    console,
    note,
    resumable,
)

if TYPE_CHECKING:
    from ..distill.recipe import TeachSettings
    from ..distill.teachers.budget import Limits


Stage = Literal["traces", "samples", "teacher", "training"]


def teach(
    problems: Problems,
    teacher: Annotated[
        str,
        typer.Option(
            help="pocket, https://HOST/v1, hf:ORG/NAME, a checkpoint folder, a .gguf file, or worked: the solutions "
            "that the problems bring."
        ),
    ] = "pocket",
    student: Annotated[str, typer.Option(help="smollm2, pocket, hf:ORG/NAME or a checkpoint folder.")] = "smollm2",
    out: Annotated[Path | None, typer.Option(help="The run folder; runs/STUDENT-PROBLEMS if not given.")] = None,
    n_traces: Annotated[int, typer.Option(help="Training problems to ask the teacher.", min=1)] = 2000,
    n_eval: Annotated[int, typer.Option(help="Held-out problems to score on.", min=1)] = 200,
    temperature: Annotated[float | None, typer.Option(help="Of the teacher; 0 for pocket, else 0.6.", min=0)] = None,
    top_p: Annotated[float | None, typer.Option(help="Of the teacher; 1 for pocket, else 0.95.", min=0, max=1)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="A trace's limit; 512 for pocket, else 4096.", min=1)] = None,
    samples: Annotated[int, typer.Option(help="Of each problem, at most.", min=1)] = 1,
    keep: Annotated[int, typer.Option(help="Right ones of each problem, after which it is asked no more.", min=1)] = 1,
    expand: Annotated[int, typer.Option(help="New problems that the teacher writes like each given one.", min=0)] = 0,
    accept: Annotated[
        str | None,
        typer.Option(help="vote, judge or vote,judge: what may stand for a grader; where there is none, both may."),
    ] = None,
    vote_share: Annotated[
        float, typer.Option(help="Of a problem's samples that have to agree.", min=0.01, max=1)
    ] = 0.6,
    judge: Annotated[
        str | None, typer.Option(help="A model that judges what the vote leaves open; given as a teacher is.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The judge's name on its server, if it has several.")] = None,
    judge_compare: Annotated[
        bool, typer.Option("--judge-compare", help="Compare the samples of a problem instead of scoring each.")
    ] = False,
    rubric: Annotated[Path | None, typer.Option(help="A text file with what the judge's scores 1 to 5 take.")] = None,
    curate: Annotated[
        list[str] | None, typer.Option(help="FILTER=VALUE or FILTER=off; docs/curation.md lists the filters.")
    ] = None,
    pass_samples: Annotated[
        int,
        typer.Option(
            help="Tries of the untrained student at each problem; what it always solves is left out, "
            "by GRPO what it never does, too.",
            min=0,
        ),
    ] = 0,
    logprobs: Annotated[
        int, typer.Option(help="Log-probabilities a token to keep beside the traces; 64 is usual.", min=0)
    ] = 0,
    price: Annotated[str | None, typer.Option(help="IN,OUT: the teacher's dollars a million tokens.")] = None,
    judge_price: Annotated[str | None, typer.Option(help="IN,OUT of the judge; the teacher's if not given.")] = None,
    max_usd: Annotated[float | None, typer.Option(help="What the traces may cost in all.", min=0)] = None,
    max_hours: Annotated[float | None, typer.Option(help="How long this command may ask.", min=0)] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and what it may cost; ask nothing.")
    ] = False,
    eval_max_tokens: Annotated[int, typer.Option(help="An answer's limit when scoring.", min=1)] = 512,
    model: ServerModel = None,
    traces: Annotated[Path | None, typer.Option(help="Train on this traces.jsonl and ask no teacher.")] = None,
    method: Annotated[
        Literal["distill", "grpo"],
        typer.Option(help="grpo: no teacher, the student improves by what the graders say (needs the rl extra)."),
    ] = "distill",
    loss: Annotated[
        Literal["auto", "cross-entropy", "logits"],
        typer.Option(help="logits: learn the log-probabilities beside the traces; auto: where that is possible."),
    ] = "auto",
    logit_share: Annotated[
        float, typer.Option(help="Of the loss that they are; the rest is cross-entropy.", min=0, max=1)
    ] = 0.9,
    curriculum: Annotated[
        bool, typer.Option("--curriculum", help="Order the traces by how often the untrained student solves them.")
    ] = False,
    rounds: Annotated[
        int, typer.Option(help="After the first training: the student answers, the teacher corrects, it trains.", min=0)
    ] = 0,
    round_problems: Annotated[int, typer.Option(help="New problems a round.", min=1)] = 500,
    round_samples: Annotated[int, typer.Option(help="The student's answers to each of them.", min=1)] = 4,
    on_policy_loss: Annotated[
        Literal["auto", "reverse-kl", "forward-kl", "policy-gradient", "off"],
        typer.Option(help="How the teacher's scores of the student's tokens train; off: own right answers instead."),
    ] = "auto",
    full: Annotated[bool, typer.Option("--full", help="Train all weights instead of a LoRA adapter.")] = False,
    lora_rank: Annotated[int, typer.Option(min=1)] = 32,
    lora_alpha: Annotated[int, typer.Option(min=1)] = 32,
    lora_first_layer: Annotated[
        int, typer.Option(help="Leave the layers below without an adapter: faster.", min=0)
    ] = 0,
    lora_targets: Annotated[
        str, typer.Option(help="Linear maps with an adapter, such as q_proj,v_proj; every one if not given.")
    ] = "",
    lora_plus: Annotated[
        float, typer.Option(help="The learning rate of LoRA's B by that of its A; LoRA+ advises 16.", min=0.01)
    ] = 1.0,
    dora: Annotated[bool, typer.Option("--dora", help="Weight-decomposed LoRA; slower.")] = False,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale the adapter by the rank's root.")] = False,
    qlora: Annotated[bool, typer.Option("--qlora", help="A base of 4 bits under the adapter; needs a GPU.")] = False,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; 6e-4 for LoRA, 1e-4 for --full.", min=0)] = None,
    train_batch_size: Annotated[int, typer.Option(help="Rows a training step.", min=1)] = 16,
    micro_batch: Annotated[
        int | None, typer.Option(help="Rows of it computed at once; as many as fit the memory if not given.", min=1)
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the traces, at most.", min=1)] = 3,
    steps: Annotated[int | None, typer.Option(help="Training steps, at most.", min=1)] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Box the training time; the learning rate follows the clock.", min=0.01)
    ] = None,
    max_length: Annotated[
        int, typer.Option(help="Tokens of a training row, at most; longer ones are counted.", min=16)
    ] = 1024,
    too_long: Annotated[
        Literal["drop", "shorten"],
        typer.Option(help="What becomes of longer ones; shorten takes lines out of the middle of the reasoning."),
    ] = "drop",
    reasoning_weight: Annotated[float, typer.Option(help="Of its tokens in the loss.", min=0)] = 1.0,
    answer_weight: Annotated[float, typer.Option(help="Of its tokens in the loss.", min=0)] = 1.0,
    n_validation: Annotated[
        int, typer.Option(help="Training problems held out to watch the training; none if there are few.", min=0)
    ] = 32,
    patience: Annotated[
        int, typer.Option(help="Validations, 20 in a run, without progress before it ends early; 0: never.", min=0)
    ] = 8,
    train_dtype: Annotated[
        Literal["bf16", "fp32"] | None, typer.Option(help="The faster one here, measured, if not given.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Of training; measured if not given.", min=1)] = None,
    report_to: Annotated[
        str, typer.Option(help="tensorboard, trackio, wandb, …, or several with commas between them.")
    ] = "",
    stop_after: Annotated[Stage | None, typer.Option(help="End early, after this stage.")] = None,
    concurrency: Concurrency = None,
    batch_size: BatchSize = None,
    device: Device = "auto",
    timeout: Annotated[float, typer.Option(help="Seconds that an endpoint may be silent.", min=0.1)] = 600.0,
    max_rpm: Annotated[int | None, typer.Option(help="Requests a minute to an endpoint.", min=1)] = None,
    max_tpm: Annotated[int | None, typer.Option(help="Tokens a minute of an endpoint.", min=1)] = None,
    seed: Seed = 0,
    json_output: AsJson = False,
    offline: Offline = False,
    quiet: Quiet = False,
) -> None:
    """Problems and a teacher -> verified traces -> a trained student -> scores. The same command again goes on."""
    from ..distill.training.distributed import follow, is_first, leading

    if not is_first():
        follow()
        return
    from ..distill.evaluation.report import print_curation, print_hops
    from ..distill.judging.judge import DEFAULT_RUBRIC, read_rubric
    from ..distill.recipe import TeachSettings, Work
    from ..distill.run import run_name
    from ..distill.teach import teach as run_teach
    from ..distill.teachers.budget import Limits, Price

    settings = TeachSettings(
        problems=problems,
        teacher=teacher,
        student=student,
        n_traces=n_traces,
        samples=samples,
        keep=keep if traces else min(keep, samples),
        expand=expand,
        accept=[part.strip() for part in accept.split(",") if part.strip()] if accept else None,
        vote_share=vote_share,
        judge=judge,
        judge_model=judge_model,
        judge_compare=judge_compare,
        rubric=read_rubric(rubric) if rubric else DEFAULT_RUBRIC,
        curation=TeachSettings.curation_of(curate or ()),
        pass_samples=pass_samples,
        logprobs=logprobs,
        n_eval=n_eval,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        eval_max_tokens=eval_max_tokens,
        teacher_model=model,
        seed=seed,
        traces=str(traces) if traces else None,
        method=method,
        loss=loss,
        logit_share=logit_share,
        curriculum=curriculum,
        rounds=rounds,
        round_problems=round_problems,
        round_samples=round_samples,
        on_policy_loss=on_policy_loss,
        training={
            "full": full,
            "lora_rank": lora_rank,
            "lora_alpha": lora_alpha,
            "lora_first_layer": lora_first_layer,
            "lora_targets": lora_targets,
            "lora_plus": lora_plus,
            "dora": dora,
            "rslora": rslora,
            "qlora": qlora,
            "lr": lr,
            "batch_size": train_batch_size,
            "micro_batch": micro_batch,
            "epochs": epochs,
            "steps": steps,
            "minutes": minutes,
            "max_length": max_length,
            "too_long": too_long,
            "reasoning_weight": reasoning_weight,
            "answer_weight": answer_weight,
            "n_validation": n_validation,
            "patience": patience,
            "dtype": train_dtype,
            "threads": threads,
            "report_to": report_to,
        },
    )
    folder = out or Path("runs") / run_name(student, problems)
    limits = Limits(
        Price.parse(price) if price else None, max_usd, max_hours, Price.parse(judge_price) if judge_price else None
    )
    if dry_run:
        _preview(settings, limits, folder, offline, json_output)
        return
    with leading(), bars(quiet) as progress, resumable(folder):
        result = run_teach(
            settings,
            folder,
            work=Work(concurrency, batch_size, timeout, max_rpm, max_tpm, limits, device, offline, note),
            stop_after=stop_after,
            on_progress=progress,
        )
    if result.curation:
        print_curation(console(), result.curation)
        kept, total = result.curation["kept"], result.curation["traces"]
        own = folder / "traces.jsonl"
        print(f"{kept} of {total} traces train; all of them are in {own if own.exists() else traces}")
    if result.scores:
        print_hops(console(), result.scores, {})
        print(f"report: {folder}/report.html\nnext:   deepdistill quantize {folder}")
    if json_output:
        print(json.dumps(dataclasses.asdict(result), default=str))


def _preview(settings: TeachSettings, limits: Limits, folder: Path, offline: bool, json_output: bool) -> None:
    """Print what `teach` would ask for and what that may cost, without asking."""
    from ..distill.preview import describe_preview, preview
    from ..distill.teach import draw_problems

    problems, held_out = draw_problems(settings, offline)
    made = preview(problems, held_out, settings, limits, folder)
    print(*describe_preview(made, problems, settings, limits), sep="\n")
    if json_output:
        print(json.dumps(dataclasses.asdict(made)))
