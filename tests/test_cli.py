"""What a person sees: one line and a hint for what they did wrong, the right exit code, JSON as the last line."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import typer

from deepdistill.cli import app, main


@pytest.fixture(autouse=True)
def _nothing_piped_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))


@pytest.mark.parametrize(
    ("argv", "status", "code", "hints"),
    [
        (["eval", "pocket", "--problems", "gym:chain_sam"], 2, "no-such-dataset", "chain_sum"),
        (["eval", "pocket", "--problems", "gym:chain_sum?terms=2"], 2, "no-such-parameter", "min_terms"),
        (["eval", "pocket", "--problems", "gym:gcd"], 1, "pocket-cannot-answer", "it answers"),
        (["eval", "pocket", "--problems", "{tmp}/empty.jsonl"], 1, "no-problems", ""),
        (["eval", "nowhere", "--n", "3"], 2, "no-such-model", "checkpoint folder"),
        (["eval", "{tmp}/nowhere.gguf", "--n", "3"], 1, "no-such-model", ""),
        (["eval", "{tmp}/broken.gguf", "--n", "3"], 1, "gguf-broken", ""),
        (["eval", "http://127.0.0.1:9/v1", "--n", "3"], 1, "server-down", ""),
        (
            ["teach", "--problems", "gym:chain_sum", "--student", "nobody", "--out", "{tmp}/run"],
            2,
            "no-such-model",
            "smollm2",
        ),
        (["teach", "--problems", "gym:chain_sum", "--out", "{tmp}/empty.jsonl"], 1, "out-is-file", "--out"),
        (["quantize", "{tmp}/nowhere"], 1, "no-checkpoint", ""),
        (["quantize", "{tmp}"], 1, "no-config", ""),
        (["chat", "{tmp}/nowhere.gguf", "-p", "hi"], 1, "no-such-model", ""),
        (["chat", "{tmp}/broken.gguf", "-p", "hi"], 1, "gguf-broken", ""),
    ],
)
def test_bad_input_is_one_line_and_a_hint(
    argv: list[str], status: int, code: str, hints: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00\x00\x00 and no more")
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main([*(word.replace("{tmp}", str(tmp_path)) for word in argv), "--json"]) == status
    printed, error = capsys.readouterr()
    lines = [line for line in error.splitlines() if line.startswith(("error:", "hint:"))]
    assert "Traceback" not in error
    assert json.loads(printed.splitlines()[-1])["error"]["code"] == code
    assert lines[0].startswith("error: ")
    assert hints in error
    assert set(before) <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("argv", [["teach"], ["eval"], ["nothing"], ["eval", "pocket", "--n", "0"]])
def test_usage_errors_are_2(argv: list[str]) -> None:
    assert main(argv) == 2


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert main(["--help"]) == 0
    assert "deepdistill 0." in capsys.readouterr().out


def test_eval_prints_its_json_last(capsys: pytest.CaptureFixture[str], chain_sum: str, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    argv = ["eval", "pocket", "--problems", chain_sum, "--n", "20", "--json", "--quiet", "--answers", str(answers)]
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    keys = {"accuracy", "n", "interval", "closed", "looped", "tokens_per_answer", "tokens_per_s", "seed", "problems"}
    assert set(result) >= keys
    assert result["n"] == 20
    assert result["accuracy"] >= 0.8
    right = [json.loads(line)["verdict"] == "right" for line in answers.read_text().splitlines()]
    assert sum(right) / 20 == result["accuracy"]


def test_demo_quick_goes_the_whole_way(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--quick", "--minutes", "0.05", "--out", str(out), "--json", "--quiet"]) == 0
    output = capsys.readouterr().out
    result = json.loads(output.splitlines()[-1])
    assert set(result["scores"]) == {"base", "student", "gguf"}
    assert Path(result["gguf"]).is_file()
    assert f"next: deepdistill chat {out}" in output
    # And the pieces of the same run, by hand: another type, and the chat's answer to a question.
    assert main(["quantize", str(out), "--type", "F32", "--json", "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(report["proofs"][name]["holds"] for name in ("valid", "tokens", "template", "greedy"))
    assert report["proofs"]["n_tokens"] == 20 * 64
    assert main(["chat", str(out), "-p", "What is 4 + 3?", "--max-tokens", "20", "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"content", "reasoning_content", "finish_reason"} <= set(said)


def test_a_student_without_a_tokenizer_is_named(
    pocket_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pocket_student, tmp_path / "student")
    (tmp_path / "student" / "tokenizer.json").unlink()
    assert main(["quantize", str(tmp_path / "student")]) == 1
    assert "tokenizer" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.gguf"))


def test_a_program_gets_an_errors_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["teach", "--problems", "p", "--max-usd", "3", "--dry-run", "--json"]) == 2
    out, err = capsys.readouterr()
    record = json.loads(out.splitlines()[-1])["error"]
    assert record["code"] == "price-missing"
    assert record["message"] in err


def test_help_fits_80_columns_and_is_whole_sentences(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    group = typer.main.get_command(app)
    assert main(["--help"]) == 0
    listed = " ".join(capsys.readouterr().out.split())
    names = [[name] for name in group.commands] + [["runs", "compare"], ["runs", "delete"]]  # type: ignore[attr-defined]
    for name in names:
        assert main([*name, "--help"]) == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 80
        assert "..." not in text.partition("\n")[2]
        sentences = [paragraph for paragraph in text.split("\n\n")[1:] if not paragraph.endswith(":")]
        assert sentences[0].endswith(".")
        if len(name) == 1:
            assert f"{name[0]} {' '.join(sentences[0].split())}" in listed  # in full
    for command in (group.commands[name[0]] for name in names):  # type: ignore[attr-defined]
        for option in command.params:
            assert option.help, option.name
            assert re.search(r"[.…\]']$", option.help), option.help
