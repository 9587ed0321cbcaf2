"""The interface of every teacher: conversations in, completions out as they finish.

Evaluation asks its models through the same interface, so that a teacher, a student and a GGUF are scored alike.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ...errors import TeacherError
from ...localrun.core.closes import Closes
from ...localrun.core.generation import Completion, Message, Sampling, TopLogprobs
from ...localrun.core.reporter import SILENT
from ..records import Backend, Request, TeacherInfo

Rung = Literal["text", "generated", "given"]
"""The probabilities that a teacher gives: none, those of its own text, or those of any given text too."""


@dataclass(frozen=True)
class Capabilities:
    """What a teacher gives: the `rung` and every lower one, with `top_logprobs` probabilities a token (0: none)."""

    rung: Rung
    top_logprobs: int
    reasoning: bool
    """Whether it returned its reasoning apart from the answer."""
    token_ids: bool
    """Whether it gives the ids of the tokens that it generated."""


class Teacher(Closes):
    """A model that answers many conversations at once. Close it, or use it as a context manager."""

    name: str
    backend: Backend
    revision: str | None = None
    vocabulary: str | None = None
    n_parallel: int = 1
    on_note: Callable[[str], None] = SILENT.say
    """Called with one line when the teacher does something other than asked: set it to show that to the user."""

    @abstractmethod
    def generate(
        self, requests: Iterable[Request], sampling: Sampling, *, top_logprobs: int = 0
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index of the request, completion) as each finishes; closing the iterator stops the work.

        Requests are drawn as there is room for them, so `requests` may end early, or never: a teacher draws about
        `n_parallel` ahead, or a few times that if it sorts them by length. Each is sampled with its own seed, not with
        `sampling.seed`. With `top_logprobs` a completion holds that many log-probabilities a token, or as many as the
        teacher gives. A request whose failure is final comes back with `finish_reason` "error", and `error` says why.

        Raises:
            TeacherError: no request can succeed any more (a server that is down, a key that it refuses).
            ModelError: the model cannot run here (out of memory).
        """

    def score(self, messages: Sequence[Message], answer: str | Sequence[int], *, top_logprobs: int) -> TopLogprobs:
        """Return the most probable tokens `[T, top_logprobs]` at the place of each of the T tokens of a given answer.

        The answer, of this model or any other, follows the rendered conversation: token ids of this teacher's
        vocabulary, or text, which it tokenizes, special tokens parsed. The answer's own token is always among them: in
        the last place where it is not one of the most probable.

        Raises:
            TeacherError: `code` "cannot-score": this teacher scores only what it generated.
            ModelError: `code` "context-too-small".
        """
        raise TeacherError(
            f"{self.name} gives no log-probabilities of a given text",
            "use a model in this process",
            code="cannot-score",
        )

    def score_many(
        self, conversations: Sequence[tuple[Sequence[Message], Sequence[int]]], *, top_logprobs: int
    ) -> Iterator[tuple[int, TopLogprobs]]:
        """Yield (index, what `score` returns) for each (messages, answer's token ids), as they come.

        Raises:
            TeacherError: `code` "cannot-score": this teacher scores only what it generated.
            ModelError: `code` "context-too-small".
        """
        for index, (messages, answer) in enumerate(conversations):
            yield index, self.score(messages, answer, top_logprobs=top_logprobs)

    def tokenize(self, text: str) -> list[int] | None:
        """Return the token ids of a text without special tokens added; None if the teacher does not give them."""
        return None

    def accepts(self, problem_source: str) -> None:
        """Return if the teacher was made for problems of this source.

        Raises:
            TeacherError: it was not; the hint says what it answers.
        """

    def close(self) -> None:
        """Give back what the teacher holds: most hold nothing. More than one call does no harm."""

    @property
    def info(self) -> TeacherInfo:
        """Who this is, as a trace keeps it."""
        return TeacherInfo(self.name, self.backend, self.revision, self.vocabulary)
