"""Conversations on disk: a JSON file for each in the user's data folder, with its KV cache in a file beside it.

The JSON is written after every turn. The KV cache is large, and only worth keeping for a conversation that is resumed
another day, so it is written when the user leaves. If the engine refuses it, as one of another model, it is deleted.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from ...errors import ArtifactError
from ..core.atomic import write_text
from ..core.generation import Message, Sampling
from ..core.text import read_text, shorten
from ..engine.engine import Engine
from ..families.thinking import Think

DEFAULT_SAMPLING = Sampling(max_tokens=2048)
_LEAST_TOKENS = 256  # in a state: fewer are computed as fast as they are read
_MAX_TITLE = 60  # characters
_HINT = "give a file that /save or /export json wrote"


def data_dir() -> Path:
    """Return the user's data folder of this program."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "deepdistill"


@dataclass(frozen=True)
class Conversation:
    """A conversation as it is kept. `messages` begins with the system message, if there is one; times are UTC."""

    messages: list[Message]
    model: str = ""
    model_hash: str = ""
    think: Think = "auto"
    think_budget: int | None = None
    sampling: Sampling = DEFAULT_SAMPLING
    created: str = ""
    updated: str = ""

    @property
    def system(self) -> str | None:
        """The system message."""
        return self.messages[0]["content"] if self.messages[:1] and self.messages[0]["role"] == "system" else None

    @property
    def turns(self) -> list[Message]:
        """The messages without the system message."""
        return self.messages[self.system is not None :]

    @property
    def title(self) -> str:
        """The beginning of the first question, short enough for a list."""
        asked = next((turn for turn in self.turns if turn["role"] == "user"), None)
        return shorten(asked.get("typed", asked["content"]) if asked else "", _MAX_TITLE)

    @property
    def when(self) -> str:
        """The local time when it was last written, for a list."""
        try:
            return f"{datetime.fromisoformat(self.updated).astimezone():%Y-%m-%d %H:%M}"
        except ValueError:  # another program's file
            return " " * 16

    def to_json(self) -> str:
        """Return the JSON text of its file."""
        record = {"title": self.title} | {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps(record | {"sampling": asdict(self.sampling)}, ensure_ascii=False, indent=2) + "\n"

    def to_markdown(self) -> str:
        """Return the conversation as Markdown, with the thinking as quotes."""
        blocks = [f"# {self.title or 'A conversation'}", f"with {Path(self.model).name}"]
        for message in self.messages:
            blocks.append(f"**{message['role']}**")
            if thought := message.get("reasoning_content"):
                blocks.append("\n".join(f"> {line}".rstrip() for line in thought.splitlines()))
            blocks.append(message["content"])
        return "\n\n".join(blocks) + "\n"


def read_conversation(path: Path) -> Conversation:
    """Return the conversation in a file: one of ours, or any JSON object with `messages`.

    Raises:
        ArtifactError: code "file-unreadable", "file-not-text" or "conversation-broken".
    """
    try:
        record = json.loads(read_text(path))
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON", _HINT, code="conversation-broken") from error
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not _are_messages(messages):
        raise ArtifactError(f"{path} is not a conversation", _HINT, code="conversation-broken")
    names = ("model", "model_hash", "created", "updated")
    texts = {name: record[name] for name in names if isinstance(record.get(name), str)}
    think, budget = record.get("think"), record.get("think_budget")
    return Conversation(
        messages=messages,
        think=think if think in get_args(Think) else "auto",
        think_budget=budget if isinstance(budget, int) else None,
        sampling=_sampling(record.get("sampling")),
        **texts,
    )


def _are_messages(messages: list[Any]) -> bool:
    """Return whether these are messages: an optional system message, then questions and answers in turn."""
    if not all(isinstance(m, dict) and all(isinstance(text, str) for text in m.values()) for m in messages):
        return False
    roles = [m.get("role") for m in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    return turns == ["user", "assistant"] * (len(turns) // 2) and all("content" in m for m in messages)


def _sampling(record: Any) -> Sampling:
    kinds = {name: type(value) for name, value in asdict(DEFAULT_SAMPLING).items()}
    given = record if isinstance(record, dict) else {}
    numbers = {key: n for key, n in given.items() if isinstance(n, int | float) and 0 <= n < 1 << 31}
    return replace(DEFAULT_SAMPLING, **{key: kinds[key](n) for key, n in numbers.items() if key in kinds})


def write_new(path: Path, text: str) -> None:
    """Write a new file.

    Raises:
        ArtifactError: code "already-exists" or "write-failed".
    """
    if path.exists():
        raise ArtifactError(
            f"{path} already exists", "give another name; nothing was overwritten", code="already-exists"
        )
    write_text(path, text)


class Store:
    """The folder of kept conversations."""

    def __init__(self, folder: Path | None = None, *, max_state_bytes: int = 1 << 30) -> None:
        """Keep conversations in a folder, by default the user's, and at most so many bytes of states."""
        self.folder, self._max_state_bytes = folder or data_dir() / "conversations", max_state_bytes

    def new_path(self) -> Path:
        """Return the path for a new conversation; names sort by time."""
        return self.folder / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}.json"

    def newest_first(self) -> Iterator[tuple[Path, Conversation]]:
        """Yield the readable conversations, the last one written first."""
        for path in sorted(self.folder.glob("*.json"), key=_written_at, reverse=True):
            try:
                yield path, read_conversation(path)
            except ArtifactError:
                continue  # another program's, or broken: the others are still found

    def write(self, path: Path, conversation: Conversation) -> None:
        """Write a conversation to its file, readable to its user alone.

        Raises:
            ArtifactError: code "folder-unwritable" or "write-failed".
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ArtifactError(f"cannot create {self.folder}: {error.strerror}", code="folder-unwritable") from error
        write_text(path, conversation.to_json(), mode=0o600)

    def delete(self, path: Path) -> None:
        """Delete a conversation, with its state."""
        path.unlink(missing_ok=True)
        path.with_suffix(".state").unlink(missing_ok=True)

    def save_state(self, path: Path, engine: Engine, n_used: int) -> None:
        """Save the engine's KV cache of a conversation of n_used tokens, if that saves time later.

        Raises:
            ArtifactError: code "write-failed".
        """
        if n_used >= _LEAST_TOKENS and path.exists():
            engine.save_state(path.with_suffix(".state"))
            self._bound_states()

    def load_state(self, path: Path, engine: Engine) -> int:
        """Return how many tokens of a conversation the engine need not compute again."""
        state = path.with_suffix(".state")
        n = engine.load_state(state) if state.exists() else 0
        if n == 0:
            state.unlink(missing_ok=True)
        return n

    def _bound_states(self) -> None:
        """Delete states without a conversation, and the oldest beyond the limit."""
        room = self._max_state_bytes
        for state in sorted(self.folder.glob("*.state"), key=_written_at, reverse=True):
            room -= state.stat().st_size
            if room < 0 or not state.with_suffix(".json").exists():
                state.unlink(missing_ok=True)


def _written_at(path: Path) -> tuple[int, str]:
    try:
        return path.stat().st_mtime_ns, path.name
    except OSError:  # deleted meanwhile
        return 0, path.name
