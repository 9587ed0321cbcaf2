"""The commands around traces, as a user types them: teach up to the traces, dry runs, inspect, export, plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deepdistill.cli import main
from deepdistill.distill.problems.split import bucket_of

QUESTIONS = [q for i in range(200) if bucket_of(q := f"What is {i} plus {3 * i}, as a number?") == "train"][:12]


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """Twelve training questions with their answers, and some to be scored on."""
    path = tmp_path / "problems.jsonl"
    rows = [{"question": q, "answer": str(4 * int(q.split()[2]))} for q in QUESTIONS]
    held_out = [q for i in range(200, 400) if bucket_of(q := f"What is {i} plus {3 * i}, as a number?") == "test"]
    rows += [{"question": q, "answer": "1"} for q in held_out[:5]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Another tool's generations: three to each question, two of them right in words of their own."""
    path = tmp_path / "theirs.jsonl"
    rows = []
    for q in QUESTIONS:
        n = int(q.split()[2])
        said = [
            f"<think>{n} and three times that</think>\n\nThe answer is {4 * n}.",
            f"<think>Four times the first number makes it, so I multiply {n} by 4</think>\n\n{4 * n}",
            f"<think>a guess</think>\n\n{4 * n + 1}",
        ]
        rows.append({"problem": q, "answer": str(4 * n), "generations": said})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def last_json(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def run(problems: Path, theirs: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    argv = ["--problems", str(problems), "--traces", str(theirs), "--keep", "2", "--stop-after", "traces"]
    assert main(["teach", *argv, "--out", str(folder), "--quiet", "--offline"]) == 0
    return folder


def test_others_traces_come_in_graded_and_as_many_as_asked_for_are_kept(
    run: Path, problems: Path, theirs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    curation = json.loads((run / "curation.json").read_text())
    assert (curation["traces"], curation["dropped"]["wrong"], curation["kept"]) == (36, 12, 24)
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    argv = ["--problems", str(problems), "--traces", str(theirs), "--keep", "2", "--stop-after", "traces"]
    assert main(["teach", *argv, "--out", str(run)]) == 0
    assert f"24 of 36 traces train; all of them are in {run}/traces.jsonl" in capsys.readouterr().out


def test_a_run_without_a_trace_to_train_on_says_why_and_shows_them(
    problems: Path, theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in theirs.read_text().splitlines()]
    theirs.write_text("".join(json.dumps(row | {"generations": row["generations"][2:]}) + "\n" for row in rows))
    argv = ["--problems", str(problems), "--traces", str(theirs), "--student", "pocket", "--out", str(tmp_path / "run")]
    assert main(["teach", *argv, "--quiet"]) == 1
    err = capsys.readouterr().err
    assert "no trace to train on" in err
    assert "12 wrong" in err
    assert "a guess" in (tmp_path / "run" / "report.html").read_text()


def test_inspect_shows_files_runs_and_single_traces(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run / "traces.jsonl"), "--json"]) == 0
    report = last_json(capsys)
    assert (report["traces"], report["verdicts"]) == (36, {"right": 24, "wrong": 12})
    assert main(["inspect", str(run), "--json"]) == 0
    assert last_json(capsys)["curation"]["kept"] == 24
    assert main(["inspect", str(run), "--show", "2", "--json"]) == 0
    out = capsys.readouterr().out
    assert "Four times the first number" in out
    trace = json.loads(out.splitlines()[-1])
    assert main(["inspect", str(run / "traces.jsonl"), "--show", trace["id"][:10]]) == 0
    assert "Four times the first number" in capsys.readouterr().out


def test_export_writes_rows_beside_the_run_or_where_it_is_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--to", "messages", "--json"]) == 0
    found = last_json(capsys)
    assert found["rows"] == 24
    rows = [json.loads(line) for line in Path(found["path"]).read_text().splitlines()]
    assert rows[0]["messages"][-1]["reasoning_content"] == f"{QUESTIONS[0].split()[2]} and three times that"
    out = tmp_path / "all.parquet"
    argv = ["--to", "parquet", "--all", "--reasoning", "think", "--out", str(out), "--json"]
    assert main(["export", str(run / "traces.jsonl"), *argv]) == 0
    assert last_json(capsys) == {"path": str(out), "rows": 36}
    assert main(["export", "--to", "messages"]) == 2
    assert "which traces?" in capsys.readouterr().err


def test_a_dry_run_asks_nobody_and_leaves_nothing(
    problems: Path, theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = ["--teacher", "http://127.0.0.1:9/v1", "--samples", "3", "--max-tokens", "1000", "--price", "1,10"]
    argv = ["teach", "--problems", str(problems), *nobody, "--dry-run", "--json", "--out", str(tmp_path / "new")]
    assert main(argv) == 0
    found = last_json(capsys)
    assert (found["n_problems"], found["n_held_out"], found["n_traces"]) == (12, 5, 36)
    assert found["usd"] == pytest.approx((36_000 * 10 + found["prompt_tokens"]) / 1e6)
    assert not (tmp_path / "new").exists()
    assert main(["teach", "--problems", str(problems), "--traces", str(theirs), "--dry-run"]) == 0
    assert "no teacher is asked" in capsys.readouterr().out


def test_plan_says_what_a_large_teacher_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--tokens-per-s", "5000", "--gpu-hour", "2", "--json"]) == 0
    made = last_json(capsys)
    assert made["hours"] == pytest.approx(10_000 * 4_000 / 5000 / 3600)
    assert made["usd_rented"] == pytest.approx(made["hours"] * 8 * 2)


@pytest.mark.parametrize(
    ("argv", "status", "code"),
    [
        (["teach", "--problems", "{tmp}/none.jsonl"], 1, "no-such-file"),
        (["teach", "--problems", "{tmp}/torn.jsonl", "--stop-after", "traces"], 1, "line-broken"),
        (["teach", "--problems", "{p}", "--traces", "{tmp}/none.jsonl", "--stop-after", "traces"], 1, "no-such-file"),
        (["teach", "--problems", "{p}", "--traces", "{p}", "--stop-after", "traces"], 1, "no-traces"),
        (["teach", "--problems", "{p}", "--max-usd", "3", "--dry-run"], 2, "price-missing"),
        (["teach", "--problems", "{p}", "--price", "cheap", "--dry-run"], 2, "bad-settings"),
        (["teach", "--problems", "{p}", "--set", "cost.judge_price=1", "--dry-run"], 2, "bad-settings"),
        (["teach", "--problems", "{p}", "--set", "curation.accept=me", "--dry-run"], 2, "bad-settings"),
        (["teach", "--problems", "{p}", "--teacher", "nobody", "--stop-after", "traces"], 2, "no-such-model"),
        (["teach", "--problems", "{p}", "--device", "tpu", "--stop-after", "traces"], 2, "no-such-device"),
        (["teach", "--problems", "{p}", "--teacher", "https://api.deepseek.com/v1", "--offline"], 2, "offline"),
        (["teach", "--problems", "{p}", "--stop-after", "traces"], 1, "pocket-cannot-answer"),
        (["inspect", "{tmp}/none"], 1, "file-unreadable"),
        (["inspect", "{p}"], 1, "line-broken"),
        (["inspect", "{tmp}"], 1, "not-a-run"),
        (["export", "{p}", "--to", "messages"], 1, "line-broken"),
        (["plan", "nobody"], 2, "no-such-model"),
        (["plan", "{p}"], 1, "config-broken"),
    ],
)
def test_what_is_off_is_one_line_with_its_exit_code(
    argv: list[str], status: int, code: str, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "torn.jsonl").write_text('{"question": "c')
    argv = [word.replace("{tmp}", str(tmp_path)).replace("{p}", str(problems)) for word in argv]
    out = ["--out", str(tmp_path / "run"), "--student", "pocket"] if argv[0] == "teach" else []
    assert main([*argv, *out, "--json"]) == status
    printed, err = capsys.readouterr()
    assert json.loads(printed.splitlines()[-1])["error"]["code"] == code
    assert err.count("error: ") == 1
    assert "Traceback" not in err
