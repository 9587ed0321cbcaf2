"""The quantize extra has no torch: its tests are collected without it, and those that need no checkpoint run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
BLOCK = "import sys\nfor name in ('torch', 'transformers', 'peft', 'accelerate'):\n    sys.modules[name] = None\n"


@pytest.fixture(scope="module")
def blocked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the plugin `block_torch` makes torch and its friends impossible to import."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "block_torch.py").write_text(BLOCK)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    return os.environ | {"PYTHONPATH": path}


def run_pytest(environment: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "-p", "block_torch", "-p", "no:cacheprovider", "-q", *arguments]
    done = subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_module_is_collected_without_torch(blocked: dict[str, str]) -> None:
    lines = run_pytest(blocked, "--collect-only", "-m", "", ".").splitlines()
    collected = {line.split("::")[0].rpartition("/")[2] for line in lines if "::" in line}
    assert collected == {path.name for path in FOLDER.rglob("test_*.py")}
    assert "skipped" not in lines[-1]


def test_what_needs_no_checkpoint_runs_without_torch(blocked: dict[str, str]) -> None:
    last = run_pytest(blocked, "choose/test_allocate.py", "measure/test_gate.py", "convert/test_files.py").splitlines()[
        -1
    ]
    assert " passed, 1 skipped" in last, "only the test of a student's file needs torch"
