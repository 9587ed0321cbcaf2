"""`deepdistill runs`: what is in a folder of runs, two of them compared, and one deleted, or refused."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from deepdistill.cli import main
from deepdistill.distill.recipe.teach import TeachRecipe
from deepdistill.distill.run import Run
from deepdistill.localrun.core.settings import changed

OLD_RUN = Path(__file__).parent / "data" / "run-0.1.0" / "run"
RECIPE = TeachRecipe("gym:chain_sum?max_terms=2", "pocket")


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))


def score(accuracy: float) -> dict[str, Any]:
    return {"accuracy": accuracy, "n": 4, "interval": [0.1, 0.9]}


def make(name: str, *, verdicts: str = "", **changes: Any) -> Path:
    """Make a run whose student's answers have the verdicts, one letter each."""
    folder = Path("runs") / name
    with Run(folder, changed(RECIPE, {key.replace("__", "."): value for key, value in changes.items()})) as run:
        if verdicts:
            run.save("scores.json", {"base": score(0.25), "student": score(verdicts.count("r") / len(verdicts))})
            whole = {"r": "right", "w": "wrong", "u": "unknown"}
            lines = [json.dumps({"problem_id": f"{i}", "verdict": whole[v]}) for i, v in enumerate(verdicts)]
            (folder / "answers").mkdir()
            (folder / "answers" / "student.jsonl").write_text("\n".join(lines) + "\n{torn")
    return folder


def last_json(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def code_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str | None:
    main(["runs", *arguments, "--json"])
    found = last_json(capsys)
    return found["error"]["code"] if "error" in found else None


def test_the_list_says_how_far_each_run_came(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--json"]) == 0
    assert last_json(capsys) == []
    make("scored", verdicts="rrww")
    shutil.copytree(OLD_RUN, "runs/old")
    (Path("runs") / "broken").mkdir()
    (Path("runs") / "broken" / "recipe.json").write_text("{")
    (Path("runs") / "link").symlink_to("scored")
    with Run(Path("runs/begun"), RECIPE):
        assert main(["runs", "--json"]) == 0
        found = {Path(run["folder"]).name: run for run in last_json(capsys)}
    assert {name: (run["stage"], run["is_at_work"]) for name, run in found.items()} == {
        "scored": ("scored", False),
        "old": ("trained", False),
        "begun": ("begun", True),
    }
    assert (found["scored"]["base"], found["scored"]["accuracy"], found["old"]["accuracy"]) == (0.25, 0.5, None)
    files = [path for path in Path("runs/old").rglob("*") if path.is_file()]
    assert found["old"]["n_bytes"] == sum(path.stat().st_size for path in files)


def test_at_80_columns_the_list_has_every_name_in_full(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    make("smollm2-" + "long" * 12, verdicts="rw")
    assert main(["runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    cells = [line.split("  ")[0].strip() for line in lines]
    assert "smollm2-" + "long" * 12 in "".join(cells)
    assert "…" not in "".join(lines)


def test_comparing_shows_settings_scores_and_answers_that_differ(capsys: pytest.CaptureFixture[str]) -> None:
    make("a", verdicts="rrwwu")
    make("b", verdicts="rwrww", training__epochs=5, training__lora__rank=64)
    assert main(["runs", "compare", "runs/a", "runs/b", "--json"]) == 0
    found = last_json(capsys)
    assert found["settings"] == {"training.epochs": [3, 5], "training.lora.rank": [32, 64]}
    assert [one["accuracy"] for one in found["hops"]["student"]] == [0.4, 0.4]
    assert found["answers"] == {"gained": 1, "lost": 1, "still wrong": 1, "still right": 1, "unknown": 1}
    assert code_of(capsys, "compare", "runs/a", "runs") == "no-run"


def test_a_run_is_deleted_only_after_a_yes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make("a", verdicts="rw")
    assert code_of(capsys, "delete", "runs/a") == "not-confirmed"
    for reply, is_there in (("n\n", True), ("y\n", False)):
        answers = io.StringIO(reply)
        monkeypatch.setattr(answers, "isatty", lambda: True)
        monkeypatch.setattr("sys.stdin", answers)
        assert main(["runs", "delete", "runs/a"]) == 0
        assert folder.exists() == is_there
    shutil.copytree(OLD_RUN, "runs/old")
    assert code_of(capsys, "delete", "runs/old", "--yes") is None
    assert list(Path("runs").iterdir()) == []


def test_what_is_no_run_or_more_than_a_run_is_not_deleted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = Path("outside")
    outside.mkdir()
    (outside / "precious.txt").write_text("mine")
    folder = make("a", verdicts="rw")

    def refusal(path: Path) -> str | None:
        return code_of(capsys, "delete", str(path), "--yes")

    assert [refusal(path) for path in (outside, Path("runs"), folder / "answers", Path("none"))] == ["no-run"] * 4
    Path("link").symlink_to(folder)
    assert refusal(Path("link")) == "no-run"
    (folder / "answers" / "link").symlink_to(outside.resolve())
    assert refusal(folder) == "run-has-link"
    (folder / "answers" / "link").unlink()
    (folder / "notes.txt").write_text("mine")
    assert refusal(folder) == "not-of-run"
    (folder / "notes.txt").unlink()
    shutil.copytree(outside, folder / "photos")
    assert refusal(folder) == "not-of-run"
    shutil.rmtree(folder / "photos")
    with Run(folder, RECIPE):
        assert refusal(folder) == "file-locked"
    (folder / "recipe.json").write_text('{"name": "of another program"}')
    assert refusal(folder) == "recipe-broken"
    assert (outside / "precious.txt").exists()
    assert (folder / "scores.json").exists()
    monkeypatch.chdir(make("b"))
    assert refusal(Path("../b")) == "folder-in-use"
