"""Teachers: whatever answers the problems. `open_teacher` makes one from the string that a user gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...errors import ModelError, UsageError
from ..records import Backend, Request, TeacherInfo
from .base import Teacher

__all__ = ["Backend", "Request", "Teacher", "TeacherInfo", "open_teacher", "pocket_dir"]

_FORMS = "a model is pocket, https://HOST/v1, hf:ORG/NAME, a checkpoint folder or a .gguf file"


def pocket_dir() -> Path:
    """Return the folder of the embedded teacher's checkpoint."""
    return Path(__file__).parent.parent / "pocket" / "weights"


def open_teacher(
    spec: str,
    *,
    device: str = "auto",
    batch_size: int | None = None,
    concurrency: int | None = None,
    timeout_s: float = 300.0,
    max_rpm: int | None = None,
    max_tpm: int | None = None,
    model: str | None = None,
    offline: bool = False,
) -> Teacher:
    """Open `pocket`, `https://HOST/v1`, `hf:ORG/NAME`, a checkpoint folder or a `.gguf` file.

    Several servers of one model are one spec: `http://a/v1,http://b/v1`. `device` and `batch_size` are for models in
    this process. For servers are `concurrency` (requests at once; None finds the best number), `timeout_s` (the
    longest silence, in seconds), `max_rpm` and `max_tpm` (requests and tokens a minute) and `model` (its name there).

    Raises:
        UsageError: the spec is none of these, or needs the network and `offline` is set.
        ModelError: the model cannot be loaded here.
        TeacherError: the server is down or refuses.
    """
    if urlsplit(spec).scheme in ("http", "https"):
        return _open_endpoint(
            spec,
            offline,
            concurrency=concurrency,
            timeout_s=timeout_s,
            max_rpm=max_rpm,
            max_tpm=max_tpm,
            model=model,
        )
    path = Path(spec)
    if spec.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"no GGUF file at {spec}")
        from .gguf import GGUFTeacher

        return GGUFTeacher(path, n_parallel=batch_size)
    if not spec or (spec != "pocket" and not spec.startswith("hf:") and not path.is_dir()):
        raise UsageError(f"no model {spec!r}", _FORMS)
    try:
        from .huggingface.teacher import TransformersTeacher
    except ImportError as error:
        raise ModelError(f"{spec} needs {error.name}", "pip install 'deepdistill[teach]'") from error
    if spec == "pocket":
        return TransformersTeacher(pocket_dir(), name="pocket", backend="pocket", device=device, batch_size=batch_size)
    if spec.startswith("hf:"):
        name = spec.removeprefix("hf:")
        return TransformersTeacher(name, name=spec, device=device, batch_size=batch_size, offline=offline)
    return TransformersTeacher(path, name=path.resolve().name, device=device, batch_size=batch_size)


def _open_endpoint(spec: str, offline: bool, **settings: Any) -> Teacher:
    try:
        from .endpoint.teacher import EndpointTeacher, split_addresses
    except ImportError as error:
        raise ModelError(f"{spec} needs {error.name}", "pip install 'deepdistill[teach]'") from error
    for host in (urlsplit(address).hostname for address in split_addresses(spec)):
        if offline and host not in ("localhost", "127.0.0.1", "::1"):
            raise UsageError(f"--offline forbids the teacher at {host}", "leave it out, or give a local teacher")
    return EndpointTeacher(spec, **settings)
