"""Rows from files of every kind, and prompts from folders and text files."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet

from deepdistill.distill.problems.load import load_problems


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
