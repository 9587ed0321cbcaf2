"""The files of a model: how many parts, their names, and that all of them appear or none.

llama.cpp names the parts of a split model `NAME-00001-of-00003.gguf` and opens the first. The first is renamed last, so
whoever finds it finds all of them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ...errors import ArtifactError
from ...localrun.core.atomic import replacing_file
from ...localrun.core.text import format_bytes


def shard_paths(out: Path, n: int) -> list[Path]:
    """Return the paths of a file's n parts, under the names that llama.cpp looks for."""
    return [out] if n == 1 else [out.with_name(f"{out.stem}-{i + 1:05d}-of-{n:05d}.gguf") for i in range(n)]


def shards(sizes: Sequence[int], limit: int | None) -> list[range]:
    """Return which consecutive tensors go into each part, so that none exceeds `limit` bytes; `sizes` are in bytes.

    A tensor larger than the limit gets a part to itself.
    """
    starts, filled = [0], 0
    for i, size in enumerate(sizes):
        if limit and filled and filled + size > limit:
            starts.append(i)
            filled = 0
        filled += size
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(sizes)], strict=True)]


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        ArtifactError: `code` "file-unreadable".
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}", code="file-unreadable") from error


@contextmanager
def replacing_parts(paths: Sequence[Path], n_bytes: int) -> Iterator[list[Path]]:
    """Yield a temporary file beside each path; all of them take their places when the block ends well, else none.

    Args:
        paths: a model's parts, the one that llama.cpp opens first.
        n_bytes: what all of them will take, checked against the free space before anything is written.

    Raises:
        ArtifactError: `code` "is-folder", or "write-failed": the disk is full or the folder cannot be written.
    """
    out = paths[0]
    if out.is_dir():
        raise ArtifactError(f"{out} is a folder", "name the file, such as student.gguf", code="is-folder")
    _check_space(out, n_bytes)
    with ExitStack() as stack:  # which renames in reverse: the first part last
        temporaries = [stack.enter_context(replacing_file(path)) for path in paths]
        yield temporaries
        for temporary in temporaries:  # every part is on the disk before the first one gets its name
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())


def _check_space(out: Path, n_bytes: int) -> None:
    """Make the folder of a file, and check that so many bytes fit there."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
    except OSError as error:
        raise ArtifactError(f"cannot write {out}: {error.strerror or error}", code="write-failed") from error
    if free < n_bytes:
        raise ArtifactError(
            f"cannot write {out}: it takes {format_bytes(n_bytes)}, and the disk has {format_bytes(free)} left",
            "free some space, or write to another disk with --out",
            code="write-failed",
        )
