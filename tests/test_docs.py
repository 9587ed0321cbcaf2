"""The documents say what the program does: the command reference, the two README commands, the links."""

from __future__ import annotations

import re
import subprocess
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAIN_COMMAND = "python -m pip install -c constraints.txt '.[all]' && deepdistill demo"
TEST_COMMAND = "python -m pip install -c constraints.txt -e '.[all,test]' && pytest"
DOCUMENTS = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md") if (ROOT / name).exists()
] + sorted((ROOT / "docs").glob("**/*.md"))


def shell_lines(document: str) -> list[str]:
    """Return the lines of every fenced sh block."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", document, flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


def rendered_cli_reference() -> str:
    loader = SourceFileLoader("scripts_docs", str(ROOT / "scripts" / "docs"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    text: str = module.render()
    return text


def test_cli_reference_is_what_help_says() -> None:
    text = rendered_cli_reference()
    assert text.count("\n## deepdistill ") >= 5, "the reference lacks commands"
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == text, "out of date: run scripts/docs"


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
