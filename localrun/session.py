"""A conversation with a model: its turns, what is asked next, and what becomes of an answer that was stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

from ..errors import ArtifactError
from .engine import Engine, Step
from .generation import Message, Sampling


class Session:
    """The turns so far. An assistant's thinking is kept beside its answer: the template decides what the model sees."""

    def __init__(self, engine: Engine, *, system: str | None, thinking: bool, sampling: Sampling) -> None:
        self.engine, self.system, self.thinking, self.sampling = engine, system, thinking, sampling
        self.turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """The conversation as the template takes it."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def ask(self, text: str) -> Generator[Step]:
        """Yield the answer's steps; the turn is kept once there is an answer, whole or stopped half way.

        A turn that fails, or is stopped before its answer began, is taken back: the model never sees it.

        Raises:
            ModelError: the conversation does not fit the context.
        """
        question: Message = {"role": "user", "content": text}
        prompt = self.engine.render([*self.messages, question], thinking=self.thinking)
        said = {"thinking": "", "answer": ""}
        opened, finished = False, False
        try:
            for step in self.engine.stream(prompt, self.sampling):
                said[step.part] += step.text
                opened = opened or step.closed is not None
                finished = step.finish_reason is not None
                yield step
        finally:
            if finished or said["answer"].strip():
                answer: Message = {"role": "assistant", "content": said["answer"]}
                self.turns += [question, answer | ({"reasoning_content": said["thinking"]} if opened else {})]

    def knows_thinking_switch(self) -> bool:
        """Say whether the model's template renders differently without thinking."""
        turn: list[Message] = [{"role": "user", "content": "?"}]
        return self.engine.render(turn, thinking=True) != self.engine.render(turn, thinking=False)

    def reset(self) -> None:
        """Begin a new conversation under the same system message, with a new seed so that it may go differently."""
        self.turns.clear()
        self.sampling = replace(self.sampling, seed=self.sampling.seed + 1)

    def save(self, path: Path) -> None:
        """Write the conversation: Markdown to a .md file, else JSON with `model` and `messages`.

        Raises:
            ArtifactError: there is a file already, or it cannot be written.
        """
        path = path.expanduser()
        if path.exists():
            raise ArtifactError(f"{path} is there already", "give another name; nothing was overwritten")
        text = self._markdown() if path.suffix == ".md" else self._json()
        half_written = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            half_written.write_text(text, encoding="utf-8")
            half_written.replace(path)
        except OSError as error:
            half_written.unlink(missing_ok=True)
            raise ArtifactError(f"cannot write {path}: {error.strerror}") from error

    def _json(self) -> str:
        record = {"model": self.engine.path.name, "messages": self.messages}
        return json.dumps(record, ensure_ascii=False, indent=2) + "\n"

    def _markdown(self) -> str:
        blocks = [f"# A conversation with {self.engine.path.name}"]
        for message in self.messages:
            blocks.append(f"**{message['role']}**")
            if thought := message.get("reasoning_content"):
                blocks.append("\n".join(f"> {line}".rstrip() for line in thought.splitlines()))
            blocks.append(message["content"])
        return "\n\n".join(blocks) + "\n"
