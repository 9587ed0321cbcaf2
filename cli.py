"""The command line: parse, call one function of one stage, render. Each command imports its stage when it runs."""

from __future__ import annotations

import dataclasses
import errno
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import __version__
from .errors import ArtifactError, DeepDistillError, GateError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from .distill.budget import Limits
    from .distill.recipe import TeachSettings
    from .localrun.progress import Bars
    from .quantize.paired import Answers
    from .quantize.quantize import QuantizeReport

app = typer.Typer(
    name="deepdistill",
    help="Put a large teacher's reasoning into a small model that runs on a laptop, and measure every hop.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DEMO_PROBLEMS = "gym:chain_sum?min_terms=2&max_terms=4&min_digits=1&max_digits=2"

Stage = Literal["traces", "samples", "teacher", "training"]
Think = Literal["auto", "on", "off"]
KVType = Literal["f16", "q8_0", "q4_0"]
Problems = Annotated[
    str,
    typer.Option(
        help="gym:NAME?param=value&…, a .jsonl, .csv, .parquet or .txt file, a folder of prompts, or "
        "hf:ORG/NAME?split=…; ?grader=KIND:ARGUMENT says how to grade."
    ),
]
Out = Annotated[Path | None, typer.Option(help="Where to write.")]
Seed = Annotated[int, typer.Option(help="Of the problems, the sampling and the training.", min=0)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of standard output.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never touch the network.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on standard error.")]
Concurrency = Annotated[
    int | None, typer.Option(help="Requests in flight to an endpoint; it finds the best number if not given.", min=1)
]
BatchSize = Annotated[int | None, typer.Option(help="Sequences that a model in process answers at once.", min=1)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1, for a model that answers in this process.")]
ServerModel = Annotated[str | None, typer.Option("--model", help="The model's name on the server, if it has several.")]


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return its exit code: 0 done, 1 error, 2 usage, 3 a gate was not met, 130 Ctrl-C."""
    try:
        app(args=argv)
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1
    except DeepDistillError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        print(f"error: {error}\nhint: what was written before stays; make room and run again", file=sys.stderr)
        return 1
    return 0


def _show_version(value: bool) -> None:
    if value:
        print(f"deepdistill {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take what every command shares."""


@app.command()
def demo(
    out: Out = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A tiny student, in under 90 seconds: the path, no skill.")
    ] = False,
    student: Annotated[str | None, typer.Option(help="smollm2, pocket, hf:ORG/NAME or a folder.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Of training.", min=0.01)] = None,
    seed: Seed = 0,
    json_output: AsJson = False,
    offline: Offline = False,
    quiet: Quiet = False,
) -> None:
    """The whole way: embedded teacher, student and problems, then one question to the finished GGUF."""
    from .distill.recipe import TeachSettings, Work
    from .distill.report import print_hops
    from .distill.student import student_dir
    from .distill.teach import teach

    pupil = student or ("pocket" if quick else "smollm2")
    full = pupil == "pocket"  # a student that knows nothing yet: an adapter on random weights would learn nothing
    boxed = minutes if minutes is not None else (0.4 if quick else 8.0)
    settings = TeachSettings(
        problems=DEMO_PROBLEMS,
        student=pupil,
        n_traces=1000 if quick else 6000,
        n_eval=50 if quick else 200,
        eval_max_tokens=96 if quick else 512,
        seed=seed,
        training={"minutes": boxed, "epochs": 100}
        | ({"full": True, "lr": 3e-3} if full else {"batch_size": 4, "lr": 1.2e-3}),  # see docs/experiments.md
    )
    folder = out or Path("runs") / ("demo-quick" if quick else "demo")
    started = time.monotonic()
    with _bars(quiet) as progress, _resumable(folder):
        result = teach(settings, folder, work=Work(offline=offline), on_progress=progress)
        report = _export(folder / "student", folder / "student-Q8_0.gguf", "Q8_0", None, settings, progress)
        scores = result.scores | {"gguf": _score_gguf(folder, report.path, settings, progress)}
    question, thinking, answer = _ask(report.path, settings)
    minutes_taken = (time.monotonic() - started) / 60
    sizes = {
        "base": _weight_bytes(student_dir(pupil, offline)),
        "student": _weight_bytes(folder / "student"),
        "gguf": report.path.stat().st_size,
    }
    print_hops(_console(), scores, sizes)
    print(*report.summary(), sep="\n")
    print(f"\nquestion: {question}")
    _console().print(thinking.strip(), style="dim", markup=False, highlight=False)
    print(f"answer:   {answer.strip()}\n\n{minutes_taken:.1f} minutes in all; see {folder}/report.html")
    print(f"next: deepdistill chat {folder}")
    if json_output:
        print(json.dumps({"run": str(folder), "gguf": str(report.path), "minutes": minutes_taken, "scores": scores}))


@app.command()
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
        typer.Option(help="Tries of the untrained student at each problem; what it always solves is left out.", min=0),
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
    from .distill.processes import follow, is_first, leading

    if not is_first():
        follow()
        return
    from .distill.budget import Limits, Price
    from .distill.judge import DEFAULT_RUBRIC, read_rubric
    from .distill.recipe import TeachSettings, Work
    from .distill.report import print_curation, print_hops
    from .distill.run import run_name
    from .distill.teach import teach as run_teach

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
    with leading(), _bars(quiet) as progress, _resumable(folder):
        result = run_teach(
            settings,
            folder,
            work=Work(concurrency, batch_size, timeout, max_rpm, max_tpm, limits, device, offline, _note),
            stop_after=stop_after,
            on_progress=progress,
        )
    if result.curation:
        print_curation(_console(), result.curation)
        kept, total = result.curation["kept"], result.curation["traces"]
        own = folder / "traces.jsonl"
    print(f"{kept} of {total} traces train; all of them are in {own if own.exists() else traces}")
    if result.scores:
        print_hops(_console(), result.scores, {})
        print(f"report: {folder}/report.html\nnext:   deepdistill quantize {folder}")
    if json_output:
        print(json.dumps(dataclasses.asdict(result), default=str))


def _preview(settings: TeachSettings, limits: Limits, folder: Path, offline: bool, json_output: bool) -> None:
    """Print what `teach` would ask for and what that may cost, without asking."""
    from .distill.preview import describe_preview, preview
    from .distill.teach import draw_problems

    problems, held_out = draw_problems(settings, offline)
    made = preview(problems, held_out, settings, limits, folder)
    print(*describe_preview(made, problems, settings, limits), sep="\n")
    if json_output:
        print(json.dumps(dataclasses.asdict(made)))


@app.command()
def plan(
    teacher: Annotated[
        str,
        typer.Argument(help="A known model (a wrong name lists them), a config.json, or a folder with one."),
    ] = "DeepSeek-R1",
    n_traces: Annotated[int, typer.Option(help="To be made.", min=1)] = 10_000,
    tokens: Annotated[int, typer.Option(help="Of a trace on average, thinking and answer.", min=1)] = 4_000,
    prompt_tokens: Annotated[int, typer.Option(help="Of a prompt on average.", min=0)] = 200,
    gpu: Annotated[str, typer.Option(help="H200, H100, A100, RTX4090, …; a wrong name lists them.")] = "H200",
    n_gpus: Annotated[int | None, typer.Option(help="The fewest that hold it, if not given.", min=1)] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights; the publisher's if not given.")] = None,
    kv_dtype: Annotated[Literal["bf16", "fp8"], typer.Option(help="Of the KV cache.")] = "bf16",
    concurrency: Annotated[int, typer.Option(help="Sequences at once.", min=1)] = 256,
    tokens_per_s: Annotated[
        float | None,
        typer.Option(help="Measured on the deployment; a bound stands in if not given.", min=0.01),
    ] = None,
    gpu_hour: Annotated[float | None, typer.Option(help="Dollars for a GPU and hour.", min=0)] = None,
    price: Annotated[str | None, typer.Option(help="IN,OUT: an endpoint's dollars a million tokens.")] = None,
    json_output: AsJson = False,
) -> None:
    """What a full-size teacher takes: memory, GPUs, hours and money, each formula shown."""
    from .distill.budget import Price
    from .distill.plan import PlanSettings
    from .distill.plan import plan as make_plan
    from .distill.plan_text import plan_json, print_plan

    made = make_plan(
        PlanSettings(
            teacher,
            n_traces,
            tokens,
            prompt_tokens,
            gpu,
            n_gpus,
            dtype,  # type: ignore[arg-type]  # PlanSettings checks it, and says which there are
            kv_dtype,
            concurrency,
            tokens_per_s,
            gpu_hour,
            Price.parse(price) if price else None,
        )
    )
    print_plan(made, _console())
    if json_output:
        print(json.dumps(plan_json(made)))


@app.command()
def quantize(
    student: Annotated[
        Path | None, typer.Argument(help="A run folder, or a Hugging Face checkpoint folder or adapter.")
    ] = None,
    type_: Annotated[
        str,
        typer.Option("--type", help="F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q4_K_M Q4_0 IQ4_XS Q3_K_M Q2_K …: a recipe."),
    ] = "Q8_0",
    size: Annotated[str | None, typer.Option(help="90MB: the best types for a file of at most this.")] = None,
    bpw: Annotated[float | None, typer.Option(help="4.5: the best types for at most so many bits a weight.")] = None,
    target: Annotated[
        Literal["phone", "laptop"] | None, typer.Option(help="The best types for such a machine's memory and speed.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The file to write; beside the student if not given.")] = None,
    base: Annotated[Path | None, typer.Option(help="An adapter's base; what it names if not given.")] = None,
    traces: Annotated[
        Path | None, typer.Option(help="What to measure with: a traces.jsonl; the run's own if not given.")
    ] = None,
    imatrix: Annotated[
        str | None, typer.Option(help="An importance matrix (GGUF), or none; made from the traces if not given.")
    ] = None,
    fidelity: Annotated[bool, typer.Option(help="Measure the file against the unquantized model.")] = True,
    compare: Annotated[
        str | None, typer.Option(help="Q4_K_M,Q4_0: recipes to measure beside the file, for the table and the plot.")
    ] = None,
    gate: Annotated[
        str | None, typer.Option(help="'accuracy >= 0.98 of bf16, loops <= 1%': else no file, and exit 3.")
    ] = None,
    promote: Annotated[
        bool, typer.Option("--promote", help="Raise the worst tensors until the gate is met or --size is reached.")
    ] = False,
    heal: Annotated[int, typer.Option(help="Steps of distillation under the file's types; needs torch.", min=0)] = 0,
    problems: Annotated[
        str | None, typer.Option(help="Whose test questions are asked; the run's own if not given.")
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Test problems to ask file and unquantized model.", min=0)] = 0,
    proofs: Annotated[bool, typer.Option(help="Prove the file against the checkpoint after writing it.")] = True,
    split: Annotated[str | None, typer.Option(help="500MB: parts of at most so many bytes of tensors.")] = None,
    verify: Annotated[
        Path | None, typer.Option(help="Make this file again from its sources, and compare; nothing is written.")
    ] = None,
    json_output: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Student -> GGUF: types by recipe or by measurement under a size, what it kept, a gate, and proofs."""
    if verify is not None:
        _verify(verify, student, imatrix, json_output, quiet)
        return
    if student is None:
        raise UsageError("which student?", "give a run folder or a checkpoint folder")
    from .quantize.files import parse_size
    from .quantize.gate import Gate
    from .quantize.release import release
    from .quantize.settings import ReleaseSettings

    folder, settings = _run_of(student)
    checkpoint = folder / "student" if folder else student
    if folder and not checkpoint.is_dir():
        raise ArtifactError(f"{folder} holds no trained student", f"deepdistill teach --out {folder} … makes one")
    kind = size or (f"{bpw:g}bpw" if bpw else target) or type_.upper()
    target_path = out or (folder or checkpoint.resolve().parent) / f"{checkpoint.resolve().name}-{kind}.gguf"
    held = Gate.parse(gate) if gate else None
    wanted = ReleaseSettings(
        type=type_,
        size=parse_size(size) if size else None,
        bpw=bpw,
        target=target,
        base=base,
        imatrix=imatrix,
        traces=traces or _traces_of(folder, settings),
        gate=held,
        promote=promote,
        heal=heal,
        fidelity=fidelity,
        compare=tuple(part for part in (compare or "").split(",") if part),
        split=parse_size(split) if split else None,
    )
    n_asked = n or (200 if held and held.needs_answers else 0)
    with _bars(quiet) as progress:
        ask = _asking(problems, settings, n_asked, progress) if n_asked else None
        recipe = dataclasses.asdict(settings) if settings else {}
        made = release(
            checkpoint,
            target_path,
            wanted,
            recipe=recipe,
            evaluate=ask,
            divergence=_divergence() if heal else None,
            metadata=_metadata(settings),
            on_progress=progress,
        )
        report = made.report
        if proofs:
            report = report.proved(_questions(problems, settings), on_progress=progress)
    print(f"{report.path}: {report.n_bytes / 1e6:.1f} MB, {report.bits_per_weight:.2f} bits a weight")
    print(*report.summary(), *made.summary(), sep="\n")
    print(f"next: deepdistill chat {report.path}")
    if json_output:
        measured = {key: value for key, value in dataclasses.asdict(made).items() if key != "report"}
        print(json.dumps(dataclasses.asdict(report) | measured, default=str))
    if report.proofs and report.proofs.failed:
        raise GateError(f"{report.path} does not do what its checkpoint does", "the proofs above say where they differ")


def _verify(path: Path, student: Path | None, imatrix: str | None, json_output: bool, quiet: bool) -> None:
    """Make a file again from its sources and compare."""
    from .quantize.verify import verify as run_verify

    folder, _ = _run_of(student) if student else (None, None)
    with _bars(quiet) as progress:
        found = run_verify(
            path, folder / "student" if folder else student, Path(imatrix) if imatrix else None, progress
        )
    print(*found.summary(), sep="\n")
    if json_output:
        print(json.dumps(dataclasses.asdict(found) | {"holds": found.holds}))
    if not found.holds:
        raise GateError(f"{path} is not what its sources make", "the lines above say what differs")


def _divergence() -> Callable[..., Any]:
    """Return the loss of healing."""
    try:
        from .distill.losses import projected_kl
    except ImportError as error:
        raise UsageError("--heal needs torch", "pip install 'deepdistill[teach]'") from error
    return projected_kl


def _traces_of(folder: Path | None, settings: TeachSettings | None) -> Path | None:
    """Return a run's traces, where it keeps them or where it was given them."""
    found = [
        folder / "traces.jsonl" if folder else None,
        Path(settings.traces) if settings and settings.traces else None,
    ]
    return next((path for path in found if path and path.is_file()), None)


def _metadata(settings: TeachSettings | None) -> dict[str, str | int | float | bool]:
    """Return what a GGUF says of the version and the run that made it."""
    recipe = {"deepdistill.recipe": json.dumps(dataclasses.asdict(settings))} if settings else {}
    return {"deepdistill.version": __version__, **recipe}


def _questions(problems: str | None, settings: TeachSettings | None) -> list[str]:
    """Return some test questions of a spec, or of the run."""
    from .distill.problems import load_problems

    spec = problems or (settings.problems if settings else DEMO_PROBLEMS)
    return [p.question for p in load_problems(spec, "test", 20, settings.seed if settings else 0)]


def _asking(problems: str | None, settings: TeachSettings | None, n: int, progress: Bars) -> Callable[[Path], Answers]:
    """Return what asks a GGUF the same n test problems each time, and says which it got right."""
    from .distill.evaluate import score_file
    from .distill.problems import load_problems
    from .quantize.paired import Answers

    spec = problems or (settings.problems if settings else DEMO_PROBLEMS)
    held_out = load_problems(spec, "test", n, settings.seed if settings else 0)
    max_tokens = settings.eval_max_tokens if settings else 512

    def ask(path: Path) -> Answers:
        with tempfile.TemporaryDirectory() as folder:
            answers = Path(folder) / "answers.jsonl"
            score = score_file(path, held_out, max_tokens, progress, answers)
            lines = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
        return Answers(tuple(line["verdict"] == "right" for line in lines), score.closed, score.looped)

    return ask


@app.command()
def chat(
    model: Annotated[
        str | None, typer.Argument(help="A .gguf file, a run folder, hf:ORG/REPO[:FILE]; else the newest run.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Ask once and leave; piped input comes after it.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    continue_: Annotated[bool, typer.Option("--continue", help="Go on with the newest kept conversation.")] = False,
    pick: Annotated[bool, typer.Option("--pick", help="Go on with a kept conversation, from a list.")] = False,
    log: Annotated[bool, typer.Option("--log/--no-log", help="Keep the conversation on this machine.")] = True,
    think: Annotated[Think | None, typer.Option(help="auto leaves it to the model's template.")] = None,
    think_budget: Annotated[
        int | None, typer.Option(help="Tokens of thinking, at most; an answer always follows.", min=0)
    ] = None,
    loop_guard: Annotated[bool, typer.Option(help="End thinking and answers that go in circles.")] = True,
    fold: Annotated[bool, typer.Option("--fold", help="Show the thinking as one line.")] = False,
    temperature: Annotated[float | None, typer.Option(help="0 if not given.", min=0)] = None,
    top_p: Annotated[float | None, typer.Option(help="1 if not given.", min=0, max=1)] = None,
    top_k: Annotated[int | None, typer.Option(help="0, which is off, if not given.", min=0)] = None,
    min_p: Annotated[float | None, typer.Option(help="0, which is off, if not given.", min=0, max=1)] = None,
    repeat_penalty: Annotated[float, typer.Option(help="Of the last 64 tokens; 1 is off.", min=1)] = 1.0,
    dry: Annotated[float, typer.Option(help="DRY's multiplier against long repeats; 0 is off.", min=0)] = 0.0,
    max_tokens: Annotated[
        int | None, typer.Option(help="An answer's limit, thinking included; 2048 if not given.", min=1)
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of context; the model's own, as memory allows, if not given.", min=16)
    ] = None,
    kv_type: Annotated[KVType, typer.Option(help="Of the cache: q8_0 and q4_0 take less memory.")] = "f16",
    speculate: Annotated[
        bool, typer.Option("--speculate", help="Guess tokens ahead, where that pays: faster on text that repeats.")
    ] = False,
    draft: Annotated[
        Path | None, typer.Option(help="A small GGUF of the same vocabulary that guesses ahead for --speculate.")
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Show an image with the first question.")] = None,
    mmproj: Annotated[
        Path | None, typer.Option(help="The projector for images; found beside the model if named mmproj-….gguf.")
    ] = None,
    schema: Annotated[Path | None, typer.Option(help="Hold the answer to the JSON schema in this file.")] = None,
    grammar: Annotated[Path | None, typer.Option(help="Hold the answer to the GBNF grammar in this file.")] = None,
    tools: Annotated[
        Path | None, typer.Option(help="Offer the tools in this JSON file, in OpenAI's form; calls come out in it too.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling; 0 if not given.", min=0)] = None,
    json_output: AsJson = False,
    offline: Offline = False,
) -> None:
    """Talk to a GGUF, its thinking visible and apart; one-shot with -p, and in pipes."""
    from .localrun.chat import ChatSettings
    from .localrun.chat import chat as run_chat

    settings = ChatSettings(
        system=system,
        think=think,
        think_budget=think_budget,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        dry=dry,
        max_tokens=max_tokens,
        seed=seed,
        loop_guard=loop_guard,
        speculate=speculate or draft is not None,
        n_ctx=context,
        kv_type=kv_type,
        draft_path=draft,
        resume="pick" if pick else ("newest" if continue_ else None),
        keep=log,
        fold=fold,
        images=tuple(image or ()),
        mmproj_path=mmproj,
        grammar=_grammar(schema, grammar),
        tools=_tools(tools),
        offline=offline,
    )
    code = run_chat(model, settings, prompt=prompt, json_output=json_output)
    if code:
        raise typer.Exit(code)


@app.command()
def bench(
    model: Annotated[str | None, typer.Argument(help="A .gguf file, a run folder or hf:ORG/REPO[:FILE].")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer points, in half a minute for a small model.")] = False,
    threads: Annotated[int | None, typer.Option(help="Measured anew if not given.", min=1)] = None,
    json_output: AsJson = False,
    offline: Offline = False,
    quiet: Quiet = False,
) -> None:
    """Prefill and decoding at several depths, sequences and KV types, against what the memory's bandwidth allows."""
    from .localrun.bench import QUICK, BenchSettings, print_bench
    from .localrun.bench import bench as run_bench
    from .localrun.find import find_model

    path = find_model(model, offline=offline)
    with _bars(quiet) as progress:
        report = run_bench(path, QUICK if quick else BenchSettings(), n_threads=threads, on_progress=progress)
    print_bench(report, _console())
    if json_output:
        print(json.dumps(report.to_json()))


@app.command()
def doctor(json_output: AsJson = False) -> None:
    """This machine: cores, memory, GPU, llama.cpp's build, which models fit, and what confines code that is graded."""
    from .localrun.doctor import doctor as run_doctor
    from .localrun.doctor import print_doctor

    report = run_doctor()
    print_doctor(report, _console())
    layers = _confinement()
    if layers is not None:
        print("grading code: " + (f"confined by {', '.join(layers)}" if layers else "not here: nothing confines it"))
    if json_output:
        print(json.dumps(report.to_json() | {"confinement": layers}))


@app.command()
def export(
    path: Annotated[
        str | None, typer.Argument(help="traces.jsonl; or a .gguf file, a run folder or hf:ORG/REPO[:FILE].")
    ] = None,
    to: Annotated[
        Literal["phone", "messages", "parquet"],
        typer.Option(help="phone: a GGUF as a folder; messages (JSONL) or parquet: traces for other trainers."),
    ] = "phone",
    out: Annotated[Path | None, typer.Option(help="The folder or file; named after the path if not given.")] = None,
    reasoning: Annotated[
        Literal["field", "think"], typer.Option(help="Of traces: in a field of its own, or between think tags.")
    ] = "field",
    all_traces: Annotated[bool, typer.Option("--all", help="Traces that are not right, too.")] = False,
    memory: Annotated[
        int | None, typer.Option(help="MB that the model and its context may take; 2000 if not given.", min=1)
    ] = None,
    json_output: AsJson = False,
    offline: Offline = False,
    quiet: Quiet = False,
) -> None:
    """A GGUF as a folder for phones with a page that runs it offline, or traces as other trainers load them."""
    if to != "phone":
        _export_traces(path, to, out, reasoning, all_traces, json_output)
        return
    from .localrun.find import find_model
    from .localrun.phone import export_phone

    folder = Path(path) if path and Path(path).is_dir() else None
    model = folder or find_model(path, offline=offline)
    name = (folder or model.with_suffix("")).resolve().name
    run, settings = _run_of(folder) if folder else (None, None)
    with _bars(quiet) as progress:

        def make(type_: str) -> Path:
            assert run is not None
            target = run / f"student-{type_}.gguf"
            return _export(run / "student", target, type_, None, settings, progress, proofs=False).path

        report = export_phone(
            model,
            out or Path(f"{name}-phone"),
            memory_mb=memory,
            make=make if run and (run / "student").is_dir() else None,
            offline=offline,
            on_progress=progress,
        )
    print(*report.summary(), f"next: python -m http.server --directory {report.folder}/web 8000", sep="\n")
    if json_output:
        print(json.dumps(dataclasses.asdict(report), default=str))


def _export_traces(
    path: str | None,
    to: Literal["messages", "parquet"],
    out: Path | None,
    reasoning: Literal["field", "think"],
    all_traces: bool,
    json_output: bool,
) -> None:
    """Write traces, a run's or a file's, as rows for another trainer."""
    from .distill.exports import export_traces

    if path is None:
        raise UsageError("which traces?", "give a traces.jsonl or a run folder")
    source = Path(path) / "traces.jsonl" if Path(path).is_dir() else Path(path)
    target = out or source.with_name(f"{source.stem}-{to}.{'parquet' if to == 'parquet' else 'jsonl'}")
    n_rows = export_traces(source, target, to, reasoning=reasoning, include="all" if all_traces else "accepted")
    print(f"{target}: {n_rows:,} rows")
    if json_output:
        print(json.dumps({"path": str(target), "rows": n_rows}))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A traces.jsonl, a run folder or a .gguf file.")],
    show: Annotated[
        str | None, typer.Option("--show", help="One trace to read: its number, or how its id begins.")
    ] = None,
    json_output: AsJson = False,
) -> None:
    """What an artifact holds: traces with their verdicts, lengths and cost, a run with its scores, a GGUF's origin."""
    if path.suffix == ".gguf":
        from .quantize.inspection import inspect_gguf, summary

        of_file = inspect_gguf(path)
        print(*summary(of_file), sep="\n")
        if json_output:
            print(json.dumps(of_file, default=str))
        return
    from .distill.inspection import find_trace, inspect_run, inspect_traces
    from .distill.show import print_report, print_run, print_trace

    console = _console()
    if show is not None:
        trace = find_trace(path / "traces.jsonl" if path.is_dir() else path, show)
        print_trace(trace, console)
        found = dataclasses.asdict(trace)
    elif path.is_dir():
        found = inspect_run(path)
        print_run(found, console)
    else:
        report = inspect_traces(path)
        print_report(report, console)
        found = report.to_json()
    if json_output:
        print(json.dumps(found, default=str))


@app.command("eval")
def eval_(
    model: Annotated[
        str,
        typer.Argument(help="pocket, smollm2, a run, a checkpoint folder, a .gguf, hf:ORG/NAME or https://HOST/v1."),
    ],
    problems: Problems = DEMO_PROBLEMS,
    n: Annotated[int, typer.Option("--n", help="Held-out problems.", min=1)] = 200,
    seed: Seed = 0,
    max_tokens: Annotated[int, typer.Option(help="An answer's limit, thinking included.", min=1)] = 512,
    temperature: Annotated[float, typer.Option(min=0)] = 0.0,
    answers: Annotated[
        Path | None, typer.Option(help="Write every question, answer and verdict to this JSONL file.")
    ] = None,
    server_model: ServerModel = None,
    concurrency: Concurrency = None,
    batch_size: BatchSize = None,
    device: Device = "auto",
    json_output: AsJson = False,
    offline: Offline = False,
    quiet: Quiet = False,
) -> None:
    """Accuracy with its interval, closed thinking, loops and tokens an answer, on held-out problems."""
    from .distill.evaluate import evaluate, format_score
    from .distill.grade import Grader
    from .distill.problems import load_problems
    from .distill.student import student_dir
    from .distill.teachers import open_teacher
    from .localrun.generation import Sampling

    held_out = load_problems(problems, "test", n, seed, offline=offline)
    spec = str(student_dir(model)) if model == "smollm2" else model
    folder, _ = _run_of(Path(model))
    with (
        _bars(quiet) as progress,
        open_teacher(
            str(folder / "student") if folder else spec,
            device=device,
            batch_size=batch_size,
            concurrency=concurrency,
            model=server_model,
            offline=offline,
        ) as teacher,
        Grader() as grader,
    ):
        for source in {p.source for p in held_out}:
            teacher.accepts(source)
        score = evaluate(
            teacher,
            held_out,
            grader,
            Sampling(temperature=temperature, seed=seed, max_tokens=max_tokens),
            lambda done, right: progress("answers", done, len(held_out), f"{right} right"),
            answers,
        )
    if score.n < n:
        print(f"note: the test part of {problems} holds {score.n} problems, not {n}", file=sys.stderr)
    closed = "" if score.closed is None else f", thinking closed {100 * score.closed:.1f} %"
    print(
        f"{model}: {100 * score.accuracy:.1f} % of {score.n} (95 % interval {format_score(score.interval)} %){closed}, "
        f"looped {100 * score.looped:.1f} %, {score.tokens_per_answer:.0f} tokens an answer, "
        f"{score.tokens_per_s:.0f} tokens/s"
    )
    if json_output:
        print(json.dumps({"model": model, "problems": problems, "seed": seed} | score.to_json()))


def _confinement() -> list[str] | None:
    """Return what holds code that a grader runs; None where the graders are not installed or cannot be."""
    try:
        from .distill.sandbox import confinement
    except ImportError:
        return None
    return list(confinement())


def _grammar(schema: Path | None, grammar: Path | None) -> str | None:
    """Return the GBNF that a file holds, or that holds an answer to the JSON schema in a file."""
    path = schema or grammar
    if path is None:
        return None
    if schema and grammar:
        raise UsageError("--schema and --grammar are two ways to say one thing", "give one of them")
    text = _read(path)
    if not schema:
        return text
    from .localrun.schema import grammar_of_schema

    return grammar_of_schema(text)


def _tools(path: Path | None) -> tuple[dict[str, Any], ...]:
    """Return the tools that a file holds, in OpenAI's form."""
    if path is None:
        return ()
    from .localrun.tools import read_tools

    return read_tools(_read(path))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not UTF-8 text") from error


def _run_of(path: Path) -> tuple[Path | None, TeachSettings | None]:
    """Return (run folder, its settings) if a path is a run folder or its student, else (None, None)."""
    if not any((folder / "recipe.json").is_file() for folder in (path, path.parent)):
        return None, None  # nothing to import a stage for
    from .distill.recipe import TeachSettings
    from .distill.run import find_run

    folder = find_run(path)
    return folder, TeachSettings.of_run(folder) if folder else None


def _export(
    checkpoint: Path,
    target: Path,
    type_: str,
    problems: str | None,
    settings: TeachSettings | None,
    progress: Bars,
    proofs: bool = True,
) -> QuantizeReport:
    """Quantize a checkpoint, with the run's recipe in its metadata, and prove it on test questions."""
    from .quantize.quantize import quantize as run_quantize

    report = run_quantize(checkpoint, target, type_, metadata=_metadata(settings), on_progress=progress)
    return report.proved(_questions(problems, settings), on_progress=progress) if proofs else report


def _score_gguf(folder: Path, path: Path, settings: TeachSettings, progress: Bars) -> dict[str, Any]:
    """Score a GGUF on the problems that its run was scored on, with the same limits."""
    from .distill.evaluate import score_file
    from .distill.problems import load_problems

    held_out = load_problems(settings.problems, "test", settings.n_eval, settings.seed)
    return score_file(path, held_out, settings.eval_max_tokens, progress, folder / "answers" / "gguf.jsonl").to_json()


class _resumable:
    """On Ctrl-C, say that nothing is lost and how to go on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is KeyboardInterrupt:
            print(
                f"\nstopped; {self._folder} keeps what was done: the same command goes on from there", file=sys.stderr
            )


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _bars(quiet: bool) -> Bars:
    from .localrun.progress import Bars

    return Bars(quiet)


def _console() -> Console:
    from rich.console import Console

    return Console()


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _ask(gguf: Path, settings: TeachSettings) -> tuple[str, str, str]:
    """Ask the finished GGUF the first held-out question; return (question, thinking, answer)."""
    from .distill.problems import load_problems
    from .localrun.engine import Engine
    from .localrun.generation import Sampling

    question = load_problems(settings.problems, "test", 1, settings.seed)[0].question
    with Engine(gguf, n_ctx=1024) as engine:
        prompt = engine.render([{"role": "user", "content": question}])
        steps = list(engine.stream(prompt, Sampling(max_tokens=settings.eval_max_tokens)))
    parts = {part: "".join(step.text for step in steps if step.part == part) for part in ("thinking", "answer")}
    return question, parts["thinking"], parts["answer"]


if __name__ == "__main__":
    sys.exit(main())
