"""A failing server, and a teacher on it, for every test of the room."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_server import FakeServer, serving

from deepdistill.distill.teachers.endpoint.teacher import EndpointTeacher


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DEEPDISTILL_API_KEY", "OPENAI_API_KEY", "DEEPSEEK_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as server:
        yield server


@pytest.fixture
def teacher(server: FakeServer) -> Iterator[EndpointTeacher]:
    with EndpointTeacher(server.url, concurrency=3, timeout_s=0.5, max_backoff_s=0.02) as teacher:
        yield teacher


@pytest.fixture
def second(server: FakeServer) -> Iterator[FakeServer]:
    with serving() as second:
        yield second
