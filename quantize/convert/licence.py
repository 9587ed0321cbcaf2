"""A model's provenance: its name, licence and base models, read from its card or config, written to a GGUF."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from gguf import GGUFWriter
from gguf.metadata import Metadata

from ...errors import ArtifactError
from .checkpoint import Checkpoint

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Provenance:
    """A model's name, licence (with its name and link if it is not a standard one) and base models (`ORG/NAME`)."""

    name: str
    licence: str | None
    licence_name: str | None
    licence_link: str | None
    base_models: tuple[str, ...]


def read_provenance(checkpoint: Checkpoint) -> Provenance:
    """Read README.md's front matter, then config.json for what is missing there; for an adapter, its base's too.

    Raises:
        ArtifactError: `code` "card-broken": the front matter is not YAML.
    """
    card = _front_matter(checkpoint.folder)
    if checkpoint.base:
        # peft's card names the base by its path on this machine, which is nobody else's business.
        stated = {key: value for key, value in card.items() if value and key not in ("base_model", "model_name")}
        card = _front_matter(checkpoint.base) | stated
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
        message = f"the front matter of {folder}/README.md is broken: {first}"
        raise ArtifactError(message, code="card-broken") from error


def _text(value: Any) -> str | None:
    return str(value) if value else None


def _origin(config: dict[str, Any]) -> str | None:
    """Return the model's name on the hub, if the config has one."""
    name = config.get("_name_or_path") or ""
    return name if _REPOSITORY.fullmatch(name) else None


def write_provenance(provenance: Provenance, writer: GGUFWriter) -> None:
    """Add a model's provenance to a file's metadata, under llama.cpp's keys."""
    Metadata(
        name=provenance.name,
        license=provenance.licence,
        license_name=provenance.licence_name,
        license_link=provenance.licence_link,
        base_models=[_base_model(base) for base in provenance.base_models] or None,
    ).set_gguf_meta_model(writer)


def _base_model(base: str) -> dict[str, str]:
    organization, _, name = base.rpartition("/")
    on_hub = {"organization": organization, "repo_url": f"https://huggingface.co/{base}"}
    return {"name": name} | (on_hub if _REPOSITORY.fullmatch(base) else {})
