"""Group relative policy optimization (GRPO) with TRL's trainer: our sampler answers, our graders judge.

The student answers each problem several times. An answer's advantage is its reward minus its group's mean, so that no
second model has to estimate the expected reward. The loss and the loop are TRL's. Its sampling with `generate` is not
used: ours refills the batch whenever an answer ends, and computes the tokens that prompts share once.

Source: DeepSeekMath, arXiv 2402.03300; clipping and the loss's scale as in DAPO, arXiv 2503.14476 (TRL's default).
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from ....errors import ModelError
from ....localrun.core.generation import Sampling
from ....localrun.core.reporter import SILENT, Reporter
from ....localrun.families.thinking import prompt_opens_thinking
from ...device import SMALL_MODEL, choose_device, has_fast_bf16, quiet_transformers
from ...recipe.training import GrpoRecipe, TrainingRecipe
from ...records import GradesAnswers, Problem, messages_of, question_in
from ...run import CLOCK_FILE
from ...teachers.huggingface.batching import BatchDecoder, new_sequence
from ...tokenizer import Tokenizer, ids_of, prompt_of, text_of
from ..callback import checkpoints, last_checkpoint
from ..lora import load_base
from ..merge import save_checkpoint
from ..train import TrainPaths
from ..trainer import use_one_gpu
from .reward import Reward, reward_of

_ROWS_SMALL, _ROWS_LARGE = 64, 8  # answers in one backward pass of models under 20 M parameters, and of larger ones


@dataclass(frozen=True)
class GrpoSettings(GrpoRecipe):
    """How to train by reward. In each step the student answers `problems_per_step` problems, each `group_size` times.

    `lr` is the peak, from which the learning rate falls to 0; None means 1e-4 for models under 20 M parameters and 2e-6
    for larger ones. `minutes` limits the time, sampling included; with None the training takes all `steps`.
    `rows_per_pass` is the number of answers in one backward pass; None chooses it by the model's size.
    """

    group_size: int = 8
    steps: int = 200
    minutes: float | None = None
    max_tokens: int = 256
    lr: float | None = None
    rows_per_pass: int | None = None
    save_every_s: float = TrainingRecipe.save_every_s
    seed: int = 0


@dataclass(frozen=True)
class GrpoReport:
    """The result of a training.

    `curve` has a record per step: minutes, the share of right answers, the share of groups whose answers earned
    different rewards (only these teach), mean tokens per answer, and all tokens sampled so far.
    """

    steps: int
    minutes: float
    sampled_tokens: int
    curve: list[dict[str, float]]


def grpo(
    paths: TrainPaths,
    problems: Sequence[Problem],
    *,
    tokenizer: Tokenizer,
    grader: GradesAnswers,
    settings: GrpoSettings,
    device: str = "auto",
    report: Reporter = SILENT,
) -> GrpoReport:
    """Train all weights of a checkpoint by reward and save the result; resume from the last checkpoint.

    Raises:
        ModelError: `code` "not-installed": TRL is missing; or the weights cannot be loaded.
    """
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise ModelError(
            "reinforcement learning needs TRL", "pip install 'deepdistill[rl]'", code="not-installed"
        ) from error
    where = choose_device(device)
    quiet_transformers()
    model: Any = load_base(paths.base_dir, torch.float32).to(where)
    sampler = _Sampler(tokenizer, problems, grader=grader, settings=settings)
    watch = _Watch(settings, sampler, report)
    trainer = _make_trainer(model, sampler, watch=watch, checkpoints_dir=paths.checkpoints_dir, device=where)
    trainer.train(resume_from_checkpoint=last_checkpoint(paths.checkpoints_dir))
    save_checkpoint(trainer.model, paths.base_dir, tokenizer=tokenizer, out=paths.out)
    return GrpoReport(trainer.state.global_step, round(watch.seconds() / 60, 2), sampler.n_tokens, watch.curve)


class _Sampler:
    """Answers TRL's prompts with our decoder and rewards the answers with our graders."""

    def __init__(
        self, tokenizer: Tokenizer, problems: Sequence[Problem], *, grader: GradesAnswers, settings: GrpoSettings
    ) -> None:
        self.tokenizer, self.grader, self.settings = tokenizer, grader, settings
        self.problems = problems
        self._by_question = {problem.question: problem for problem in problems}
        self.n_tokens = 0
        self.rewards: list[Reward] = []
        self.lengths: list[int] = []

    def roll_out(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Return one sampled answer a prompt: TRL has repeated each prompt `group_size` times already."""
        model, settings = trainer.model, self.settings
        sampling = Sampling(temperature=settings.temperature, max_tokens=settings.max_tokens)
        ids = [ids_of(self.tokenizer, prompt_of(self.tokenizer, prompt)) for prompt in prompts]
        # A sample's seed follows from the run's seed and the sample's place, so a resumed run draws the same samples.
        n_before = trainer.state.global_step * trainer.accelerator.num_processes + trainer.accelerator.process_index
        first = settings.seed * 1_000_003 + n_before * len(prompts)
        rows = [
            new_sequence(i, row, max_new=settings.max_tokens, sampling=sampling, seed=first + i)
            for i, row in enumerate(ids)
        ]
        eos_ids, pad_id = frozenset([self.tokenizer.eos_token_id]), self.tokenizer.pad_token_id or 0
        decoder = BatchDecoder(model, batch_size=len(rows), eos_ids=eos_ids, pad_id=pad_id)
        was_training = model.training
        model.eval()
        with torch.inference_mode(), trainer.accelerator.autocast():
            done = {row.index: row.tokens for row in decoder.run(iter(rows), sampling)}
        model.train(was_training)
        completions = [done[i] for i in range(len(rows))]
        self.lengths = [len(tokens) for tokens in completions]
        self.n_tokens += sum(self.lengths)
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

    def reward(self, prompts: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        """Return the reward of each answer."""
        opened: dict[str, bool] = {}
        self.rewards = []
        for prompt, ids in zip(prompts, completion_ids, strict=True):
            question = question_in(prompt)
            if question not in opened:
                opened[question] = prompt_opens_thinking(prompt_of(self.tokenizer, prompt))
            kept = ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids
            text = text_of(self.tokenizer, kept)
            problem = self._by_question[question]
            weight, is_open = self.settings.format_weight, opened[question]
            self.rewards.append(
                reward_of(problem, text, starts_inside=is_open, grader=self.grader, format_weight=weight)
            )
        return [reward.total for reward in self.rewards]


class _Watch(TrainerCallback):
    """Keeps the time, the curve and the checkpoints, and ends the training."""

    def __init__(self, settings: GrpoSettings, sampler: _Sampler, report: Reporter) -> None:
        self._settings, self._sampler, self._report = settings, sampler, report
        self._before = 0.0
        self._started = self._saved = time.monotonic()
        self.curve: list[dict[str, float]] = []

    def seconds(self) -> float:
        return self._before + time.monotonic() - self._started

    def progress(self, step: int) -> float:
        """Return which share of the run is done after so many steps, 0 to 1."""
        done = step / self._settings.steps
        if self._settings.minutes is not None:
            limit_s = 60 * self._settings.minutes  # 0 if choosing the problems took all of it
            done = max(done, self.seconds() / limit_s if limit_s > 0 else 1.0)
        return min(1.0, done)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / CLOCK_FILE
        if saved.exists():
            kept = json.loads(saved.read_text(encoding="utf-8"))
            self._before, self.curve, self._sampler.n_tokens = kept["seconds"], kept["curve"], kept["sampled_tokens"]
        self._started = self._saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        rewards, lengths = self._sampler.rewards, self._sampler.lengths
        right = sum(reward.is_right for reward in rewards) / len(rewards)
        totals, size = [reward.total for reward in rewards], self._settings.group_size
        groups = [totals[i : i + size] for i in range(0, len(totals), size)]
        self.curve.append(
            {
                "step": state.global_step,
                "minutes": round(self.seconds() / 60, 3),
                "right": round(right, 4),
                "groups": round(sum(len(set(group)) > 1 for group in groups) / len(groups), 4),
                "tokens": round(sum(lengths) / len(lengths), 1),
                "sampled_tokens": self._sampler.n_tokens,
            }
        )
        done = self.progress(state.global_step)
        control.should_training_stop |= done >= 1
        if time.monotonic() - self._saved >= self._settings.save_every_s or done >= 1:
            control.should_save, self._saved = True, time.monotonic()
        self._report.progress(
            "reinforcing",
            done,
            total=1.0,
            note=f"{100 * right:.0f} % right, {self.curve[-1]['tokens']:.0f} tokens an answer",
        )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        kept = {"seconds": self.seconds(), "curve": self.curve, "sampled_tokens": self._sampler.n_tokens}
        (folder / CLOCK_FILE).write_text(json.dumps(kept), encoding="utf-8")
        for older in checkpoints(Path(args.output_dir))[:-1]:
            shutil.rmtree(older, ignore_errors=True)


def _make_trainer(model: Any, sampler: _Sampler, *, watch: _Watch, checkpoints_dir: Path, device: torch.device) -> Any:
    from datasets import Dataset

    from .trainer import RewardTrainer

    settings = sampler.settings

    def rate(step: int) -> float:
        return min((step + 1) / max(1, settings.warmup_steps), 1 - watch.progress(step))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*rollout_func.*", category=UserWarning)
        trainer = RewardTrainer(
            rate,
            model=model,
            reward_funcs=sampler.reward,
            args=_arguments(settings, model, checkpoints_dir=checkpoints_dir, device=device),
            train_dataset=Dataset.from_list([{"prompt": messages_of(problem)} for problem in sampler.problems]),
            processing_class=sampler.tokenizer,
            callbacks=[watch],
            rollout_func=sampler.roll_out,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(settings: GrpoSettings, model: Any, *, checkpoints_dir: Path, device: torch.device) -> Any:
    """Return TRL's arguments."""
    from trl.trainer.grpo_config import GRPOConfig

    n_rows = settings.group_size * settings.problems_per_step
    is_small = model.num_parameters() < SMALL_MODEL
    wanted = settings.rows_per_pass or (_ROWS_SMALL if is_small else _ROWS_LARGE)
    rows_per_pass = max(n for n in range(1, min(wanted, n_rows) + 1) if n_rows % n == 0)
    given = GRPOConfig(
        output_dir=str(checkpoints_dir),
        per_device_train_batch_size=rows_per_pass,
        gradient_accumulation_steps=n_rows // rows_per_pass,
        num_generations=settings.group_size,
        max_completion_length=settings.max_tokens,
        temperature=settings.temperature,
        beta=settings.kl_weight,
        scale_rewards="none",  # else wrong answers that differ only in form would teach as much as any
        epsilon=settings.clip_low,
        epsilon_high=settings.clip_high,
        max_steps=settings.steps,
        learning_rate=(1e-4 if is_small else 2e-6) if settings.lr is None else settings.lr,
        max_grad_norm=settings.max_grad_norm,
        adam_beta2=0.99,
        bf16=not is_small and has_fast_bf16(device),
        use_cpu=device.type == "cpu",
        activation_checkpointing=False,
        logging_steps=1,
        save_strategy="no",  # `_Watch` decides when
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        seed=settings.seed,
    )
    use_one_gpu(given)
    return given
