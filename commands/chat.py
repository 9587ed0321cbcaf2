"""`deepdistill chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import ArtifactError, UsageError
from .shared import AsJson, Offline

Think = Literal["auto", "on", "off"]
KVType = Literal["f16", "q8_0", "q4_0"]


def chat(
    model: Annotated[
        str | None, typer.Argument(help="A .gguf file, a run folder, hf:ORG/REPO[:FILE]; else the newest run.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Ask once and leave; piped input comes after it.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    continue_: Annotated[bool, typer.Option("--continue", help="Go on with the newest kept conversation.")] = False,
    pick: Annotated[bool, typer.Option("--pick", help="Go on with a kept conversation, from a list.")] = False,
    log: Annotated[bool, typer.Option("--log/--no-log", help="Keep the conversation on this machine.")] = True,
    think: Annotated[Think | None, typer.Option(help="auto leaves it to the model's template.")] = None,
    think_budget: Annotated[
        int | None, typer.Option(help="Tokens of thinking, at most; an answer always follows.", min=0)
    ] = None,
    loop_guard: Annotated[bool, typer.Option(help="End thinking and answers that go in circles.")] = True,
    fold: Annotated[bool, typer.Option("--fold", help="Show the thinking as one line.")] = False,
    temperature: Annotated[float | None, typer.Option(help="0 if not given.", min=0)] = None,
    top_p: Annotated[float | None, typer.Option(help="1 if not given.", min=0, max=1)] = None,
    top_k: Annotated[int | None, typer.Option(help="0, which is off, if not given.", min=0)] = None,
    min_p: Annotated[float | None, typer.Option(help="0, which is off, if not given.", min=0, max=1)] = None,
    repeat_penalty: Annotated[float, typer.Option(help="Of the last 64 tokens; 1 is off.", min=1)] = 1.0,
    dry: Annotated[float, typer.Option(help="DRY's multiplier against long repeats; 0 is off.", min=0)] = 0.0,
    max_tokens: Annotated[
        int | None, typer.Option(help="An answer's limit, thinking included; 2048 if not given.", min=1)
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of context; the model's own, as memory allows, if not given.", min=16)
    ] = None,
    kv_type: Annotated[KVType, typer.Option(help="Of the cache: q8_0 and q4_0 take less memory.")] = "f16",
    speculate: Annotated[
        bool, typer.Option("--speculate", help="Guess tokens ahead, where that pays: faster on text that repeats.")
    ] = False,
    draft: Annotated[
        Path | None, typer.Option(help="A small GGUF of the same vocabulary that guesses ahead for --speculate.")
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Show an image with the first question.")] = None,
    mmproj: Annotated[
        Path | None, typer.Option(help="The projector for images; found beside the model if named mmproj-….gguf.")
    ] = None,
    schema: Annotated[Path | None, typer.Option(help="Hold the answer to the JSON schema in this file.")] = None,
    grammar: Annotated[Path | None, typer.Option(help="Hold the answer to the GBNF grammar in this file.")] = None,
    tools: Annotated[
        Path | None, typer.Option(help="Offer the tools in this JSON file, in OpenAI's form; calls come out in it too.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling; 0 if not given.", min=0)] = None,
    json_output: AsJson = False,
    offline: Offline = False,
) -> None:
    """Talk to a GGUF, its thinking visible and apart; one-shot with -p, and in pipes."""
    from ..localrun.chat.chat import ChatSettings
    from ..localrun.chat.chat import chat as run_chat

    settings = ChatSettings(
        system=system,
        think=think,
        think_budget=think_budget,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        dry=dry,
        max_tokens=max_tokens,
        seed=seed,
        loop_guard=loop_guard,
        speculate=speculate or draft is not None,
        n_ctx=context,
        kv_type=kv_type,
        draft_path=draft,
        resume="pick" if pick else ("newest" if continue_ else None),
        keep=log,
        fold=fold,
        images=tuple(image or ()),
        mmproj_path=mmproj,
        grammar=_grammar(schema, grammar),
        tools=_tools(tools),
        offline=offline,
    )
    code = run_chat(model, settings, prompt=prompt, json_output=json_output)
    if code:
        raise typer.Exit(code)


def _grammar(schema: Path | None, grammar: Path | None) -> str | None:
    """Return the GBNF that a file holds, or that holds an answer to the JSON schema in a file."""
    path = schema or grammar
    if path is None:
        return None
    if schema and grammar:
        raise UsageError("--schema and --grammar are two ways to say one thing", "give one of them")
    text = _read(path)
    if not schema:
        return text
    from ..localrun.engine.json_schema import grammar_of_schema

    return grammar_of_schema(text)


def _tools(path: Path | None) -> tuple[dict[str, Any], ...]:
    """Return the tools that a file holds, in OpenAI's form."""
    if path is None:
        return ()
    from ..localrun.families.tool_calls import read_tools

    return read_tools(_read(path))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not UTF-8 text") from error
