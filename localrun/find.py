"""Find the GGUF that a user names: a path, a run folder, the newest run, or a file on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, ModelError, UsageError
from .core.text import first_line

_PREFERRED = ("Q4_K_M", "Q8_0")
_HUB_SPEC = re.compile(r"hf:(?P<repo>[^/:\s]+/[^/:\s]+)(?::(?P<file>.+))?")


def find_model(spec: str | None, runs_dir: Path = Path("runs"), *, offline: bool = False) -> Path:
    """Return the path of the GGUF that `spec` names.

    `spec` is a file, a folder (its newest GGUF), `hf:ORG/REPO[:FILE]` (FILE: a name, or a part of one such as Q8_0), or
    None for the newest GGUF of all runs.

    Raises:
        ArtifactError: code "no-such-model": there is none.
        ModelError: code "hub-unreachable", "not-in-cache", "no-such-model", or "not-installed" for `huggingface_hub`.
        UsageError: code "spec-broken": an hf: spec that names no repository.
    """
    if spec is None:
        found = _newest(runs_dir.rglob("*.gguf")) if runs_dir.is_dir() else None
        if found is None:
            raise ArtifactError(
                f"no model given, and no run in {runs_dir}/ has a GGUF yet",
                "name a .gguf file or hf:ORG/REPO, or make one: deepdistill demo",
                code="no-such-model",
            )
        return found
    if spec.startswith("hf:"):
        return _from_hub(spec, offline)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.exists():
        return path
    hint = f"to download from the hub: hf:{spec}" if re.fullmatch(r"[\w.-]+/[\w.-]+", spec) else ""
    hint = hint or "give a .gguf file, a run folder or hf:ORG/REPO[:FILE]"
    raise ArtifactError(f"there is no model {spec}", hint, code="no-such-model")


def _in_folder(folder: Path) -> Path:
    found = _newest(folder.rglob("*.gguf"))
    if found is None:
        has_weights = any(folder.rglob("*.safetensors"))
        raise ArtifactError(
            f"there is no GGUF file in {folder}",
            f"make one: deepdistill quantize {folder}" if has_weights else "give a .gguf file or a run folder",
            code="no-such-model",
        )
    return found


def _newest(paths: Iterable[Path]) -> Path | None:
    models = (path for path in paths if path.is_file() and "mmproj" not in path.name)
    return max(models, key=lambda path: path.stat().st_mtime, default=None)


def _from_hub(spec: str, offline: bool) -> Path:
    """Download a file, or take it from the hub's cache."""
    parsed = _HUB_SPEC.fullmatch(spec)
    if not parsed:
        raise UsageError(
            f"{spec!r} names no hub repository", "write hf:ORG/REPO or hf:ORG/REPO:FILE", code="spec-broken"
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise ModelError(
            f"{spec} needs huggingface_hub, which is not installed",
            "pip install huggingface_hub",
            code="not-installed",
        ) from error
    repo = parsed["repo"]
    try:
        if offline:
            folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns="*.gguf", local_files_only=True))
            names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")]
            return folder / _choose(names, parsed["file"], repo)
        # list_repo_files would try for half a minute before it reports that there is no network.
        names = [file.rfilename for file in huggingface_hub.model_info(repo).siblings or []]
        name = _choose(names, parsed["file"], repo)
        return Path(huggingface_hub.hf_hub_download(repo, name))
    except (OSError, ValueError, RuntimeError) as error:  # most errors of the hub and its HTTP library
        raise _hub_error(spec, error, offline) from error
    except Exception as error:  # httpx's transport errors derive from Exception alone
        if type(error).__module__.partition(".")[0].startswith(("httpx", "httpcore", "huggingface_hub")):
            raise _hub_error(spec, error, offline) from error
        raise


def _choose(names: Iterable[str], wanted: str | None, repo: str) -> str:
    """Return the one file of a repository that is meant."""
    models = sorted(n for n in names if n.endswith(".gguf") and "mmproj" not in n and not re.search(r"-of-\d+\.", n))
    if wanted in models:
        return str(wanted)
    fitting = [name for name in models if wanted is None or wanted.lower() in Path(name).name.lower()]
    for type_ in _PREFERRED if wanted is None else ():
        fitting = [name for name in fitting if type_ in name.upper()] or fitting
        if len(fitting) == 1:
            break
    if len(fitting) == 1:
        return fitting[0]
    if not models:
        hint = "look for a repository of the same name that ends in -GGUF"
        raise ModelError(f"{repo} has no GGUF file", hint, code="no-such-model")
    what = f"{len(fitting)} GGUF files that match" if fitting else f"no GGUF file like {wanted}"
    hint = f"name one: hf:{repo}:FILE. It has: {', '.join(models)}"
    raise ModelError(f"{repo} has {what}", hint, code="no-such-model")


def _hub_error(spec: str, error: Any, offline: bool) -> ModelError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if offline:
        return ModelError(f"{spec} is not in the hub's cache", "run once without --offline", code="not-in-cache")
    if status in (401, 403, 404):
        return ModelError(
            f"the hub refuses {spec} (HTTP {status})",
            "check the name; for a private or gated repository log in with: hf auth login",
            code="no-such-model",
        )
    return ModelError(
        f"cannot download {spec}: {first_line(error)}",
        "check the network; --offline uses the cache",
        code="hub-unreachable",
    )
