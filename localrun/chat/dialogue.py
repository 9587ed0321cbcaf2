"""A conversation at a terminal: show what happens to it, and keep it on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path

from rich.console import Console

from ...errors import DeepDistillError
from ..core.printable import facts_table, new_console, printable
from ..engine.engine import Engine
from ..engine.stream import Step
from .conversations import Conversation, Store
from .keyboard import Keys
from .oneshot import why_cut
from .screen import Screen, Thought
from .session import Question, Session

_NEARLY_FULL = 0.85  # of the context


class Dialogue:
    """A conversation at a terminal: the session, where it is kept, and what the next line begins with."""

    def __init__(
        self,
        session: Session,
        console: Console | None = None,
        *,
        open_engine: Callable[[Path], Engine] = Engine,
        store: Store | None = None,
        folded: bool = False,
        offline: bool = False,
    ) -> None:
        """Converse in a console; without a store, nothing is kept on disk."""
        self.session, self.open_engine, self.store = session, open_engine, store
        self.console = console or new_console()
        self.folded, self.offline = folded, offline
        self.pending = Question("")  # the next one, as far as typed and attached
        self.unanswered: Question | None = None  # the last one, if it was taken back
        self.thought: Thought | None = None  # the last turn's
        self.last: Step | None = None
        self.path: Path | None = None  # where the conversation is kept, once it has a turn
        self._created, self._written = "", 0
        self.keys = Keys()

    def say(self, text: str) -> None:
        """Print a line of the chat itself, not of the model."""
        is_file = not self.console.is_terminal
        self.console.print(text, style="dim italic", markup=False, highlight=False, soft_wrap=is_file)

    def say_facts(self, facts: Mapping[str, str]) -> None:
        """Print a table of names and values."""
        self.console.print(facts_table(facts.items(), ""), style="dim italic")

    def new_screen(self) -> Screen:
        """Return a screen for one answer to stream to."""
        return Screen(self.console, folded=self.folded)

    def greet(self) -> None:
        """Print the model's name and its context."""
        engine = self.session.engine
        kept = "" if self.store else " Nothing is kept on disk."
        self.say(f"{engine.path.name}, {engine.n_ctx:,} tokens of context. /help lists the commands.{kept}")

    def answer(self, question: Question) -> None:
        """Answer one turn and keep it; Ctrl-C stops the answer.

        Raises:
            ModelError: the question does not fit the context.
        """
        screen, n_turns, notes = self.new_screen(), len(self.session.turns), list[str]()
        steps, was_stopped = self.session.ask(question), False
        self.last, self.unanswered = None, question
        try:
            with self.keys.watched(), closing(steps):
                screen.wait()
                for step in steps:
                    self.last = step
                    screen.show(step)
                    notes += [step.note] if step.note else []
                    if self.keys.folds():
                        screen.toggle()
        except KeyboardInterrupt:
            was_stopped = True
        finally:
            screen.end()
            self.folded, self.thought, self.pending = screen.folded, screen.thought, Question(self.keys.typed())
        if len(self.session.turns) > n_turns:
            self.unanswered = None
            self.keep()
        self._report(was_stopped, notes)

    def _report(self, was_stopped: bool, notes: Iterable[str]) -> None:
        last, session = self.last, self.session
        if was_stopped:
            self.say("(stopped; the question was taken back: /edit or /retry)" if self.unanswered else "(stopped)")
        elif last:
            thinking = f", {last.n_reasoning} of them thinking" if last.n_reasoning else ""
            self.say(f"({last.n_generated} tokens{thinking}, {last.tokens_per_s:.0f} tokens/s)")
            notes = [*notes, *why_cut(session, last)]
        for note in notes:
            self.say(f"note: {note}")
        used = last.n_prompt + last.n_generated - last.n_reasoning if last else 0
        if used >= _NEARLY_FULL * session.engine.n_ctx:
            self.say(
                f"note: {used} of {session.engine.n_ctx} tokens of context are used; /undo makes room, /clear begins "
                "a new conversation, --context makes the context larger"
            )

    def fold(self) -> None:
        """Fold thinking from now on; or show it from now on, beginning with the last one."""
        self.folded = not self.folded
        if self.thought and not self.folded:
            self.new_screen().show_again(self.thought)
        else:
            self.say(f"thinking is {'folded into one line' if self.folded else 'shown'}")

    def keep(self) -> None:
        """Write the conversation to its file, or delete the file if every turn was taken back."""
        if self.store is None:
            return
        try:
            if self.path and _written_at(self.path) != self._written:
                self.say("another chat continued this conversation; this one is kept in a file of its own from here on")
                self.path = None
            if self.session.turns:
                self.path = self.path or self.store.new_path()
                self.store.write(self.path, self.record())
                self._written = _written_at(self.path)
            elif self.path:
                self.store.delete(self.path)
                self.path = None
        except DeepDistillError as error:
            self.say(f"note: {error.message}; the conversation is not kept")

    def record(self) -> Conversation:
        """Return the conversation as it is written to disk."""
        record = self.session.record(self._created)
        self._created = record.created
        return record

    def leave(self) -> None:
        """Save the KV cache, so that this conversation is quick to resume."""
        try:
            if self.store and self.path:
                self.store.save_state(self.path, self.session.engine, self.session.n_used())
        except DeepDistillError as error:
            self.say(f"note: {error.message}")

    def begin(self) -> None:
        """Begin a new conversation."""
        self.session.reset()
        self.path, self._created, self.pending = None, "", Question("")
        self.unanswered = self.thought = self.last = None

    def resume(self, path: Path | None, conversation: Conversation) -> None:
        """Leave this conversation and resume another, with its settings."""
        self.leave()
        self.begin()
        self.session.adopt(conversation)
        self.take_up(path, conversation)

    def take_up(self, path: Path | None, conversation: Conversation) -> None:
        """Show the end of the conversation that the session has adopted, and load its KV cache."""
        n_ready = 0
        if path and self.store:
            n_ready = self.store.load_state(path, self.session.engine)
            self.path, self._created, self._written = path, conversation.created, _written_at(path)
        engine, n = self.session.engine, len(self.session.turns) // 2
        ready = "; the model only reads the last answer again" if n_ready else ""  # without its thinking
        turns = "1 turn" if n == 1 else f"{n} turns"
        self.say(f"{conversation.title}: {turns}, {self.session.n_used():,} tokens{ready}")
        if conversation.model_hash and conversation.model_hash != engine.model.hash:
            self.say(f"it began with {Path(conversation.model).name} and continues with {engine.path.name}")
        if self.session.turns:
            asked, answered = self.session.turns[-2:]
            self.console.print(f"› {printable(Question.from_message(asked).typed)}", markup=False, highlight=False)
            self.new_screen().show_text(answered["content"])
            if thinking := answered.get("reasoning_content", "").strip():
                self.thought = Thought(printable(thinking), len(engine.tokenize(thinking)))


def _written_at(path: Path) -> int:
    """Return when a file was last written, in ns; 0 if it is gone."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
