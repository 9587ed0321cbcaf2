"""What has to be closed can be used in a `with` block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self


class Closes(ABC):
    """A context manager that calls `close` when its block ends, however it ends."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is held. More than one call does no harm."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
