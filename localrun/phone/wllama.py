"""Fetch wllama, llama.cpp built for browsers: two npm packages of one pinned version, checked against their hashes.

They are fetched once into the cache and checked at every use. `wllama` itself needs a browser with WebAssembly's
64-bit memory; `wllama-compat` is the build for browsers without it, iPhones above all.

Source: https://github.com/ngxson/wllama (MIT).
"""

from __future__ import annotations

import base64
import hashlib
import os
import tarfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from ...errors import ArtifactError, ModelError, UsageError
from ..core.atomic import replacing_file
from ..core.reporter import SILENT, Reporter
from ..core.text import format_bytes
from ..machine.hardware import cache_dir

VERSION = "3.8.1"
_REGISTRY = "https://registry.npmjs.org"
_MAX_BYTES = 64 << 20  # of a tarball, and of each file in it: the largest has 16 MB
_TIMEOUT = 30  # seconds without a byte


@dataclass(frozen=True)
class Package:
    """An npm package: the hash of its tarball (the registry's `dist.integrity`), and the files that we use."""

    name: str
    sha512: str
    members: dict[str, str]  # in the tarball -> in the page's folder

    @property
    def file_name(self) -> str:
        """The tarball's name in the registry."""
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


def unpack_wllama(folder: Path, *, offline: bool = False, report: Reporter = SILENT) -> list[str]:
    """Write wllama's files into a folder that exists; return a line for each package that was fetched.

    Raises:
        ArtifactError: code "package-changed": a package in the cache, or from the registry, is not the pinned one.
        ModelError: code "registry-unreachable".
        UsageError: code "not-in-cache": `offline`, and a package is missing; "registry-broken": npm's setting is bad.
    """
    notes = []
    for package in PACKAGES:
        tarball = cache_dir() / package.file_name
        if not tarball.is_file():
            if offline:
                raise UsageError(
                    f"{package.name} {VERSION} is not in the cache, and --offline forbids fetching it",
                    f"run once without --offline, or put {package.file_name} into {cache_dir()}",
                    code="not-in-cache",
                )
            notes.append(_fetch(package, tarball, report))
        data = tarball.read_bytes()
        if not _is_pinned(package, data):
            hint = "remove it and run the command again"
            raise ArtifactError(f"{tarball} is not the pinned {package.name} {VERSION}", hint, code="package-changed")
        _unpack(tarball, package.members, folder)
    return notes


def registry() -> str:
    """Return npm's registry where npm itself looks it up: the environment, then ~/.npmrc, then the public one."""
    for name in ("npm_config_registry", "NPM_CONFIG_REGISTRY"):
        if os.environ.get(name):
            return os.environ[name].rstrip("/")
    try:
        lines = (Path.home() / ".npmrc").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    settings = dict([part.strip().strip("\"'") for part in line.split("=", 1)] for line in lines if "=" in line)
    return (settings.get("@wllama:registry") or settings.get("registry") or _REGISTRY).rstrip("/")


def _fetch(package: Package, target: Path, report: Reporter) -> str:
    """Download a tarball into the cache if it is the pinned one; return a line for people."""
    url = f"{registry()}/{package.name}/-/{package.file_name}"
    if not url.startswith(("https://", "http://")):
        message = f"npm's registry is set to {registry()}, which is not a web address"
        raise UsageError(message, "see: npm config get registry", code="registry-broken")
    data = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            total = int(response.headers.get("Content-Length") or 0)
            while piece := response.read(1 << 18):
                data += piece
                report.progress(f"fetching {package.name}", len(data), total=max(total, len(data)), note="bytes")
                if len(data) > _MAX_BYTES:
                    break
    except (OSError, ValueError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", None) or error
        raise ModelError(
            f"cannot fetch {url}: {reason}",
            "check the network and npm's registry setting",
            code="registry-unreachable",
        ) from error
    if not _is_pinned(package, bytes(data)):
        message = f"{url} sent something else than the pinned {package.name} {VERSION}"
        raise ArtifactError(message, "nothing was kept of it", code="package-changed")
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(target) as temporary:
        temporary.write_bytes(data)
    return f"fetched {package.name} {VERSION} ({format_bytes(len(data))}) from {url}, kept in {target}"


def _is_pinned(package: Package, data: bytes) -> bool:
    return base64.b64encode(hashlib.sha512(data).digest()).decode() == package.sha512


def _unpack(tarball: Path, members: dict[str, str], folder: Path) -> None:
    """Write chosen members under our own names: no path in the tarball decides where a file lands."""
    with tarfile.open(tarball) as archive:
        for name, ours in members.items():
            member = archive.getmember(name)
            file = archive.extractfile(member) if member.isreg() else None
            if file is None:
                raise ArtifactError(f"{tarball}: {name} is not a plain file", code="package-changed")
            (folder / ours).write_bytes(file.read(_MAX_BYTES))
