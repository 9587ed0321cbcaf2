"""The embedded teacher: what it weighs, how it is balanced, and what it scores (all of it, in the slow tests)."""

from __future__ import annotations

import json
from pathlib import Path

import card
import pytest
import torch
import train as recipe
from transformers import DeepseekV3ForCausalLM, PreTrainedTokenizerFast

from deepdistill.distill.planning.kv_cache import kv_numbers
from deepdistill.distill.pocket.families import FAMILIES
from deepdistill.distill.problems.split import bucket_of
from deepdistill.distill.teachers import open_teacher, pocket_dir


def test_it_is_a_deepseek_v3_of_at_most_8_mb_with_under_half_its_experts_active() -> None:
    with open_teacher("pocket") as teacher:
        assert isinstance(teacher.model, DeepseekV3ForCausalLM)
        config = teacher.model.config
        total, active = card.count_parameters(teacher.model)
    assert config.n_routed_experts >= 8
    n_working = config.num_experts_per_tok + config.n_shared_experts
    assert n_working / (config.n_routed_experts + config.n_shared_experts) < 0.5
    assert active < total
    latent, plain = kv_numbers(config.to_dict())
    assert latent == (32 + 16) * 4
    assert plain == 4 * (32 + 32) * 4  # keys and values of four heads, as many layers
    assert sum(file.stat().st_size for file in pocket_dir().iterdir()) <= 8e6


def test_the_balance_rule_moves_biases_against_the_load_and_evens_it_out() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(pocket_dir())
    model = recipe.make_model(recipe.Recipe(), tokenizer)
    balance = recipe.ExpertBalance(model)
    tokens = torch.randint(5, 500, (8, 64), generator=torch.Generator().manual_seed(0))
    model(tokens)
    load = balance.load.clone()
    assert load.sum(dim=1).tolist() == [8 * 64 * 2] * 3  # two experts a token in every sparse layer
    balance.update(0.5)
    for router, counts in zip(balance.routers, load, strict=True):
        assert torch.equal(router.e_score_correction_bias, 0.5 * torch.sign(counts.mean() - counts))
        router.e_score_correction_bias.zero_()
    model(tokens)
    first = balance.busiest()
    for _ in range(150):
        balance.load.zero_()
        model(tokens)
        balance.update(2e-3)
    model(tokens)
    assert balance.busiest() < min(1.3, first)


def test_padding_is_not_counted() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(pocket_dir())
    balance = recipe.ExpertBalance(model := recipe.make_model(recipe.Recipe(), tokenizer))
    balance.is_real = torch.tensor([[True, True, False, False]])
    model(torch.tensor([[5, 6, 0, 0]]))
    assert balance.load.sum(dim=1).tolist() == [4, 4, 4]


def test_it_is_trained_on_the_training_bucket_alone() -> None:
    for family in FAMILIES:
        questions = [question for question, _ in recipe.draw_texts(family, 40, seed=7)]
        assert len(questions) == 40
        assert {bucket_of(question) for question in questions} == {"train"}


def test_the_recipe_runs_and_continues_from_a_stage(tmp_path: Path) -> None:
    short = recipe.Recipe(minutes=0.02, n_rows=40, warmup_steps=1)
    recipe.train(short, tmp_path / "a")
    recipe.train(short, tmp_path / "b", tmp_path / "a")
    assert len(json.loads((tmp_path / "b" / "curve.json").read_text())) == 2
    DeepseekV3ForCausalLM.from_pretrained(tmp_path / "b")


@pytest.mark.slow
def test_bars() -> None:
    with open_teacher("pocket") as teacher:
        scores = card.score_families(teacher, 500)
        load = card.expert_load(teacher, card.held_out_texts(teacher, 100))
    assert all(score.n == 500 for score in scores.values())
    assert scores["chain_sum"].accuracy >= 0.95
    assert min(score.accuracy for score in scores.values()) >= 0.90
    assert load.max() <= 1.5
