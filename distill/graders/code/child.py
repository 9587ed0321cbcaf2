"""The confined process, in one of three roles: the code under test, its tests, or a program that reads and prints.

code/python.py starts it with its settings as JSON. Its memory holds no more of the problem than its role needs.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

from . import sandbox
from .rpc import Caller, Gone, Remote, Server, Undecided

_MODULES = {
    "np": "numpy", "numpy": "numpy", "pd": "pandas", "pandas": "pandas", "pytest": "pytest", "scipy": "scipy",
    "torch": "torch", "tf": "tensorflow", "nx": "networkx", "sympy": "sympy", "sp": "sympy", "plt": "matplotlib.pyplot",
}  # fmt: skip
"""Modules that tests use without importing them, by the names that they are known by."""
_LIBRARY = {
    name: f"{module}:{name}"
    for module, names in {
        "collections": "Counter defaultdict OrderedDict deque namedtuple",
        "math": "isclose isnan isinf inf nan pi sqrt floor ceil gcd lcm factorial comb perm prod log exp sin cos tan",
        "itertools": "product permutations combinations chain",
        "functools": "reduce partial cmp_to_key",
        "typing": "Any Callable Dict Iterable List Optional Sequence Set Tuple Union",
        "decimal": "Decimal",
        "fractions": "Fraction",
        "datetime": "date timedelta timezone",
        "io": "StringIO BytesIO",
        "pathlib": "Path",
        "unittest": "TestCase",
        "pytest": "approx raises",
        "numpy": "allclose array array_equal ndarray",
        "numpy.testing": "assert_allclose assert_almost_equal assert_array_equal assert_array_almost_equal",
    }.items()
    for name in names.split()
}
"""What else tests use without importing it: MODULE:NAME by name."""

NOT_CONFINED = 97  # exit status: the system lacks the layers that are needed
OUT_OF_MEMORY = 98


def main(settings: dict[str, Any]) -> None:
    """Confine this process, then run its role."""
    role = {"code": serve_code, "program": run_program, "tests": run_tests}[settings["role"]]
    scratch = Path(settings["scratch"])
    source = (scratch / "source.py").read_text(encoding="utf-8")
    channel: list[Any] = [os.fdopen(n, mode) for n, mode in zip(settings["channel"], ("rb", "wb", "wb"), strict=False)]
    limits = sandbox.SandboxLimits(cpu_s=settings["cpu_s"])
    if settings["confined"]:
        try:
            sandbox.confine(scratch, map(Path, settings["readable"]), limits=limits, parent=settings["parent"])
        except sandbox.NotConfined as error:
            print(error, file=sys.stderr)
            sys.exit(NOT_CONFINED)
    else:
        sandbox.die_with(settings["parent"])
        sandbox.set_limits(limits)
        os.chdir(scratch)
    sys.argv, sys.path[:] = ["solution.py"], settings["python_path"]
    role(source, channel)


def serve_code(source: str, channel: list[BinaryIO]) -> None:
    """Run the code once, then answer the calls of the tests."""
    module = sys.modules["solution"] = type(sys)("solution")
    read, write = channel
    failed: dict[str, Any] | None = None
    try:
        exec(compile(source, "solution.py", "exec"), module.__dict__)
    except SystemExit:  # the script ends itself; what it has defined by then can be tested
        pass
    except MemoryError:
        failed = {"error": ["MemoryError", ""]}
    except BaseException as error:
        failed = {"failed": f"{type(error).__name__}: {error}"}
    if failed is None:
        Server(module.__dict__, read, write).serve()
    else:
        read.readline()
        write.write(json.dumps(failed).encode() + b"\n")
        write.flush()


def run_program(source: str, channel: list[BinaryIO]) -> None:
    """Run the code as a script."""
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    try:
        exec(compile(source, "solution.py", "exec"), module.__dict__)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


def run_tests(source: str, channel: list[BinaryIO]) -> None:
    """Run the tests against the code at the other end of the channel and write the verdict to the third descriptor."""
    verdict = channel.pop()
    tests = json.loads(source)
    caller = Caller(*channel)
    score, reason = judge(tests["source"], tests["entry_point"], caller)
    verdict.write(json.dumps({"score": score, "reason": reason}).encode() + b"\n")
    verdict.flush()


def judge(source: str, entry_point: str | None, caller: Caller) -> tuple[float | None, str]:
    """Return the score, or None if the tests cannot tell, and the reason if the score is not 1.0."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        return None, f"the tests are not Python: {error}"
    try:
        n_checks, failure = _run_source(tree, entry_point, caller)
    except MemoryError:
        return None, "the memory limit was reached"
    except (SystemExit, KeyboardInterrupt):
        return None, "the tests ended themselves"
    reason = f"{type(failure).__name__}: {failure}".rstrip(": ") if failure else ""
    if caller.undecided or (failure and caller.met_foreign_error):
        return None, caller.undecided or reason
    if isinstance(failure, ImportError) and not caller.n_calls:
        return None, reason
    if caller.gone or failure:
        return 0.0, caller.gone or reason
    if not n_checks or not caller.n_calls:
        return None, "the tests check nothing of the code"
    return 1.0, ""


def _run_source(tree: ast.Module, entry_point: str | None, caller: Caller) -> tuple[int, Exception | None]:
    """Run the tests; return how many checks passed, and the exception that ended them, if any."""
    n_checks = 0

    def passed() -> None:
        nonlocal n_checks
        n_checks += 1

    module = sys.modules["tests"] = type(sys)("tests")
    names = module.__dict__
    names["__passed__"] = passed
    try:
        names.update(_names_of_code(tree, entry_point, caller))
        exec(compile(ast.fix_missing_locations(_Instrument().visit(tree)), "tests.py", "exec"), names)
        n_tests = _run_functions(names, entry_point)
    except (Undecided, Gone):
        return n_checks, None  # the caller knows
    except MemoryError:
        raise
    except Exception as error:
        return n_checks, error
    return n_checks + n_tests, None


class _Instrument(ast.NodeTransformer):
    """Count each assert that holds, since tests that check nothing say nothing, and drop imports of the solution."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt:
        return ast.copy_location(ast.Pass(), node) if node.module == "solution" else node

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        counted = ast.Expr(ast.Call(ast.Name("__passed__", ast.Load()), [], []))
        return [node, ast.copy_location(counted, node)]


def _names_of_code(tree: ast.Module, entry_point: str | None, caller: Caller) -> dict[str, Any]:
    """Return what the tests need from the code: names that neither they nor Python nor its library define."""
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    asked = {entry_point} if entry_point else set()  # even if Python has the name too
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.ImportFrom) and node.module == "solution":
            asked |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    missing = {name for name in used - bound if not hasattr(builtins, name)} - {"__name__", "*"} - asked
    known = {name for name in missing if name in sys.stdlib_module_names or name in _MODULES}
    # A problem may ask for a gcd of its own: then its tests use no other name that only the code can have.
    if asked or missing - known - set(_LIBRARY):
        known |= missing & set(_LIBRARY)
    subjects = (missing - known | asked) - {"*"}
    if judge := _judges_itself(tree, subjects | {"candidate"}):
        caller.refuse(f"the tests let the code's own {judge} say whether its results are right")
    found = {name: _library(name, caller) for name in sorted(known)}
    for name in sorted(subjects):
        with contextlib.suppress(NameError):  # raised again where a test needs it
            found[name] = caller.name(name)
    return found


def _library(name: str, caller: Caller) -> Any:
    """Return what tests mean by a name that they do not import: never the code's object of that name."""
    module, _, attribute = _LIBRARY.get(name, _MODULES.get(name, name)).partition(":")
    try:
        found = importlib.import_module(module)
        return getattr(found, attribute) if attribute else found
    except ImportError:
        caller.refuse(f"the tests use {name}, and {module} is not installed")


def _judges_itself(tree: ast.Module, subjects: set[str]) -> str:
    """Return the name of the code's function that an assert leaves the verdict to, as in `assert same(f(2), 4)`.

    Whoever gives the results could then also say that they are right, and would see what is expected.
    """
    for node in ast.walk(tree):
        verdicts = [node.test] if isinstance(node, ast.Assert) else []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            verdicts = node.args[:1] if node.func.attr in ("assertTrue", "assertFalse") else []
        while verdicts:
            verdict = verdicts.pop()
            if isinstance(verdict, ast.BoolOp):
                verdicts += verdict.values
            elif isinstance(verdict, ast.UnaryOp):
                verdicts.append(verdict.operand)
            elif isinstance(verdict, ast.Compare) and isinstance(verdict.comparators[0], ast.Constant):
                is_bool = isinstance(verdict.comparators[0].value, bool)
                verdicts += [verdict.left] if is_bool and len(verdict.comparators) == 1 else []
            elif isinstance(verdict, ast.Call) and (name := _root(verdict)) in subjects:
                given = (*verdict.args, *(keyword.value for keyword in verdict.keywords))
                inner = (call for value in given for call in ast.walk(value) if isinstance(call, ast.Call))
                if any(_root(call) in subjects for call in inner):
                    return name
    return ""


def _root(call: ast.Call) -> str:
    """Return the name that a call begins with: `a` of `a(1)`, `a.b(1)` and `a(1).b()`."""
    node: ast.expr = call
    while isinstance(node, ast.Call | ast.Attribute | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _run_functions(names: dict[str, Any], entry_point: str | None) -> int:
    """Run `check(candidate)`, functions named test_* and TestCases; return how many tests the TestCases have."""
    defined = {name: value for name, value in names.items() if not isinstance(value, Remote)}
    if callable(defined.get("check")) and entry_point:
        defined["check"](names[entry_point] if entry_point in names else _missing(entry_point))
    for name, value in defined.items():
        if name.startswith("test") and callable(value) and not isinstance(value, type):
            value()
    return _run_test_cases(defined) if "unittest" in sys.modules else 0


def _run_test_cases(names: dict[str, Any]) -> int:
    import unittest

    suite = unittest.TestSuite()
    for value in names.values():
        if isinstance(value, type) and issubclass(value, unittest.TestCase):
            suite.addTests(unittest.defaultTestLoader.loadTestsFromTestCase(value))
    result = unittest.TestResult()
    suite.run(result)
    for _, trace in result.errors + result.failures:
        raise AssertionError(trace.strip().splitlines()[-1])
    return result.testsRun - len(result.skipped)


def _missing(name: str) -> Any:
    raise NameError(f"name {name!r} is not defined")
