"""The chat's slash commands: what each is called, what may follow it, and what it does."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ...errors import ArtifactError, UsageError
from ..core.text import format_bytes
from ..families.thinking import Think
from ..find import find_model
from .attach import fenced, read_text
from .conversations import read_conversation, write_new
from .session import Question

if TYPE_CHECKING:
    from .repl import Dialogue

_MOST_LISTED = 20
KEYS_HELP = """\
Enter sends; Alt-Enter, or a backslash before Enter, begins a new line. Tab completes. Ctrl-C stops an answer, Ctrl-T \
folds and unfolds thinking, Ctrl-D leaves. A message that begins with a slash is sent with a space before it."""


@dataclass(frozen=True)
class Command:
    """One command. `run` gets what follows the name; `choices` are offered for it, None where it is a path."""

    usage: str
    help: str
    run: Callable[[Dialogue, str], None]
    choices: Callable[[Dialogue], Iterable[str] | None] = lambda _: ()

    @property
    def name(self) -> str:
        """The command as it is typed, with its slash."""
        return self.usage.partition(" ")[0]


def obey(talk: Dialogue, line: str) -> None:
    """Carry out a line that begins with a slash.

    Raises:
        EOFError: it was /quit.
        DeepDistillError: it cannot be done.
    """
    name, _, rest = line.strip().partition(" ")
    command = COMMANDS.get(_ALIASES.get(name, name))
    if command is None:
        near = [known for known in COMMANDS if len(name) > 1 and known.startswith(name)]
        hint = f"did you mean {' or '.join(near)}?" if near else "/help lists the commands"
        raise UsageError(f"there is no {name}", hint)
    command.run(talk, rest.strip())


def _help(talk: Dialogue, _: str) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold")
    table.add_column()
    for command in COMMANDS.values():
        table.add_row(Text(command.usage), Text(command.help, "dim"))
    talk.console.print(table)
    talk.say(KEYS_HELP)


def _model(talk: Dialogue, rest: str) -> None:
    from ..doctor import installed_models

    nearby = nearby_models(talk)
    others = (path for _, path in installed_models() if "mmproj" not in path.name)
    models = [*nearby, *(path for path in others if path.resolve() not in nearby)]
    if not rest:
        for i, path in enumerate(models, 1):
            here = " (this one)" if path.samefile(talk.session.engine.path) else ""
            talk.say(f"{i}  {path}{here}")
        talk.say("/model N, or a .gguf file, a run folder or hf:ORG/REPO[:FILE], switches")
        return
    is_number = rest.isdigit() and 0 < int(rest) <= len(models)
    path = models[int(rest) - 1] if is_number else find_model(rest, offline=talk.offline)
    engine = talk.open_engine(path)
    talk.session.engine.close()
    talk.session.engine = engine
    goes_on = ", the conversation goes on" if talk.session.turns else ""
    talk.say(f"{engine.path.name}, {engine.n_ctx:,} tokens of context{goes_on}")


def nearby_models(talk: Dialogue) -> list[Path]:
    """Return the GGUFs of the runs here and of the folder that the model is in."""
    here = talk.session.engine.path
    paths = [*here.parent.glob("*.gguf"), *Path("runs").rglob("*.gguf"), here]
    return sorted({path.resolve(): path for path in paths if "mmproj" not in path.name}.values())


def _system(talk: Dialogue, rest: str) -> None:
    if rest:
        talk.session.system = None if rest == "-" else rest
    talk.say(f"system message: {talk.session.system or 'none'}")


def _think(talk: Dialogue, rest: str) -> None:
    session = talk.session
    if rest in get_args(Think):
        session.think = next(think for think in get_args(Think) if think == rest)
        if rest != "auto" and not session.knows_thinking_switch():
            talk.say("this model has no switch for thinking")
            return
    elif rest in ("show", "fold"):
        talk.folded = rest == "fold"
        talk.say(f"thinking is {'folded into one line' if talk.folded else 'shown'}")
        return
    elif rest:
        raise UsageError(f"/think {rest} means nothing", "/think auto, on, off, show or fold")
    elif talk.thought:
        talk.new_screen().show_again(talk.thought)
    talk.say(f"thinking is {session.think}")


def _budget(talk: Dialogue, rest: str) -> None:
    session = talk.session
    if rest:
        budget = None if rest == "off" else _whole_number(rest, "/budget 200, or /budget off")
        session.guidance = replace(session.guidance, think_budget=budget)
    budget = session.guidance.think_budget
    talk.say("thinking has no budget" if budget is None else f"thinking is held to {budget:,} tokens")


def _whole_number(text: str, hint: str) -> int:
    if not text.isdecimal():
        raise UsageError(f"{text} is no number of tokens", hint)
    return int(text)


def _temp(talk: Dialogue, rest: str) -> None:
    session = talk.session
    if rest:
        if not re.fullmatch(r"\d{1,2}(\.\d*)?|\.\d+", rest):
            raise UsageError(f"{rest} is no temperature", "/temp 0 is greedy, /temp 0.7 is usual")
        session.sampling = replace(session.sampling, temperature=float(rest))
    greedy = ": the most likely token, always" if session.sampling.temperature == 0 else ""
    talk.say(f"temperature {session.sampling.temperature:g}{greedy}")


def _file(talk: Dialogue, rest: str) -> None:
    pending = talk.pending
    if rest == "-":
        talk.pending = Question(pending.typed)
        talk.say("nothing is attached")
    elif rest:
        path = Path(rest).expanduser()
        block = fenced(path.name, read_text(path, talk.session.engine.n_ctx))
        n = len(talk.session.engine.tokenize(pending.attached + block))
        room = talk.session.engine.n_ctx - talk.session.n_used()
        if n >= room:
            raise ArtifactError(
                f"{path} takes {n:,} tokens and the context has room for {max(0, room):,}",
                "attach a part of it, /clear the conversation, or give a larger --context",
            )
        talk.pending = pending._replace(attached=pending.attached + block)
        talk.say(f"{path.name} is attached to the next message, {n:,} tokens; /file - takes it away")
    else:
        talk.say("a file is attached" if pending.attached else "/file PATH attaches a text file to the next message")


def _image(talk: Dialogue, rest: str) -> None:
    engine, pending = talk.session.engine, talk.pending
    if not engine.sees_images:
        from ..engine.vision import find_mmproj

        beside = find_mmproj(engine.path)
        hint = (
            f"begin again with --mmproj {beside}" if beside else "a model that sees comes with an mmproj file: --mmproj"
        )
        raise UsageError(f"{engine.path.name} has no vision part here", hint)
    path = Path(rest).expanduser().absolute()
    if not path.is_file():
        raise ArtifactError(f"no image at {path}", "/image PATH attaches one to the next message")
    talk.pending = pending._replace(images=(*pending.images, str(path)))
    talk.say(f"{path.name} is attached to the next message; /file - takes it away")


def _retry(talk: Dialogue, _: str) -> None:
    if question := talk.unanswered:
        talk.answer(question)
        return
    before = talk.session.turns[-2:]
    question = talk.session.undo()
    if question is None:
        raise UsageError("there is nothing to ask again")
    talk.session.reseed()
    n_turns = len(talk.session.turns)
    try:
        talk.answer(question)
    finally:
        if len(talk.session.turns) == n_turns:  # stopped before it began: the old answer stays
            talk.session.turns += before
            talk.unanswered = None
    if talk.session.sampling.temperature == 0 and talk.session.turns[-2:] == before:
        talk.say("the same: at temperature 0 only /temp, /think or /system make it another answer")


def _edit(talk: Dialogue, _: str) -> None:
    question = talk.unanswered or talk.session.undo()
    if question is None:
        raise UsageError("there is nothing to edit")
    talk.pending, talk.unanswered = question, None
    talk.keep()


def _undo(talk: Dialogue, _: str) -> None:
    question = talk.session.undo()
    if question is None:
        raise UsageError("there is no turn to take back")
    talk.keep()
    first = question.typed.splitlines()[0] if question.typed else ""
    talk.say(f"taken back: {first}")


def _clear(talk: Dialogue, _: str) -> None:
    talk.leave()
    talk.begin()
    talk.say("a new conversation; the system message stays")


def _save(talk: Dialogue, rest: str) -> None:
    if rest:
        path = Path(rest).expanduser()
        record = talk.record()
        write_new(path, record.to_markdown() if path.suffix == ".md" else record.to_json())
        talk.say(f"saved to {path}")
    elif talk.path:
        talk.say(f"kept in {talk.path}")
    else:
        talk.say("nothing to save yet" if talk.store else "this conversation is not kept; /save FILE writes it")


def _load(talk: Dialogue, rest: str) -> None:
    kept = list(islice(talk.store.newest_first(), _MOST_LISTED)) if talk.store else []
    if rest.isdecimal() and 0 < int(rest) <= len(kept):
        path, conversation = kept[int(rest) - 1]
        talk.resume(path, conversation)
    elif rest:
        talk.resume(None, read_conversation(Path(rest).expanduser()))
    elif kept:
        for i, (_, conversation) in enumerate(kept, 1):
            talk.say(f"{i:>2}  {conversation.when}  {conversation.title}")
        talk.say("/load N goes on with one")
    else:
        talk.say("no conversation is kept yet; /load FILE reads one that was saved")


def _export(talk: Dialogue, rest: str) -> None:
    form, _, name = rest.partition(" ")
    if form not in ("md", "json"):
        raise UsageError("/export md or /export json", "a file name may follow")
    record = talk.record()
    words = re.sub(r"\W+", "-", record.title.lower()).strip("-")[:40] or "conversation"
    path = Path(name.strip() or f"{words}.{form}").expanduser()
    write_new(path, record.to_markdown() if form == "md" else record.to_json())
    talk.say(f"written to {path}")


def _stats(talk: Dialogue, _: str) -> None:
    session, last = talk.session, talk.last
    engine, sampling = session.engine, session.sampling
    used = session.n_used()
    facts = {
        "model": f"{engine.path.name}, {format_bytes(engine.size_bytes)}, threads {engine.n_threads}",
        "context": f"{used:,} of {engine.n_ctx:,} tokens, {math.ceil(100 * used / engine.n_ctx)} %",
        "turns": f"{len(session.turns) // 2}",
        "sampling": f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, seed {sampling.seed}, "
        f"at most {sampling.max_tokens:,} tokens",
    }
    if last:
        facts["last"] = (
            f"{last.n_prompt:,} tokens of prompt, {last.n_generated:,} answered, {last.n_reasoning:,} of them thinking"
        )
        facts["speed"] = (
            f"{last.prompt_per_s:,.0f} tokens/s of what was new in the prompt, "
            f"{last.tokens_per_s:,.0f} tokens/s answered"
        )
    talk.say_facts(facts)


def _quit(talk: Dialogue, _: str) -> None:
    raise EOFError


def _path(_: Dialogue) -> None:
    """Offer paths."""


_ALL = (
    Command("/help", "these lines", _help),
    Command("/model [N|PATH]", "list models, or switch", _model, lambda talk: map(str, nearby_models(talk))),
    Command("/system [TEXT]", "show or set the system message; - removes it", _system, lambda _: ("-",)),
    Command(
        "/think [auto|on|off|show|fold]",
        "let the model think or not; show or fold it; alone: the last thinking again",
        _think,
        lambda _: (*get_args(Think), "show", "fold"),
    ),
    Command("/budget [N|off]", "tokens of thinking, at most", _budget, lambda _: ("off",)),
    Command("/temp [T]", "temperature; 0 is greedy", _temp),
    Command("/file PATH", "attach a text file to the next message", _file, _path),
    Command("/image PATH", "attach an image, if the model sees", _image, _path),
    Command("/retry", "ask the last question again", _retry),
    Command("/edit", "take the last question back into the line", _edit),
    Command("/undo", "take the last turn back", _undo),
    Command("/save [FILE]", "write a copy: Markdown to .md, else JSON", _save, _path),
    Command("/load [N|FILE]", "list kept conversations, or go on with one", _load, _path),
    Command("/export md|json [FILE]", "write the conversation here", _export, lambda _: ("md", "json")),
    Command("/stats", "tokens, speeds, context", _stats),
    Command("/clear", "begin a new conversation", _clear),
    Command("/quit", "leave, as Ctrl-D does", _quit),
)
COMMANDS = {command.name: command for command in _ALL}
_ALIASES = {"/reset": "/clear", "/exit": "/quit", "/?": "/help"}
