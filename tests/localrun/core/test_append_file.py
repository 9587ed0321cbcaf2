"""Append-only files: each append is whole or not there, and only one writer at a time adds to a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deepdistill.errors import ArtifactError
from deepdistill.localrun.core.append_file import AppendFile, WriterLock


def test_what_was_appended_is_there_at_once_and_after_opening_again(tmp_path: Path) -> None:
    path = tmp_path / "log"
    file = AppendFile(path)
    file.write(b"one\n")
    assert path.read_bytes() == b"one\n"
    file.sync()
    file.close()
    file.close()
    again = AppendFile(path)
    again.write(b"two\n")
    assert (again.size, path.read_bytes()) == (8, b"one\ntwo\n")
    again.truncate(4)
    assert path.read_bytes() == b"one\n"
    again.close()


@pytest.mark.parametrize("whole", [b"", b"one\n", b"x" * 200_000 + b"\n"])
@pytest.mark.parametrize("torn", [b"", b"t", b"t" * 70_000])
def test_a_torn_line_is_cut_off_however_long_it_is(tmp_path: Path, whole: bytes, torn: bytes) -> None:
    (tmp_path / "log").write_bytes(whole + torn)
    file = AppendFile(tmp_path / "log")
    assert (file.cut_torn_line(), file.size) == (len(torn), len(whole))
    file.close()
    assert (tmp_path / "log").read_bytes() == whole


def test_a_failed_append_leaves_what_was_there_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, real = AppendFile(tmp_path / "log"), os.write
    file.write(b"one\n")

    def interrupted(handle: int, data: bytes) -> int:
        real(handle, data[:2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            file.write(b"two\n")
    assert (tmp_path / "log").read_bytes() == b"one\n"
    file.write(b"three\n")
    file.close()
    assert (tmp_path / "log").read_bytes() == b"one\nthree\n"


def test_what_cannot_be_opened_or_has_changed_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "log"):
        with pytest.raises(ArtifactError, check=lambda error: error.code == "write-failed"):
            AppendFile(path)
    file = AppendFile(tmp_path / "log")
    (tmp_path / "log").write_bytes(b"other\n")
    with pytest.raises(ArtifactError, check=lambda error: error.code == "file-changed"):
        file.write(b"one\n")
    file.close()
    assert (tmp_path / "log").read_bytes() == b"other\n"


def test_one_writer_at_a_time_holds_the_lock(tmp_path: Path) -> None:
    lock = WriterLock(tmp_path / "new" / "log")
    with pytest.raises(ArtifactError, check=lambda e: e.code == "file-locked" and str(os.getpid()) in e.message):
        WriterLock(tmp_path / "new" / "log")
    with pytest.raises(ArtifactError, check=lambda e: e.code == "file-locked" and "the run" in e.message):
        WriterLock(tmp_path / "new" / "log", what=tmp_path / "the run")
    lock.release()
    lock.release()
    WriterLock(tmp_path / "new" / "log").release()
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, check=lambda error: error.code == "folder-unwritable"):
        WriterLock(tmp_path / "file" / "log")
