"""Foreign text reaches a terminal without what a terminal obeys."""

from __future__ import annotations

import pytest
from rich.text import Text

from deepdistill.localrun.core.printable import facts_table, new_console, printable


def test_control_characters_and_overrides_go_and_tabs_become_spaces() -> None:
    assert printable("a\x1b[2J\x07\x9b1mb\u202etxt\tc\nd\r") == "a[2J1mbtxt  c\nd"


def test_a_dumb_terminals_width_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal then
    monkeypatch.setenv("COLUMNS", "47")
    assert new_console().width == 47


def test_a_console_writes_its_own_styles_and_no_escape_of_a_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    table = facts_table([("name", Text("\x1b]0;pwned\x07[/b]"))])
    console = new_console()
    console.print("\x1b]0;pwned\x07[/b]", table, style="bold")
    printed = capsys.readouterr().out
    assert "\x1b[1m" in printed
    assert printed.count("]0;pwned[/b]") == 2
    assert "\x1b]" not in printed
    assert "\x07" not in printed
