"""Files that only grow, by one writer at a time: what was appended is whole after `kill -9` at any byte.

`append` returns when the operating system has the bytes, so that the death of this process loses none of them. A loss
of power may take what was not yet on the disk; `sync` returns when it is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
from binascii import unhexlify
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from ...errors import ArtifactError

_T = TypeVar("_T")
_NO_ROOM_HINT = "make room and run the same command again: it goes on after what is stored"


class AppendFile:
    """A file that is only added to. Each `append` adds all of its bytes or, if that fails, none of them."""

    def __init__(self, path: Path) -> None:
        """Open or create the file.

        Raises:
            ArtifactError: it cannot be opened.
        """
        self.path, self._is_dirty, self._failure = path, False, ""
        is_new = not path.exists()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
            stat = os.fstat(self._file)
            self.size, self._inode = stat.st_size, (stat.st_dev, stat.st_ino)
        except OSError as error:
            raise ArtifactError(f"cannot open {path}: {error.strerror or error}") from error
        if is_new:
            _sync_folder(path.parent)

    def append(self, data: bytes) -> None:
        """Add the bytes at the end.

        Raises:
            ArtifactError: the disk is full, or another program changed the file; what was there is still valid.
        """
        self._check()
        self._is_dirty = True
        try:
            written = os.write(self._file, data)
            while written < len(data):  # a nearly full disk takes a part and then refuses the rest
                written += os.write(self._file, data[written:])
            self.size += len(data)
        except BaseException as error:
            self.truncate(self.size)
            if not isinstance(error, OSError):
                raise
            raise ArtifactError(f"cannot write to {self.path}: {error.strerror or error}", _NO_ROOM_HINT) from error

    def truncate(self, size: int) -> None:
        """Cut the file to its first `size` bytes.

        Raises:
            ArtifactError: it cannot be cut; no more is appended then.
        """
        self._is_dirty = True
        try:
            os.ftruncate(self._file, size)
        except OSError as error:
            self._failure = f"cannot cut {self.path} back to {size} bytes: {error.strerror or error}"
            raise ArtifactError(self._failure, "the next run cuts it when it opens the file") from error
        self.size = size

    def cut_torn_line(self) -> int:
        """Cut off what stands behind the last newline, and return how many bytes that were."""
        end = self.size
        while end > 0:
            start = max(0, end - (1 << 16))
            os.lseek(self._file, start, os.SEEK_SET)
            newline = os.read(self._file, end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        torn = self.size - end
        if torn:
            self.truncate(end)
        return torn

    def sync(self) -> None:
        """Return when all that was appended is on the disk.

        Raises:
            ArtifactError: the disk refused some of it; no more is appended then, as nobody can tell what is there.
        """
        if not self._is_dirty:
            return
        try:
            os.fsync(self._file)
        except OSError as error:
            self._failure = f"the disk did not keep all of {self.path}: {error.strerror or error}"
            raise ArtifactError(self._failure, "check the disk, then run the same command again") from error
        self._is_dirty = False

    def close(self) -> None:
        """Sync and close. More than one call does no harm."""
        if self._file < 0:
            return
        file, self._file = self._file, -1
        try:
            if self._is_dirty:
                self._is_dirty = False
                os.fsync(file)
        except OSError as error:
            raise ArtifactError(f"the disk did not keep all of {self.path}: {error.strerror or error}") from error
        finally:
            os.close(file)

    def _check(self) -> None:
        """Refuse to write where bytes would be lost or land behind those of somebody else."""
        if self._failure:
            raise ArtifactError(self._failure)
        try:
            stat = os.stat(self.path)
            unchanged = (stat.st_dev, stat.st_ino) == self._inode and stat.st_size == self.size
        except OSError:
            unchanged = False
        if not unchanged:
            raise ArtifactError(
                f"another program changed, moved or deleted {self.path} while it was written",
                "nothing was added since; run the same command again",
            )


class WriterLock:
    """The right to write a file, held by one process on any host until `release` or its death.

    The lock file tells others who holds it. It stays when the lock is given back: deleting it would race.
    """

    def __init__(self, path: Path, *, what: Path | None = None) -> None:
        """Take the lock of a file; `what` is named instead of it where it stands for more.

        Raises:
            ArtifactError: another writer holds it, with who that is; or the folder cannot be written.
        """
        lock_path = path.with_name(f".{path.name}.lock")
        self._path, self._lock = lock_path, FileLock(lock_path, timeout=0, thread_local=False)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout as error:
            raise ArtifactError(
                f"{what or path} is being written by {_holder(lock_path)}",
                f"wait for it to end, or work in another {'folder with --out' if what else 'file'}",
            ) from error
        except OSError as error:
            raise ArtifactError(
                f"cannot work in {path.parent}: {error.strerror or error}", "give another folder with --out"
            ) from error
        since = datetime.now(UTC).isoformat(timespec="seconds")
        self._write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))

    def release(self) -> None:
        """Give the lock back. More than one call does no harm."""
        if self._lock.is_locked:
            self._write("")
            self._lock.release()

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk, or Windows, where a locked file cannot be written
            self._path.write_text(text, encoding="utf-8")


def _holder(lock_path: Path) -> str:
    try:
        holder = json.loads(lock_path.read_text(encoding="utf-8"))
        since = datetime.fromisoformat(holder["since"]).astimezone()
        return f"process {holder['pid']} on {holder['host']} since {since:%Y-%m-%d %H:%M:%S}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line with its newline) of each whole line; a torn last one is left out.

    Raises:
        ArtifactError: the file cannot be read.
    """
    try:
        with path.open("rb", buffering=1 << 20) as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    return
                yield number, line
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}", "is it the traces file?") from error


def parse_line(parse: Callable[[bytes], _T], path: Path, number: int, line: bytes) -> _T:
    """Return what a line says.

    Raises:
        ArtifactError: `parse` raised ValueError; the message names the file and the line.
    """
    try:
        return parse(line)
    except ValueError as error:
        raise ArtifactError(
            f"{path}:{number} is broken: {error}",
            "if this is the right file, mend or delete that line: nothing was changed",
        ) from error


def id_key(id_: str) -> bytes:
    """Return an id as 16 bytes: what its 32 hex digits say, or for any other id a hash of it."""
    try:
        key = unhexlify(id_)
    except ValueError:
        key = b""
    return key if len(key) == 16 else hashlib.sha256(id_.encode()).digest()[:16]


def _sync_folder(folder: Path) -> None:
    """Have the disk keep a new file's name, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
