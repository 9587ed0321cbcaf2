"""The table of a student's files, and what of it can be compared."""

from __future__ import annotations

from pathlib import Path

from deepdistill.quantize.provenance.comparison import ComparedFile, keep_files


def test_a_table_holds_only_what_can_be_compared(tmp_path: Path) -> None:
    def row(name: str, texts: str, asked: str) -> ComparedFile:
        return ComparedFile(
            name, 10, 4.0, False, {"kl_mean": 0.1}, {"accuracy": 0.5}, {"lost": 1, "gained": 0}, texts, asked
        )

    keep_files(tmp_path, [row("a", "t1", "200 of x"), row("b", "t1", "200 of x")], "source")
    kept = {one.name: one for one in keep_files(tmp_path, [row("b", "t1", "20 of y")], "source")}
    assert (kept["a"].fidelity, kept["a"].answers, kept["a"].paired) == ({"kl_mean": 0.1}, None, None)
    kept = {one.name: one for one in keep_files(tmp_path, [row("c", "t2", "20 of y")], "source")}
    assert (kept["a"].fidelity, kept["b"].fidelity) == (None, None)
    assert kept["b"].answers == {"accuracy": 0.5}
    assert [one.name for one in keep_files(tmp_path, [row("d", "t2", "")], "other")] == ["d"]
