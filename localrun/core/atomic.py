"""Files and folders that are there whole or not at all: written beside their place, then renamed into it.

The temporary name is new and random, so that a link that somebody left there is never followed, and two processes never
write into one file. A file is on the disk before it gets its name, so that a loss of power leaves the
old one or the new one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ...errors import ArtifactError


@contextlib.contextmanager
def replacing_file(path: Path, *, mode: int = 0o666) -> Iterator[Path]:
    """Yield the path of an empty file beside `path` to write to; it takes the place of `path` when the block ends well.

    `mode` gives its permissions, less the umask.

    Raises:
        ArtifactError: `code` "write-failed": the disk is full, or the folder cannot be written.
    """
    with _translated(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
    temporary = Path(name)
    try:
        with _translated(path, temporary):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(mode & ~_umask())  # mkstemp's are private
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` to fill; it is renamed to `path` when the block ends well.

    Raises:
        ArtifactError: `code` "write-failed": the disk is full, or a folder with something in it has that name already.
    """
    with _translated(path):
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
        with _translated(path, temporary):
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Write a UTF-8 text file, whole or not at all.

    Raises:
        ArtifactError: see `replacing_file`.
    """
    with replacing_file(path, mode=mode) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _translated(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Turn what the system says of this file into an error that names it; what it says of other files passes."""
    try:
        yield
    except OSError as error:
        is_ours = temporary is None or error.filename is None or Path(error.filename).is_relative_to(temporary)
        if not is_ours:
            raise
        raise ArtifactError(
            f"cannot write {path}: {error.strerror or error}", "make room or choose another place", code="write-failed"
        ) from error


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
