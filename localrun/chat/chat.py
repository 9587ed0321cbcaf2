"""Talk to a GGUF: a conversation in the terminal, or one question with `-p`, in pipes and into files.

When a conversation outgrows the context, the chat says so: it never silently drops anything.
"""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ...errors import ArtifactError, ModelError, UsageError
from ..core.text import read_text
from ..engine.engine import Engine
from ..families.tool_calls import read_tools
from ..find import find_model
from ..recipe import ChatRecipe
from .conversations import Conversation, Store
from .oneshot import answer_once, is_terminal, read_question
from .session import Question, Session

_MOST_LISTED = 20


_DEFAULTS = ChatRecipe()


def chat(
    model: str | Path | None,
    recipe: ChatRecipe = _DEFAULTS,
    *,
    prompt: str | None = None,
    resume: Literal["newest", "pick"] | None = None,
    json_output: bool = False,
) -> int:
    """Chat in the terminal, or answer once if there is a prompt, a pipe or no terminal to write to; return 0.

    `model` is a spec for `find_model`; None is the resumed conversation's model, or else the newest run's. `resume`
    continues the newest kept conversation, or one picked from a list.

    >>> from deepdistill import chat
    >>> chat("model.gguf", prompt="State the final answer to the following arithmetic problem: 4 - 1 =")
    3
    0

    Raises:
        ArtifactError, ModelError: the file cannot be run, or the question does not fit the context.
        UsageError: code "no-question", "needs-question" or "no-such-conversation".
    """
    piped = not is_terminal(sys.stdin)
    once = prompt is not None or piped or not is_terminal(sys.stdout)
    _check_once(recipe, once=once, json_output=json_output)
    grammar, schema = _constraint(recipe)
    tools = read_tools(read_text(recipe.tools)) if recipe.tools else ()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that the encoding lacks must not stop the answer
    store = Store()
    path, conversation = _kept(store, resume) if resume else (None, Conversation(messages=[]))
    question = read_question(prompt, read_stdin=piped or prompt is None) if once else ""
    open_engine = partial(_open_engine, recipe=recipe, may_see=bool(recipe.images) or not once)
    model_path = _model_path(model, conversation, recipe.offline)
    with _loading(model_path):
        session = Session(open_engine(model_path))
    try:
        _warn_of_long_context(session.engine)
        session.adopt(conversation)
        _override(session, recipe, grammar=grammar, schema=schema, tools=tools)
        images = tuple(str(image.absolute()) for image in recipe.images)
        if once:
            if path:
                store.load_state(path, session.engine)
            answer_once(session, Question(question, images=images), json_output=json_output, folded=recipe.fold)
            if path and recipe.keep:
                store.write(path, session.record(conversation.created))
                store.save_state(path, session.engine, session.n_used())
        else:
            from .dialogue import Dialogue  # not for a pipe: these load what draws and reads keys
            from .repl import converse

            dialogue = Dialogue(
                session,
                open_engine=open_engine,
                store=store if recipe.keep else None,
                folded=recipe.fold,
                offline=recipe.offline,
            )
            converse(dialogue, (path, conversation) if path else None, images)
    finally:
        session.engine.close()
    return 0


def _check_once(recipe: ChatRecipe, *, once: bool, json_output: bool) -> None:
    """Refuse what only works with one question."""
    if json_output and not once:
        raise UsageError("--json answers one question", "add -p 'QUESTION', or pipe one in", code="needs-question")
    if recipe.tools and not once:
        raise UsageError(
            "--tools answers one question: deepdistill itself runs no tool",
            "add -p 'QUESTION'",
            code="needs-question",
        )


def _warn_of_long_context(engine: Engine) -> None:
    if engine.n_ctx > engine.n_ctx_train > 0:
        trained = f"the model was trained for {engine.n_ctx_train:,} tokens of context"
        print(f"note: {trained}: beyond them its answers may get worse", file=sys.stderr)


def _override(
    session: Session, recipe: ChatRecipe, *, grammar: str | None, schema: str | None, tools: tuple[dict[str, Any], ...]
) -> None:
    """Put into a session what was given; what was not stays as the resumed conversation has it."""
    session.system = (session.system if recipe.system is None else recipe.system) or None
    session.think = recipe.think or session.think
    budget = session.guidance.think_budget if recipe.think_budget is None else recipe.think_budget
    session.guidance = replace(
        session.guidance,
        think_budget=budget,
        grammar=grammar,
        schema=schema,
        loop_guard=recipe.loop_guard,
        speculate=recipe.speculate or recipe.draft is not None,
        repeat_penalty=recipe.repeat_penalty,
        dry_multiplier=recipe.dry,
    )
    session.tools = tools
    given = {name: value for name, value in asdict(recipe.sampling).items() if value is not None}
    session.sampling = replace(session.sampling, **given)


def _constraint(recipe: ChatRecipe) -> tuple[str | None, str | None]:
    """Return the text of the grammar file and that of the schema file, which is checked before a model is loaded."""
    if recipe.schema and recipe.grammar:
        hint = "give one of them"
        raise UsageError("--schema and --grammar are two ways to say one thing", hint, code="settings-conflict")
    grammar = read_text(recipe.grammar) if recipe.grammar else None
    schema = read_text(recipe.schema) if recipe.schema else None
    if schema is not None:
        from ..engine.json_schema import check_schema  # loads llguidance

        check_schema(schema)
    return grammar, schema


def _kept(store: Store, which: Literal["newest", "pick"]) -> tuple[Path, Conversation]:
    """Return a kept conversation: the newest, or one that the user picks from a list."""
    kept = list(islice(store.newest_first(), 1 if which == "newest" else _MOST_LISTED))
    if not kept:
        hint = "chat without --continue first: a conversation is kept after its first answer"
        raise ArtifactError("there is no kept conversation yet", hint, code="no-such-conversation")
    if which == "newest":
        return kept[0]
    for i, (_, conversation) in enumerate(kept, 1):
        print(f"{i:>2}  {conversation.when}  {conversation.title}", file=sys.stderr)
    print("number (Enter for 1): ", end="", file=sys.stderr, flush=True)
    buffer = getattr(sys.stdin, "buffer", sys.stdin)
    line = buffer.readline()
    number = (line.decode("utf-8", "replace") if isinstance(line, bytes) else line).strip() or "1"
    if not number.isdecimal() or not 0 < int(number) <= len(kept):
        hint = f"give a number from 1 to {len(kept)}"
        raise UsageError(f"there is no conversation {number}", hint, code="no-such-conversation")
    return kept[int(number) - 1]


@contextmanager
def _loading(path: Path) -> Iterator[None]:
    """Show on a terminal that a file is being loaded, which can take a minute."""
    if not is_terminal(sys.stderr):
        yield
        return
    name = ascii(path.name)[1:-1]  # its width is known, and it cannot steer the terminal
    text = f"loading {name} ..."[: shutil.get_terminal_size().columns - 1]
    print(end=text, file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(end=f"\r{' ' * len(text)}\r", file=sys.stderr, flush=True)


def _open_engine(path: Path, recipe: ChatRecipe, may_see: bool) -> Engine:
    """Load a model, with its projector if it may be shown images."""
    load = partial(Engine, path, n_ctx=recipe.n_ctx, kv_type=recipe.kv_type, draft_path=recipe.draft)
    if recipe.mmproj or not may_see or not any("mmproj" in file.name for file in path.parent.glob("*.gguf")):
        return load(mmproj_path=recipe.mmproj)
    from ..engine.vision import find_mmproj

    try:
        return load(mmproj_path=find_mmproj(path))
    except ModelError:  # the projector beside it may be another model's
        if recipe.images:
            raise
        return load()


def _model_path(model: str | Path | None, conversation: Conversation, offline: bool) -> Path:
    if model is not None or not conversation.model:
        return find_model(None if model is None else str(model), offline=offline)
    path = Path(conversation.model)
    if not path.is_file():
        raise ArtifactError(
            f"this conversation's model is gone: {path}",
            "name another: deepdistill chat MODEL --continue",
            code="no-such-model",
        )
    return path
