"""Foreign text reaches a terminal without what a terminal obeys."""

from __future__ import annotations

import pytest

from deepdistill.localrun.core.printable import new_console, printable


def test_control_characters_and_overrides_go_and_tabs_become_spaces() -> None:
    assert printable("a\x1b[2J\x07\x9b1mb\u202etxt\tc\nd\r") == "a[2J1mbtxt  c\nd"


def test_a_dumb_terminals_width_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal then
    monkeypatch.setenv("COLUMNS", "47")
    assert new_console().width == 47
