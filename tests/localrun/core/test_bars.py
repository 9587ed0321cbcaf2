"""What a person sees of work that takes long: two lines a stage on a terminal, a few plain ones in a pipe."""

from __future__ import annotations

import re

import pytest
from rich.cells import cell_len

from deepdistill.localrun.core.bars import Bars

HOSTILE = "\x1b]0;owned\x07 \x1b[2J [red]up[/red] \u202e" + "漢" * 200


def test_a_pipe_gets_a_few_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Bars(quiet=False) as bars:
        for done in range(1, 101):
            bars.progress("training", done, total=100, note=f"step {done} {HOSTILE}")
        bars.progress("training", 100, total=100, note="again")
        bars.say("a word")
    printed, shown = capsys.readouterr()
    assert printed == ""
    lines = shown.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["training: 1 %", "training: 100 %", "note: a word"]
    assert "step 1 " in lines[0]
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", shown)


def test_quiet_draws_nothing_and_still_says(capsys: pytest.CaptureFixture[str]) -> None:
    with Bars(quiet=True) as bars:
        bars.progress("training", 1, total=2)
        bars.say("a word")
    assert capsys.readouterr().err.split() == ["note:", "a", "word"]


def test_a_terminal_gets_two_lines_a_stage_within_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "80", "LINES": "24", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    with Bars(quiet=False) as bars:
        bars.progress("a stage with a name that is far too long for it", 1, total=1, note="first")
        bars.progress("training", 1, total=4, note="a note")
        bars.progress("training", 2, total=4, note=HOSTILE)
    shown = capsys.readouterr().err
    assert "\x1b]0" not in shown
    assert "\u202e" not in shown
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).split("\r")[-1] for line in shown.splitlines()]
    assert max(map(cell_len, lines)) <= 80
    done = [i for i, line in enumerate(lines) if line.startswith("a stage with") and "first" in line]
    assert len(done) == 1  # in one line, once
    last = next(i for i in reversed(range(len(lines))) if "50 %" in lines[i])
    assert lines[last].startswith("training")
    assert lines[last + 1].startswith("  �]0;owned")
    assert lines[last + 1].endswith("…")
    assert last > done[0]
