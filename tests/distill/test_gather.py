"""From problems to judged traces in one run folder: expansion, sampling, voting, judging, imports, and going on."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from deepdistill.distill.context import Context
from deepdistill.distill.problems.split import bucket_of
from deepdistill.distill.recipe.gathering import CostRecipe, TracesRecipe
from deepdistill.distill.recipe.teach import TeachRecipe
from deepdistill.distill.records import Request, Trace
from deepdistill.distill.run import Run
from deepdistill.distill.teach import teach
from deepdistill.distill.teachers.base import Teacher
from deepdistill.distill.traces.store import TraceStore
from deepdistill.errors import ArtifactError, TeacherError, UsageError
from deepdistill.localrun.core.generation import Completion, Sampling
from deepdistill.localrun.core.reporter import SILENT, Reporter
from deepdistill.localrun.core.settings import changed


class Writer(Teacher):
    """Answers as the first of `rules` says whose pattern is found in the last message; counts what it was asked."""

    name, backend = "writer", "endpoint"

    def __init__(self, rules: dict[str, Any]) -> None:
        self.rules, self.asked = rules, list[str]()

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, *, top_logprobs: int = 0
    ) -> Iterator[tuple[int, Completion]]:
        for index, request in enumerate(requests):
            text = request.messages[-1]["content"]
            said = next(say for pattern, say in self.rules.items() if re.search(pattern, text))
            content = said(text, request.seed) if callable(said) else said
            if "What is 2 + 3?" not in text:  # the probe
                self.asked.append(text)
            if content == "dead":
                raise TeacherError("the server is down")
            yield index, Completion(content, f"let me see: {content}", True, "stop", 10, 20, 10, 0.1)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Problems without answers: ten of them in the training bucket."""
    names = [f"Which number does the word w{i} stand for?" for i in range(40)]
    chosen = [name for name in names if bucket_of(name) == "train"][:10]
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{name}\n" for name in chosen))
    return path


def settings_of(problems: Path, changes: dict[str, Any] | None = None) -> TeachRecipe:
    base = {"teacher.model": "toy", "teacher.temperature": 1.0, "traces.samples": 4, "curation.keep": 1}
    return changed(TeachRecipe(str(problems)), base | (changes or {}))


def gather_only(folder: Path, settings: TeachRecipe, writer: Writer, report: Reporter = SILENT) -> list[Trace]:
    with suppress(ArtifactError):  # nothing may be fit to train on
        teach(settings, folder, report=report, stop_after="traces", opener=lambda *_, **__: writer)
    return list(TraceStore.read(folder / "traces.jsonl"))


def agreeing(text: str, seed: int) -> str:
    """Say 7 to an even word always, and to an odd one something else at each seed."""
    word = re.search(r"w(\d+)", text)
    return "Answer: 7" if word and int(word[1]) % 2 == 0 else f"Answer: {seed}"


def test_samples_that_agree_are_voted_in_and_no_others(prompts: Path, tmp_path: Path) -> None:
    settings = settings_of(prompts, {"curation.similarity": None})  # the questions are much alike
    traces = gather_only(tmp_path / "run", settings, Writer({"": agreeing}))
    assert len(traces) == 40
    for trace in traces:
        is_even = int(re.search(r"w(\d+)", trace.messages[0]["content"])[1]) % 2 == 0  # type: ignore[index]
        assert trace.verdict == "unknown"
        assert (trace.verdict_by, trace.agreement) == (("vote", 1.0) if is_even else ("none", 0.25))
    curation = json.loads((tmp_path / "run" / "curation.json").read_text())
    assert curation["kept"] == len({t.problem_id for t in traces if t.verdict_by == "vote"})


def test_settling_again_writes_nothing_new(prompts: Path, tmp_path: Path) -> None:
    gather_only(tmp_path / "run", settings_of(prompts), Writer({"": agreeing}))
    path = tmp_path / "run" / "traces.verdicts.jsonl"
    before, again = path.read_bytes(), Writer({"": agreeing})
    gather_only(tmp_path / "run", settings_of(prompts), again)
    assert path.read_bytes() == before
    assert not again.asked


def verdict(text: str, seed: int) -> str:
    """Score what says 7 with 5, all else with 1, in the form that the judge is asked for."""
    mark = re.search(r"VERDICT (\w+)", text)
    assert mark
    return f'VERDICT {mark[1]} {{"score": {5 if "Answer: 70" in text else 1}}}'


def test_a_judge_looks_at_what_the_vote_leaves_open_and_is_asked_once(prompts: Path, tmp_path: Path) -> None:
    def say(text: str, seed: int) -> str:
        return f"Answer: 70{seed}" if seed % 2 else f"Answer: 6{seed}"

    settings = settings_of(prompts, {"judge.model": "judge", "traces.samples": 2})
    writer = Writer({"VERDICT": verdict, "": say})
    traces = gather_only(tmp_path / "run", settings, writer)
    assert {(t.verdict_by, "Answer: 70" in t.content) for t in traces} <= {("judge", True), ("none", False)}
    assert {t.verdict_by for t in traces} == {"judge", "none"}
    again = Writer({"": "dead"})
    assert gather_only(tmp_path / "run", settings, again) == traces
    assert not again.asked


def test_new_problems_are_asked_too_and_bought_once(prompts: Path, tmp_path: Path) -> None:
    def write(text: str, seed: int) -> str:
        given = re.search(r"w(\d+) stand for\?\n</problem>", text)
        assert given
        new = [f"What colour has the flag number {given[1]}{i} of this long list?" for i in range(2)]
        return json.dumps(new)

    writer = Writer({"<problem>": write, "": "Answer: 7"})
    settings = settings_of(prompts, {"traces.samples": 2, "traces.expand.n": 2})
    traces = gather_only(tmp_path / "run", settings, writer)
    new = {t.problem_id for t in traces if t.source.startswith("expand:")}
    assert 8 <= len(new) <= 20, "some fall into the held-out part of the split"
    assert all(bucket_of(t.messages[0]["content"]) == "train" for t in traces)
    again = Writer({"": "dead"})
    assert gather_only(tmp_path / "run", settings, again) == traces


def test_the_budget_holds_for_everything_together(prompts: Path, tmp_path: Path, recorder: Any) -> None:
    price = (0.0, 1e6 / 20)  # a dollar for each answer
    writer = Writer({"VERDICT": verdict, "": lambda text, seed: f"Answer: {seed}"})
    settings = settings_of(prompts, {"traces.samples": 1, "judge.model": "toy"})
    bounded = changed(settings, {"cost": CostRecipe(price=price, max_usd=14.0)})
    gather_only(tmp_path / "run", bounded, writer, recorder)
    assert len(writer.asked) == 14, "ten traces, four judgements"
    assert any("$14.00 spent" in line for line in recorder.said)
    gather_only(tmp_path / "run", bounded, writer)
    assert len(writer.asked) == 14
    gather_only(tmp_path / "run", changed(bounded, {"cost.max_usd": 99.0}), writer)
    assert len(writer.asked) == 20


def test_what_failed_has_been_paid_for_when_a_run_goes_on(prompts: Path, tmp_path: Path, recorder: Any) -> None:
    class Breaks(Writer):
        def generate(self, *arguments: Any, **options: Any) -> Iterator[tuple[int, Completion]]:
            for index, completion in super().generate(*arguments, **options):
                lost = dataclasses.replace(completion, completion_tokens=0, lost_tokens=(0, 20))
                yield index, dataclasses.replace(lost, finish_reason="error") if self.asked else completion

    price = (0.0, 1e6 / 20)  # a dollar for each answer, and for each failure
    settings = settings_of(prompts, {"traces.samples": 2, "judge.model": "toy"})
    settings = changed(settings, {"cost": CostRecipe(price=price, max_usd=5.0)})
    gather_only(tmp_path / "run", settings, Breaks({"": "7"}))
    again = Writer({"": "7"})
    gather_only(tmp_path / "run", changed(settings, {"cost.max_usd": 7.0}), again, recorder)
    assert len(again.asked) == 2
    assert any("$7.00 spent" in line for line in recorder.said)


def test_a_judge_has_a_name_and_a_price_of_its_own(prompts: Path, tmp_path: Path, recorder: Any) -> None:
    opened: list[tuple[str, str | None]] = []
    writer = Writer({"VERDICT": verdict, "": lambda text, seed: f"Answer: {seed}"})

    def opener(spec: str, *, model: str | None, **_: Any) -> Teacher:
        opened.append((spec, model))
        return writer

    judge = {"judge.model": "http://judge/v1", "judge.server_model": "strict"}
    settings = settings_of(prompts, {"traces.samples": 1, "teacher.server_model": "r1"} | judge)
    settings = changed(settings, {"cost": CostRecipe(price=(0.0, 1e6 / 20), judge_price=(0.0, 2e6 / 20))})
    with suppress(ArtifactError):
        teach(settings, tmp_path / "run", report=recorder, stop_after="traces", opener=opener)
    assert opened == [("toy", "r1"), ("http://judge/v1", "strict")]
    assert any("$30.00 spent" in line for line in recorder.said), "ten traces at one dollar, ten judgements at two"
    for name, model in (("http://judge/v1", None), ("toy", "r1")):  # r1 is a name on the teacher's server
        opened.clear()
        of_judge = changed(settings, {"judge.model": name, "judge.server_model": None})
        with Run(tmp_path / name.partition(":")[0], of_judge) as run:
            Context(run, of_judge, opener=opener).open_judge()
        assert opened == [(name, model)]


def test_traces_that_nothing_would_judge_are_not_paid_for(prompts: Path, tmp_path: Path) -> None:
    writer = Writer({"": "7"})
    lonely = settings_of(prompts, {"traces.samples": 1, "student": "pocket"})
    for settings in (lonely, settings_of(prompts, {"curation.accept": ["judge"], "student": "pocket"})):
        with pytest.raises(UsageError, check=lambda error: error.code == "nothing-judges") as caught:
            teach(settings, tmp_path / "run", opener=lambda *_, **__: writer)
        assert "--samples 8" in caught.value.hint
    assert not writer.asked
    result = teach(lonely, tmp_path / "run", opener=lambda *_, **__: writer, stop_after="traces")
    assert (len(writer.asked), result.curation["kept"]) == (10, 0), "who wants traces alone gets them"


def test_the_probe_tells_what_a_teacher_gives_though_it_is_not_asked_for(
    prompts: Path, tmp_path: Path, recorder: Any
) -> None:
    class Knows(Writer):
        def score(self, *_: Any, **__: Any) -> Any:
            self.on_note("asked for more than is wanted later")

    gather_only(tmp_path / "run", settings_of(prompts), Knows({"": "7"}), recorder)
    assert any("on-policy distillation" in line for line in recorder.said)
    assert not any("asked for more" in line for line in recorder.said)


def test_traces_of_other_tools_are_graded_here(tmp_path: Path) -> None:
    questions = [f"What is {i} + {i}?" for i in range(30)]
    rows = [
        {"problem": q, "answer": str(2 * i), "generation": f"<think>\n{i}+{i}\n</think>\n\n{2 * i + (i % 5 == 0)}"}
        for i, q in enumerate(questions)
    ]
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = tmp_path / "p.jsonl"
    problems.write_text("".join(json.dumps({"question": r["problem"], "answer": r["answer"]}) + "\n" for r in rows))
    settings = TeachRecipe(problems=str(problems), traces=TracesRecipe(file=str(theirs)))
    for _ in range(2):  # the second time there is nothing to do
        result = teach(settings, tmp_path / "run", stop_after="traces")
    traces = list(TraceStore.read(tmp_path / "run" / "traces.jsonl"))
    assert len(traces) == 30
    for i, trace in enumerate(traces):
        assert trace.verdict == ("wrong" if i % 5 == 0 else "right")
        assert trace.reasoning_content == f"{i}+{i}"
    in_training = [i for i, q in enumerate(questions) if bucket_of(q) == "train"]
    assert result.curation["kept"] == sum(i % 5 != 0 for i in in_training)


def test_more_may_be_asked_for_until_the_training_has_begun(prompts: Path, tmp_path: Path) -> None:
    first, more = Writer({"": agreeing}), Writer({"": agreeing})
    gather_only(tmp_path / "run", settings_of(prompts, {"traces.n": 4, "traces.samples": 2}), first)
    traces = gather_only(tmp_path / "run", settings_of(prompts, {"traces.n": 10, "traces.samples": 3}), more)
    assert (len(first.asked), len(more.asked), len(traces)) == (8, 22, 30)
    with pytest.raises(ArtifactError, check=lambda error: error.code == "run-differs"):
        teach(settings_of(prompts, {"teacher.temperature": 0.5}), tmp_path / "run", stop_after="traces")
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-7"
    checkpoint.mkdir(parents=True)
    (checkpoint / "clock.json").touch()
    with pytest.raises(ArtifactError, check=lambda error: error.code == "run-differs") as caught:
        teach(settings_of(prompts), tmp_path / "run", stop_after="traces")
    assert "delete student/" in caught.value.hint


def test_several_greedy_samples_are_refused() -> None:
    several = TeachRecipe("x", traces=TracesRecipe(samples=2))
    assert several.sampling.temperature > 0
    with pytest.raises(UsageError, check=lambda error: error.code == "samples-alike"):
        _ = changed(several, {"teacher.temperature": 0.0}).sampling
