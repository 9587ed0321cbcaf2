"""Where a model comes from: its licence and base model, read from its card or config, written to file and card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from gguf import GGUFWriter
from gguf.metadata import Metadata

from ...errors import ArtifactError
from .checkpoint import Checkpoint

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_MARK = "<!-- written by deepdistill quantize -->"


@dataclass(frozen=True)
class Provenance:
    """A model's name, licence (with its name and link where it is no standard one) and base models (`ORG/NAME`)."""

    name: str
    licence: str | None
    licence_name: str | None
    licence_link: str | None
    base_models: tuple[str, ...]


def read_provenance(checkpoint: Checkpoint) -> Provenance:
    """Read README.md's front matter; what it does not say is taken from config.json, for an adapter from its base's.

    Raises:
        ArtifactError: the front matter is no YAML.
    """
    card = _front_matter(checkpoint.folder)
    if checkpoint.base:
        own = {key: value for key, value in card.items() if value and key not in ("base_model", "model_name")}
        card = _front_matter(checkpoint.base) | own  # peft's card names the base by its place on this machine
    licence = card.get("license") or checkpoint.config.get("license")
    if isinstance(licence, list):
        licence = ", ".join(map(str, licence))
    bases = card.get("base_model") or checkpoint.config.get("base_model") or _origin(checkpoint.config)
    bases = [bases] if isinstance(bases, str) else bases or []
    return Provenance(
        name=str(card.get("model_name") or checkpoint.folder.resolve().name),
        licence=str(licence) if licence else None,
        licence_name=_text(card.get("license_name")),
        licence_link=_text(card.get("license_link")),
        base_models=tuple(map(str, bases)),
    )


def _front_matter(folder: Path) -> dict[str, Any]:
    try:
        return dict(Metadata.load_model_card(folder))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise ArtifactError(f"the front matter of {folder}/README.md is broken: {first}") from error


def _text(value: Any) -> str | None:
    return str(value) if value else None


def _origin(config: dict[str, Any]) -> str | None:
    """Return the hub name that the config remembers, if it is one."""
    name = config.get("_name_or_path") or ""
    return name if _REPOSITORY.fullmatch(name) else None


def write_provenance(provenance: Provenance, writer: GGUFWriter) -> None:
    """Add it to a file's metadata, under llama.cpp's names."""
    writer.add_name(provenance.name)
    if provenance.licence:
        writer.add_license(provenance.licence)
    if provenance.licence_name:
        writer.add_license_name(provenance.licence_name)
    if provenance.licence_link:
        writer.add_license_link(provenance.licence_link)
    if not provenance.base_models:
        return
    writer.add_base_model_count(len(provenance.base_models))
    for i, base in enumerate(provenance.base_models):
        organization, _, name = base.rpartition("/")
        writer.add_base_model_name(i, name)
        if _REPOSITORY.fullmatch(base):
            writer.add_base_model_organization(i, organization)
            writer.add_base_model_repo_url(i, f"https://huggingface.co/{base}")


def write_card(path: Path, provenance: Provenance, table: str, plot: str, facts: Mapping[str, Any]) -> Path:
    """Write README.md beside a file: front matter for the hub, how to run it, what was measured, where it is from.

    A card that somebody else wrote is left alone: ours goes to `<file>.md` then.

    Raises:
        ArtifactError: it cannot be written.
    """
    front = {
        "license": provenance.licence or "other",
        "base_model": list(provenance.base_models),
        "library_name": "gguf",
        "tags": ["gguf", "deepdistill", "reasoning"],
    }
    front |= {"license_name": provenance.licence_name} if provenance.licence_name else {}
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", _MARK, f"# {provenance.name}, quantized", ""]
    lines += [f"`{path.name}` runs in llama.cpp and whatever is built on it, or with", "", "```sh"]
    lines += [f"deepdistill chat {path.name}", "```", ""]
    if table:
        lines += ["## What was kept", "", "Against the unquantized model, on held-out traces and test problems.", ""]
        lines += [table, ""]
    if plot:
        picture = path.with_name("fidelity.svg")
        _write_text(picture, plot)
        lines += [f"![Divergence against size]({picture.name})", ""]
    lines += ["## Where it is from", ""]
    lines += [f"- {name.replace('_', ' ')}: {_said(value)}" for name, value in facts.items() if value]
    lines += ["", f"`deepdistill inspect {path.name}` prints all of it; "
              f"`deepdistill quantize --verify {path.name}` makes the file again and compares.", ""]  # fmt: skip
    card = path.with_name("README.md")
    if card.is_file() and _MARK not in card.read_text(encoding="utf-8", errors="replace"):
        card = path.with_name(f"{path.name}.md")
    _write_text(card, "\n".join(lines))
    return card


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_said(one)}" for key, one in value.items())
    if isinstance(value, list):
        return "; ".join(_said(one) for one in value)
    return str(value)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
