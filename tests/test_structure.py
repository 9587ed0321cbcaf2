"""The house stays as it was planned: who imports whom, what ships, how fast and by which names the commands answer."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("distill", "quantize", "localrun")
PACKAGES = (*STAGES, "commands")
COMMANDS_NOW = {"demo", "teach", "quantize", "chat", "eval"}
COMMANDS_EVER = COMMANDS_NOW | {
    "serve",
    "runs",
    "inspect",
    "export",
    "push",
    "recipe",
    "new",
    "plan",
    "doctor",
    "bench",
}
TYPER_FLAGS = {"AsJson", "Offline", "Out", "Quiet", "Seed"}  # aliases of commands/shared.py
OVERRIDES = {  # names and order of parameters that libraries give
    "__exit__", "forward", "backward", "compute_loss", "_get_per_token_logps_and_entropies", "_attend", "_to_json",
    "call_binop",
}  # fmt: skip
HEAVY = {"torch", "transformers", "peft", "accelerate"}
POSIX_ONLY = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
POSIX_MODULES = {"distill.graders.code.sandbox", "localrun.chat.keyboard"}  # one a stage at most
# System calls that Python has no function for:
KERNEL_MODULES = {"distill.graders.code.sandbox", "distill.graders.code.seccomp"}
DECLARATIONS = (
    "distill.recipe",
    "localrun.core.settings",
    "localrun.recipe",
    "quantize.recipe",
)  # what flags come from
ROOMS: dict[str, dict[str, str]] = {
    "localrun": {
        "core": "",
        "gguf": "core",
        "machine": "core gguf",
        "families": "core",
        "engine": "core gguf machine families",
        "weights": "core gguf machine engine",
        "find": "core",
        "recipe": "core families",
        "doctor": "core gguf machine",
        "chat": "core families engine find recipe doctor",
        "phone": "core gguf machine families",
        "bench": "core machine engine",
    },
    "quantize": {
        "recipe": "",
        "convert": "",
        "measure": "recipe convert",
        "heal": "recipe convert measure",
        "provenance": "convert",
        "choose": "recipe convert measure provenance",
        "report": "convert measure",
        "sign": "recipe convert measure provenance choose",
        "release": "recipe convert measure heal provenance choose report sign",
        "verify": "convert provenance choose",
    },
    "distill": {
        "recipe": "",
        "records": "",
        "tokenizer": "",
        "device": "",
        "hub": "",
        "planning": "recipe",
        "graders": "records",
        "problems": "recipe records hub graders",
        "pocket": "problems",
        "curation": "recipe records problems",
        "teachers": "recipe records tokenizer device planning graders problems pocket",
        "run": "recipe",
        "traces": "recipe records graders problems teachers run",
        "context": "recipe teachers run",
        "judging": "graders recipe records teachers traces context",
        "gather": "recipe records graders problems teachers run traces context judging",
        "training": (
            "recipe records tokenizer device hub graders problems pocket curation teachers run traces context gather"
        ),
        "evaluation": "recipe records graders problems curation teachers run traces context training",
        "preview": "recipe records problems teachers traces",
        "runs": "recipe run evaluation",
        "teach": (
            "recipe records problems curation teachers run traces context judging gather training evaluation preview"
        ),
    },
}
"""What each room of a stage imports, lowest room first: a room imports only from rooms above it in this table."""
SHARED_FLAGS = {"problems", "teacher", "student", "out", "seed", "json", "offline", "quiet"}


@dataclass(frozen=True)
class Import:
    """One imported module as the package's own dotted path (`distill.traces`) or a library's (`torch.nn`)."""

    importer: str  # dotted path of the module, relative to the package
    target: str
    relative: bool
    at_load: bool  # runs when the module is loaded: outside functions and TYPE_CHECKING

    @property
    def stage(self) -> str:
        return self.importer.split(".")[0]

    @property
    def top(self) -> str:
        return self.target.split(".")[0]

    def __str__(self) -> str:
        return f"{self.importer} imports {self.target}"


def package_files() -> list[Path]:
    return sorted(ROOT.glob("*.py")) + [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def statements(tree: ast.AST, at_load: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Yield every import of a module, those inside functions and conditions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, at_load
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements(node, False)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from statements(node, at_load and not inside)


def imports_of(path: Path, root: Path = ROOT) -> Iterator[Import]:
    parts = path.relative_to(root).with_suffix("").parts
    importer = ".".join(parts)
    for node, at_load in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif node.level == 0:
            targets = [node.module or ""]
        else:
            base = ".".join((*parts[: len(parts) - node.level], *([node.module] if node.module else [])))
            # `from . import traces` names a module, `from .traces import Trace` does not: both begin with the module.
            targets = [base] if node.module else [f"{base}.{alias.name}".strip(".") for alias in node.names]
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        yield from (Import(importer, target, relative, at_load) for target in targets)


@cache
def all_imports() -> tuple[Import, ...]:
    return tuple(found for path in package_files() for found in imports_of(path))


def faults(*found: Import) -> list[str]:
    return sorted({str(one) for one in found})


def test_reader_sees_imports_wherever_they_stand(tmp_path: Path) -> None:
    (tmp_path / "quantize").mkdir()
    module = tmp_path / "quantize" / "a.py"
    module.write_text(
        "from typing import TYPE_CHECKING\nfrom ..errors import E\nfrom . import b\nfrom .. import distill\n"
        "if TYPE_CHECKING:\n    import x\ndef f():\n    try:\n        import torch.nn\n    except ImportError: ...\n"
    )
    assert [(one.target, one.relative, one.at_load) for one in imports_of(module, tmp_path)] == [
        ("typing", False, True),
        ("errors", True, True),
        ("quantize.b", True, True),
        ("distill", True, True),
        ("x", False, False),
        ("torch.nn", False, False),
    ]


def test_inside_the_package_imports_are_relative() -> None:
    own = {"deepdistill", *PACKAGES, "cli", "errors"}
    assert faults(*(one for one in all_imports() if not one.relative and one.top in own)) == []


def test_tests_import_the_installed_package() -> None:
    found = [one for path in sorted((ROOT / "tests").rglob("*.py")) for one in imports_of(path)]
    assert faults(*(one for one in found if one.relative or one.top in {*PACKAGES, "cli", "errors"})) == []
    assert list((ROOT / "tests").rglob("__init__.py")) == [], "tests are no package"


def test_stages_import_only_what_they_may() -> None:
    may: dict[str, set[str]] = {
        "localrun": {"localrun", "errors", "__version__"},
        "distill": {"distill", "localrun", "errors", "__version__"},
        "quantize": {"quantize", "localrun", "errors", "__version__"},
        "commands": {"commands", "distill", "quantize", "localrun", "errors", "__version__"},
        "cli": {"commands", "errors", "__version__"},
        "__main__": {"cli"},
        "__init__": {"distill", "quantize", "localrun", "errors"},
        "errors": set(),
    }
    assert faults(*(one for one in all_imports() if one.relative and one.top not in may[one.stage])) == []


def room_of(module: str, stage: str) -> str | None:
    """Return the folder of a stage that a module is in, or the module itself where it lies beside the rooms."""
    parts = module.split(".")
    return parts[1] if parts[0] == stage and len(parts) > 1 else None


def arrows(stage: str) -> set[tuple[str, str]]:
    """Return (room, room that it imports), imports inside functions and for types too."""
    found = set()
    for one in all_imports():
        here, there = room_of(one.importer, stage), room_of(one.target, stage)
        if here and there and here != there and here != "__init__":  # a stage's own __init__ is above its rooms
            found.add((here, there))
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_room_imports_only_rooms_below_it(stage: str) -> None:
    table = {room: allowed.split() for room, allowed in ROOMS[stage].items()}
    order = list(table)
    assert [
        (room, other) for room, below in table.items() for other in below if order.index(other) >= order.index(room)
    ] == []
    assert arrows(stage) == {(room, other) for room, below in table.items() for other in below}
    on_disk = {path.stem for path in (ROOT / stage).iterdir() if path.suffix == ".py" or list(path.glob("*.py"))}
    assert on_disk - {"__init__", "__pycache__"} == set(table)


def test_a_stage_has_few_entries_and_its_modules_are_short() -> None:
    most = {"distill": 22, "localrun": 14, "quantize": 14}
    entries = {
        stage: [path.name for path in (ROOT / stage).iterdir() if path.name != "__pycache__"] for stage in STAGES
    }
    assert {stage: names for stage, names in entries.items() if len(names) > most[stage]} == {}
    assert [str(path) for path in package_files() if path.read_text(encoding="utf-8").count("\n") > 400] == []


def own_functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, int, int]]:
    """Yield (where, function, its parameters, those that can be positional), without self and cls."""
    for path in package_files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        methods = {id(one) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for one in node.body}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                is_static = any(isinstance(one, ast.Name) and one.id == "staticmethod" for one in node.decorator_list)
                positional = len(node.args.posonlyargs) + len(node.args.args) - (id(node) in methods and not is_static)
                where = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                yield where, node, positional + len(node.args.kwonlyargs), positional


def is_own(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Say whether a function's parameters are ours to choose: typer's callbacks and libraries' overrides are not."""
    return (
        node.name not in OVERRIDES
        and "typer." not in ast.unparse(node.args)
        and not any(isinstance(one.annotation, ast.Name) and one.annotation.id in TYPER_FLAGS for one in node.args.args)
    )


def test_functions_take_few_parameters_and_most_by_keyword() -> None:
    own = [(where, total, positional) for where, node, total, positional in own_functions() if is_own(node)]
    assert [where for where, total, _ in own if total > 7] == []
    assert [where for where, total, positional in own if total > 3 and positional > 2] == []


def test_most_functions_are_short() -> None:
    lengths = [(node.end_lineno or 0) - node.lineno + 1 for _, node, _, _ in own_functions()]
    assert sum(length > 30 for length in lengths) <= 0.035 * len(lengths)


def test_every_error_has_a_code() -> None:
    from deepdistill import errors

    ours = {name for name in vars(errors) if name.endswith("Error")}
    without = []
    for path in package_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ours:
                codes = [
                    one.value.value
                    for one in node.keywords
                    if one.arg == "code" and isinstance(one.value, ast.Constant)
                ]
                if not any(one.arg == "code" for one in node.keywords) or any(
                    not re.fullmatch(r"[a-z]+(-[a-z]+)*", c) for c in codes
                ):
                    without.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert without == []


def test_what_loads_a_checkpoint_refuses_its_code_and_its_pickles() -> None:
    """transformers would ask at the terminal for leave to run a checkpoint's code, and torch unpickle anything."""
    wanted = {"from_pretrained": ("trust_remote_code", False), "from_config": ("trust_remote_code", False)}
    wanted["torch.load"] = ("weights_only", True)
    loose = []
    for path in [*package_files(), *sorted((ROOT / "benchmarks").rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name = "torch.load" if ast.unparse(node.func) == "torch.load" else node.func.attr
                said = {(one.arg, getattr(one.value, "value", None)) for one in node.keywords}
                if name in wanted and wanted[name] not in said:
                    loose.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node.func)}")
    assert loose == []


def test_only_a_bounded_template_is_given_to_transformers() -> None:
    """Everything renders with localrun.families.template; the proofs compare it with transformers' own afterwards."""
    uses = [path.name for path in package_files() if ".apply_chat_template(" in path.read_text(encoding="utf-8")]
    assert uses == ["proofs.py"]


def test_commands_print_foreign_text_in_one_place() -> None:
    """`tell` cleans what it prints; a plain print has words of ours, or JSON, which escapes."""
    loose = []
    for path in [ROOT / "cli.py", *sorted((ROOT / "commands").glob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "typer.echo", "typer.secho"):
                said = [ast.unparse(one) for one in node.args if not isinstance(one, ast.Constant)]
                known = ("json.dumps(", "f'deepdistill {__version__}'", "*(printable(")
                loose += [f"{path.name}:{node.lineno} {one}" for one in said if not one.startswith(known)]
    assert loose == []


def test_the_package_itself_loads_no_stage() -> None:
    """Its public names come from the stages, each when it is asked for (tests/test_public.py)."""
    assert faults(*(one for one in all_imports() if one.stage == "__init__" and one.relative and one.at_load)) == []


def test_localrun_never_imports_torch() -> None:
    assert faults(*(one for one in all_imports() if one.stage == "localrun" and one.top in HEAVY)) == []


def test_llama_cpp_and_ctypes_stand_in_localrun_alone() -> None:
    low_level = {"ctypes", "llama_cpp"}
    outside = (one for one in all_imports() if one.top in low_level and one.stage != "localrun")
    assert faults(*(one for one in outside if one.top != "ctypes" or one.importer not in KERNEL_MODULES)) == []


def test_posix_only_modules_stand_in_one_place() -> None:
    assert {one.importer for one in all_imports() if one.top in POSIX_ONLY} <= POSIX_MODULES


def test_commands_import_stages_only_when_they_run() -> None:
    early = (one for one in all_imports() if one.stage == "commands" and one.at_load and one.top in STAGES)
    assert faults(*(one for one in early if not one.target.startswith(DECLARATIONS))) == []


def test_declarations_load_the_standard_library_alone() -> None:
    """Flags come from them, so that `--help` loads them."""
    code = (
        "import sys, importlib\n"
        "before = set(sys.modules)\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(name for name in new if name not in sys.stdlib_module_names and not name.startswith('_')))"
    )
    assert (
        run_python(code, *(f"deepdistill.{name}" for name in (*DECLARATIONS, "distill.recipe.teach"))).strip()
        == "['deepdistill']"
    )


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quantize_and_localrun_load_without_torch() -> None:
    modules = [
        ".".join(("deepdistill", *path.relative_to(ROOT).with_suffix("").parts))
        for path in package_files()
        if path.relative_to(ROOT).parts[0] in {"quantize", "localrun"} and not path.stem.startswith("__")
    ]
    assert modules
    code = (
        "import importlib, sys\n"
        f"for name in {sorted(HEAVY)!r}: sys.modules[name] = None\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(len(sys.argv) - 1)"
    )
    assert run_python(code, *modules).strip() == str(len(modules))


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["teach", "--help"]])
def test_help_loads_no_heavy_library(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom deepdistill.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print('LOADED', *sorted({name.split('.')[0] for name in sys.modules}))"
    )
    loaded = run_python(code, *arguments).splitlines()[-1].split()
    assert loaded[0] == "LOADED"
    heavy = HEAVY | {"llama_cpp", "numpy", "tokenizers", "safetensors", "reasoning_gym", "pyarrow", "httpx"}
    assert heavy.intersection(loaded) == set()


@cache
def setuptools_settings() -> dict[str, Any]:
    settings: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return settings


def test_listed_packages_are_those_on_disk() -> None:
    folders = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    on_disk = {".".join(("deepdistill", *folder.relative_to(ROOT).parts)) for folder in folders}
    assert set(setuptools_settings()["packages"]) == {"deepdistill", *on_disk}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_every_data_file_ships() -> None:
    shipped = {
        path
        for package, patterns in setuptools_settings()["package-data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")[1:]).glob(pattern)
    }
    on_disk = {
        path
        for stage in STAGES
        for path in (ROOT / stage).rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    assert sorted(map(str, (on_disk | {ROOT / "py.typed"}) - shipped)) == []


def test_root_holds_only_the_modules_that_should_ship() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == {"__init__", "__main__", "cli", "errors"}


def commands() -> dict[str, Any]:
    """Return every command by its name; those below another have its name before their own."""
    from deepdistill.cli import app

    def below(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, command in getattr(group, "commands", {}).items():
            if not command.hidden:
                yield f"{prefix}{name}", command
                yield from below(command, f"{prefix}{name} ")

    return dict(below(typer.main.get_command(app)))


def options() -> Iterator[tuple[str, Any]]:
    for name, command in commands().items():
        yield from ((name, parameter) for parameter in command.params if parameter.param_type_name == "option")


def test_commands_have_the_planned_names() -> None:
    assert COMMANDS_NOW <= {name.partition(" ")[0] for name in commands()} <= COMMANDS_EVER
    assert [name for name, command in commands().items() if not command.help] == []


def declared_keys(command: str) -> set[str]:
    from deepdistill.commands.recipe import TREES
    from deepdistill.localrun.core.settings import fields_of

    return {leaf.key for leaf in fields_of(TREES[command])} if command in TREES else set()


def test_flags_are_spelled_like_their_fields() -> None:
    odd = []
    for command, option in options():
        if option.name.replace("__", ".") in declared_keys(command):
            continue  # its declaration says the flag
        field = option.name.strip("_").replace("_", "-")
        flags = {flag.removeprefix("--") for flag in option.opts}
        # A field may say more than its flag where the word is taken: `json_output`, `server_model`.
        if not any(field == flag or field.startswith(f"{flag}-") or field.endswith(f"-{flag}") for flag in flags):
            odd.append(f"{command} {option.opts}: field {option.name}")
    assert odd == []


def flag_types() -> Iterator[tuple[str, str, object]]:
    """Yield each command's name, and every flag with its type: the field's annotation without `None`."""
    for command, option in options():
        hints = get_type_hints(inspect.unwrap(commands()[command].callback))
        if option.name in hints:  # all but --help
            hint = hints[option.name]
            kinds = set(get_args(hint) or (hint,)) - {type(None)}
            yield command, option.opts[0], kinds.pop() if len(kinds) == 1 else hint


def test_flags_mean_the_same_everywhere() -> None:
    kinds: dict[str, dict[object, set[str]]] = {}
    for command, flag, kind in flag_types():
        kinds.setdefault(flag.removeprefix("--"), {}).setdefault(kind, set()).add(command)
    assert {flag: kind for flag, kind in kinds.items() if len(kind) > 1} == {}
    assert kinds.keys() >= SHARED_FLAGS
    assert {flag: set(kinds[flag]) for flag in ("json", "offline", "quiet", "seed")} == {
        "json": {bool},
        "offline": {bool},
        "quiet": {bool},
        "seed": {int},
    }
    assert kinds["json"][bool] >= COMMANDS_NOW, "every command answers in JSON"
