"""Code under its tests: what is right, what is wrong, and that hostile code neither passes nor gets out."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deepdistill.distill.graders.code.sandbox import FILE_LAYERS, NETWORK_LAYERS, confinement
from deepdistill.distill.graders.pool import Grader
from deepdistill.distill.records import Grade, Problem

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="code is confined on Linux alone")

SQUARE = "assert f(2) == 4\nassert f(3) == 9\nassert f(-1) == 1"
PAIRS = [{"input": "2\n", "output": "4\n"}, {"input": "3\n", "output": "9\n"}]


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(timeout_s=20, n_workers=2) as grader:
        yield grader


def problem(tests: object, kind: str = "python", **metadata: object) -> Problem:
    return Problem("id", "question?", None, "test", kind, {"tests": tests} | metadata)


def grade_all(grader: Grader, cases: list[tuple[object, str]], **metadata: object) -> list[Grade]:
    with ThreadPoolExecutor(grader.n_workers) as threads:
        return list(threads.map(lambda case: grader.grade(problem(case[0], **metadata), case[1]), cases))


RIGHT: list[tuple[object, str]] = [
    (SQUARE, "def f(x): return x * x"),
    (SQUARE, "Here:\n```python\ndef f(x):\n    return x ** 2\n```\nDone."),
    (SQUARE, "```python\ndef f(x): return x * x\n```\nUse it so:\n```python\nprint(f(2))\n```"),
    (SQUARE, "```\nf = lambda x: x * x\n```"),
    (SQUARE.split("\n"), "def f(x): return x * x"),
    ('["assert f(2) == 4"]', "def f(x): return x * x"),
    (SQUARE, "import numpy as np\ndef f(x): return np.int64(x) ** 2"),
    (SQUARE, "from fractions import Fraction\ndef f(x): return Fraction(x) * x"),
    (SQUARE, "import sys\ndef f(x): return x * x\nif True: sys.exit(0)"),
    (SQUARE, "from concurrent.futures import ThreadPoolExecutor\n"
             "def f(x): return ThreadPoolExecutor(2).submit(lambda: x * x).result()"),
    (SQUARE, "import tempfile\ndef f(x):\n    with tempfile.TemporaryFile() as t:\n        return x * x"),
    ("def check(candidate):\n    xs = [[3, 1], [2]]\n    candidate(xs)\n    assert xs == [[1, 3], [2]]\ncheck(order)",
     "def order(xs):\n    for x in xs: x.sort()"),
    ("assert f(lambda x: x + 1, 2) == 3\nassert f(abs, -2) == 2", "def f(g, x): return g(x)"),
    ("s = Stack()\ns.push([1])\nassert len(s) == 1 and s.pop() == [1]\nassert isinstance(s, Stack) and not s.items",
     "class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n"
     "    def pop(self): return self.items.pop()\n    def __len__(self): return len(self.items)"),
    ("assert list(f(3)) == [0, 1, 2]\nassert [x for x in f(2)] == [0, 1]", "def f(n):\n    yield from range(n)"),
    ("try:\n    f(-1)\nexcept ValueError:\n    caught = True\nassert caught", "def f(x): raise ValueError('no')"),
    ("from solution import f\ndef test_two():\n    assert f(2) == 4", "def f(x): return x * x"),
    ("import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(2), 4)",
     "def f(x): return 4"),
    ("assert math.isclose(f(2), 1.41421356, rel_tol=1e-6)", "import math\ndef f(x): return math.sqrt(x)"),
    ("assert f() == (1, 2.5, None, True, 'é', b'x', {1: {2}}, frozenset({3}), 1j, 10**5000)",
     "from collections import OrderedDict\n"
     "def f(): return 1, 2.5, None, True, 'é', b'x', OrderedDict({1: {2}}), frozenset({3}), 1j, 10**5000"),
    (PAIRS, "print(int(input()) ** 2)"),
    (PAIRS, "import sys\nx = int(sys.stdin.read())\nif __name__ == '__main__':\n    print(x * x, ' ')"),
    ({"inputs": ["2\n", "3\n"], "outputs": ["4", "9"]}, "print(int(input()) ** 2)"),
    ({"fn_name": "f", "inputs": [[2], [3]], "outputs": [4, 9]}, "def f(x): return x * x"),
]  # fmt: skip

WRONG = [
    "", "pass", "def f(x): return x", "def f(x): return 4", "def f(x): return str(x * x)", "def f(x): return [x * x]",
    "def f(x): return None", "def f(x): print(x * x)", "def g(x): return x * x", "f = 4", "def f(): return 4",
    "def f(x) return x * x", "def f(x):\nreturn x * x", "```python\ndef f(x): return x\n```", "x * x", "I don't know.",
    "def f(x): return x * x + (x == 3)", "def f(x): return abs(x) * x", "def f(x): return -x * x",
    "def f(x): raise ValueError", "def f(x): raise AssertionError", "def f(x): return f(x)", "def f(x): assert False",
    "def f(x): return x * x\nraise RuntimeError", "def f(x): return x * x\n1 / 0", "import no_such_module",
    "def f(x): return x * x\ndel f", "def f(x): yield x * x", "def f(x): return lambda: x * x", "class f: pass",
    "def f(x): return float('nan')", "def f(x): return x * x + 1e-9", "def f(x): return (x * x,)", "\0", "\ud7ff",
    "(" * 5000, "f = " + "-" * 20000 + "1",
]  # fmt: skip

# A pass forged, not earned: none of these knows a square.
FORGED = [
    "import sys\nsys.exit(0)", "import os\nos._exit(0)", "def f(x):\n    import os; os._exit(0)",
    "def f(x):\n    import sys; sys.exit(0)", "def f(x): raise SystemExit(0)", "def f(x): raise KeyboardInterrupt",
    "class E:\n    def __eq__(self, o): return True\ndef f(x): return E()",
    "class E(int):\n    def __eq__(self, o): return True\n    __hash__ = None\ndef f(x): return E(7)",
    "class E(list):\n    def __eq__(self, o): return True\ndef f(x): return E()",
    "class E(float):\n    def __sub__(self, o): return 0.0\n    def __eq__(self, o): return True\n"
    "def f(x): return E(1)",
    "class E:\n    def __getattribute__(self, n): return lambda *a: True\ndef f(x): return E()",
    "class M(type):\n    def __eq__(c, o): return True\nclass E(metaclass=M): pass\ndef f(x): return E",
    "import builtins\nbuiltins.AssertionError = ValueError\ndef f(x): return 0",
    "import builtins\nbuiltins.int.__eq__ = lambda a, b: True\ndef f(x): return 0",
    "import builtins\nbuiltins.isinstance = lambda *a: True\nbuiltins.type = lambda x: int\ndef f(x): return 0",
    "import builtins\nbuiltins.exec = builtins.eval = builtins.compile = lambda *a, **k: None\ndef f(x): return 0",
    "import ast\nast.parse = lambda *a: None\nast.Assert = None\ndef f(x): return 0",
    "import json\njson.dumps = lambda *a: '{\"score\": 1.0, \"reason\": \"\"}'\ndef f(x): return 0",
    "import json\njson.loads = lambda *a: {'do': 'name', 'given': [[], {}], 'name': 'f'}\ndef f(x): return 0",
    "print('{\"score\": 1.0, \"reason\": \"\"}')\ndef f(x): return 0",
    "import os\nfor n in range(3, 64):\n    try: os.write(n, b'{\"score\": 1.0, \"reason\": \"\"}\\n')\n"
    "    except OSError: pass\ndef f(x): return 0",
    "import os\nfor n in range(64):\n    try: os.write(n, b'{\"value\": true}\\n' * 9)\n    except OSError: pass\n"
    "def f(x): return True",
    "import os\nfor n in range(64):\n    try: os.close(n)\n    except OSError: pass\ndef f(x): return 0",
    "import os\nos.write(1, b'[' * 100000 + b'\\n')\nfor n in range(3, 20):\n"
    "    try: os.write(n, b'[' * 60000 + b'\\n')\n"
    "    except OSError: pass\ndef f(x): return 0",
    "import sys\nfor m in list(sys.modules.values()):\n    for n in ('judge', 'passed', '_answer', 'encode'):\n"
    "        if hasattr(m, n): setattr(m, n, lambda *a: (1.0, ''))\ndef f(x): return 0",
    "import gc\nfound = [o for o in gc.get_objects() if isinstance(o, dict)\n"
    "         and 'ass' + 'ert f(2)' in str(o.values())[:10000]]\n"
    "def f(x):\n    if found: return x * x",
    "import sys\ndef f(x):\n    g = sys._getframe()\n    while g:\n\n"
    "        if 'ass' + 'ert f' in repr(g.f_locals): return x * x\n"
    "        g = g.f_back\n    return 0",
    "import glob\ntext = ''.join(open(p).read() for p in glob.glob('/tmp/**/source.py', recursive=True))\n"
    "def f(x): return x * x if 'ass' + 'ert' in text else 0",
    "import inspect\ndef f(x):\n    for i in inspect.stack():\n        i.frame.f_globals['f'] = None\n    return 0",
    "__passed__ = None\ndef assertEqual(*a): pass\ndef check(*a): pass\ndef test_f(): pass\ndef f(x): return 0",
    "abs = len = str = lambda *a: 4\ndef f(x): return 4",
    "import atexit, os\natexit.register(lambda: os._exit(0))\ndef f(x): return 0",
    "import signal, os\nsignal.raise_signal(signal.SIGTERM)", "import os\nos.abort()",
    "import ctypes\nctypes.string_at(0)", "import faulthandler\nfaulthandler._sigsegv()",
    "def f(x):\n    try: return f(x)\n    except RecursionError: return 0",
    "def f(x):\n    a = []\n    a.append(a)\n    return a", "def f(x): return type('X', (), {})()",
]  # fmt: skip


def test_right_code(grader: Grader) -> None:
    assert len(RIGHT) >= 20
    grades = grade_all(grader, RIGHT, entry_point=None)
    assert [(code, grade) for (_, code), grade in zip(RIGHT, grades, strict=True) if grade.verdict != "right"] == []


def test_an_entry_point_is_what_check_is_given(grader: Grader) -> None:
    tests = "def check(candidate):\n    assert candidate(2) == 4\n"
    right, wrong, missing = (
        grader.grade(problem(tests, entry_point="square"), f"def {name}(x): return {value}")
        for name, value in (("square", "x * x"), ("square", "x + x + 1"), ("cube", "x * x"))
    )
    assert (right.verdict, wrong.verdict, missing.verdict) == ("right", "wrong", "wrong")


def test_wrong_code_is_wrong(grader: Grader) -> None:
    grades = grade_all(grader, [(SQUARE, code) for code in WRONG])
    assert [(code[:60], grade) for code, grade in zip(WRONG, grades, strict=True) if grade.verdict != "wrong"] == []


def test_a_forged_pass_is_not_right(grader: Grader) -> None:
    assert len(WRONG) + len(FORGED) >= 50
    grades = grade_all(grader, [(SQUARE, code) for code in FORGED])
    assert [code for code, grade in zip(FORGED, grades, strict=True) if grade.verdict == "right"] == []
    tolerant = "assert abs(f(2) - 4) < 1e-6\nassert 4 in [f(2)]\nassert not f(2) != 4"
    operators = ("__sub__", "__rsub__", "__abs__", "__lt__", "__eq__", "__ne__", "__contains__", "__bool__")
    body = "\n".join(f"    def {name}(self, *a): return self" for name in operators)
    yes = f"class E:\n{body}\n    def __lt__(self, o): return True\ndef f(x): return E()"
    assert grader.grade(problem(tolerant), yes).verdict == "unknown"


ALWAYS = "lambda *a, **k: True"
ACCOMPLICES = [
    ("assert np.allclose(f(2), 4)", f"class np: allclose = {ALWAYS}\ndef f(x): return 5"),
    ("assert np.array_equal(f(2), [4])", f"class np: array_equal = {ALWAYS}\ndef f(x): return [5]"),
    ("assert isclose(f(2), 4)", f"isclose = {ALWAYS}\ndef f(x): return 5"),
    ("assert f(2) == pytest.approx(4)", "class pytest: approx = lambda x: 5\ndef f(x): return 5"),
    ("assert f(2) == approx(4)", "approx = lambda x: 5\ndef f(x): return 5"),
    ("assert Counter(f(2)) == Counter([4])", "Counter = lambda x: 0\ndef f(x): return [5]"),
    ("assert same(f(2), 4)", f"same = {ALWAYS}\ndef f(x): return 5"),
    ("assert not differ(f(2), 4)", "differ = lambda *a: False\ndef f(x): return 5"),
    ("assert same(f(2), 4) is True and f(2)", f"same = {ALWAYS}\ndef f(x): return 5"),
    ("for _ in map(f, [2]): assert _ == 4", "def f(x): raise StopIteration"),
    ("assert all(x == 4 for x in map(f, [2]))", "def f(x): raise StopIteration"),
    ("assert f(2) == 4 or tf.no_such_thing(f(2), 4)", f"class tf: no_such_thing = {ALWAYS}\ndef f(x): return 5"),
]


def test_what_tests_use_without_importing_it_is_never_the_codes_own(grader: Grader) -> None:
    grades = grade_all(grader, [(tests, code) for tests, code in ACCOMPLICES])
    assert [case for case, grade in zip(ACCOMPLICES, grades, strict=True) if grade.verdict == "right"] == []
    honest = [(tests, "def f(x): return [x * x] if LIST else x * x") for tests, _ in ACCOMPLICES[:5]]
    honest = [(tests, code.replace("LIST", str("array_equal" in tests))) for tests, code in honest]
    honest.append(("assert gcd(4, 6) == 2", "def gcd(a, b):\n    while b: a, b = b, a % b\n    return a"))
    honest.append(("assert decode(encode('a')) == 'a'", "def encode(x): return x[::-1]\ndecode = encode"))
    grades = grade_all(grader, honest)
    assert [(case, grade.reason) for case, grade in zip(honest, grades, strict=True) if grade.verdict != "right"] == []


def test_numbers_that_are_not_finite_can_be_expected(grader: Grader) -> None:
    pairs = [{"input": [1], "output": float("inf")}, {"input": [0], "output": float("nan")}]
    code = "def f(x): return float('inf') if x else float('nan')"
    forged = "inf = nan = 1\ndef f(x): return 1"
    right, wrong = (grader.grade(problem(pairs, entry_point="f"), text) for text in (code, forged))
    assert (right.verdict, wrong.verdict) == ("right", "wrong")


def test_programs_that_print_the_wrong_thing(grader: Grader) -> None:
    programs = [
        "print(4)", "print(9)", "", "import os; os._exit(0)", "print(int(input()))", "print(int(input()) ** 2, 0)",
        "x = int(input()); print(x * x); raise SystemExit(1)", "print(open(__file__).read())", "print('4\\n9')",
        "while True: print(4)", "x = int(input()); print(x * x, end=''); print(x * x)",
    ]  # fmt: skip
    grades = grade_all(grader, [(PAIRS, code) for code in programs])
    assert [(c, g) for c, g in zip(programs, grades, strict=True) if g.verdict != "wrong"] == []


@pytest.mark.slow
def test_code_for_another_problem(grader: Grader) -> None:
    bodies = ["x", "x + 1", "x * 2", "x * x", "-x", "str(x)", "[x]", "x > 2"]
    tests = [
        f"assert f(3) == {eval(body, {'x': 3})!r} and type(f(5)) is type({body.replace('x', '5')})" for body in bodies
    ]
    cases: list[tuple[object, str]] = [(test, f"def f(x): return {body}") for test in tests for body in bodies]
    verdicts = [grade.verdict == "right" for grade in grade_all(grader, cases)]
    assert verdicts == [i == j for i in range(len(bodies)) for j in range(len(bodies))]


@pytest.mark.parametrize(
    ("tests", "code", "reason"),
    [
        ("assert f(2) ==", "def f(x): return 4", "not Python"),
        ("import no_such_module\nassert f(2) == 4", "def f(x): return 4", "no_such_module"),
        ("assert 1 == 1", "def f(x): return 4", "check nothing"),
        ("f(2)", "def f(x): return 4", "check nothing"),
        ("def test(): pass", "def f(x): return 4", "check nothing"),
        ("assert sum([2, 2]) == 4", "def sum(x): return 0", "check nothing"),
        ("raise SystemExit(0)", "def f(x): return 4", "ended themselves"),
        ("class A: pass\nassert f(A()) == 4", "def f(x): return 4", "cannot cross"),
        ("assert f(1) == V(1)", "class V:\n    def __init__(s, x): pass\n    def __eq__(s, o): return 1\nf = V", "own"),
        ([], "x = 1", "no tests"),
        ({"inputs": ["1"], "outputs": []}, "x = 1", "same length"),
        (SQUARE, "def f(x):\n    a = bytearray(10 ** 10)\n    return x * x", "memory"),
        (SQUARE, "a = bytearray(10 ** 10)", "memory"),
        (PAIRS, "a = bytearray(10 ** 10)", "memory"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_unknown(grader: Grader, tests: object, code: str, reason: str) -> None:
    grade = grader.grade(problem(tests), code)
    assert (grade.verdict, grade.verdict_by, grade.score) == ("unknown", "none", None)
    assert reason in grade.reason


@pytest.mark.parametrize(
    "code",
    ["def f(x):\n    while True: pass", "while True: pass", "import time\ntime.sleep(60)\ndef f(x): return x * x",
     "import threading\nlock = threading.Lock()\nlock.acquire()\ndef f(x): lock.acquire()"],
)  # fmt: skip
def test_code_that_never_ends_is_unknown_and_leaves_no_process(code: str) -> None:
    with Grader(timeout_s=1.5, n_workers=1) as grader:
        grade = grader.grade(problem(SQUARE), code)
        assert (grade.verdict, grade.reason) == ("unknown", "the time limit was reached")
        (worker,) = grader.processes
        assert children_of(worker.pid) == []


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"  # whoever inherits a dead process may let it lie
    except FileNotFoundError:
        return False


def test_killing_the_worker_kills_the_code() -> None:
    with Grader(timeout_s=30, n_workers=1) as grader:
        grader.grade(problem(SQUARE), "def f(x): return x * x")
        (worker,) = grader.processes
        running = list[str]()
        thread = threading.Thread(target=grader.grade, args=(problem(SQUARE), "while True: pass"))
        thread.start()
        while len(running) < 2:
            running = children_of(worker.pid)
        worker.kill()
        thread.join()
        ended = time.monotonic() + 20  # it takes as long as the kernel does, and far less than the code's own limit
        while any(runs(child) for child in running):
            assert time.monotonic() < ended, "the code outlives its worker"


# What each confined attempt must end in: `f` answers 4 if the attempt succeeded, so that `right` means a way out.
ESCAPES = {
    "read a password file": "open('/etc/passwd').read()",
    "list the root": "assert len(os.listdir('/')) > 0 and 'etc' in os.listdir('/')",
    "read the home": "os.listdir('{home}')",
    "read a file of the user's": "open('{secret}').read()",
    "write beside the scratch folder": "open('{folder}/new', 'w').write('x')",
    "write to /tmp": "open('/tmp/deepdistill-escape', 'w').write('x')",
    "write to the library": "open(os.__file__, 'a').write('x')",
    "follow a link out": "os.symlink('{secret}', 'link'); open('link').read()",
    "climb out": "open('../../../../../../etc/passwd').read()",
    "read the parent's memory": "open(f'/proc/{os.getppid()}/mem', 'rb')",
    "read the parent's environment": "open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "open a socket": "socket.socket()",
    "connect to this machine": "socket.create_connection(('127.0.0.1', {port}), 1)",
    "resolve a name": "socket.getaddrinfo('localhost', 80); socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "open a unix socket": "socket.socket(socket.AF_UNIX).connect('/run/systemd/private')",
    "send by a socket pair": "socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b'x', '\\0abstract')",
    "kill the parent": "os.kill(os.getppid(), 9)",
    "stop every process": "os.kill(-1, 19)",
    "have the kernel signal the parent": "fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
    "choose the kernel's signal": "fcntl.fcntl(os.pipe()[0], fcntl.F_SETSIG, 9)",
    "own a descriptor's signals": "fcntl.ioctl(socket.socketpair()[0], 0x8901, os.getppid().to_bytes(4, 'little'))",
    "limit the parent": "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
    "raise a limit": "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
    "fork": "os.fork()",
    "start a program": "subprocess.run(['/bin/true'], check=True)",
    "become another program": "os.execv('/bin/true', ['true'])",
    "run a shell": "assert os.system('true') == 0",
    "trace the parent": "assert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "leave by a new namespace": "assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "mount": "assert ctypes.CDLL(None).mount(b'none', b'.', b'tmpfs', 0, None) == 0",
    "change the root": "os.chroot('.')",
    "become root": "os.setuid(0); os.setgid(0)",
    "call the kernel another way": "assert ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(256)) >= 0",
    "survive its parent": "assert ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0",
    "write a large file": "open('big', 'wb').write(bytes(1 << 26))",
    "open many files": "[open('/dev/null') for _ in range(1000)]",
    "see the environment": "assert os.environ['DEEPDISTILL_SECRET']",
    "find it in a child's arguments": "open('/proc/self/cmdline').read()",
}


def test_hostile_code_gets_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPDISTILL_SECRET", "1")
    (tmp_path / "secret").write_text("secret")
    imports = "import ctypes, fcntl, os, resource, signal, socket, subprocess\n"
    imports += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    with socket.create_server(("127.0.0.1", 0)) as server, Grader(timeout_s=20, n_workers=2) as grader:
        fill = {
            "{home}": os.path.expanduser("~"),
            "{secret}": str(tmp_path / "secret"),
            "{folder}": str(tmp_path),
            "{port}": str(server.getsockname()[1]),
        }
        cases: list[tuple[object, str]] = []
        for attempt in ESCAPES.values():
            for name, value in fill.items():
                attempt = attempt.replace(name, value)
            cases.append(("assert f(2) == 4", f"{imports}def f(x):\n    {attempt}\n    return 4"))
        grades = grade_all(grader, cases)
        fine = grader.grade(
            problem("assert f(2) == 4"), f"{imports}def f(x):\n    open('mine', 'w').write('x')\n    return 4"
        )
    assert fine.verdict == "right", "the scratch folder is the code's"
    assert {name: g for name, g in zip(ESCAPES, grades, strict=True) if g.verdict == "right"} == {}
    assert {path.name for path in tmp_path.iterdir()} == {"secret"}
    assert not Path("/tmp/deepdistill-escape").exists()


def test_threads_and_output_are_bounded(grader: Grader) -> None:
    bomb = "import threading, time\ndef f(x):\n    n = 0\n    try:\n        while True:\n            n += 1\n"
    bomb += "            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    bomb += "    except RuntimeError: return n < 1000"
    flood = "def f(x):\n    import sys\n    for _ in range(20000): print('x' * 10000)\n    return True"
    grades = grade_all(grader, [("assert f(2) is True", bomb), ("assert f(2) is True", flood)])
    assert [grade.verdict for grade in grades] == ["right", "right"]
    endless = grader.grade(problem(PAIRS), "import sys\nwhile True: sys.stdout.write('4' * 100000)")
    assert endless.verdict == "wrong"


def test_python_unconfined_reads_files_and_needs_to_be_said(grader: Grader, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("4")
    code = f"def f(x): return int(open({str(tmp_path / 'data')!r}).read())"
    assert grader.grade(problem("assert f(2) == 4"), code).verdict == "wrong"
    assert grader.grade(problem("assert f(2) == 4", "python:unconfined"), code).verdict == "right"


def test_this_machine_confines() -> None:
    layers = set(confinement())
    assert layers & FILE_LAYERS
    assert layers & NETWORK_LAYERS
