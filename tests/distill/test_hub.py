"""Data sets from a stand-in for the hub: the files of one split, from the network once and then from the cache."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from deepdistill.distill.hub import choose_files
from deepdistill.errors import UsageError


@pytest.mark.parametrize(
    ("names", "split", "config", "expected"),
    [
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
         "train", None, [0, 1]),
        (["main/train-0.parquet", "socratic/train-0.parquet", "main/test-0.parquet"], "train", "main", [0]),
        (["train.jsonl", "test.jsonl", "README.md"], "test", None, [1]),
        (["default/train/0000.parquet", "default/train/0001.parquet"], "train", None, [0, 1]),
        (["train.parquet", "train.jsonl"], "train", None, [0]),
        (["constrained.jsonl", "untrained/x.parquet"], "train", None, []),
    ],
)  # fmt: skip
def test_files_of_a_split(names: list[str], split: str, config: str | None, expected: list[int]) -> None:
    assert choose_files(names, split, config) == [names[i] for i in expected]


def test_a_split_in_several_configs_takes_a_choice() -> None:
    with pytest.raises(UsageError, check=lambda error: error.code == "several-configs" and "socratic" in error.message):
        choose_files(["main/train-0.parquet", "socratic/train-0.parquet"], "train", None)


def parquet(*rows: dict[str, object]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), buffer)
    return buffer.getvalue()


def test_a_data_set_of_the_hub(tmp_path: Path, hub: Callable[..., AbstractContextManager[str]]) -> None:
    halves = [[{"question": f"{i}?", "answer": str(i)} for i in part] for part in (range(3), range(3, 5))]
    files = {
        "README.md": b"# a data set",
        "main/train-00000-of-00002.parquet": parquet(*halves[0]),
        "main/train-00001-of-00002.parquet": parquet(*halves[1]),
        "main/test-00000-of-00001.parquet": parquet({"question": "t?", "answer": "t"}),
        "other/train-00000-of-00001.parquet": parquet({"question": "o?", "answer": "o"}),
    }
    code = """if True:
        import json, sys
        from deepdistill.distill.problems.load import load_problems
        from deepdistill.errors import DeepDistillError
        try:
            found = load_problems(sys.argv[1], offline=len(sys.argv) > 2)
            print(json.dumps([[p.question, p.answer, p.source, p.grader] for p in found]))
        except DeepDistillError as error:
            print(json.dumps([type(error).__name__, error.code]))
    """

    def ask(*arguments: str) -> Any:  # in a process of its own: the hub's library reads its settings once
        env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    expected = [[f"{i}?", str(i), "hf:org/sums", "math"] for i in range(5)]
    with hub({"org/sums": files}) as endpoint:
        assert ask("hf:org/sums?config=main") == expected
        assert ask("hf:org/sums") == ["UsageError", "several-configs"]
        assert ask("hf:org/sums?split=validation") == ["UsageError", "no-such-split"]
        assert ask("hf:org/nothing") == ["ArtifactError", "hub-failed"]
    assert ask("hf:org/sums?config=main", "offline") == expected
    assert ask("hf:org/sums?config=main&split=test", "offline") == ["UsageError", "no-such-split"]
    assert ask("hf:org/never", "offline") == ["ArtifactError", "not-in-cache"]
    (part,) = tmp_path.rglob("train-00001-of-00002.parquet")
    part.unlink()
    assert ask("hf:org/sums?config=main", "offline") == ["ArtifactError", "split-incomplete"]
