"""Python code against the unit tests of its problem, in processes that reach neither files nor the network.

The code is the last fenced block that defines something, or the whole content. `tests` in the problem's metadata is
source with asserts, `test_*` functions, a `check(candidate)` or TestCases; a list of such lines; or pairs of input and
output, for a program (stdin and stdout) or, with an `entry_point`, for a function. The code never sees the expected
results: asserts run in a process of their own (rpc.py), and output is compared here.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..base import CannotTell, Submission
from .child import NOT_CONFINED, OUT_OF_MEMORY

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*\1[ \t]*$", re.DOTALL | re.MULTILINE)
_MAX_OUTPUT = 1 << 20  # bytes
_NOT_CONFINED_HERE = "this system cannot confine code; python:unconfined runs it without a sandbox"
_PACKAGE, _ROOT = __package__.split(".")[0], Path(__file__).parents[3]
# The package's folder may have any name, and -S leaves out the hook that finds an editable install.
_BOOTSTRAP = (
    "import sys, json, importlib.util as i; s = json.loads(sys.argv[1]); "
    f"p = i.spec_from_file_location({_PACKAGE!r}, {str(_ROOT / '__init__.py')!r}, "
    f"submodule_search_locations=[{str(_ROOT)!r}]); "
    f"m = sys.modules[{_PACKAGE!r}] = i.module_from_spec(p); p.loader.exec_module(m); "
    f"from {__package__}.child import main; main(s)"
)


def load(argument: str) -> None:
    """Check the argument, and whether this system can confine code."""
    from .sandbox import confinement

    if argument not in ("", "unconfined"):
        raise CannotTell(f"python has no option {argument!r}; it takes unconfined")
    if not argument and not confinement():
        raise CannotTell(_NOT_CONFINED_HERE)


def grade(submission: Submission) -> float:
    """Return 1.0 if the code passes every test, else 0.0.

    Raises:
        CannotTell: there are no tests, they are broken or check nothing, a limit of time or memory was reached, or
            this system cannot confine code.
    """
    tests = read_tests(submission.metadata)
    code = extract(submission.content, names_in(tests))
    deadline = time.monotonic() + submission.timeout_s * 0.9
    try:
        compile(code, "solution.py", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0.0
    with tempfile.TemporaryDirectory(prefix="deepdistill-", ignore_cleanup_errors=True) as folder:
        scratch = _Scratch(Path(folder).resolve(), deadline, is_confined=submission.argument != "unconfined")
        return _run_programs(code, tests, scratch) if isinstance(tests, list) else _run_tests(code, tests, scratch)


def read_tests(metadata: Mapping[str, Any]) -> dict[str, Any] | list[tuple[str, str]]:
    """Return the tests as source with its entry point, or as pairs of a program's input and output."""
    tests, entry_point = metadata.get("tests"), metadata.get("entry_point")
    if isinstance(tests, str) and tests.lstrip()[:1] in "[{":
        with contextlib.suppress(ValueError):
            tests = json.loads(tests)
    if isinstance(tests, Mapping):
        entry_point = tests.get("fn_name") or entry_point
        inputs, outputs = tests.get("inputs", tests.get("input")), tests.get("outputs", tests.get("output"))
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise CannotTell("the tests' inputs and outputs are not lists of the same length")
        tests = [{"input": i, "output": o} for i, o in zip(inputs, outputs, strict=True)]
    if isinstance(tests, Sequence) and not isinstance(tests, str) and tests:
        if all(isinstance(test, str) for test in tests):
            tests = "\n".join(tests)
        elif all(isinstance(test, Mapping) and {"input", "output"} <= test.keys() for test in tests):
            if not entry_point:
                return [(_text(test["input"]), _text(test["output"])) for test in tests]
            tests = "\n".join(_call(str(entry_point), test["input"], test["output"]) for test in tests)
    if not isinstance(tests, str) or not tests.strip():
        raise CannotTell("the problem has no tests")
    setup = metadata.get("test_setup") or metadata.get("test_setup_code") or ""
    return {"source": f"{setup}\n{tests}", "entry_point": str(entry_point) if entry_point else None}


def extract(content: str, wanted: set[str]) -> str:
    """Return the last fenced block of Python that defines a wanted name, else the last block, else the content."""
    blocks: list[str] = [
        body for _, language, body in _FENCE.findall(content) if language.lower() in ("", "py", "python", "python3")
    ]
    for block in reversed(blocks):
        if wanted & _defined(block):
            return block
    return blocks[-1] if blocks else content


def names_in(tests: dict[str, Any] | list[tuple[str, str]]) -> set[str]:
    """Return the names that tests use."""
    if isinstance(tests, list):
        return set()
    try:
        tree = ast.parse(tests["source"])
    except (SyntaxError, ValueError):
        return set()
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | {tests["entry_point"]}


def _defined(source: str) -> set[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    return {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)}


def _call(entry_point: str, given: Any, expected: Any) -> str:
    arguments = given if isinstance(given, list) else [given]
    result = f"{entry_point}(*{_literal(arguments)})"
    if isinstance(expected, float) and math.isnan(expected):
        return f"result = {result}\nassert isinstance(result, float) and result != result"
    return f"assert {result} == {_literal(expected)}"


def _literal(value: Any) -> str:
    """Return a JSON value as Python source, with its infinite numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(key)}: {_literal(item)}' for key, item in value.items())}}}"
    return repr(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(map(str, value)) if isinstance(value, list) else str(value)


@dataclass(frozen=True)
class _Scratch:
    """Where and for how long the processes of one submission run."""

    folder: Path
    deadline: float
    is_confined: bool

    def start(
        self,
        role: str,
        source: str,
        *,
        channel: tuple[int, ...] = (),
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        """Start an interpreter with an empty environment, in a session and a folder of its own."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        (folder / "source.py").write_text(source, encoding="utf-8", errors="surrogatepass")
        settings = _fixed_settings() | {
            "role": role,
            "scratch": str(folder),
            "channel": channel,
            "confined": self.is_confined,
            "parent": os.getpid(),
            "cpu_s": max(1, round(self.deadline - time.monotonic() + 0.5)),
        }
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        environment = {"HOME": str(folder), "TMPDIR": str(folder), "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"} | threads
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _BOOTSTRAP, json.dumps(settings)],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            env=environment,
            pass_fds=channel,
            start_new_session=True,
        )

    def read(self, descriptor: int, most: int) -> bytes:
        """Return the bytes of a pipe until its end, or a few more than `most`.

        Raises:
            CannotTell: the deadline passes first.
        """
        data = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while len(data) <= most:
                if not selector.select(max(0.0, self.deadline - time.monotonic())):
                    raise CannotTell("the time limit was reached")
                chunk = os.read(descriptor, 1 << 16)
                if not chunk:
                    break
                data += chunk
        return bytes(data)


def _run_tests(code: str, tests: dict[str, Any], scratch: _Scratch) -> float:
    """Run the tests and the code in two processes, joined by two pipes, and return the verdict of the tests."""
    to_code, to_tests, verdict = os.pipe(), os.pipe(), os.pipe()
    children: list[subprocess.Popen[bytes]] = []
    try:
        try:
            children.append(scratch.start("code", code, channel=(to_code[0], to_tests[1])))
            channel = (to_tests[0], to_code[1], verdict[1])
            children.append(scratch.start("tests", json.dumps(tests), channel=channel))
        finally:
            for end in (*to_code, *to_tests, verdict[1]):
                os.close(end)
        line = scratch.read(verdict[0], _MAX_OUTPUT)
        with contextlib.suppress(subprocess.TimeoutExpired):  # its status says how it ended
            children[0].wait(timeout=0.5)
        status = children[0].poll()
    finally:
        os.close(verdict[0])
        for child in children:
            _kill(child)
    _check_status(status)
    _check_status(children[1].returncode if not line else 0)
    if not line:
        raise CannotTell("the tests' process ended without a verdict")
    reply = json.loads(line)
    if reply["score"] is None:
        raise CannotTell(reply["reason"])
    return float(reply["score"])


def _run_programs(code: str, tests: list[tuple[str, str]], scratch: _Scratch) -> float:
    """Run the code once for each input and compare its output."""
    for given, expected in tests:
        with tempfile.TemporaryFile() as stdin:
            stdin.write(given.encode())
            stdin.seek(0)
            read, write = os.pipe()
            child = scratch.start("program", code, stdin=stdin.fileno(), stdout=write)
            os.close(write)
            try:
                output = scratch.read(read, len(expected) + _MAX_OUTPUT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=0.5)
            finally:
                os.close(read)
                _kill(child)
        if len(output) > len(expected) + _MAX_OUTPUT:
            return 0.0
        _check_status(child.returncode)
        if child.returncode or _lines(output.decode(errors="replace")) != _lines(expected):
            return 0.0
    return 1.0


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


@cache
def _fixed_settings() -> dict[str, Any]:
    from .sandbox import python_paths

    standard = [path for path in sys.path if path.startswith(sysconfig.get_path("stdlib")) and "-packages" not in path]
    packages = list(dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib")))
    return {
        "python_path": [*standard, *packages],
        "readable": [str(path) for path in python_paths()],
    }


def _check_status(status: int | None) -> None:
    """Raise CannotTell if a limit or a lack of confinement, and not the code, ended a process."""
    if status == NOT_CONFINED:
        raise CannotTell(_NOT_CONFINED_HERE)
    if status == OUT_OF_MEMORY:
        raise CannotTell("the memory limit was reached")
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        raise CannotTell("the time limit was reached")


def _kill(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    child.wait()
