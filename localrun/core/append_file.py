"""Files that only grow, with one writer at a time: what was written is whole after `kill -9` at any byte.

`write` returns when the operating system has the bytes, so that the death of this process loses none of them. A loss
of power may take what was not yet on the disk; `sync` returns when it is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from ...errors import ArtifactError
from .closes import Closes

_NO_ROOM_HINT = "make room and run the same command again: it resumes after what is stored"


class AppendFile(Closes):
    """A file that only grows, and is no link. Each `write` adds all of its bytes or, if that fails, none of them."""

    def __init__(self, path: Path) -> None:
        """Open or create the file.

        Raises:
            ArtifactError: `code` "write-failed": it cannot be opened.
        """
        self.path, self._is_dirty, self._failure = path, False, ""
        is_new = not path.exists()
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
            self._file = os.open(path, flags, 0o644)
            stat = os.fstat(self._file)
            self.size, self._inode = stat.st_size, (stat.st_dev, stat.st_ino)
        except OSError as error:
            why = "it is a link" if path.is_symlink() else error.strerror or error
            raise ArtifactError(f"cannot open {path}: {why}", code="write-failed") from error
        if is_new:
            _sync_folder(path.parent)

    def write(self, data: bytes) -> None:
        """Add the bytes at the end.

        Raises:
            ArtifactError: `code` "write-failed" if the disk is full, "file-changed" if another program changed the
                file; what was there before is still valid.
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
            raise self._failed(f"cannot write to {self.path}", error, _NO_ROOM_HINT) from error

    def truncate(self, size: int) -> None:
        """Cut the file to its first `size` bytes.

        Raises:
            ArtifactError: `code` "write-failed": it cannot be cut; nothing more is appended then.
        """
        self._is_dirty = True
        try:
            os.ftruncate(self._file, size)
        except OSError as error:
            hint = "the next run cuts it when it opens the file"
            failure = self._failed(f"cannot cut {self.path} back to {size} bytes", error, hint)
            self._failure = failure.message
            raise failure from error
        self.size = size

    def cut_torn_line(self) -> int:
        """Cut off what follows the last newline, and return how many bytes that was."""
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
        """Return when the disk has all that was written.

        Raises:
            ArtifactError: `code` "write-failed": the disk refused some of it; nothing more is appended then, since
                nobody can tell what the disk has.
        """
        if not self._is_dirty:
            return
        try:
            os.fsync(self._file)
        except OSError as error:
            failure = self._failed(
                f"the disk did not keep all of {self.path}", error, "check the disk, then run the same command again"
            )
            self._failure = failure.message
            raise failure from error
        self._is_dirty = False

    def close(self) -> None:
        """Sync and close. Calling it again does no harm."""
        if self._file < 0:
            return
        file, self._file = self._file, -1
        try:
            if self._is_dirty:
                self._is_dirty = False
                os.fsync(file)
        except OSError as error:
            raise self._failed(f"the disk did not keep all of {self.path}", error, "check the disk") from error
        finally:
            os.close(file)

    def _failed(self, what: str, error: OSError, hint: str) -> ArtifactError:
        return ArtifactError(f"{what}: {error.strerror or error}", hint, code="write-failed")

    def _check(self) -> None:
        """Refuse to write where bytes would be lost or land behind those of another program."""
        if self._failure:
            raise ArtifactError(self._failure, code="write-failed")
        try:
            stat = os.stat(self.path)
            unchanged = (stat.st_dev, stat.st_ino) == self._inode and stat.st_size == self.size
        except OSError:
            unchanged = False
        if not unchanged:
            raise ArtifactError(
                f"another program changed, moved or deleted {self.path} while it was written",
                "nothing was added since; run the same command again",
                code="file-changed",
            )


class WriterLock:
    """The right to write a file, held by one process on any host until `release` or until the process dies.

    The lock file tells others who holds it. It stays after `release`: deleting it would race with the next writer.
    """

    def __init__(self, path: Path, *, what: Path | None = None) -> None:
        """Take the lock of a file. Messages name `what`, if given: the folder that the file guards.

        Raises:
            ArtifactError: `code` "file-locked": another writer holds it, and the message says who;
                "folder-unwritable": the lock file cannot be created.
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
                code="file-locked",
            ) from error
        except OSError as error:
            raise ArtifactError(
                f"cannot write in {path.parent}: {error.strerror or error}",
                "choose another folder with --out",
                code="folder-unwritable",
            ) from error
        since = datetime.now(UTC).isoformat(timespec="seconds")
        self._write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))

    def release(self) -> None:
        """Give the lock back. Calling it again does no harm."""
        if self._lock.is_locked:
            self._write("")
            self._lock.release()

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk, or Windows, where a locked file cannot be written
            self._path.write_text(text, encoding="utf-8")


def is_locked(path: Path) -> bool:
    """Say whether a process holds the right to write a file; this takes it for a moment to find out."""
    lock_path = path.with_name(f".{path.name}.lock")
    if not lock_path.exists():
        return False
    try:
        with FileLock(lock_path, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False  # a folder that nobody here can write


def _holder(lock_path: Path) -> str:
    try:
        holder = json.loads(lock_path.read_text(encoding="utf-8"))
        since = datetime.fromisoformat(holder["since"]).astimezone()
        return f"process {holder['pid']} on {holder['host']} since {since:%Y-%m-%d %H:%M:%S}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _sync_folder(folder: Path) -> None:
    """Make the disk keep a new file's name, on systems that can sync a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
