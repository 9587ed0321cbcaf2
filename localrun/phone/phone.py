"""A GGUF as a folder for phones and browsers: the file, a card, an Ollama Modelfile, and a page that runs it offline.

The page (`../web/`) is static. It runs llama.cpp in WebAssembly (wllama), keeps all its files on the device at the
first visit, and needs no network from then on. Nothing in the folder names a server, and the page's content security
policy forbids every server but its own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import ArtifactError, ModelError
from ..core.atomic import replacing_folder
from ..core.reporter import SILENT, Reporter
from ..core.text import format_bytes
from ..families.thinking import prompt_opens_thinking
from ..gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from ..gguf.header import read_gguf
from ..gguf.split import is_shard, split_gguf
from .cards import ModelCard, about, modelfile, readme
from .wllama import unpack_wllama

DEFAULT_MEMORY_MB = 2000
MAX_TOKENS = 2048  # of one answer, as in the terminal

_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")  # to make, the most exact first
_MAX_WASM_BYTES = 4_000_000_000  # a page's memory, the model and its context together
_PAGE = Path(__file__).parents[1] / "web"
_GIVEN = ("./", "files.js")  # what a visit fetches besides the files that files.js lists


@dataclass(frozen=True)
class PhoneReport:
    """What was written: `files` has each file's size in bytes by its path in `folder`; `notes` are for people."""

    folder: Path
    model: str
    n_ctx: int
    memory_bytes: int
    files: dict[str, int]
    notes: tuple[str, ...]

    def summary(self) -> list[str]:
        """Return the report's lines for people."""
        n_shards = sum(is_shard(Path(name)) for name in self.files)
        return [
            f"{self.folder}: {format_bytes(sum(self.files.values()))} in {len(self.files)} files",
            f"{self.model}: {format_bytes(self.files[self.model])}; about {format_bytes(self.memory_bytes)} of memory "
            f"with {self.n_ctx} tokens of context",
            f"web/: the page, with the model in {n_shards} {'part' if n_shards == 1 else 'parts'}",
            *self.notes,
        ]


def export_phone(
    model_path: Path,
    out: Path,
    *,
    memory_mb: int | None = None,
    make: Callable[[str], Path] | None = None,
    offline: bool = False,
    report: Reporter = SILENT,
) -> PhoneReport:
    """Write a folder for phones and browsers from a GGUF, or from the best GGUF of a folder for the memory.

    From a folder it takes the largest quantized file that fits. `memory_mb` is what the model and its context may take,
    by default 2,000 MB. If no file fits, `make` is called with a file type such as Q4_K_M and returns the path of the
    file that it wrote. `offline` takes wllama from the cache only.

    Raises:
        ArtifactError: code "already-exists" or "no-such-model", or see `read_gguf` and `split_gguf`.
        ModelError: code "not-enough-memory" or "no-chat-template", or see `unpack_wllama`.
        UsageError: see `unpack_wllama`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(
            f"{out} already exists", "name another folder with --out, or remove it", code="already-exists"
        )
    model = choose_model(model_path, (memory_mb or DEFAULT_MEMORY_MB) * 1_000_000, make)
    starts_inside = model.tags is not None and prompt_opens_thinking(
        model.render({"role": "user", "content": "?"}), model.tags
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(out) as folder:
        notes = _fill(folder, model, starts_inside=starts_inside, offline=offline, report=report)
        if out.exists():
            out.rmdir()  # it is empty
    if model.path != model_path:
        notes = [f"took {model.path}", *notes]
    if model.memory_bytes > _MAX_WASM_BYTES:
        notes.append(
            "too large for a browser, which gives a page 4 GB of memory at most: use an app that opens GGUF files"
        )
    files = {path.relative_to(out).as_posix(): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    return PhoneReport(out, f"{model.name}.gguf", model.n_ctx, model.memory_bytes, files, tuple(notes))


def _fill(folder: Path, model: ModelCard, *, starts_inside: bool, offline: bool, report: Reporter) -> list[str]:
    """Write everything into an empty folder; return notes for people."""
    web = folder / "web"
    for name in ("wllama", "model"):
        (web / name).mkdir(parents=True)
    notes = unpack_wllama(web / "wllama", offline=offline, report=report)
    whole = folder / f"{model.name}.gguf"
    report.progress("writing the folder", 0, total=2, note="copying the model")
    shutil.copyfile(model.path, whole)
    report.progress("writing the folder", 1, total=2, note="splitting the model")
    shards = split_gguf(whole, web / "model")
    _write_page(web, model, shards=shards, starts_inside=starts_inside)
    (folder / "Modelfile").write_text(modelfile(model), encoding="utf-8")
    (folder / "README.md").write_text(readme(model, len(shards)), encoding="utf-8")
    report.progress("writing the folder", 2, total=2)
    return notes


def choose_model(model_path: Path, memory: int, make: Callable[[str], Path] | None) -> ModelCard:
    """Return the best file for so many bytes of memory: the given one, the folder's best, or one that `make` writes.

    Raises:
        ArtifactError, ModelError: see `export_phone`.
    """
    found = [ModelCard.of(path, memory) for path in _candidates(model_path)]
    fitting = [model for model in found if model.fits]
    if fitting:
        return max(fitting, key=lambda model: (not model.is_float, model.size_bytes))
    smallest = min(found, key=lambda model: model.size_bytes, default=None)
    possible = [type_ for type_ in _TYPES if smallest is None or _may_fit(smallest, type_, memory)]
    for type_ in possible if make else ():
        assert make
        written = ModelCard.of(make(type_), memory)
        if written.fits:
            return written
    if smallest is None:
        raise ArtifactError(
            f"there is no GGUF file in {model_path}", "make one: deepdistill quantize", code="no-such-model"
        )
    needs = smallest.footprint.total_bytes(smallest.min_ctx)
    hints = [f"a smaller type may fit: deepdistill quantize --type {possible[0]}"] if possible and not make else []
    raise ModelError(
        f"{smallest.path.name} with {smallest.min_ctx} tokens of context takes {format_bytes(needs)} of memory, "
        f"and only nine tenths of {format_bytes(memory)} may be used",
        "; ".join([*hints, "or give more memory, or take a smaller model"]).removeprefix("or "),
        code="not-enough-memory",
    )


def _candidates(model_path: Path) -> Iterator[Path]:
    """Yield the models at a path: one file, or those of a folder."""
    if not model_path.is_dir():
        if not model_path.exists():
            hint = "give a .gguf file or a run folder"
            raise ArtifactError(f"there is no model {model_path}", hint, code="no-such-model")
        yield model_path
        return
    for path in sorted(model_path.rglob("*.gguf")):
        if not is_shard(path) and read_gguf(path).metadata.get("general.type", "model") == "model":
            yield path


def _may_fit(model: ModelCard, type_: str, memory: int) -> bool:
    """Return whether a model could fit if all its weights had a file type's base type; real files are larger."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType["_".join(type_.split("_")[:2])]]
    smaller = replace(model.footprint, weight_bytes=model.n_weights // block * block_bytes)
    return smaller.max_ctx(memory) >= model.min_ctx


def _write_page(web: Path, model: ModelCard, *, shards: list[Path], starts_inside: bool) -> None:
    """Copy the page's own files, and write what it runs and its list of files for it."""
    for path in _PAGE.iterdir():
        shutil.copyfile(path, web / path.name)
    manifest = {"name": model.name, "short_name": model.name, "start_url": "./", "display": "standalone"}
    icon = {"src": "icon.svg", "sizes": "any", "type": "image/svg+xml"}
    text = json.dumps(manifest | {"icons": [icon]}, indent=2) + "\n"
    (web / "manifest.webmanifest").write_text(text, encoding="utf-8")
    paths = sorted(path for path in web.rglob("*") if path.is_file() and path.name != "LICENCE")
    files = {path.relative_to(web).as_posix(): path.stat().st_size for path in paths}
    facts: dict[str, Any] = {
        "name": model.name,
        "about": about(model),
        "nCtx": model.n_ctx,
        "maxTokens": MAX_TOKENS,
        "tags": model.tags._asdict() if model.tags else None,
        "startsInside": starts_inside,
        "shards": [f"model/{path.name}" for path in shards],
    }
    digest = hashlib.sha256(json.dumps(facts).encode())
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    shell = [name for name in files if not name.startswith("model/") and not name.endswith((".wasm", "/compat.js"))]
    export = {"version": digest.hexdigest()[:16], **facts, "shell": [*shell, *_GIVEN], "files": files}
    (web / "files.js").write_text(f"self.EXPORT = {json.dumps(export, indent=1)};\n", encoding="utf-8")
