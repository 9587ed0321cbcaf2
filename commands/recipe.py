"""`deepdistill recipe`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..distill.recipe.teach import EvalRecipe, TeachRecipe
from ..errors import UsageError
from ..localrun.core.settings import as_toml, values_of
from ..localrun.recipe import ChatRecipe
from ..quantize.recipe import QuantizeRecipe
from .shared import AsJson, tell

TREES: dict[str, type] = {"teach": TeachRecipe, "quantize": QuantizeRecipe, "chat": ChatRecipe, "eval": EvalRecipe}
"""The settings of every command that has a tree of them."""


def recipe(
    what: Annotated[
        str, typer.Argument(help="The command whose settings to print (teach, quantize, chat, eval), or a run folder.")
    ] = "teach",
    json_output: AsJson = False,
) -> None:
    """Print the settings of a command or a run.

    They come as a TOML file for --config, each with its default and a comment.
    """
    settings: Any = TREES.get(what)
    if settings is None:
        settings = _of_run(Path(what))
    tell(as_toml(settings).rstrip())
    if json_output:
        print(json.dumps({} if isinstance(settings, type) else values_of(settings)))


def _of_run(path: Path) -> TeachRecipe:
    from .run_folder import run_of

    _, recipe = run_of(path)
    if recipe is None:
        hint = f"give a run folder, or one of {', '.join(TREES)}"
        raise UsageError(f"{path} is neither a command with settings nor a run folder", hint, code="no-recipe")
    return recipe
