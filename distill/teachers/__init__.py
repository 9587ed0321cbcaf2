"""Teachers: models that answer the problems. `open_teacher` opens one from the string that a user gives."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict, Unpack
from urllib.parse import urlsplit

from ...errors import ModelError, UsageError
from ..recipe.gathering import RequestRecipe
from ..records import Backend, Request, TeacherInfo
from .base import Teacher

__all__ = ["Backend", "Request", "ServerOptions", "Teacher", "TeacherInfo", "open_teacher", "pocket_dir"]

_FORMS = "a model is pocket, https://HOST/v1, hf:ORG/NAME, a checkpoint folder or a .gguf file"


def pocket_dir() -> Path:
    """Return the folder of the embedded teacher's checkpoint."""
    return Path(__file__).parent.parent / "pocket" / "weights"


class ServerOptions(TypedDict, total=False):
    """How to use a server, as `EndpointTeacher` takes it."""

    model: str | None
    """Its name there; None is right where the server has only one."""
    concurrency: int | None
    """Requests at once; None finds the best number."""
    timeout_s: float
    """The longest silence, in seconds."""
    max_rpm: int | None
    """Requests a minute, at most."""
    max_tpm: int | None
    """Tokens a minute, at most."""
    request: RequestRecipe | None
    """What every request has beside its conversation: a system message, switches of the thinking, any field."""


def open_teacher(
    spec: str,
    *,
    device: str = "auto",
    batch_size: int | None = None,
    offline: bool = False,
    **server: Unpack[ServerOptions],
) -> Teacher:
    """Open `pocket`, `https://HOST/v1`, `hf:ORG/NAME`, a checkpoint folder or a `.gguf` file.

    Several servers of one model are one spec: `http://a/v1,http://b/v1`. `device` and `batch_size` are for models in
    this process, `server` is for servers: see `ServerOptions`.

    >>> from deepdistill import open_teacher
    >>> with open_teacher("pocket") as teacher:
    ...     print(teacher.name, teacher.backend)
    pocket pocket

    Raises:
        UsageError: `code` "no-such-model", "offline" if the spec needs the network, or "server-only" if `request` asks
            a model in this process for what only servers are asked for.
        ModelError: the model cannot be loaded here.
        TeacherError: the server is down or refuses.
    """
    if urlsplit(spec).scheme in ("http", "https"):
        return _open_endpoint(spec, offline, server)
    plain = RequestRecipe()
    if asked := [name for name, value in vars(server.get("request") or plain).items() if value != getattr(plain, name)]:
        hint = "leave it out, or give the address of a server"
        raise UsageError(f"--{asked[0]} is for models on a server, and {spec} is none", hint, code="server-only")
    path = Path(spec)
    if spec.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"there is no GGUF file at {spec}", "check the path", code="no-such-model")
        from .gguf import GGUFTeacher

        return GGUFTeacher(path, n_parallel=batch_size)
    if not spec or (spec != "pocket" and not spec.startswith("hf:") and not path.is_dir()):
        raise UsageError(f"there is no model {spec!r}", _FORMS, code="no-such-model")
    try:
        from .huggingface.teacher import TransformersTeacher
    except ImportError as error:
        raise _needs(spec, error) from error
    if spec == "pocket":
        return TransformersTeacher(pocket_dir(), name="pocket", backend="pocket", device=device, batch_size=batch_size)
    if spec.startswith("hf:"):
        name = spec.removeprefix("hf:")
        return TransformersTeacher(name, name=spec, device=device, batch_size=batch_size, offline=offline)
    return TransformersTeacher(path, name=path.resolve().name, device=device, batch_size=batch_size)


def _open_endpoint(spec: str, offline: bool, server: ServerOptions) -> Teacher:
    try:
        from .endpoint.teacher import EndpointTeacher, split_addresses
    except ImportError as error:
        raise _needs(spec, error) from error
    for host in (urlsplit(address).hostname for address in split_addresses(spec)):
        if offline and host not in ("localhost", "127.0.0.1", "::1"):
            raise UsageError(
                f"--offline forbids the teacher at {host}", "leave it out, or give a local teacher", code="offline"
            )
    return EndpointTeacher(spec, **server)


def _needs(spec: str, error: ImportError) -> ModelError:
    return ModelError(f"{spec} needs {error.name}", "pip install 'deepdistill[teach]'", code="not-installed")
