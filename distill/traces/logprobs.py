"""Token ids and top-k log-probabilities of traces: a binary file beside traces.jsonl, one checksummed record a trace.

A token takes 5 + 5 k bytes (325 at k = 64): its id, the log of the probability outside the top k, and for each of the k
its id in 24 bits and its log-probability as a float16. docs/traces.md describes the layout.

Sixteen bits round a probability of 0.5 by up to 1e-4, which is often more than the whole tail. So the tail is stored
separately, and reading shifts each position's values, by no more than their rounding, until both sum to one again.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Self

from ...errors import ArtifactError
from ...localrun.core.append_file import AppendFile
from ...localrun.core.closes import Closes
from ...localrun.core.generation import TopLogprobs
from ..records import id_key

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_MAGIC = b"DDLP"
_VERSION = 1
_HEADER = struct.Struct("<4sHHI16sII")  # magic, version, k, T, trace key, CRC-32 of the payload, of what precedes it
_NO_TOKEN = 0xFFFFFF  # means -1: the server gave fewer than k


def logprobs_path(traces_path: Path) -> Path:
    """Return the path of a traces file's log-probabilities."""
    return traces_path.with_name(f"{traces_path.stem}.logprobs.bin")


def encode(trace_id: str, token_ids: Sequence[int], logprobs: TopLogprobs) -> bytes:
    """Return the record of a trace of T tokens.

    Raises:
        ValueError: there are not T rows, or a token id does not fit 24 bits.
    """
    import numpy as np

    n_tokens, k = logprobs.ids.shape
    if len(token_ids) != n_tokens or logprobs.values.shape != (n_tokens, k):
        raise ValueError(f"{len(token_ids)} tokens, ids {logprobs.ids.shape}, values {logprobs.values.shape}")
    with np.errstate(divide="ignore", over="ignore"):
        tail = np.log(np.clip(1.0 - np.exp(logprobs.values.astype(np.float64)).sum(axis=1), 0.0, 1.0))  # [T]
        halves = [tail.astype("<f2").tobytes(), logprobs.values.astype("<f2").tobytes()]
    payload = b"".join([_to_24_bits(np.asarray(token_ids)), _to_24_bits(logprobs.ids), *halves])
    head = _HEADER.pack(_MAGIC, _VERSION, k, n_tokens, id_key(trace_id), zlib.crc32(payload), 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(head)) + payload


def _to_24_bits(ids: npt.NDArray[np.integer]) -> bytes:
    import numpy as np

    if ids.size and not -1 <= ids.min() <= ids.max() < _NO_TOKEN:
        raise ValueError(f"token ids from {ids.min()} to {ids.max()} do not fit 24 bits")
    return ids.astype("<i4").reshape(-1, 1).view(np.uint8)[:, :3].tobytes()


def _from_24_bits(data: bytes) -> npt.NDArray[np.int32]:
    import numpy as np

    wide = np.zeros((len(data) // 3, 4), np.uint8)
    wide[:, :3] = np.frombuffer(data, np.uint8).reshape(-1, 3)
    ids = wide.view("<i4").ravel().astype(np.int32)
    ids[ids == _NO_TOKEN] = -1
    return ids


def _decode(payload: bytes, n_tokens: int, k: int) -> tuple[npt.NDArray[np.int32], TopLogprobs]:
    import numpy as np

    ids_end = 3 * n_tokens * (1 + k)
    ids = _from_24_bits(payload[:ids_end])
    halves = np.frombuffer(payload, "<f2", offset=ids_end).astype(np.float64)
    tail, values = halves[:n_tokens], halves[n_tokens:].reshape(n_tokens, k)
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = np.log1p(-np.exp(tail)) - np.log(np.exp(values).sum(axis=1))  # [T]
    values = values + np.where(np.isfinite(shift), shift, 0.0)[:, None]
    return ids[:n_tokens], TopLogprobs(ids[n_tokens:].reshape(n_tokens, k), values.astype(np.float32))


class _Record(NamedTuple):
    """A record's place in the file and its header."""

    start: int
    end: int
    k: int
    n_tokens: int
    key: bytes
    crc: int

    @classmethod
    def read(cls, file: BinaryIO, start: int, path: Path) -> Self | None:
        """Return the record that begins at `start`, or None if the file ends within its header."""
        file.seek(start)
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size:
            return None
        magic, version, k, n_tokens, key, crc, head_crc = _HEADER.unpack(head)
        if magic != _MAGIC or version != _VERSION or zlib.crc32(head[:-4]) != head_crc:
            raise _broken(path, start)
        return cls(start, start + _HEADER.size + n_tokens * (5 + 5 * k), k, n_tokens, key, crc)

    def payload(self, file: BinaryIO) -> bytes | None:
        """Return the payload, or None if its checksum is wrong."""
        file.seek(self.start + _HEADER.size)
        data = file.read(self.end - self.start - _HEADER.size)
        return data if zlib.crc32(data) == self.crc else None


def _whole_records(file: BinaryIO, path: Path) -> Iterator[_Record]:
    """Yield the records, reading their headers alone; a torn last one is left out."""
    size = file.seek(0, 2)
    record = _Record.read(file, 0, path)
    while record is not None and record.end <= size:
        yield record
        record = _Record.read(file, record.end, path)


@dataclass(frozen=True)
class StoredTop:
    """A teacher's top-k distribution at n targets, which stays on the disk until it is read.

    `place` is the index of each target among the record's tokens, or -1 for a target that is not among them: its
    distribution has the target alone, with probability 1.
    """

    path: Path
    start: int  # the byte at which the record begins
    place: array[int]  # [n]

    def __len__(self) -> int:
        return len(self.place)

    def read(self, targets: Sequence[int]) -> TopLogprobs:
        """Return the distribution `[n, k]` at the targets `[n]`.

        Raises:
            ArtifactError: `code` "file-unreadable" or "logprobs-broken".
        """
        import numpy as np

        with _open(self.path) as file:
            _, top = _read(file, self.start, self.path)
        place = np.array(self.place)
        ids: npt.NDArray[np.int32] = np.full((len(place), top.ids.shape[1]), -1, np.int32)
        values: npt.NDArray[np.float32] = np.full(ids.shape, -np.inf, np.float32)
        ids[:, 0], values[:, 0] = targets, 0.0
        has_place = place >= 0
        ids[has_place], values[has_place] = top.ids[place[has_place]], top.values[place[has_place]]
        return TopLogprobs(ids, values)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise ArtifactError(
            f"cannot read {path}: {error.strerror or error}", "check the path", code="file-unreadable"
        ) from error


def _broken(path: Path, start: int) -> ArtifactError:
    hint = "move it away: the traces are valid without it"
    return ArtifactError(f"{path} is broken at byte {start}", hint, code="logprobs-broken")


def _read(file: BinaryIO, start: int, path: Path) -> tuple[npt.NDArray[np.int32], TopLogprobs]:
    record = _Record.read(file, start, path)
    payload = record.payload(file) if record else None
    if record is None or payload is None:
        raise _broken(path, start)
    return _decode(payload, record.n_tokens, record.k)


class Logprobs(Closes):
    """The log-probabilities of a traces file, by trace. Close it, or use it in a `with` block."""

    def __init__(self, path: Path) -> None:
        """Open the file (see `logprobs_path`).

        Raises:
            ArtifactError: `code` "file-unreadable" or "logprobs-broken".
        """
        self.path = path
        with ExitStack() as opened:
            self._file = opened.enter_context(_open(path))
            records = _whole_records(self._file, path)
            self._starts = {record.key: record.start for record in records}  # of a key the last counts
            opened.pop_all()

    def get(self, trace_id: str) -> tuple[npt.NDArray[np.int32], TopLogprobs] | None:
        """Return (token ids [T], top-k log-probabilities [T, k]) of a trace; None if it has none.

        At each position the probabilities sum to one minus the teacher's probability of all other tokens.

        Raises:
            ArtifactError: `code` "logprobs-broken".
        """
        start = self._starts.get(id_key(trace_id))
        return None if start is None else _read(self._file, start, self.path)

    def stored(self, trace_id: str, place: Sequence[int]) -> StoredTop:
        """Return the distributions at some tokens of a trace without reading them yet (see `StoredTop`)."""
        return StoredTop(self.path, self._starts[id_key(trace_id)], array("i", place))

    def __contains__(self, trace_id: str) -> bool:
        return id_key(trace_id) in self._starts

    def __len__(self) -> int:
        return len(self._starts)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class LogprobsWriter(AppendFile):
    """The same file for appending, under the lock of the traces.

    Opening it cuts off a torn record, and a last record whose trace was never written; `n_cut_bytes` says how long
    they were.
    """

    def __init__(self, path: Path, stored: set[bytes]) -> None:
        """Open or create the file. `stored` has the keys of the traces in the store.

        Raises:
            ArtifactError: `code` "write-failed", or "logprobs-broken" if it is broken before its end.
        """
        super().__init__(path)
        try:
            with path.open("rb") as file:
                last = next(iter(deque(_whole_records(file, path), maxlen=1)), None)
                end = last.end if last else 0
                if last and (last.key not in stored or last.payload(file) is None):
                    end = last.start
            self.n_cut_bytes = self.size - end
            if self.n_cut_bytes:
                self.truncate(end)
        except BaseException:
            self.close()
            raise
