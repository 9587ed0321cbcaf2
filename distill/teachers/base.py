"""What every teacher is to the rest of the pipeline: conversations in, completions out as they finish.

Evaluation asks its models through the same interface, so that a teacher, a student and a GGUF are scored alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from ...localrun.generation import Completion, Message, Sampling

Backend = Literal["pocket", "endpoint", "transformers", "gguf"]


@dataclass(frozen=True)
class TeacherInfo:
    """Who answered: what a trace keeps of its teacher. `revision` is a commit or a hash of the weights, if known."""

    name: str
    backend: Backend
    revision: str | None = None


@dataclass(frozen=True)
class Request:
    """A conversation to answer, and the seed of its sampling."""

    messages: Sequence[Message]
    seed: int = 0


class Teacher(ABC):
    """A model that answers many conversations at once. Close it, or use it as a context manager."""

    name: str
    backend: Backend
    revision: str | None = None
    n_parallel: int = 1

    @abstractmethod
    def generate(
        self, requests: Iterable[Request], sampling: Sampling, *, top_logprobs: int = 0
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index of the request, completion) as each finishes; closing the iterator stops the work.

        Requests are drawn as there is room for them, so whoever gives them can end early. Each is sampled with its own
        seed (`sampling.seed` is not looked at). With `top_logprobs` a completion holds that many log-probabilities a
        token, or as many as the teacher gives. A request that fails for good comes back with `finish_reason` "error"
        and the reason in `error`.

        Raises:
            TeacherError: no request can succeed any more (a server that is down, a key that it refuses).
            ModelError: the model cannot run here (out of memory).
        """

    def accepts(self, problem_source: str) -> None:  # noqa: B027 - most teachers answer anything
        """Return if the teacher was made for problems of this source.

        Raises:
            TeacherError: it was not; the hint says what it answers.
        """

    def close(self) -> None:  # noqa: B027 - most teachers hold nothing
        """Give back what the teacher holds. More than one call does no harm."""

    @property
    def info(self) -> TeacherInfo:
        """Who this is, as a trace keeps it."""
        return TeacherInfo(self.name, self.backend, self.revision)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
