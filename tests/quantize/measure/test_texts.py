"""Traces as the student was taught them, in three parts, with what was judged later."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from deepdistill.errors import ArtifactError, UsageError
from deepdistill.localrun.engine.engine import Engine
from deepdistill.quantize.measure.texts import purpose_of, read_texts
from deepdistill.quantize.recipe import CalibrationRecipe


def test_texts_are_rendered_as_taught_and_parts_share_no_problem(
    f16: Path, traces: Path, tmp_path: Path, small: CalibrationRecipe
) -> None:
    texts = read_texts(traces, f16, replace(small, n_calibrate=10**6, n_measure=10**6))
    with Engine(f16, n_ctx=256, n_threads=1) as engine:
        rendered = {
            part: [engine.detokenize(text.tokens) for text in getattr(texts, part)]
            for part in ("calibrate", "choose", "measure")
        }
        text = texts.measure[0]
        asked = engine.detokenize(text.tokens[: text.n_prompt])
    for part, whole in rendered.items():
        questions = [one.split("user\n")[1].split("<|im_end|>")[0] for one in whole]
        assert {purpose_of(question) for question in questions} == {part}
    everything = [one for part in rendered.values() for one in part]
    assert len(everything) == len(set(everything)) > 60, "every verified trace once; the wrong one is left out"
    assert asked.endswith("<think>\n")
    assert rendered["measure"][0].endswith("<|im_end|>")
    assert "</think>" in rendered["measure"][0].removeprefix(asked)
    assert text.n_thinking == len(engine_tokens(f16, asked, rendered["measure"][0]))


def engine_tokens(path: Path, asked: str, whole: str) -> list[int]:
    with Engine(path, n_ctx=256, n_threads=1) as engine:
        reasoning = whole.removeprefix(asked).split("</think>")[0].strip()
        return engine.model.tokenize(reasoning, whole=False)


def test_too_few_traces_are_said_so(f16: Path, traces: Path, tmp_path: Path, small: CalibrationRecipe) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(traces.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(UsageError, check=lambda error: error.code == "too-few-traces"):
        read_texts(few, f16, small)
    few.write_text("{}\n" * 2)
    with pytest.raises(ArtifactError, check=lambda error: error.code == "trace-broken"):
        read_texts(few, f16, small)


def test_what_was_judged_later_counts_as_verified(
    f16: Path, traces: Path, tmp_path: Path, small: CalibrationRecipe
) -> None:
    """Votes and judges' verdicts stand beside the traces, which are unknown without them."""
    stored = [json.loads(line) | {"id": f"{i:016x}"} for i, line in enumerate(traces.read_text().splitlines())]
    unknown = tmp_path / "traces.jsonl"
    unknown.write_text("".join(json.dumps(one | {"verdict": "unknown", "verdict_by": "none"}) + "\n" for one in stored))
    with pytest.raises(UsageError, check=lambda error: error.code == "too-few-traces"):
        read_texts(unknown, f16, small)
    before = [{"id": one["id"], "verdict_by": "judge"} for one in stored]
    taken_back = [{"id": stored[5]["id"], "verdict_by": "none"}]
    verdicts = tmp_path / "traces.verdicts.jsonl"
    verdicts.write_text("".join(json.dumps(one) + "\n" for one in [*before, *taken_back]) + '{"id": "torn')
    everything = replace(small, n_calibrate=10**6, n_choose=10**6, n_measure=10**6)
    texts = read_texts(unknown, f16, everything)
    assert len(texts.heal) + len(texts.choose) + len(texts.measure) == len(stored) - 1
    verdicts.write_text("".join(json.dumps(one) + "\n" for one in before))
    assert read_texts(unknown, f16, everything).sha256 != texts.sha256
