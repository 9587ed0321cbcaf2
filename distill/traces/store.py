"""Traces, and the file that keeps them: a JSON line each, appended in one write, valid after `kill -9` at any byte.

A process that dies while it writes leaves at most a last line without its newline; opening the store cuts that line
off and says so. A broken line anywhere else is no accident of ours: it is named, and nothing is overwritten.

Two files may stand beside traces.jsonl: traces.verdicts.jsonl with what was judged later (a line never changes once it
is written), and traces.logprobs.bin with token ids and log-probabilities. docs/traces.md has all three formats.
"""

from __future__ import annotations

import threading
from binascii import unhexlify
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Self

from ...errors import ArtifactError
from ...localrun.core.append_file import WriterLock, id_key
from ...localrun.core.generation import Completion
from ...localrun.core.record_log import R, RecordLog, parse_line, read_records, whole_lines
from ..records import Judgement, Trace, VerdictBy
from .logprobs import LogprobsWriter, encode, logprobs_path


class TraceStore:
    """An append-only file of traces. One writer at a time; close it, or use it as a context manager.

    A killed process loses nothing that `append` returned from. A loss of power takes at most the last `sync_every_s`
    seconds (0: nothing), which the next run then asks for again. `repairs` says what was mended on opening.
    """

    def __init__(self, path: Path, *, sync_every_s: float = 5.0) -> None:
        """Open or create the file.

        Raises:
            ArtifactError: another process writes it, it cannot be opened, or a line other than a torn last one is
                broken. Lines are checked by their ends, the first and the last one wholly; reading checks the rest.
        """
        self.path, self.sync_every_s = path, sync_every_s
        self.repairs: list[str] = []
        self._guard = threading.RLock()
        self._timer: threading.Timer | None = None
        with ExitStack() as opened:
            lock = WriterLock(path)
            opened.callback(lock.release)
            self._ids = _scan_ids(path) if path.exists() else set[bytes]()
            self._file = self._open_log(path, Trace, opened)
            has_verdicts = verdicts_path(path).exists()
            self._verdicts = self._open_log(verdicts_path(path), Judgement, opened) if has_verdicts else None
            self._logprobs = self._open_logprobs(opened) if logprobs_path(path).exists() else None
            self._opened = opened.pop_all()

    def append(self, trace: Trace, completion: Completion | None = None) -> None:
        """Add a trace, in the file before this returns; one whose id is already there is left out.

        If the completion it was made from holds log-probabilities, they go to the sidecar, on the disk before the
        trace's own line is written; `n_logprobs` of the stored trace says so.

        Raises:
            ArtifactError: the disk is full or the file cannot be written; what was there before is still valid.
        """
        key = id_key(trace.id)
        with self._guard:
            if key in self._ids:
                return
            before = self._file.size
            self._ids.add(key)
            try:
                self._append(trace, completion)
            finally:
                if self._file.size == before:
                    self._ids.discard(key)
            self._sync_soon()

    def append_judgements(self, judgements: Iterable[Judgement]) -> None:
        """Add what was judged of stored traces, in the file before this returns; the last one of a trace counts.

        Raises:
            ArtifactError: the disk is full or the file cannot be written.
        """
        with self._guard:
            if self._verdicts is None:
                self._verdicts = self._open_log(verdicts_path(self.path), Judgement, self._opened)
            self._verdicts.extend(judgements)
            self._sync_soon()

    def has(self, trace_id: str) -> bool:
        """Say whether a trace of this id is stored."""
        return id_key(trace_id) in self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[Trace]:
        """Yield the traces stored so far, in order, read from the file."""
        return self.read(self.path)

    @staticmethod
    def read(path: Path) -> Iterator[Trace]:
        """Yield the distinct traces of a file with what was judged later, without touching it.

        One at a time is in memory; a torn last line is left out.

        Raises:
            ArtifactError: the file is missing, or a line other than a torn last one is broken.
        """
        judged = read_judgements(verdicts_path(path))
        seen: set[bytes] = set()
        for trace in read_records(path, Trace):
            key = id_key(trace.id)
            if key not in seen:
                seen.add(key)
                yield _with_judgement(trace, *judged[key]) if key in judged else trace

    def close(self) -> None:
        """Sync, close and let others write. More than one call does no harm."""
        with self._guard:
            if self._timer is not None:
                self._timer.cancel()
            self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_log(self, path: Path, cls: type[R], opened: ExitStack) -> RecordLog[R]:
        log = opened.enter_context(RecordLog(path, cls))
        if log.n_cut_bytes:
            self.repairs.append(f"{path.name}: cut off a torn last line of {log.n_cut_bytes} bytes")
        return log

    def _open_logprobs(self, opened: ExitStack) -> LogprobsWriter:
        writer = LogprobsWriter(logprobs_path(self.path), self._ids)
        opened.callback(writer.close)
        if writer.cut_bytes:
            self.repairs.append(f"{writer.path.name}: cut off {writer.cut_bytes} bytes that belong to no trace")
        return writer

    def _append(self, trace: Trace, completion: Completion | None) -> None:
        """Write the log-probabilities, if there are any, then the line; neither is there if either fails."""
        if completion is None or completion.logprobs is None or completion.token_ids is None:
            self._file.append(replace(trace, n_logprobs=0) if trace.n_logprobs else trace)
            return
        if self._logprobs is None:
            self._logprobs = self._open_logprobs(self._opened)
        writer, before = self._logprobs, self._logprobs.size
        try:
            writer.append(encode(trace.id, completion.token_ids, completion.logprobs))
            writer.sync()
            self._file.append(replace(trace, n_logprobs=completion.logprobs.ids.shape[1]))
        except BaseException:
            if writer.size > before:
                writer.truncate(before)
            raise

    def _sync_soon(self) -> None:
        if self.sync_every_s <= 0:
            self._sync()
        elif self._timer is None:
            self._timer = threading.Timer(self.sync_every_s, self._sync_later)
            self._timer.daemon = True
            self._timer.start()

    def _sync_later(self) -> None:
        with self._guard, suppress(ArtifactError):  # the file remembers it, and the next append says so
            self._timer = None
            self._sync()

    def _sync(self) -> None:
        for file in (self._logprobs, self._file, self._verdicts):
            if file is not None:
                file.sync()


def _scan_ids(path: Path) -> set[bytes]:
    """Return the keys of the traces in a file, parsing only the lines that do not begin and end as ours do."""
    ids: set[bytes] = set()
    last, number = b"", 0
    for number, line in whole_lines(path):
        last = line
        if number > 1 and line.startswith(b'{"id": "') and line[40:42] == b'",' and line.endswith(b"}\n"):
            try:
                ids.add(unhexlify(line[8:40]))
                continue
            except ValueError:
                pass
        ids.add(id_key(parse_line(Trace, path, number, line).id))
    if number > 1:
        parse_line(Trace, path, number, last)
    return ids


def _with_judgement(trace: Trace, verdict_by: VerdictBy, agreement: float | None) -> Trace:
    """Merge a judgement in: no vote unsays what a grader said."""
    by = trace.verdict_by if trace.verdict_by == "grader" else verdict_by
    return replace(trace, verdict_by=by, agreement=agreement)


def verdicts_path(traces_path: Path) -> Path:
    """Return where the later judgements of a traces file stand."""
    return traces_path.with_name(f"{traces_path.stem}.verdicts.jsonl")


def read_judgements(path: Path) -> dict[bytes, tuple[VerdictBy, float | None]]:
    """Return (verdict_by, agreement) by the key of the trace, each from its last line; no file: none.

    Raises:
        ArtifactError: a line other than a torn last one is broken.
    """
    judged: dict[bytes, tuple[VerdictBy, float | None]] = {}
    shared: dict[tuple[VerdictBy, float | None], tuple[VerdictBy, float | None]] = {}  # a million take few values
    for judgement in read_records(path, Judgement, missing_ok=True):
        said = (judgement.verdict_by, judgement.agreement)
        judged[id_key(judgement.id)] = shared.setdefault(said, said)
    return judged
