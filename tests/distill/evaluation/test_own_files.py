"""Files as people bring them, and a stand-in that answers: right answers are right in any style, wrong ones never."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from deepdistill.cli import main
from deepdistill.distill.evaluation.evaluate import evaluate, unclear
from deepdistill.distill.gather import as_told
from deepdistill.distill.problems.load import load_problems
from deepdistill.distill.problems.split import bucket_of, question_id
from deepdistill.distill.recipe.gathering import AskingRecipe, CurationRecipe, TracesRecipe
from deepdistill.distill.recipe.teach import ScoresRecipe, TeachRecipe
from deepdistill.distill.recipe.training import TrainingRecipe
from deepdistill.distill.records import Request, question_in
from deepdistill.distill.run import settled
from deepdistill.distill.teach import teach
from deepdistill.distill.teachers.base import Teacher
from deepdistill.distill.traces.store import TraceStore
from deepdistill.localrun.core.generation import Completion, Sampling

LABELS = ["billing", "bug", "feature", "praise"]
LABEL_STYLES = (
    "{}", "**{}**", "`{}`", "Label: {}", "The label is **{}**.", "```\n{}\n```", "Category → {}",
    "{}\n\nIt says so itself.",
    "This should be labelled as {}", "It is not {other}, rather {}.", "The message reads like that.\n\n**Label:** {}",
    '{{"label": "{}"}}', "<answer>{}</answer>", "It might look like {other} at first.\nSo the answer is {}.",
)  # fmt: skip
JSON_STYLES = (
    "{}", "```json\n{}\n```", "Here it is:\n\n{}\n\nAnything else?", "```\n{}\n```\nThe date is as given.",
    "<answer>{}</answer>",
)  # fmt: skip
UNIT_STYLES = (
    "{}", "It is {}.", "**{}**", "The answer is {}", "```\n{}\n```", "1 of them is so much, therefore x = {}",
    "\\boxed{{{}}}",
)  # fmt: skip
Row = dict[str, Any]


def label_rows() -> list[Row]:
    return [
        {"question": f"Message {i}: the thing number {i * 7}. Label it.", "answer": LABELS[i % 4]} for i in range(68)
    ]


def json_rows() -> list[Row]:
    made = [{"name": f"Customer {i}", "total": i / 4, "items": ["pen", i], "paid": i % 2 == 0} for i in range(66)]
    return [{"question": f"Extract: customer {i} …", "answer": value} for i, value in enumerate(made)]


def unit_rows() -> list[Row]:
    kinds = (("km", "m", 1000), ("kg", "g", 1000), ("hours", "minutes", 60), ("feet", "inches", 12))
    cases = [(i, *kinds[i % 4]) for i in range(2, 70)]
    return [{"question": f"How many {to} are {i} {of}?", "answer": f"{i * n} {to}"} for i, of, to, n in cases]


def label_wrong(answer: str) -> str:
    return LABELS[(LABELS.index(answer) + 1) % 4]


def label_reply(answer: str, i: int) -> str:
    return LABEL_STYLES[i % len(LABEL_STYLES)].format(answer, other=label_wrong(label_wrong(answer)))


def json_wrong(answer: str) -> str:
    return json.dumps(json.loads(answer) | {"total": "unknown"})


def json_reply(answer: str, i: int) -> str:
    value = json.loads(answer)
    keys = random.Random(i).sample(sorted(value), len(value))
    text = json.dumps({key: value[key] for key in keys}, indent=i % 3 or None)
    return JSON_STYLES[i % len(JSON_STYLES)].format(text)


def unit_wrong(answer: str) -> str:
    number, unit = answer.split()
    return f"{int(number) + 1} {unit}"


def unit_reply(answer: str, i: int) -> str:
    return UNIT_STYLES[i % len(UNIT_STYLES)].format(answer)


Reply = Callable[[str, int], str]
FILES: dict[str, tuple[Callable[[], list[Row]], str, Reply, Callable[[str], str]]] = {
    "labels": (label_rows, "label", label_reply, label_wrong),
    "json": (json_rows, "json", json_reply, json_wrong),
    "units": (unit_rows, "number", unit_reply, unit_wrong),
}


class StandIn(Teacher):
    """Answers each question by a function of the question and of how many it has answered; keeps what it was asked."""

    name, backend = "stand-in", "endpoint"

    def __init__(self, answer: Callable[[str, int], str]) -> None:
        self.answer, self.asked = answer, list[Request]()

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, *, top_logprobs: int = 0
    ) -> Iterator[tuple[int, Completion]]:
        for index, request in enumerate(requests):
            self.asked.append(request)
            content = self.answer(question_in(request.messages), len(self.asked))
            yield index, Completion(content, "I look at it.", True, "stop", 9, 9, 4, 0.1)


def written(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", FILES)
def test_right_answers_are_right_in_any_style_and_wrong_ones_never(name: str, tmp_path: Path) -> None:
    rows, grader, reply, wrong = FILES[name]
    problems = load_problems(written(tmp_path / "own.jsonl", rows()))
    assert {problem.grader for problem in problems} == {grader}
    assert len(problems) >= 60
    known = {problem.question: problem.answer or "" for problem in problems}
    right = evaluate(StandIn(lambda question, i: reply(known[question], i)), problems)
    assert (right.accuracy, right.n_unknown) == (1.0, 0)
    answers = tmp_path / "answers.jsonl"
    false = evaluate(StandIn(lambda question, i: reply(wrong(known[question]), i)), problems, answers_path=answers)
    assert (false.accuracy, false.n_unknown) == (0.0, 0)
    scores = {json.loads(line)["score"] for line in answers.read_text(encoding="utf-8").splitlines()}
    assert scores == ({0.8} if name == "json" else {0.0})


def test_a_mixed_file_is_told_row_by_row_and_asked_for_what_each_row_needs(tmp_path: Path, recorder: Any) -> None:
    path = written(tmp_path / "own.jsonl", label_rows()[:40] + json_rows()[:26] + unit_rows()[:2])
    problems = load_problems(path, report=recorder)
    assert (
        f"{path}: 40 rows graded as labels (billing, bug, feature, praise), 26 as JSON, 2 as numbers" in recorder.said
    )
    told = {p.grader: p.messages[0]["content"] if p.messages else "" for p in problems}
    assert all(label in told["label"] for label in LABELS)
    assert "JSON" in told["json"]
    assert told["number"] == ""
    assert {p.id for p in problems} == {question_id(row["question"]) for row in label_rows()[:40] + json_rows()[:26] + unit_rows()[:2]}  # fmt: skip  # noqa: E501


def test_an_instruction_goes_to_teacher_and_traces_and_moves_nothing(tmp_path: Path, capsys: Any) -> None:
    path = written(tmp_path / "own.jsonl", label_rows())
    plain = [(p.id, p.question) for p in load_problems(path, "train")]
    known = {row["question"]: row["answer"] for row in label_rows()}
    teacher = StandIn(lambda question, i: label_reply(known.get(question, "bug"), i))  # else: is it there?
    recipe = TeachRecipe(path, asking=AskingRecipe("Be a clerk."), traces=TracesRecipe(99), curation=CurationRecipe())
    teach(recipe, tmp_path / "run", stop_after="traces", opener=lambda *_, **__: teacher)
    traces = list(TraceStore.read(tmp_path / "run" / "traces.jsonl"))
    assert {(trace.problem_id, question_in(trace.messages)) for trace in traces} == set(plain)
    assert all(bucket_of(question_in(trace.messages)) == "train" for trace in traces)
    assert {trace.messages[0]["content"] for trace in traces} == {"Be a clerk."}
    assert {request.messages[0]["content"] for request in teacher.asked[-len(traces) :]} == {"Be a clerk."}
    assert {(trace.grader, trace.verdict, trace.score) for trace in traces} == {("label", "right", 1.0)}
    capsys.readouterr()
    assert main(["teach", "--problems", path, "--instruction", "Be a clerk.", "--out", str(tmp_path / "dry"), "--dry-run"]) == 0  # fmt: skip  # noqa: E501
    assert "Be a clerk." in capsys.readouterr().out


def test_a_run_of_the_version_before_resumes_with_its_graders(tmp_path: Path) -> None:
    path, folder = written(tmp_path / "own.jsonl", label_rows()), tmp_path / "run"
    teacher = StandIn(lambda question, i: "bug")
    old = TeachRecipe(path, asking=AskingRecipe(graders="columns"), traces=TracesRecipe(8))
    teach(old, folder, stop_after="traces", opener=lambda *_, **__: teacher)
    traces = (folder / "traces.jsonl").read_bytes()
    assert {trace.grader for trace in TraceStore.read(folder / "traces.jsonl")} == {"math"}
    record = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps({k: v for k, v in record.items() if k != "asking"} | {"version": 1}))
    again = TeachRecipe(path, traces=TracesRecipe(8))
    assert settled(again, folder).asking.graders == "columns"
    assert settled(again, tmp_path / "other").asking.graders == "shape"
    teach(again, folder, stop_after="traces", opener=lambda *_, **__: teacher)
    assert (folder / "traces.jsonl").read_bytes() == traces
    assert json.loads((folder / "recipe.json").read_text())["asking"]["graders"] == "columns"


def test_many_unknown_answers_are_said_with_their_reasons(tmp_path: Path) -> None:
    rows = [{"question": f"Who is number {i}?", "answer": f"Person {chr(65 + i)}x"} for i in range(10)]
    problems = load_problems(written(tmp_path / "own.jsonl", rows))
    score = evaluate(StandIn(lambda question, i: "Somebody else" if i > 2 else problems[i - 1].answer or ""), problems)
    assert (score.accuracy, score.n_unknown, sum(score.unknown.values())) == (0.2, 8, 8)
    assert len(score.unknown) == 1
    assert "80 %" in unclear(vars(score))
    assert next(iter(score.unknown)) in unclear(vars(score))
    assert unclear({"n": 10, "n_unknown": 2, "unknown": {"x": 2}}) == ""
    assert unclear({"n": 10, "accuracy": 0.5}) == ""


def test_traces_that_were_made_without_an_instruction_are_scored_without_it(tmp_path: Path) -> None:
    path, folder = written(tmp_path / "own.jsonl", label_rows()), tmp_path / "run"
    teach(TeachRecipe(path, traces=TracesRecipe(4)), folder, stop_after="traces", opener=lambda *_, **__: StandIn(lambda *_: "bug"))  # fmt: skip  # noqa: E501
    ours, foreign = folder / "traces.jsonl", tmp_path / "foreign.jsonl"
    written(foreign, [{"question": "Which?", "response": "<think>hm</think>bug", "answer": "bug"}])
    told = [as_told(TeachRecipe(path, traces=TracesRecipe(4, file=file))).asking for file in (None, ours, foreign)]
    assert [asking.instruction for asking in told] == [None, None, ""]


def test_every_hop_is_asked_with_the_instruction_and_tells_what_is_unknown(tmp_path: Path) -> None:
    path, folder = written(tmp_path / "own.jsonl", label_rows()), tmp_path / "run"
    known = {row["question"]: row["answer"] for row in label_rows()}
    training = TrainingRecipe(weights="full", steps=2, batch_size=2)
    recipe = TeachRecipe(
        path, "pocket", traces=TracesRecipe(8), training=training, scores=ScoresRecipe(3, max_tokens=8)
    )
    teacher = StandIn(lambda question, i: known.get(question, "bug"))
    result = teach(recipe, folder, opener=lambda *_, **__: teacher)
    told = load_problems(path, n=1)[0].messages[0]["content"]
    asked = [{"role": "user", "content": "Message 1"}]
    for hop in ("base", "student"):
        assert 0 <= result.scores[hop]["n_unknown"] <= result.scores[hop]["n"]
        lines = (folder / "answers" / f"{hop}.jsonl").read_text(encoding="utf-8").splitlines()
        assert sum(json.loads(line)["verdict"] == "unknown" for line in lines) == result.scores[hop]["n_unknown"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    assert told in str(tokenizer.apply_chat_template(asked, tokenize=False))
    record = json.loads((folder / "recipe.json").read_text())
    assert (record["asking"], record["version"]) == ({"instruction": None, "graders": "shape"}, 2)
