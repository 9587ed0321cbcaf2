"""The public surface: exactly these names, loaded when asked for, with examples that run."""

from __future__ import annotations

import doctest
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import deepdistill
from deepdistill import quantize, teach
from deepdistill.distill.recipe.teach import TeachRecipe
from deepdistill.distill.records import Problem
from deepdistill.distill.teachers import pocket_dir
from deepdistill.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
FUNCTIONS = {"chat", "evaluate", "grade", "load_problems", "open_teacher", "quantize", "teach"}
CLASSES = {"Engine", "TeachRecipe", "Trace", "TraceStore"}
ERRORS = {"ArtifactError", "DeepDistillError", "GateError", "ModelError", "TeacherError", "UsageError"}


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_nothing_else_is_public() -> None:
    assert set(deepdistill.__all__) == FUNCTIONS | CLASSES | ERRORS | {"__version__"}
    assert set(deepdistill.__all__) <= set(dir(deepdistill))
    assert {name for name in deepdistill.__all__ if isinstance(getattr(deepdistill, name), type)} == CLASSES | ERRORS
    assert all(callable(getattr(deepdistill, name)) for name in FUNCTIONS)
    with pytest.raises(AttributeError):
        deepdistill.no_such_name  # noqa: B018


def test_every_error_is_public() -> None:
    from deepdistill import errors

    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert classes == ERRORS


def test_importing_the_package_loads_the_standard_library_alone() -> None:
    code = (
        "import sys; before = set(sys.modules); import deepdistill; dir(deepdistill)\n"
        "new = set(sys.modules) - before\n"
        "print(*sorted(name for name in new if name.split('.')[0] not in sys.stdlib_module_names))"
    )
    assert run_python(code).split() == ["deepdistill"]


def test_quantize_is_the_same_whichever_of_stage_and_function_is_imported_first() -> None:
    code = (
        "import deepdistill\n"
        "first = deepdistill.quantize\n"
        "import deepdistill.quantize.recipe\n"
        "from deepdistill import quantize\n"
        "print(first is quantize, callable(quantize), deepdistill.quantize.recipe.QuantizeRecipe.__name__)"
    )
    assert run_python(code).split() == ["True", "True", "QuantizeRecipe"]


def test_a_problem_or_a_grader_with_a_reference_grades_a_reply() -> None:
    from deepdistill.distill.graders.pool import Grader

    problem = Problem("p", "What is 6 times 7?", "42", "test", "math")
    with Grader(n_workers=1) as grader:
        assert deepdistill.grade(problem, reply="It is 42.", grader=grader).verdict == "right"
        assert len(grader.processes) == 1, "a grader that was handed over stays open"
        assert deepdistill.grade("math", reference="42", reply="It is 41.", grader=grader).verdict == "wrong"
        unknown = deepdistill.grade("math", reply="It is 42.", grader=grader)
        assert (unknown.verdict, bool(unknown.reason)) == ("unknown", True)
        with pytest.raises(UsageError, check=lambda error: error.code == "settings-conflict"):
            deepdistill.grade(problem, reference="42", reply="It is 42.", grader=grader)
    with pytest.raises(UsageError, check=lambda error: error.code == "no-such-grader"):
        deepdistill.grade("no such", reference="42", reply="It is 42.")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples read: model.gguf, student/ and traces.jsonl."""
    folder = tmp_path_factory.mktemp("artifacts")
    shutil.copytree(pocket_dir(), folder / "student")
    quantize(folder / "student", folder / "model.gguf", ftype="F16")
    values: dict[str, Any] = {
        "problems": "gym:chain_sum?max_terms=2&max_digits=1",
        "student": "pocket",
        "traces": {"n": 8},
    }
    teach(TeachRecipe.from_json({"version": 1, **values}), folder / "run", stop_after="traces")
    shutil.copy(folder / "run" / "traces.jsonl", folder)
    return folder


@pytest.fixture
def workplace(artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the artifacts as the current folder, with nothing on standard input."""
    shutil.copytree(artifacts, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return tmp_path


@pytest.mark.parametrize("name", sorted(FUNCTIONS | CLASSES | {"DeepDistillError"}))
def test_the_examples_of_public_names_run(name: str, workplace: Path) -> None:
    from deepdistill.quantize.release import quantize as function

    value = function if name == "quantize" else getattr(deepdistill, name)
    found = [test for test in doctest.DocTestFinder(recurse=False).find(value, name, globs={}) if test.examples]
    assert len(found) == 1, "it has no example"
    output = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(found[0], out=output.write)
    assert runner.summarize(verbose=False).failed == 0, output.getvalue()


def test_the_snippet_of_the_readme_runs(workplace: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.M)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
