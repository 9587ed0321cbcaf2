"""The model card beside a file: front matter for the hub, how to run it, what it kept, where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from ...localrun.core.atomic import write_text
from ..convert.licence import Provenance

_MARK = "<!-- written by deepdistill quantize -->"


def write_card(path: Path, provenance: Provenance, *, table: str, plot: str, facts: Mapping[str, Any]) -> Path:
    """Write README.md beside a GGUF, and `plot` (SVG) beside that; return the card's path.

    A card that somebody else wrote stays: ours is then `<file>.md`.

    Raises:
        ArtifactError: `code` "write-failed".
    """
    lines = ["---", _front_matter(provenance), "---", _MARK, f"# {provenance.name}, quantized", ""]
    lines += [f"`{path.name}` runs in llama.cpp and everything built on it, or with", "", "```sh"]
    lines += [f"deepdistill chat {path.name}", "```", ""]
    if table:
        lines += ["## What was kept", "", "Against the unquantized model, on held-out traces and test problems.", ""]
        lines += [table, ""]
    if plot:
        picture_path = path.with_name("fidelity.svg")
        write_text(picture_path, plot)
        lines += [f"![Divergence against size]({picture_path.name})", ""]
    lines += ["## Where it comes from", ""]
    lines += [f"- {name.replace('_', ' ')}: {as_text(value)}" for name, value in facts.items() if value]
    lines += ["", f"`deepdistill inspect {path.name}` prints all of it; "
              f"`deepdistill quantize --verify {path.name}` makes the file again and compares.", ""]  # fmt: skip
    card_path = path.with_name("README.md")
    if card_path.is_file() and _MARK not in card_path.read_text(encoding="utf-8", errors="replace"):
        card_path = path.with_name(f"{path.name}.md")
    write_text(card_path, "\n".join(lines))
    return card_path


def _front_matter(provenance: Provenance) -> str:
    front: dict[str, Any] = {
        "license": provenance.licence or "other",
        "base_model": list(provenance.base_models),
        "library_name": "gguf",
        "tags": ["gguf", "deepdistill", "reasoning"],
    }
    front |= {"license_name": provenance.licence_name} if provenance.licence_name else {}
    return str(yaml.safe_dump(front, sort_keys=False)).strip()


def as_text(value: Any, write: Callable[[Any], str] = str) -> str:
    """Return a JSON value as a phrase: objects and lists without brackets, and all else as `write` writes it."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {as_text(item, write)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(as_text(item, write) for item in value)
    return write(value)
