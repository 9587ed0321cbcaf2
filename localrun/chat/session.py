"""A conversation with a model: its turns, the next question, and what is kept of a stopped answer."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

from ...errors import UsageError
from ..core.generation import FREE, Guidance, Message, Sampling
from ..engine.engine import Engine
from ..engine.stream import Step
from ..families.thinking import Think
from .conversations import DEFAULT_SAMPLING, Conversation


class Question(NamedTuple):
    """What a user typed, and what precedes it in the message: attached text files and images."""

    typed: str
    attached: str = ""
    images: tuple[str, ...] = ()

    @property
    def message(self) -> Message:
        """The message as it is kept: with `typed` if the content holds more, and `images` as paths, one a line."""
        message: Message = {"role": "user", "content": self.attached + self.typed}
        message |= {"typed": self.typed} if self.attached else {}
        return message | ({"images": "\n".join(self.images)} if self.images else {})

    @classmethod
    def from_message(cls, message: Message) -> Self:
        """Return the question of a kept message."""
        typed = message.get("typed", message["content"])
        images = tuple(message.get("images", "").splitlines())
        return cls(typed, message["content"].removesuffix(typed), images)


class Session:
    """The turns so far. An assistant's thinking is kept beside its answer: the template decides what the model sees."""

    def __init__(
        self,
        engine: Engine,
        *,
        system: str | None = None,
        think: Think = "auto",
        sampling: Sampling = DEFAULT_SAMPLING,
        guidance: Guidance = FREE,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Begin a conversation; `tools`, in OpenAI's form, are offered to the model."""
        self.tools = tools
        self.engine, self.system, self.think, self.sampling, self.guidance = engine, system, think, sampling, guidance
        self.turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """The conversation as the chat template takes it."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + list(map(_as_shown, self.turns))

    def ask(self, question: Question) -> Generator[Step]:
        """Yield the answer's steps. The turn is kept if there is an answer, complete or stopped.

        A turn that fails, or is stopped before its answer begins, is removed: the model never sees it.

        Raises:
            ModelError: the conversation does not fit the context.
        """
        asked = question.message
        prompt = self.engine.prompt([*self.messages, _as_shown(asked)], self.think, self.tools)
        images = [Path(image) for turn in [*self.turns, asked] for image in turn.get("images", "").splitlines()]
        texts = {"thinking": "", "answer": ""}
        opened, finished = False, False
        try:
            for step in self.engine.stream(prompt, self.sampling, guidance=self.guidance, images=images):
                texts[step.part] += step.text
                opened = opened or step.closed is not None
                finished = step.finish_reason is not None
                yield step
        finally:
            if finished or texts["answer"].strip():
                answer: Message = {"role": "assistant", "content": texts["answer"]}
                self.turns += [asked, answer | ({"reasoning_content": texts["thinking"]} if opened else {})]

    def undo(self) -> Question:
        """Remove the last turn; return its question.

        Raises:
            UsageError: code "no-turn": there is none.
        """
        if not self.turns:
            raise UsageError("there is no question yet", "ask something first", code="no-turn")
        asked = self.turns[-2]
        del self.turns[-2:]
        return Question.from_message(asked)

    def reseed(self) -> None:
        """Take another seed, so that the next answer differs if it is sampled."""
        self.sampling = replace(self.sampling, seed=self.sampling.seed + 1)

    def adopt(self, conversation: Conversation) -> None:
        """Continue a conversation with its settings."""
        self.turns, self.system = list(conversation.turns), conversation.system
        self.think, self.sampling = conversation.think, conversation.sampling
        self.guidance = replace(self.guidance, think_budget=conversation.think_budget)

    def record(self, created: str = "") -> Conversation:
        """Return the conversation to keep; `created` is empty for one that begins now."""
        now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return Conversation(
            messages=system + self.turns,
            model=str(self.engine.path.absolute()),
            model_hash=self.engine.model.hash,
            think=self.think,
            think_budget=self.guidance.think_budget,
            sampling=self.sampling,
            created=created or now,
            updated=now,
        )

    def reset(self) -> None:
        """Begin a new conversation with the same system message, and a new seed so that it may differ."""
        self.turns.clear()
        self.reseed()

    def n_used(self) -> int:
        """Return how many tokens of the context the conversation uses."""
        turns = self.messages
        return len(self.engine.tokenize(self.engine.prompt(turns, self.think))) if turns else 0

    def knows_thinking_switch(self) -> bool:
        """Return whether thinking can be turned on and off, by the model's template or its tags."""
        turn: list[Message] = [{"role": "user", "content": "?"}]
        return self.engine.prompt(turn, "on") != self.engine.prompt(turn, "off")


def _as_shown(turn: Message) -> Message:
    """Return a kept message as the chat template takes it, with the markers of its images."""
    message = {key: text for key, text in turn.items() if key not in ("typed", "images")}
    if "images" in turn:
        from ..engine.vision import with_images

        message["content"] = with_images(message["content"], len(turn["images"].splitlines()))
    return message
