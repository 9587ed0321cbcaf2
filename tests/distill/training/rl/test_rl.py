"""GRPO with the graders as reward: what an answer earns, that it learns, goes on after a kill, and what it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deepdistill.distill.problems.load import load_problems
from deepdistill.distill.recipe.gathering import TracesRecipe
from deepdistill.distill.recipe.teach import ScoresRecipe, TeachRecipe
from deepdistill.distill.recipe.training import CurriculumRecipe, OnPolicyRecipe, TrainingRecipe
from deepdistill.distill.records import Grade, Problem
from deepdistill.distill.teach import teach
from deepdistill.distill.teachers import pocket_dir
from deepdistill.distill.teachers.huggingface.loading import load_tokenizer
from deepdistill.distill.training.rl.reward import reward_of
from deepdistill.distill.training.train import TrainPaths
from deepdistill.errors import UsageError
from deepdistill.localrun.core.generation import Completion, Sampling


class Contains:
    """A grader that calls an answer right if it holds the reference."""

    def grade(self, problem: Problem, content: str) -> Grade:
        is_right = str(problem.answer) in content
        return Grade(content, "right" if is_right else "wrong", "grader", float(is_right))


@pytest.mark.parametrize(
    ("text", "total", "is_right"),
    [
        ("1+1=2\n</think>\n\n2", 1.1, True),
        ("1+1=3\n</think>\n\n3", 0.1, False),
        ("1+1=2 and so on", 0.0, False),  # thinks on for ever: the 2 in it is no answer
        ("1+1=2\n</think>\n\n", 0.0, False),
    ],
)
def test_what_an_answer_earns(text: str, total: float, is_right: bool) -> None:
    reward = reward_of(Problem("p", "1+1?", "2", "s", "number"), text, starts_inside=True, grader=Contains())
    assert reward.total == pytest.approx(total)
    assert reward.is_right == is_right


@pytest.mark.slow
def test_grpo_prefers_what_is_rewarded_and_a_killed_run_goes_on(
    chain_sum: str, pocket_student: Path, tmp_path: Path, relay: Any
) -> None:
    """From random weights, a reward for one token alone: it becomes the most probable within a few steps."""
    pytest.importorskip("trl", reason="the rl extra is not installed")
    from deepdistill.distill.training.rl.grpo import GrpoSettings, grpo

    tokenizer = load_tokenizer(pocket_student)
    problems = load_problems(chain_sum, "train", n=4, seed=0)
    wanted = tokenizer.decode([40])

    class Likes:
        def grade(self, problem: Problem, content: str) -> Grade:
            is_right = wanted in content
            return Grade(content, "right" if is_right else "wrong", "grader", float(is_right))

    # The random student rarely closes its thinking, so the template must not open it.
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    settings = GrpoSettings(
        steps=12, group_size=16, problems_per_step=4, max_tokens=24, lr=3e-3, warmup_steps=0, save_every_s=0
    )

    class Killed(BaseException):
        pass

    def die(done: float) -> None:
        if done >= 0.5:
            raise Killed

    paths = TrainPaths(pocket_student, tmp_path / "checkpoints", tmp_path / "student")
    with pytest.raises(Killed):
        grpo(paths, problems, tokenizer=tokenizer, grader=Likes(), settings=settings, report=relay(die))
    seen: list[float] = []
    report = grpo(
        paths,
        problems,
        tokenizer=tokenizer,
        grader=Likes(),
        settings=settings,
        report=relay(seen.append),
    )
    assert report.steps == 12
    assert seen[0] > 0.4  # it went on and did not begin again
    assert [point["step"] for point in report.curve] == list(range(1, 13))
    shares = [point["right"] for point in report.curve]
    assert sum(shares[-3:]) / 3 > sum(shares[:3]) / 3 + 0.2
    assert (tmp_path / "student" / "model.safetensors").exists()


class LikesLong:
    """A grader that calls answers of some lengths right, so that most groups hold both."""

    def grade(self, problem: Problem, content: str) -> Grade:
        is_right = len(content) % 3 == 0
        return Grade(content, "right" if is_right else "wrong", "grader", float(is_right))


@pytest.mark.slow
@pytest.mark.parametrize("is_sparse", [False, True])
def test_packed_rows_that_teach_have_the_log_probabilities_and_gradients_of_trls_padded_ones(
    is_sparse: bool, chain_sum: str, pocket_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", reason="the rl extra is not installed")
    from trl.trainer.grpo_trainer import GRPOTrainer

    from deepdistill.distill.training.rl.grpo import GrpoSettings, grpo
    from deepdistill.distill.training.rl.trainer import RewardTrainer

    packed, ours, left_out = RewardTrainer._get_per_token_logps_and_entropies, RewardTrainer._compute_loss, []
    n_compared: list[int] = []

    def compared(self: Any, model: Any, ids: Any, mask: Any, n_kept: int, *others: Any, **named: Any) -> Any:
        assert ids.shape[1] <= self._longest
        found = packed(self, model, ids, mask, n_kept, *others, **named)
        with torch.no_grad():
            plain = GRPOTrainer._get_per_token_logps_and_entropies(self, model, ids, mask, n_kept, *others, **named)
        there = mask[:, -n_kept:].bool()
        n_compared.append(int(there.sum()))
        for mine, theirs in zip(found[:2], plain[:2], strict=True):
            torch.testing.assert_close(mine[there], theirs[there], rtol=1e-4, atol=1e-4)
        return found

    def loss(self: Any, model: Any, inputs: Any) -> Any:
        left_out.append(int((inputs["advantages"].abs() < 1e-3).sum()))
        weights = [p for p in model.parameters() if p.requires_grad]
        plain = torch.autograd.grad(GRPOTrainer._compute_loss(self, model, inputs), weights, allow_unused=True)
        found = torch.autograd.grad(ours(self, model, inputs), weights, allow_unused=True)
        for mine, theirs in zip(found, plain, strict=True):
            if mine is not None and theirs is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
        return ours(self, model, inputs)

    monkeypatch.setattr(RewardTrainer, "_get_per_token_logps_and_entropies", compared)
    monkeypatch.setattr(RewardTrainer, "_compute_loss", loss)
    start = pocket_dir() if is_sparse else pocket_student
    settings = GrpoSettings(
        steps=2, group_size=4, problems_per_step=4, max_tokens=48, temperature=1.3, format_weight=0.0
    )
    folders = (tmp_path / "checkpoints", tmp_path / "student")
    tokenizer = load_tokenizer(start)
    if not is_sparse:  # a random student rarely closes its thinking
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    report = grpo(
        TrainPaths(start, *folders),
        load_problems(chain_sum, "train", n=4, seed=0),
        tokenizer=tokenizer,
        grader=LikesLong(),
        settings=settings,
    )
    assert sum(n_compared) > 500
    assert 0 < sum(left_out) < 32
    assert 0 < sum(point["groups"] for point in report.curve) < 2


def test_rows_without_an_advantage_are_left_out_and_one_stays() -> None:
    pytest.importorskip("trl", reason="the rl extra is not installed")
    from deepdistill.distill.training.rl.trainer import teaching_rows

    inputs = {
        "advantages": torch.tensor([0.0, 0.5, 6e-8, -0.5]),
        "completion_ids": torch.arange(8).view(4, 2),
        "num_items_in_batch": torch.tensor(8),
        "name": "kept",
    }
    found = teaching_rows(inputs)
    assert found["advantages"].tolist() == [0.5, -0.5]
    assert found["completion_ids"].tolist() == [[2, 3], [6, 7]]
    assert (found["num_items_in_batch"].item(), found["name"]) == (8, "kept")
    assert len(teaching_rows(inputs | {"advantages": torch.zeros(4)})["completion_ids"]) == 1


@pytest.mark.slow
def test_teach_by_grpo_keeps_a_run_folder(chain_sum: str, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the rl extra is not installed")
    settings = TeachRecipe(
        problems=chain_sum,
        student=str(pocket_dir()),
        training=TrainingRecipe(method="grpo", epochs=1, learning_rate=1e-05),
        traces=TracesRecipe(n=16),
        scores=ScoresRecipe(n=8, max_tokens=64),
    )
    result = teach(settings, tmp_path / "run")
    assert result.student_dir
    assert result.curation == {}
    assert set(result.scores) == {"base", "student"}
    training: dict[str, Any] = json.loads((tmp_path / "run" / "training.json").read_text())
    assert training["method"] == "grpo"
    assert training["steps"] == 1
    assert training["curve"][0]["right"] > 0.5
    assert (tmp_path / "run" / "report.html").exists()
    assert not list((tmp_path / "run").rglob("checkpoint-*"))
    assert teach(settings, tmp_path / "run").training == training  # it does not train again


@pytest.mark.slow
def test_grpo_leaves_out_what_the_student_always_or_never_solves(tmp_path: Path, recorder: Any) -> None:
    pytest.importorskip("trl", reason="the rl extra is not installed")
    settings = TeachRecipe(
        problems="gym:leg_counting",
        student=str(pocket_dir()),
        training=TrainingRecipe(method="grpo", pass_samples=4, steps=1, learning_rate=1e-05),
        traces=TracesRecipe(n=48),
        scores=ScoresRecipe(n=4, max_tokens=160),
    )
    teach(settings, tmp_path / "run", report=recorder)
    rates = json.loads((tmp_path / "run" / "pass_rate.json").read_text())["rates"]
    n_between = sum(0 < rate < 1 for rate in rates.values())
    assert 0 < n_between < len(rates)
    assert f"{n_between} of {len(rates)} problems train: the student solves them now and then" in recorder.said
    assert f"learns {n_between} problems by heart" in recorder.said[-1]


def test_grpo_has_no_traces_and_no_rounds(chain_sum: str, tmp_path: Path) -> None:
    for rounds, stop_after in ((1, None), (0, "traces")):
        settings = TeachRecipe(
            chain_sum,
            "pocket",
            traces=TracesRecipe(4),
            on_policy=OnPolicyRecipe(rounds),
            training=TrainingRecipe(method="grpo"),
        )
        with pytest.raises(UsageError, check=lambda error: error.code == "settings-conflict"):
            teach(settings, tmp_path / "run", stop_after=stop_after)  # type: ignore[arg-type]


def test_flags_that_reinforcement_makes_no_use_of_are_refused(tmp_path: Path) -> None:
    from deepdistill.distill.training.rl.stage import unused_settings

    settings = TeachRecipe(
        problems="gym:leg_counting",
        student="pocket",
        training=TrainingRecipe(
            method="grpo", weights="qlora", dtype="bf16", curriculum=CurriculumRecipe(enabled=True)
        ),
        traces=TracesRecipe(n=4),
        scores=ScoresRecipe(n=2),
    )
    with pytest.raises(UsageError, check=lambda error: error.code == "settings-unused"):
        teach(settings, tmp_path / "run")
    assert unused_settings(settings) == ["training.weights", "training.dtype", "training.curriculum.enabled"]


def test_problems_that_are_always_or_never_solved_are_left_out() -> None:
    from deepdistill.distill.training.pass_rate import measure_pass_rates
    from deepdistill.distill.training.rl.stage import sometimes_solved

    problems = [Problem(f"p{i}", f"{i}?", "yes", "s", "number") for i in range(4)]

    class Answers:
        """Solves problem i in i of 3 tries."""

        def generate(self, requests: Any, sampling: Sampling) -> Any:
            seeds = []
            for index, request in enumerate(requests):
                question = int(request.messages[-1]["content"][:-1])
                seeds.append(request.seed)
                content = "yes" if index % 3 < question else "no"
                yield index, Completion(content, None, None, "stop", 1, 1, 0, 0.0)
            assert len(set(seeds)) == len(seeds) == 12

    model: Any = Answers()
    rates = measure_pass_rates(
        model, problems, grader=Contains(), sampling=Sampling(temperature=1.0, seed=5), n_tries=3
    )
    assert rates == pytest.approx({"p0": 0, "p1": 1 / 3, "p2": 2 / 3, "p3": 1})
    assert sometimes_solved(problems, rates) == problems[1:3]
    assert sometimes_solved([problems[0], problems[3]], rates) == [problems[0], problems[3]]


def test_a_box_of_which_nothing_is_left_ends_after_a_step() -> None:
    """Choosing the problems may take all of the minutes."""
    from deepdistill.distill.training.rl.grpo import GrpoSettings, _Watch

    for minutes, ended in ((-1.0, True), (0.0, True), (5.0, False)):
        watch = _Watch(GrpoSettings(steps=10**6, minutes=minutes), None, lambda *_: None)  # type: ignore[arg-type]
        assert (watch.progress(1) == 1.0) is ended
