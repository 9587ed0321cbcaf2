"""The chat's slash commands: the name of each, its arguments, and what it does."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import get_args

from ...errors import ArtifactError, UsageError
from ..core.text import format_bytes, shorten
from ..families.thinking import Think
from ..find import find_model
from .attach import fenced, read_attachment
from .conversations import read_conversation, write_new
from .dialogue import Dialogue
from .session import Question

_MOST_LISTED = 20
KEYS_HELP = """\
Enter sends; Alt-Enter, or a backslash before Enter, begins a new line. Tab completes. Ctrl-C stops an answer, Ctrl-T \
folds and unfolds thinking, Ctrl-D leaves. To send a message that begins with a slash, put a space before it."""


@dataclass(frozen=True)
class Command:
    """One command. `run` gets the text after the name; `choices` are offered for it, None if it is a path."""

    usage: str
    help: str
    run: Callable[[Dialogue, str], None]
    choices: Callable[[Dialogue], Iterable[str] | None] = lambda _: ()

    @property
    def name(self) -> str:
        """The command as a user types it, with its slash."""
        return self.usage.partition(" ")[0]


def run_command(dialogue: Dialogue, line: str) -> None:
    """Run a line that begins with a slash.

    Raises:
        EOFError: the command was /quit.
        DeepDistillError: the command failed; code "no-such-command": there is none of this name.
    """
    name, _, rest = line.strip().partition(" ")
    command = COMMANDS.get(_ALIASES.get(name, name))
    if command is None:
        near = [known for known in COMMANDS if len(name) > 1 and known.startswith(name)]
        hint = f"did you mean {' or '.join(near)}?" if near else "/help lists the commands"
        raise UsageError(f"there is no command {name}", hint, code="no-such-command")
    command.run(dialogue, rest.strip())


def _help(dialogue: Dialogue, _: str) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold")
    table.add_column()
    for command in COMMANDS.values():
        table.add_row(Text(command.usage), Text(command.help, "dim"))
    dialogue.console.print(table)
    dialogue.say(KEYS_HELP)


def _model(dialogue: Dialogue, rest: str) -> None:
    from ..doctor import installed_models

    nearby = nearby_models(dialogue)
    others = (path for _, path in installed_models() if "mmproj" not in path.name)
    models = [*nearby, *(path for path in others if path.resolve() not in nearby)]
    if not rest:
        for i, path in enumerate(models, 1):
            current = " (this one)" if path.samefile(dialogue.session.engine.path) else ""
            dialogue.say(f"{i}  {path}{current}")
        dialogue.say("/model N switches, as does a .gguf file, a run folder or hf:ORG/REPO[:FILE]")
        return
    is_number = rest.isdigit() and 0 < int(rest) <= len(models)
    path = models[int(rest) - 1] if is_number else find_model(rest, offline=dialogue.offline)
    engine = dialogue.open_engine(path)
    dialogue.session.engine.close()
    dialogue.session.engine = engine
    continued = ", the conversation continues" if dialogue.session.turns else ""
    dialogue.say(f"{engine.path.name}, {engine.n_ctx:,} tokens of context{continued}")


def nearby_models(dialogue: Dialogue) -> list[Path]:
    """Return the GGUFs in the runs folder and beside the model."""
    current = dialogue.session.engine.path
    paths = [*current.parent.glob("*.gguf"), *Path("runs").rglob("*.gguf"), current]
    return sorted({path.resolve(): path for path in paths if "mmproj" not in path.name}.values())


def _system(dialogue: Dialogue, rest: str) -> None:
    if rest:
        dialogue.session.system = None if rest == "-" else rest
    dialogue.say(f"system message: {dialogue.session.system or 'none'}")


def _think(dialogue: Dialogue, rest: str) -> None:
    session = dialogue.session
    if rest in get_args(Think):
        session.think = next(think for think in get_args(Think) if think == rest)
        if rest != "auto" and not session.knows_thinking_switch():
            dialogue.say("this model has no switch for thinking")
            return
    elif rest in ("show", "fold"):
        dialogue.folded = rest == "fold"
        dialogue.say(f"thinking is {'folded into one line' if dialogue.folded else 'shown'}")
        return
    elif rest:
        raise _bad_value(f"/think does not know {rest}", "/think auto, on, off, show or fold")
    elif dialogue.thought:
        dialogue.new_screen().show_again(dialogue.thought)
    dialogue.say(f"thinking is {session.think}")


def _budget(dialogue: Dialogue, rest: str) -> None:
    session = dialogue.session
    if rest:
        budget = None if rest == "off" else _whole_number(rest, "/budget 200, or /budget off")
        session.guidance = replace(session.guidance, think_budget=budget)
    budget = session.guidance.think_budget
    dialogue.say("thinking has no budget" if budget is None else f"thinking is held to {budget:,} tokens")


def _bad_value(message: str, hint: str) -> UsageError:
    return UsageError(message, hint, code="value-broken")


def _whole_number(text: str, hint: str) -> int:
    if not text.isdecimal():
        raise _bad_value(f"{text} is not a number of tokens", hint)
    return int(text)


def _temp(dialogue: Dialogue, rest: str) -> None:
    session = dialogue.session
    if rest:
        if not re.fullmatch(r"\d{1,2}(\.\d*)?|\.\d+", rest):
            raise _bad_value(f"{rest} is not a temperature", "/temp 0 is greedy, /temp 0.7 is usual")
        session.sampling = replace(session.sampling, temperature=float(rest))
    greedy = ": the most likely token, always" if session.sampling.temperature == 0 else ""
    dialogue.say(f"temperature {session.sampling.temperature:g}{greedy}")


def _file(dialogue: Dialogue, rest: str) -> None:
    pending = dialogue.pending
    if rest == "-":
        dialogue.pending = Question(pending.typed)
        dialogue.say("no file is attached")
    elif rest:
        path = Path(rest).expanduser()
        block = fenced(path.name, read_attachment(path, dialogue.session.engine.n_ctx))
        n = len(dialogue.session.engine.tokenize(pending.attached + block))
        room = dialogue.session.engine.n_ctx - dialogue.session.n_used()
        if n >= room:
            raise ArtifactError(
                f"{path} takes {n:,} tokens and the context has room for {max(0, room):,}",
                "attach a part of it, /clear the conversation, or give a larger --context",
                code="prompt-too-long",
            )
        dialogue.pending = pending._replace(attached=pending.attached + block)
        dialogue.say(f"{path.name} is attached to the next message, {n:,} tokens; /file - removes it")
    else:
        dialogue.say(
            "a file is attached" if pending.attached else "/file PATH attaches a text file to the next message"
        )


def _image(dialogue: Dialogue, rest: str) -> None:
    engine, pending = dialogue.session.engine, dialogue.pending
    if not engine.sees_images:
        from ..engine.vision import find_mmproj

        beside = find_mmproj(engine.path)
        hint = (
            f"start the chat with --mmproj {beside}" if beside else "give the mmproj file that came with it: --mmproj"
        )
        raise UsageError(f"{engine.path.name} cannot see images here", hint, code="no-projector")
    path = Path(rest).expanduser().absolute()
    if not path.is_file():
        hint = "/image PATH attaches one to the next message"
        raise ArtifactError(f"there is no image {path}", hint, code="no-such-image")
    dialogue.pending = pending._replace(images=(*pending.images, str(path)))
    dialogue.say(f"{path.name} is attached to the next message; /file - removes it")


def _retry(dialogue: Dialogue, _: str) -> None:
    if question := dialogue.unanswered:
        dialogue.answer(question)
        return
    before = dialogue.session.turns[-2:]
    question = dialogue.session.undo()
    dialogue.session.reseed()
    n_turns = len(dialogue.session.turns)
    try:
        dialogue.answer(question)
    finally:
        if len(dialogue.session.turns) == n_turns:  # stopped before it began: keep the old answer
            dialogue.session.turns += before
            dialogue.unanswered = None
    if dialogue.session.sampling.temperature == 0 and dialogue.session.turns[-2:] == before:
        dialogue.say("the answer is the same: at temperature 0 only /temp, /think or /system change it")


def _edit(dialogue: Dialogue, _: str) -> None:
    dialogue.pending, dialogue.unanswered = dialogue.unanswered or dialogue.session.undo(), None
    dialogue.keep()


def _undo(dialogue: Dialogue, _: str) -> None:
    question = dialogue.session.undo()
    dialogue.keep()
    dialogue.say(f"undone: {shorten(question.typed, 60)}")


def _clear(dialogue: Dialogue, _: str) -> None:
    dialogue.leave()
    dialogue.begin()
    dialogue.say("this is a new conversation with the same system message")


def _save(dialogue: Dialogue, rest: str) -> None:
    if rest:
        _write(dialogue, Path(rest))
    elif dialogue.path:
        dialogue.say(f"the conversation is kept in {dialogue.path}")
    else:
        dialogue.say(
            "there is nothing to save yet" if dialogue.store else "this conversation is not kept; /save FILE writes it"
        )


def _load(dialogue: Dialogue, rest: str) -> None:
    kept = list(islice(dialogue.store.newest_first(), _MOST_LISTED)) if dialogue.store else []
    if rest.isdecimal() and 0 < int(rest) <= len(kept):
        path, conversation = kept[int(rest) - 1]
        dialogue.resume(path, conversation)
    elif rest:
        dialogue.resume(None, read_conversation(Path(rest).expanduser()))
    elif kept:
        for i, (_, conversation) in enumerate(kept, 1):
            dialogue.say(f"{i:>2}  {conversation.when}  {conversation.title}")
        dialogue.say("/load N resumes one")
    else:
        dialogue.say("there is no kept conversation yet; /load FILE reads a saved one")


def _write(dialogue: Dialogue, path: Path, form: str = "") -> None:
    """Write the conversation in a form, by default the one that the file's name ends in."""
    record, path = dialogue.record(), path.expanduser()
    write_new(path, record.to_markdown() if (form or path.suffix[1:]) == "md" else record.to_json())
    dialogue.say(f"written to {path}")


def _export(dialogue: Dialogue, rest: str) -> None:
    form, _, name = rest.partition(" ")
    if form not in ("md", "json"):
        raise _bad_value("/export needs a format: md or json", "a file name may follow it")
    words = re.sub(r"\W+", "-", dialogue.record().title.lower()).strip("-")[:40] or "conversation"
    _write(dialogue, Path(name.strip() or f"{words}.{form}"), form)


def _stats(dialogue: Dialogue, _: str) -> None:
    session, last = dialogue.session, dialogue.last
    engine, sampling = session.engine, session.sampling
    used = session.n_used()
    facts = {
        "model": f"{engine.path.name}, {format_bytes(engine.path.stat().st_size)}, threads {engine.n_threads}",
        "context": f"{used:,} of {engine.n_ctx:,} tokens, {math.ceil(100 * used / engine.n_ctx)} %",
        "turns": f"{len(session.turns) // 2}",
        "sampling": f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, seed {sampling.seed}, "
        f"at most {sampling.max_tokens:,} tokens",
    }
    if last:
        facts["last"] = (
            f"{last.n_prompt:,} prompt tokens, {last.n_generated:,} generated, {last.n_reasoning:,} of them thinking"
        )
        facts["speed"] = (
            f"{last.prompt_per_s:,.0f} tokens/s reading what was new in the prompt, "
            f"{last.tokens_per_s:,.0f} tokens/s answering"
        )
    dialogue.say_facts(facts)


def _quit(dialogue: Dialogue, _: str) -> None:
    raise EOFError


def _path(_: Dialogue) -> None:
    """Complete paths."""


_ALL = (
    Command("/help", "list the commands", _help),
    Command("/model [N|PATH]", "list models, or switch", _model, lambda dialogue: map(str, nearby_models(dialogue))),
    Command("/system [TEXT]", "show or set the system message; - removes it", _system, lambda _: ("-",)),
    Command(
        "/think [auto|on|off|show|fold]",
        "set whether the model thinks; show or fold its thinking; alone, show the last thinking",
        _think,
        lambda _: (*get_args(Think), "show", "fold"),
    ),
    Command("/budget [N|off]", "limit the tokens of thinking", _budget, lambda _: ("off",)),
    Command("/temp [T]", "set the temperature; 0 is greedy", _temp),
    Command("/file PATH", "attach a text file to the next message", _file, _path),
    Command("/image PATH", "attach an image, if the model can see", _image, _path),
    Command("/retry", "ask the last question again", _retry),
    Command("/edit", "edit the last question and ask it again", _edit),
    Command("/undo", "remove the last turn", _undo),
    Command("/save [FILE]", "save a copy, as Markdown if FILE ends in .md, else as JSON", _save, _path),
    Command("/load [N|FILE]", "list kept conversations, or resume one", _load, _path),
    Command("/export md|json [FILE]", "save the conversation in this folder", _export, lambda _: ("md", "json")),
    Command("/stats", "show tokens, speeds and the context", _stats),
    Command("/clear", "begin a new conversation", _clear),
    Command("/quit", "leave, like Ctrl-D", _quit),
)
COMMANDS = {command.name: command for command in _ALL}
_ALIASES = {"/reset": "/clear", "/exit": "/quit", "/?": "/help"}
