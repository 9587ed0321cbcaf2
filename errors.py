"""What a user did or met that stops the work. `main()` prints each as one line with its hint, never a traceback.

DeepDistillError          exit 1  the work cannot go on
├── ArtifactError                 a file or folder is missing, broken, locked or in the way
├── ModelError                    a model cannot be loaded, converted or run here
├── TeacherError                  a teacher is down, refuses, or cannot answer this
├── UsageError            exit 2  the command line or a spec is off
└── GateError             exit 3  the work is done, and a gate that the user set was not met
"""

from __future__ import annotations


class DeepDistillError(Exception):
    """Something to show to the user: what happened, and in `hint` what to do about it.

    `code` is a short slug such as "run-locked": tests and programs rely on it, never on the wording.

    >>> from deepdistill import DeepDistillError, load_problems
    >>> try:
    ...     load_problems("gym:no_such_data_set")
    ... except DeepDistillError as error:
    ...     print(error.code, error.exit_code)
    no-such-dataset 2
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "", *, code: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code


class ArtifactError(DeepDistillError):
    """A file or folder is missing, broken, locked or in the way."""


class ModelError(DeepDistillError):
    """A model cannot be loaded, converted or run here."""


class TeacherError(DeepDistillError):
    """A teacher is down, refuses, or cannot answer this."""


class UsageError(DeepDistillError):
    """The command line or a spec is off."""

    exit_code = 2


class GateError(DeepDistillError):
    """The work is done, and a gate that the user set was not met."""

    exit_code = 3
