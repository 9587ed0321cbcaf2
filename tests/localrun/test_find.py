"""The GGUF that a user means, on disk and on a stand-in for the model hub."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from deepdistill.errors import ArtifactError, DeepDistillError, UsageError
from deepdistill.localrun.find import find_model

Hub = Callable[[dict[str, dict[str, bytes]]], AbstractContextManager[str]]


def write(path: Path, age: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF")
    os.utime(path, (1_000_000 - age, 1_000_000 - age))
    return path


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(Path("runs/a/student-Q8_0.gguf"), age=5)
    write(Path("runs/b/student-Q4_0.gguf"), age=2)
    write(Path("runs/b/student-Q8_0.gguf"), age=9)
    return Path("runs")


def test_nothing_given_is_the_newest_of_all_runs(runs: Path) -> None:
    assert find_model(None) == runs / "b" / "student-Q4_0.gguf"
    write(runs / "a" / "student-Q6_K.gguf", age=1)
    assert find_model(None) == runs / "a" / "student-Q6_K.gguf"


def test_a_run_folder_is_its_newest_and_a_file_is_itself(runs: Path) -> None:
    assert find_model("runs/b") == runs / "b" / "student-Q4_0.gguf"
    write(runs / "b" / "mmproj-student.gguf")  # the newest, and no model
    assert find_model("runs/b") == runs / "b" / "student-Q4_0.gguf"
    assert find_model("runs/b/student-Q8_0.gguf") == runs / "b" / "student-Q8_0.gguf"


@pytest.mark.parametrize(
    ("spec", "kind", "named"),
    [
        (None, ArtifactError, "runs/"),
        ("nowhere.gguf", ArtifactError, "nowhere.gguf"),
        ("HuggingFaceTB/SmolLM2", ArtifactError, "SmolLM2"),
        ("empty", ArtifactError, "empty"),
        ("hf:onlyone", UsageError, "hf:onlyone"),
        ("hf:a/b/c", UsageError, "hf:a/b/c"),
    ],
)
def test_what_is_not_there_is_one_line_and_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str | None, kind: type[DeepDistillError], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(kind) as caught:
        find_model(spec)
    assert named in caught.value.message
    assert caught.value.code == ("spec-broken" if kind is UsageError else "no-such-model")
    assert "\n" not in caught.value.message + caught.value.hint
    assert caught.value.hint


def test_a_name_like_a_repository_is_pointed_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError) as caught:
        find_model("org/repo")
    assert "hf:org/repo" in caught.value.hint


def find_on(endpoint: str, home: Path, spec: str, offline: bool = False) -> str:
    """Find a model in a process of its own: the hub's library reads its settings once."""
    code = (
        "import sys\nfrom deepdistill.errors import DeepDistillError\n"
        "from deepdistill.localrun.find import find_model\n"
        "try:\n    print(find_model(sys.argv[1], offline=sys.argv[2] == 'True'))\n"
        "except DeepDistillError as error:\n    print(type(error).__name__, error.message, error.hint, sep=' | ')"
    )
    env = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, spec, str(offline)],
        capture_output=True,
        text=True,
        env=env,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_hub_gives_a_file_once_and_the_cache_gives_it_offline(tmp_path: Path, hub: Hub) -> None:
    names = ["README.md", "m-Q2_K.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-m-Q4_K_M.gguf"]
    many = {name: f"this is {name}".encode() for name in names}
    with hub({"org/many": many, "org/one": {"only.gguf": b"GGUF"}, "org/none": {"model.safetensors": b""}}) as endpoint:
        chosen = Path(find_on(endpoint, tmp_path, "hf:org/many"))
        assert chosen.read_text() == f"this is {chosen.name}"
        assert chosen.name == "m-Q4_K_M.gguf", "of several the one that most people want"
        assert Path(find_on(endpoint, tmp_path, "hf:org/many:m-Q2_K.gguf")).name == "m-Q2_K.gguf"
        assert Path(find_on(endpoint, tmp_path, "hf:org/one")).name == "only.gguf"
        assert "org/none has no GGUF" in find_on(endpoint, tmp_path, "hf:org/none")
        missing = find_on(endpoint, tmp_path, "hf:org/many:m-Q5_K_M.gguf")
        assert "m-Q5_K_M.gguf" in missing
        assert "m-Q2_K.gguf" in missing, "it says what there is"
        assert "HTTP 404" in find_on(endpoint, tmp_path, "hf:org/unknown")
    assert find_on(endpoint, tmp_path, "hf:org/many:m-Q4_K_M.gguf", offline=True) == str(chosen)
    assert "is not in the hub's cache" in find_on(endpoint, tmp_path, "hf:org/other", offline=True)
    assert find_on(endpoint, tmp_path, "hf:org/one:other.gguf").startswith("ModelError | ")
