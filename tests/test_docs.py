"""The documents say what the program does: the command reference, the two README commands, the links."""

from __future__ import annotations

import re
import subprocess
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).resolve().parent.parent
MAIN_COMMAND = "python -m pip install -c constraints.txt '.[all]' && deepdistill demo"
TEST_COMMAND = "python -m pip install -c constraints.txt -e '.[all,test]' && pytest"
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "CHANGELOG.md", "examples/README.md")),
    ROOT / "benchmarks" / "RESULTS.md",
    *sorted((ROOT / "docs").glob("**/*.md")),
]
FOLDERS = ("benchmarks", "commands", "distill", "docs", "examples", "localrun", "quantize", "scripts", "tests")


def shell_lines(document: str) -> list[str]:
    """Return the lines of every fenced sh block."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", document, flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


def rendered(function: str) -> str:
    loader = SourceFileLoader("scripts_docs", str(ROOT / "scripts" / "docs"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    text: str = getattr(module, function)()
    return text


def test_cli_reference_is_what_help_says() -> None:
    text = rendered("render")
    assert text.count("\n## deepdistill ") >= 5, "the reference lacks commands"
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == text, "out of date: run scripts/docs"


def test_settings_page_is_what_is_declared() -> None:
    text = rendered("render_settings")
    assert "| `training.lora.rank` |" in text
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == text, "out of date: run scripts/docs"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_the_documents_have_flags_that_exist(document: Path) -> None:
    from deepdistill.cli import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    unknown = []
    for line in shell_lines(document.read_text(encoding="utf-8")):
        for call in re.findall(r"\bdeepdistill (\w+)([^|;&#]*)", line):
            if call[0] in commands:
                offered = {name for param in commands[call[0]].params for name in (*param.opts, *param.secondary_opts)}
                unknown += [
                    f"{call[0]} {flag}" for flag in re.findall(r"(?<!\S)--[a-z-]+", call[1]) if flag not in offered
                ]
    assert unknown == []


@pytest.mark.parametrize("command", [MAIN_COMMAND, TEST_COMMAND])
def test_readme_gives_the_command_once(command: str) -> None:
    assert shell_lines((ROOT / "README.md").read_text(encoding="utf-8")).count(command) == 1


def test_ci_runs_the_command_of_the_readme() -> None:
    shown = subprocess.run([ROOT / ".ci" / "run", "--show"], capture_output=True, text=True, check=True)
    assert shown.stdout == TEST_COMMAND + "\n"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", document.read_text(encoding="utf-8"))
    assert [target for target in targets if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_a_document_names_exist(document: Path) -> None:
    """A file of the repository is named by its path from the root, in a sentence or in backquotes."""
    text = re.sub(r"[a-z]+://\S+", "", document.read_text(encoding="utf-8"))
    named = re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./*-]*[\w*/]", text)
    assert [path for path in named if not list(ROOT.glob(path))] == []
    modules = re.findall(r"(?<![\w./-])(?:test|bench)_\w+\.py", text)
    assert [
        name for name in modules if not list(ROOT.glob(f"tests/**/{name}")) + list(ROOT.glob(f"benchmarks/{name}"))
    ] == []
