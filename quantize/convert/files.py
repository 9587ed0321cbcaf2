"""Files that appear whole or not at all: written beside their place, put on disk, then renamed.

A model may be split into several; llama.cpp names them `NAME-00001-of-00003.gguf` and is given the first. The first is
renamed last, so that whoever finds it finds all.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...errors import ArtifactError, UsageError

_SIZES = {"K": 1e3, "M": 1e6, "G": 1e9}


def shard_paths(out: Path, n: int) -> list[Path]:
    """Return the places of n parts of a file, under the names that llama.cpp looks for."""
    return [out] if n == 1 else [out.with_name(f"{out.stem}-{i + 1:05d}-of-{n:05d}.gguf") for i in range(n)]


def shards(sizes: Sequence[int], limit: int | None) -> list[range]:
    """Return which consecutive tensors, given by their bytes, go into each part of at most `limit` bytes.

    A tensor larger than that gets a part of its own.
    """
    starts, filled = [0], 0
    for i, size in enumerate(sizes):
        if limit and filled and filled + size > limit:
            starts.append(i)
            filled = 0
        filled += size
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(sizes)], strict=True)]


def parse_size(text: str) -> int:
    """Return the bytes of a size such as `500M`, `2G` or `90MB`, counted in thousands as disks are.

    Raises:
        UsageError: it is none.
    """
    plain = text.strip().upper().removesuffix("B")
    factor = _SIZES.get(plain[-1:], 1.0)
    try:
        size = int(float(plain[:-1] if plain[-1:] in _SIZES else plain) * factor)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise UsageError(f"{text!r} is no size", "such as 500M or 2G")
    return size


@contextmanager
def beside(places: Sequence[Path], n_bytes: int) -> Iterator[list[Path]]:
    """Give a temporary path beside each place; they replace what stands there at the end, or vanish.

    Raises:
        ArtifactError: the disk is full or the folder cannot be written.
    """
    out = places[0]
    if out.is_dir():
        raise ArtifactError(f"{out} is a folder", "name the file, such as student.gguf")
    temporaries = [place.with_name(f".{place.name}.{os.getpid()}.part") for place in places]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < n_bytes:
            raise OSError(errno.ENOSPC, f"{n_bytes / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")
        yield temporaries
        for temporary in temporaries:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        for temporary, place in reversed(list(zip(temporaries, places, strict=True))):
            os.replace(temporary, place)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            detail = f" ({error.strerror})" if "MB" in (error.strerror or "") else ""
            hint = "free some space, or give --out on another disk; what was there before is untouched"
            raise ArtifactError(f"the disk is full: {out} cannot be written{detail}", hint) from error
        raise ArtifactError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
