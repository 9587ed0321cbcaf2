"""A recipe.json of any earlier version, brought to this one step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...errors import ArtifactError
from ...localrun.core.settings import flat, put

VERSION = 2
"""Of recipe.json. A setting that is renamed or means something else takes a new one, and a step in `_UPGRADES`."""


def upgraded(record: Any, where: str = "the recipe") -> dict[str, Any]:
    """Return a recipe's nested values as this version names them, without the version.

    Raises:
        ArtifactError: `code` "recipe-broken": it is no recipe; "recipe-newer": a later version wrote it.
    """
    version = record.get("version", 0) if isinstance(record, dict) else None
    if type(version) is not int or version < 0:
        raise ArtifactError(f"{where} is no recipe", "restore it from a copy", code="recipe-broken")
    if version > VERSION:
        hint = "pip install --upgrade deepdistill"
        raise ArtifactError(f"{where} was written by a newer version of deepdistill", hint, code="recipe-newer")
    for step in _UPGRADES[version:]:
        record = step(record)
    return {key: value for key, value in record.items() if key != "version"}


_FROM_0: dict[str, str | None] = {
    "teacher": "teacher.model",
    "teacher_model": "teacher.server_model",
    "temperature": "teacher.temperature",
    "top_p": "teacher.top_p",
    "max_tokens": "teacher.max_tokens",
    "logprobs": "teacher.logprobs",
    "n_traces": "traces.n",
    "samples": "traces.samples",
    "traces": "traces.file",
    "expand": "traces.expand.n",
    "vote_share": "vote.min_share",
    "judge": "judge.model",
    "judge_model": "judge.server_model",
    "judge_compare": None,  # what it judged is in the verdicts
    "rubric": "judge.rubric",
    "accept": "curation.accept",
    "keep": "curation.keep",
    "method": "training.method",
    "pass_samples": "training.pass_samples",
    "loss": "training.loss",
    "logit_share": "training.logit_share",
    "curriculum": "training.curriculum.enabled",
    "rounds": "on_policy.rounds",
    "round_problems": "on_policy.n_problems",
    "round_samples": "on_policy.samples",
    "on_policy_loss": "on_policy.loss",
    "n_eval": "scores.n",
    "eval_max_tokens": "scores.max_tokens",
    "training.lora_rank": "training.lora.rank",
    "training.lora_alpha": "training.lora.alpha",
    "training.lora_targets": "training.lora.targets",
    "training.lora_first_layer": "training.lora.first_layer",
    "training.lora_plus": "training.lora.plus",
    "training.dora": "training.lora.dora",
    "training.rslora": "training.lora.rslora",
    "training.lr": "training.learning_rate",
}


def _from_0(record: Mapping[str, Any]) -> dict[str, Any]:
    """Take a recipe of version 0.1.0, which was flat but for `curation` and `training`, into sections."""
    values: dict[str, Any] = {"version": 1}
    for path, value in flat(record):
        key = ".".join(path)
        if key in ("training.full", "training.qlora"):  # two switches became one choice of weights
            if value:
                put(values, ("training", "weights"), path[-1])
        elif (new := _FROM_0.get(key, key)) is not None:
            is_list = key in ("training.lora_targets", "training.report_to") and isinstance(value, str)
            put(values, new.split("."), [part for part in value.split(",") if part] if is_list else value)
    return values


def _from_1(record: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the graders of an older run, which graded any reference without options as mathematics."""
    return {**record, "version": 2, "asking": {"graders": "columns"}}


_UPGRADES: tuple[Callable[[Mapping[str, Any]], dict[str, Any]], ...] = (_from_0, _from_1)
