"""What every test shares: user data in a temporary folder, tiny models, and the demo's problems."""

from __future__ import annotations

from pathlib import Path

import pytest

CHAIN_SUM = "gym:chain_sum?min_terms=2&max_terms=4&min_digits=1&max_digits=2"


@pytest.fixture(scope="session")
def chain_sum() -> str:
    """The problems of the demo."""
    return CHAIN_SUM


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the user's cache and history out of the tests, and the network away."""
    patch = pytest.MonkeyPatch()
    home = tmp_path_factory.mktemp("home")
    patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    patch.setenv("XDG_DATA_HOME", str(home / "data"))
    patch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def pocket_student() -> Path:
    """The folder of the tiny dense student, untrained."""
    from deepdistill.distill.student import student_dir

    return student_dir("pocket")
