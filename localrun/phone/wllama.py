"""Get wllama, llama.cpp built for browsers: two npm packages of one pinned version, checked against their hashes.

They are fetched once into the cache and checked at every use. `wllama` itself runs where browsers have WebAssembly's
64-bit memory; `wllama-compat` is the build for those that have not, iPhones above all.

Source: https://github.com/ngxson/wllama (MIT).
"""

from __future__ import annotations

import base64
import hashlib
import os
import tarfile
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from ...errors import ArtifactError, ModelError, UsageError
from ..core.reporter import Progress, no_progress
from ..core.text import format_bytes
from ..machine.hardware import cache_dir

VERSION = "3.8.1"
_REGISTRY = "https://registry.npmjs.org"
_MAX_BYTES = 64 << 20  # of a tarball, and of each file in it: the largest has 16 MB
_TIMEOUT = 30  # seconds without a byte


@dataclass(frozen=True)
class Package:
    """An npm package: what its tarball must hash to (as the registry's `dist.integrity`), and which files are used."""

    name: str
    sha512: str
    members: dict[str, str]  # in the tarball -> in the page's folder

    @property
    def file_name(self) -> str:
        """The tarball's, as the registry has it."""
        return f"{self.name.rpartition('/')[2]}-{VERSION}.tgz"


PACKAGES = (
    Package(
        "@wllama/wllama",
        "Pl7BEJhPU8OHnV/yhn3DFZYhLLOdSHh+4TND79WCftHnlUAdQPAsyc/CfIOY+4mVxvf5VW3Xw3Uf7BBfotS1gw==",
        {
            "package/esm/index.min.js": "index.min.js",
            "package/esm/wasm/wllama.wasm": "wllama.wasm",
            "package/LICENCE": "LICENCE",
        },
    ),
    Package(
        "@wllama/wllama-compat",
        "IvmjrJ+JzDbt3w1FQq1yAmnFEiLGCceowK2Q80zW+k9ChFkPBM1ByX/9xm2xVxyd8MHC50VpuDo6SDE83k9kIQ==",
        {"package/wasm/wllama.js": "compat.js", "package/wasm/wllama.wasm": "compat.wasm"},
    ),
)


def unpack_wllama(folder: Path, *, offline: bool = False, on_progress: Progress = no_progress) -> list[str]:
    """Write wllama's files into a folder that exists; return a line for each package that was fetched.

    Raises:
        ArtifactError: a package in the cache, or what the registry gave, is not the one that is pinned.
        ModelError: the registry cannot be reached.
        UsageError: `offline`, and a package is not in the cache.
    """
    notes = []
    for package in PACKAGES:
        tarball = cache_dir() / package.file_name
        if not tarball.is_file():
            if offline:
                raise UsageError(
                    f"{package.name} {VERSION} is not in the cache, and --offline forbids to fetch it",
                    f"run once without --offline, or put {package.file_name} into {cache_dir()}",
                )
            notes.append(_fetch(package, tarball, on_progress))
        data = tarball.read_bytes()
        if not _is_pinned(package, data):
            raise ArtifactError(f"{tarball} is not the pinned {package.name} {VERSION}", "remove it and run again")
        _unpack(tarball, package.members, folder)
    return notes


def registry() -> str:
    """Return npm's registry as npm itself is told: by the environment, else ~/.npmrc, else the public one."""
    for name in ("npm_config_registry", "NPM_CONFIG_REGISTRY"):
        if os.environ.get(name):
            return os.environ[name].rstrip("/")
    try:
        lines = (Path.home() / ".npmrc").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    settings = dict([part.strip().strip("\"'") for part in line.split("=", 1)] for line in lines if "=" in line)
    return (settings.get("@wllama:registry") or settings.get("registry") or _REGISTRY).rstrip("/")


def _fetch(package: Package, target: Path, on_progress: Progress) -> str:
    """Download a tarball into the cache, if it is the pinned one; return a line that says so."""
    url = f"{registry()}/{package.name}/-/{package.file_name}"
    if not url.startswith(("https://", "http://")):
        raise UsageError(f"npm's registry is set to {registry()}, which is no web address", "npm config get registry")
    data = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            total = int(response.headers.get("Content-Length") or 0)
            while piece := response.read(1 << 18):
                data += piece
                on_progress(f"fetching {package.name}", len(data), max(total, len(data)), "bytes")
                if len(data) > _MAX_BYTES:
                    break
    except (OSError, ValueError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", None) or error
        raise ModelError(
            f"cannot fetch {url}: {reason}", "check the network; npm's registry setting is honoured"
        ) from error
    if not _is_pinned(package, bytes(data)):
        raise ArtifactError(f"{url} gave something else than {package.name} {VERSION}", "it was thrown away")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
        file.write(data)
    Path(file.name).replace(target)
    return f"fetched {package.name} {VERSION} ({format_bytes(len(data))}) from {url}, kept in {target}"


def _is_pinned(package: Package, data: bytes) -> bool:
    return base64.b64encode(hashlib.sha512(data).digest()).decode() == package.sha512


def _unpack(tarball: Path, members: dict[str, str], folder: Path) -> None:
    """Write chosen members under names of our own: no path in the tarball decides where anything lands."""
    with tarfile.open(tarball) as archive:
        for name, ours in members.items():
            member = archive.getmember(name)
            file = archive.extractfile(member) if member.isreg() else None
            if file is None:
                raise ArtifactError(f"{tarball}: {name} is no plain file")
            (folder / ours).write_bytes(file.read(_MAX_BYTES))
