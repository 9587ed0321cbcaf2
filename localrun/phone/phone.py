"""A GGUF as a folder for phones and browsers: the file, a card, an Ollama Modelfile, and a page that runs it offline.

The page (`../web/`) is static. It runs llama.cpp in WebAssembly (wllama), keeps all its files on the device at the
first visit, and from then on needs no network. Nothing in the folder names a server, and the page's content security
policy forbids all others than the one that it came from.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import ArtifactError, ModelError
from ..core.reporter import Progress, no_progress
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
_GIVEN = ("./", "files.js")  # what a visit asks for beside the files that files.js lists


@dataclass(frozen=True)
class PhoneReport:
    """What was written: `files` has each file's bytes by its path in `folder`; `notes` are for people."""

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
    on_progress: Progress = no_progress,
) -> PhoneReport:
    """Write a folder for phones and browsers from a GGUF, or from a folder's best GGUF for the memory.

    Of a folder, the largest quantized file that fits is taken. `memory_mb` is what the model and its context may take,
    2,000 MB if not given. Where no file fits, `make` is called with a file type such as Q4_K_M and returns the path of
    the file that it made. `offline` takes wllama from the cache alone.

    Raises:
        ArtifactError: the folder is there already; or a file is no GGUF, broken, or one part of a split model.
        ModelError: nothing fits the memory, the model has no chat template, or wllama cannot be fetched.
        UsageError: `offline`, and wllama is not in the cache.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(f"{out} is there already", "name another folder with --out, or remove it")
    model = choose_model(model_path, (memory_mb or DEFAULT_MEMORY_MB) * 1_000_000, make)
    starts_inside = model.tags is not None and prompt_opens_thinking(
        model.render({"role": "user", "content": "?"}), model.tags
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    half_written = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        web = half_written / "web"
        (web / "wllama").mkdir(parents=True)
        (web / "model").mkdir()
        notes = unpack_wllama(web / "wllama", offline=offline, on_progress=on_progress)
        whole = half_written / f"{model.name}.gguf"
        on_progress("writing the folder", 0, 2, "copying the model")
        shutil.copyfile(model.path, whole)
        on_progress("writing the folder", 1, 2, "splitting the model")
        shards = split_gguf(whole, web / "model")
        _write_page(web, model, shards, starts_inside)
        (half_written / "Modelfile").write_text(modelfile(model), encoding="utf-8")
        (half_written / "README.md").write_text(readme(model, len(shards)), encoding="utf-8")
        on_progress("writing the folder", 2, 2, "")
        half_written.chmod(0o755)  # mkdtemp's are private
        if out.exists():
            out.rmdir()  # it is empty
        half_written.replace(out)
    except BaseException:
        shutil.rmtree(half_written, ignore_errors=True)
        raise
    if model.path != model_path:
        notes = [f"took {model.path}", *notes]
    if model.memory_bytes > _MAX_WASM_BYTES:
        notes.append(
            "too large for a browser, whose pages have 4 GB of memory at most: use an app that opens GGUF files"
        )
    files = {path.relative_to(out).as_posix(): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    return PhoneReport(out, whole.name, model.n_ctx, model.memory_bytes, files, tuple(notes))


def choose_model(model_path: Path, memory: int, make: Callable[[str], Path] | None) -> ModelCard:
    """Return the best file for so many bytes of memory: the given one, the folder's best, or one that is made.

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
        made = ModelCard.of(make(type_), memory)
        if made.fits:
            return made
    if smallest is None:
        raise ArtifactError(f"{model_path} holds no GGUF file", "make one: deepdistill quantize")
    needs = smallest.footprint.total_bytes(smallest.min_ctx)
    hints = [f"a smaller type may fit: deepdistill quantize --type {possible[0]}"] if possible and not make else []
    raise ModelError(
        f"{smallest.path.name} with {smallest.min_ctx} tokens of context takes {format_bytes(needs)} of memory, "
        f"and there are {format_bytes(memory)}, a tenth of it to be left free",
        "; ".join([*hints, "else give more memory, or take a smaller model"]).removeprefix("else "),
    )


def _candidates(model_path: Path) -> Iterator[Path]:
    """Yield the models that a path stands for."""
    if not model_path.is_dir():
        if not model_path.exists():
            raise ArtifactError(f"no model at {model_path}", "give a .gguf file or a run folder")
        yield model_path
        return
    for path in sorted(model_path.rglob("*.gguf")):
        if not is_shard(path) and read_gguf(path).metadata.get("general.type", "model") == "model":
            yield path


def _may_fit(model: ModelCard, type_: str, memory: int) -> bool:
    """Say whether a model could fit if all its weights had a file type's base type: real files are larger."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType["_".join(type_.split("_")[:2])]]
    smaller = replace(model.footprint, weight_bytes=model.n_weights // block * block_bytes)
    return smaller.max_ctx(memory) >= model.min_ctx


def _write_page(web: Path, model: ModelCard, shards: list[Path], starts_inside: bool) -> None:
    """Copy the page's own files, and write down for it what it runs and which files it is made of."""
    for path in _PAGE.iterdir():
        shutil.copyfile(path, web / path.name)
    manifest = {"name": model.name, "short_name": model.name, "start_url": "./", "display": "standalone"}
    icon = {"src": "icon.svg", "sizes": "any", "type": "image/svg+xml"}
    (web / "manifest.webmanifest").write_text(
        json.dumps(manifest | {"icons": [icon]}, indent=2) + "\n", encoding="utf-8"
    )
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
