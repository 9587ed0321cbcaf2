"""The pinned packages: fetched once from a registry of our own, refused when they are not what is pinned."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deepdistill.errors import ArtifactError, ModelError, UsageError
from deepdistill.localrun.phone import wllama
from deepdistill.localrun.phone.wllama import Package, registry, unpack_wllama


def tarball(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return buffer.getvalue()


def pin(data: bytes) -> Package:
    return Package("@some/thing", base64.b64encode(hashlib.sha512(data).digest()).decode(), {"package/a.js": "b.js"})


GOOD = tarball({"package/a.js": b"good", "../evil.js": b"evil", "/tmp/evil.js": b"evil", "package/c.js": b"more"})


class Registry:
    """A server that gives one tarball and remembers what it was asked for."""

    def __init__(self) -> None:
        self.data, self.asked = GOOD, list[str]()
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                registry.asked.append(self.path)
                self.send_response(200)
                self.send_header("Content-Length", str(len(registry.data)))
                self.end_headers()
                self.wfile.write(registry.data)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def npm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Registry]:
    """A registry that npm's environment variable names, an empty cache, and a package that is pinned."""
    server = Registry()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server.server_port}/npm/")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(wllama, "PACKAGES", (pin(GOOD),))
    yield server
    server.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the files go."""
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


def test_a_package_is_fetched_once_and_said_so(npm: Registry, folder: Path, tmp_path: Path) -> None:
    (note,) = unpack_wllama(folder)
    assert note.startswith(f"fetched @some/thing {wllama.VERSION}")
    assert npm.asked == [f"/npm/@some/thing/-/thing-{wllama.VERSION}.tgz"]
    assert unpack_wllama(folder, offline=True) == []
    assert len(npm.asked) == 1


def test_only_named_files_land_and_only_under_our_names(npm: Registry, folder: Path, tmp_path: Path) -> None:
    unpack_wllama(folder)
    assert [path.name for path in folder.iterdir()] == ["b.js"]
    assert (folder / "b.js").read_bytes() == b"good"
    assert not list(tmp_path.rglob("evil.js"))


def test_a_link_in_the_place_of_a_file_is_refused(npm: Registry, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm.data = tarball({"package/c.js": b"x"}, links={"package/a.js": "c.js"})
    monkeypatch.setattr(wllama, "PACKAGES", (pin(npm.data),))
    with pytest.raises(ArtifactError, check=lambda error: error.code == "package-changed"):
        unpack_wllama(folder)


def test_what_is_not_pinned_is_thrown_away(npm: Registry, folder: Path, tmp_path: Path) -> None:
    npm.data = tarball({"package/a.js": b"changed"})
    with pytest.raises(ArtifactError, check=lambda error: error.code == "package-changed"):
        unpack_wllama(folder)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not list(folder.iterdir())


def test_a_changed_cache_is_found_out(npm: Registry, folder: Path, tmp_path: Path) -> None:
    unpack_wllama(folder)
    (cached,) = (tmp_path / "cache" / "deepdistill").iterdir()
    cached.write_bytes(cached.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, check=lambda error: error.code == "package-changed") as error:
        unpack_wllama(folder)
    assert "remove it" in error.value.hint


def test_offline_needs_the_cache(npm: Registry, folder: Path) -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "not-in-cache") as error:
        unpack_wllama(folder, offline=True)
    assert "--offline" in error.value.hint
    assert npm.asked == []


def test_a_registry_that_does_not_answer_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    with pytest.raises(ModelError, check=lambda error: error.code == "registry-unreachable"):
        unpack_wllama(folder)
    monkeypatch.setenv("npm_config_registry", "file:///etc")
    with pytest.raises(UsageError, check=lambda error: error.code == "registry-broken"):
        unpack_wllama(folder)


def test_the_registry_is_the_one_that_npm_uses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("npm_config_registry", "NPM_CONFIG_REGISTRY"):
        monkeypatch.delenv(name, raising=False)
    assert registry() == "https://registry.npmjs.org"
    (tmp_path / ".npmrc").write_text('; a comment\nregistry = "https://mirror.example/npm/"\nfund=false\n')
    assert registry() == "https://mirror.example/npm"
    monkeypatch.setenv("npm_config_registry", "https://other.example/")
    assert registry() == "https://other.example"
