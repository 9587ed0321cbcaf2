"""Rows from files of every kind, and prompts from folders and text files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from deepdistill.distill.problems.load import load_problems
from deepdistill.errors import ArtifactError


def test_files_of_every_kind_agree(tmp_path: Path) -> None:
    rows = [{"question": f"What is {i} plus {i}?", "answer": str(2 * i)} for i in range(50)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "p.csv").write_text("question,answer\n" + "\n".join(f"{r['question']},{r['answer']}" for r in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    read = [load_problems(str(tmp_path / f"p.{kind}"), "train", n=50) for kind in ("jsonl", "csv", "parquet")]
    stripped = [[(p.id, p.question, p.answer, p.grader) for p in problems] for problems in read]
    assert stripped[0] == stripped[1] == stripped[2]
    assert {grader for *_, grader in stripped[0]} == {"math"}


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


def test_tables_in_other_forms(tmp_path: Path, recorder: Any) -> None:
    text = "question{0}answer\nHow big is à?{0}4\n"
    (tmp_path / "semicolons.csv").write_text(text.format(";"), encoding="utf-8")
    (tmp_path / "tabs.tsv").write_text(text.format("\t"), encoding="utf-8")
    (tmp_path / "utf16.csv").write_text(text.format(","), encoding="utf-16")
    (tmp_path / "windows.csv").write_text(text.format(","), encoding="cp1252")
    (tmp_path / "zipped.csv.gz").write_bytes(gzip.compress(text.format(",").encode()))
    row = {"question": "How big is à?", "answer": "4"}
    (tmp_path / "list.json").write_text(json.dumps([row]))
    (tmp_path / "object.json").write_text(json.dumps({"version": 1, "data": [row]}))
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    for path in sorted(tmp_path.iterdir()):
        recorder.said.clear()
        problems = load_problems(str(path), report=recorder)
        assert [(p.question, p.answer) for p in problems] == [("How big is à?", "4")], path.name
        assert len(recorder.said) == 1 + (path.name == "windows.csv")


def test_a_long_field_is_read_and_a_row_with_too_many_is_not(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    long = "x" * 200_000
    path.write_text(f"question,answer\n{long},4\na,b,c\nd,5\n")
    assert [p.question for p in load_problems(str(path))] == [long, "d"]
    path.write_text("question,answer\na,b,c\n")
    with pytest.raises(
        ArtifactError, check=lambda error: error.code == "too-many-fields" and "p.csv:2" in error.message
    ):
        load_problems(str(path))


def test_a_line_without_end_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    with path.open("w") as file:
        file.write('{"question": "' + "x" * (17 << 20) + '"}\n{"question": "b"}\n')
    assert [p.question for p in load_problems(str(path))] == ["b"]


def test_the_readme_of_a_folder_is_no_problem(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("About these prompts.")
    (tmp_path / "a.txt").write_text("First?")
    assert [p.question for p in load_problems(str(tmp_path))] == ["First?"]


def test_a_parquet_bomb_is_refused_in_little_memory(tmp_path: Path) -> None:
    import tracemalloc

    texts = pyarrow.array(["x" * (20 << 20), "short"])
    answers = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 300 + [1], pyarrow.int32()), texts)
    table = pyarrow.table({"question": [f"q{i}" for i in range(301)], "answer": answers})
    pyarrow.parquet.write_table(table, tmp_path / "bomb.parquet")
    tracemalloc.start()
    problems = load_problems(str(tmp_path / "bomb.parquet"))
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()
    assert [(p.question, p.answer) for p in problems] == [("q300", "short")]
