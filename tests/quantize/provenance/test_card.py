"""The model card: its front matter, and that a card of somebody else stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deepdistill.quantize.convert.licence import Provenance
from deepdistill.quantize.provenance.card import as_text, write_card

STUDENT = Provenance("A student", "other", "Some licence", None, ("some-org/Some-Base-1B",))


def test_a_card_has_front_matter_table_plot_and_facts(tmp_path: Path) -> None:
    facts = {"think_budget": "96", "tools": {"gguf": "0.19"}, "teacher": ""}
    path = write_card(tmp_path / "a.gguf", STUDENT, table="| a |", plot="<svg/>", facts=facts)
    card = path.read_text()
    assert path == tmp_path / "README.md"
    assert card.startswith("---\nlicense: other\nbase_model:\n- some-org/Some-Base-1B\n")
    assert "license_name: Some licence\n" in card
    assert "| a |" in card
    assert "- think budget: 96\n- tools: gguf 0.19\n" in card
    assert "teacher" not in card, "what is empty is left out"
    assert (tmp_path / "fidelity.svg").read_text() == "<svg/>"


def test_our_card_is_replaced_and_another_ones_is_not(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        assert write_card(tmp_path / name, STUDENT, table="", plot="", facts={}) == tmp_path / "README.md"
    assert "b.gguf" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    assert write_card(tmp_path / "c.gguf", STUDENT, table="", plot="", facts={}) == tmp_path / "c.gguf.md"
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.5, "1.5"), ([1, "b"], "1; b"), ([{"what": "model", "licence": "mit"}], "what model, licence mit")],
)
def test_json_becomes_a_phrase(value: Any, text: str) -> None:
    assert as_text(value) == text
