"""The store of traces: an append-only file of JSON lines that stays valid after `kill -9` at any byte.

A line never changes once it is written, so later verdicts go to a file beside it, traces.verdicts.jsonl. Token ids and
log-probabilities go to traces.logprobs.bin. docs/traces.md describes all three formats.
"""

from __future__ import annotations

import threading
from binascii import unhexlify
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from ...errors import ArtifactError
from ...localrun.core.append_file import WriterLock
from ...localrun.core.closes import Closes
from ...localrun.core.generation import Completion
from ...localrun.core.record_log import R, RecordLog, parse_line, read_records, whole_lines
from ..records import Judgement, Trace, VerdictBy, id_key
from .logprobs import LogprobsWriter, encode, logprobs_path


class TraceStore(Closes):
    """An append-only file of traces for one writer at a time. Close it, or use it in a `with` block.

    A killed process loses no trace that `append` returned from. A loss of power loses at most the last `sync_every_s`
    seconds (0: nothing), which the next run asks for again. `repairs` says what opening has mended.

    >>> from pathlib import Path
    >>> from deepdistill import TraceStore
    >>> with TraceStore(Path("traces.jsonl")) as store:
    ...     print(len(store), sum(trace.verdict == "right" for trace in store))
    8 8
    """

    def __init__(self, path: Path, *, sync_every_s: float = 5.0) -> None:
        """Open or create the file.

        Raises:
            ArtifactError: `code` "file-locked" if another process writes it, "write-failed" if it cannot be opened,
                "line-broken" or "logprobs-broken". The first and the last line are parsed; of the others only the ends
                are checked, until they are read.
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
        """Add a trace to the file, unless its id is there already.

        If its completion has log-probabilities, they go to the sidecar, and the disk has them before the trace's own
        line is written; the stored trace's `n_logprobs` says how many a token has.

        Raises:
            ArtifactError: `code` "write-failed" or "file-changed"; the traces stored before are still valid.
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
        """Add later verdicts on stored traces; the last one of a trace counts.

        Raises:
            ArtifactError: `code` "write-failed" or "file-changed".
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
        """Yield the distinct traces of a file with their later verdicts, one at a time, without changing the file.

        Raises:
            ArtifactError: `code` "file-unreadable" or "line-broken".
        """
        judged = read_judgements(verdicts_path(path))
        seen: set[bytes] = set()
        try:
            for trace in read_records(path, Trace):
                key = id_key(trace.id)
                if key not in seen:
                    seen.add(key)
                    yield _with_judgement(trace, *judged[key]) if key in judged else trace
        except ArtifactError as error:
            if seen or error.code != "line-broken":
                raise
            hint = f"{error.hint}; if these are another tool's traces: deepdistill teach --traces {path}"
            raise ArtifactError(error.message, hint, code=error.code) from error

    def close(self) -> None:
        """Sync, close and release the lock. Calling it again does no harm."""
        with self._guard:
            if self._timer is not None:
                self._timer.cancel()
            self._opened.close()

    def _open_log(self, path: Path, cls: type[R], opened: ExitStack) -> RecordLog[R]:
        log = opened.enter_context(RecordLog(path, cls))
        if log.n_cut_bytes:
            self.repairs.append(f"{path.name}: cut off a torn last line of {log.n_cut_bytes} bytes")
        return log

    def _open_logprobs(self, opened: ExitStack) -> LogprobsWriter:
        writer = LogprobsWriter(logprobs_path(self.path), self._ids)
        opened.callback(writer.close)
        if writer.n_cut_bytes:
            self.repairs.append(f"{writer.path.name}: cut off {writer.n_cut_bytes} bytes that belong to no trace")
        return writer

    def _append(self, trace: Trace, completion: Completion | None) -> None:
        """Write the log-probabilities, if there are any, then the line; if either fails, neither is written."""
        if completion is None or completion.logprobs is None or completion.token_ids is None:
            self._file.append(replace(trace, n_logprobs=0) if trace.n_logprobs else trace)
            return
        if self._logprobs is None:
            self._logprobs = self._open_logprobs(self._opened)
        writer, before = self._logprobs, self._logprobs.size
        try:
            writer.write(encode(trace.id, completion.token_ids, completion.logprobs))
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
        with self._guard, suppress(ArtifactError):  # the file remembers the failure, and the next append raises it
            self._timer = None
            self._sync()

    def _sync(self) -> None:
        for file in (self._logprobs, self._file, self._verdicts):
            if file is not None:
                file.sync()


def _scan_ids(path: Path) -> set[bytes]:
    """Return the keys of a file's traces, parsing only lines that do not begin and end as ours do."""
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
        ids.add(id_key(parse_line(Trace, line, path=path, number=number).id))
    if number > 1:
        parse_line(Trace, last, path=path, number=number)
    return ids


def _with_judgement(trace: Trace, verdict_by: VerdictBy, agreement: float | None) -> Trace:
    """Merge a later verdict in; it never replaces a grader's."""
    by = trace.verdict_by if trace.verdict_by == "grader" else verdict_by
    return replace(trace, verdict_by=by, agreement=agreement)


def verdicts_path(traces_path: Path) -> Path:
    """Return the path of a traces file's later verdicts."""
    return traces_path.with_name(f"{traces_path.stem}.verdicts.jsonl")


def read_judgements(path: Path) -> dict[bytes, tuple[VerdictBy, float | None]]:
    """Return the last (verdict_by, agreement) of each trace by its key; an empty dict if there is no file.

    Raises:
        ArtifactError: `code` "line-broken".
    """
    judged: dict[bytes, tuple[VerdictBy, float | None]] = {}
    shared: dict[tuple[VerdictBy, float | None], tuple[VerdictBy, float | None]] = {}  # a million lines, few values
    for judgement in read_records(path, Judgement, missing_ok=True):
        pair = (judgement.verdict_by, judgement.agreement)
        judged[id_key(judgement.id)] = shared.setdefault(pair, pair)
    return judged
