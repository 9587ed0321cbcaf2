"""Tiny models of three kinds, written once, and a teacher on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import MODELS, write_model

from deepdistill.distill.teachers.huggingface.teacher import TransformersTeacher


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models gain nothing from a second thread, and on a busy machine wait for it."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_model(tmp_path_factory.mktemp(kind), kind) for kind in MODELS}


@pytest.fixture(scope="session", params=list(MODELS))
def teacher(request: pytest.FixtureRequest, folders: dict[str, Path]) -> TransformersTeacher:
    return TransformersTeacher(folders[request.param], device="cpu", batch_size=4)


@pytest.fixture
def llama(folders: dict[str, Path]) -> TransformersTeacher:
    return TransformersTeacher(folders["llama"], device="cpu", batch_size=4)
