"""`deepdistill chat`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ..errors import UsageError
from ..localrun.recipe import ChatRecipe
from .declared import declared
from .shared import AsJson

_TALK = "Conversation"


def run(
    recipe: ChatRecipe,
    model: Annotated[
        str | None,
        typer.Argument(help="A .gguf file, a run folder or hf:ORG/REPO[:FILE]. The newest run, unless given."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Ask once and leave; piped input is added to it.", rich_help_panel=_TALK),
    ] = None,
    continue_: Annotated[
        bool, typer.Option("--continue", help="Resume the newest kept conversation.", rich_help_panel=_TALK)
    ] = False,
    pick: Annotated[
        bool, typer.Option("--pick", help="Resume a kept conversation, from a list.", rich_help_panel=_TALK)
    ] = False,
    json_output: AsJson = False,
) -> None:
    """Talk to a GGUF, and see its thinking apart from its answer.

    With -p, or in a pipe, it answers once.
    """
    from ..localrun.chat.chat import chat as run_chat

    if continue_ and pick:
        raise UsageError("--continue and --pick name two conversations", "give one of them", code="settings-conflict")
    resume: Literal["newest", "pick"] | None = "pick" if pick else "newest" if continue_ else None
    if code := run_chat(model, recipe, prompt=prompt, resume=resume, json_output=json_output):
        raise typer.Exit(code)


ChatCommand, chat = declared(ChatRecipe, run)
