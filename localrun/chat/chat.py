"""Talk to a GGUF: a conversation in the terminal, or one question with `-p`, in pipes and into files.

When a conversation outgrows the context, the chat says so: it never silently drops anything.
"""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ...errors import ArtifactError, ModelError, UsageError
from ..engine.engine import Engine
from ..families.thinking import Think
from ..find import find_model
from .conversations import Conversation, Store
from .oneshot import answer_once, is_terminal, read_question
from .session import Question, Session

_MOST_LISTED = 20


@dataclass(frozen=True)
class ChatSettings:
    """How to chat. None leaves a matter to the conversation that is resumed, or else to the default."""

    system: str | None = None
    think: Think | None = None
    think_budget: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    repeat_penalty: float = 1.0
    dry: float = 0.0
    """DRY's multiplier: what repeats itself is penalized the more, the longer it is."""
    grammar: str | None = None
    """GBNF that holds every answer."""
    tools: tuple[dict[str, Any], ...] = ()
    """Offered to the model in OpenAI's form."""
    images: tuple[Path, ...] = ()
    """What the first question is about."""
    loop_guard: bool = True
    speculate: bool = False
    n_ctx: int | None = None
    kv_type: str = "f16"
    draft_path: Path | None = None
    mmproj_path: Path | None = None
    """The projector for images; None is the one beside the model, where one may be shown."""
    resume: Literal["newest", "pick"] | None = None
    """Go on with the newest kept conversation, or one picked from a list."""
    keep: bool = True
    """Keep the conversation, and what is typed, on disk."""
    fold: bool = False
    """Fold thinking into one line."""
    offline: bool = False

    def override(self, session: Session) -> None:
        """Put what was given into a session."""
        session.system = (session.system if self.system is None else self.system) or None
        session.think = self.think or session.think
        budget = session.guidance.think_budget if self.think_budget is None else self.think_budget
        session.guidance = replace(
            session.guidance,
            think_budget=budget,
            grammar=self.grammar,
            loop_guard=self.loop_guard,
            speculate=self.speculate,
            repeat_penalty=self.repeat_penalty,
            dry_multiplier=self.dry,
        )
        session.tools = self.tools
        names = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        session.sampling = replace(session.sampling, **given)


_DEFAULTS = ChatSettings()


def chat(
    model: str | Path | None,
    settings: ChatSettings = _DEFAULTS,
    *,
    prompt: str | None = None,
    json_output: bool = False,
) -> int:
    """Chat in the terminal, or answer once if there is a prompt, a pipe or no terminal to write to; return 0.

    `model` is a spec for `find_model`; None is the resumed conversation's model, or else the newest run's.

    Raises:
        ArtifactError, ModelError: the file cannot be run, or the question does not fit the context.
        UsageError: code "no-question", "needs-question" or "no-such-conversation".
    """
    piped = not is_terminal(sys.stdin)
    once = prompt is not None or piped or not is_terminal(sys.stdout)
    _check_once(settings, once=once, json_output=json_output)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that the encoding lacks must not stop the answer
    store = Store()
    path, conversation = _kept(store, settings.resume) if settings.resume else (None, Conversation(messages=[]))
    question = read_question(prompt, read_stdin=piped or prompt is None) if once else ""
    open_engine = partial(_open_engine, settings=settings, may_see=bool(settings.images) or not once)
    model_path = _model_path(model, conversation, settings.offline)
    with _loading(model_path):
        session = Session(open_engine(model_path))
    try:
        _warn_of_long_context(session.engine)
        session.adopt(conversation)
        settings.override(session)
        images = tuple(str(image.absolute()) for image in settings.images)
        if once:
            if path:
                store.load_state(path, session.engine)
            answer_once(session, Question(question, images=images), json_output=json_output, folded=settings.fold)
            if path and settings.keep:
                store.write(path, session.record(conversation.created))
                store.save_state(path, session.engine, session.n_used())
        else:
            from .dialogue import Dialogue  # not for a pipe: these load what draws and reads keys
            from .repl import converse

            dialogue = Dialogue(
                session,
                open_engine=open_engine,
                store=store if settings.keep else None,
                folded=settings.fold,
                offline=settings.offline,
            )
            converse(dialogue, (path, conversation) if path else None, images)
    finally:
        session.engine.close()
    return 0


def _check_once(settings: ChatSettings, *, once: bool, json_output: bool) -> None:
    """Refuse what only works with one question."""
    if json_output and not once:
        raise UsageError("--json answers one question", "add -p 'QUESTION', or pipe one in", code="needs-question")
    if settings.tools and not once:
        raise UsageError(
            "--tools answers one question: deepdistill itself runs no tool",
            "add -p 'QUESTION'",
            code="needs-question",
        )


def _warn_of_long_context(engine: Engine) -> None:
    if engine.n_ctx > engine.n_ctx_train > 0:
        trained = f"the model was trained for {engine.n_ctx_train:,} tokens of context"
        print(f"note: {trained}: beyond them its answers may get worse", file=sys.stderr)


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


def _open_engine(path: Path, settings: ChatSettings, may_see: bool) -> Engine:
    """Load a model, with its projector if it may be shown images."""
    load = partial(Engine, path, n_ctx=settings.n_ctx, kv_type=settings.kv_type, draft_path=settings.draft_path)
    if settings.mmproj_path or not may_see or not any("mmproj" in file.name for file in path.parent.glob("*.gguf")):
        return load(mmproj_path=settings.mmproj_path)
    from ..engine.vision import find_mmproj

    try:
        return load(mmproj_path=find_mmproj(path))
    except ModelError:  # the projector beside it may be another model's
        if settings.images:
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
