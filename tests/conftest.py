"""What every test shares: user data in a temporary folder, tiny models, and the demo's problems."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHAIN_SUM = "gym:chain_sum?min_terms=2&max_terms=4&min_digits=1&max_digits=2"


def pytest_unconfigure() -> None:
    """Close the two files that llama-cpp-python leaves open: Python warns of them after pytest's last line."""
    utils = sys.modules.get("llama_cpp._utils")
    for name in ("outnull_file", "errnull_file"):
        if utils:
            getattr(utils, name).close()


@pytest.fixture(scope="session")
def chain_sum() -> str:
    """The problems of the demo."""
    return CHAIN_SUM


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """Undo an ignored SIGINT, which a background shell hands down: what tests start would not see Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the user's cache and history out of the tests, and the network away."""
    patch = pytest.MonkeyPatch()
    home = tmp_path_factory.mktemp("home")
    patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    patch.setenv("XDG_DATA_HOME", str(home / "data"))
    patch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def requantize() -> ModuleType:
    """llama.cpp's own quantizer, from the benchmarks' folder, which is no package."""
    spec = importlib.util.spec_from_file_location("requantize", ROOT / "benchmarks" / "requantize.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def pocket_student() -> Path:
    """The folder of the tiny dense student, untrained."""
    from deepdistill.distill.training.student import student_dir

    return student_dir("pocket")


_COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _HubHandler(BaseHTTPRequestHandler):
    """The few answers of the Hugging Face hub that a download needs."""

    repositories: dict[str, dict[str, bytes]]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        parts = parts[1:] if parts[0] == "datasets" else parts
        is_api = parts[:2] in (["api", "models"], ["api", "datasets"])
        files = self.repositories.get("/".join(parts[2:4] if is_api else parts[:2]))
        if files is None:
            self._reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif is_api and parts[4:5] == ["tree"]:
            tree = [{"type": "file", "path": name, "size": len(body), "oid": "0"} for name, body in files.items()]
            self._reply(200, json.dumps(tree).encode())
        elif is_api:
            siblings = [{"rfilename": name} for name in files]
            self._reply(200, json.dumps({"id": "/".join(parts[2:4]), "sha": _COMMIT, "siblings": siblings}).encode())
        elif (name := "/".join(parts[4:])) in files:
            etag = hashlib.sha256(files[name]).hexdigest()
            self._reply(200, files[name], {"X-Repo-Commit": _COMMIT, "ETag": f'"{etag}"'})
        else:
            self._reply(404, b"", {"X-Error-Code": "EntryNotFound"})

    def _reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def _serve_hub(repositories: dict[str, dict[str, bytes]]) -> Iterator[str]:
    handler = type("Handler", (_HubHandler,), {"repositories": repositories})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="session")
def hub() -> Callable[[dict[str, dict[str, bytes]]], AbstractContextManager[str]]:
    """Serve repositories of files as the model hub does; the context is the endpoint's address."""
    return _serve_hub
