"""Does our GGUF reader hold against any file? Mutated ones by the hundred thousand: no crash, no hang, bounded memory.

    python benchmarks/fuzz_gguf.py [--n 100000] [--seed 0] [--limit-mib 1024] [FILE ...]

Each file is a sound one with up to eight changes: bytes at random places, lengths and counts set to interesting
numbers (none, all ones, just past the file's end, beyond 32 and 63 bits), pieces cut out or doubled, the end cut off.
The reader must answer with a header whose tensors lie in the file, or with an ArtifactError. Workers run under an
address space limit, each file under an alarm: what is slower than a second counts as a hang. Without FILE two small
files are mutated, one of every kind of value and one with a vocabulary. What fails is kept in the folder that is
printed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import random
import resource
import signal
import struct
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from deepdistill.errors import ArtifactError
from deepdistill.localrun.gguf.header import read_gguf

_NUMBERS = (0, 1, 2, 7, 8, 9, 31, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 48, (1 << 63) - 1,
            1 << 63, (1 << 64) - 1)  # fmt: skip


def sound_files(folder: Path) -> list[Path]:
    """Write two sound files, small so that every part of them is met."""
    plain, model = folder / "plain.gguf", folder / "model.gguf"
    writer = GGUFWriter(plain, "llama")
    for add in (writer.add_uint8, writer.add_int8, writer.add_uint16, writer.add_int32, writer.add_uint64):
        add(f"a.{add.__name__}", 5)
    writer.add_float64("a.f", 0.5)
    writer.add_bool("a.flag", True)
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.nested", [[1, 2], [3]])
    writer.add_custom_alignment(64)
    writer.add_tensor("one", np.ones((2, 32), np.float32))
    writer.add_tensor("two", np.zeros((3, 34), np.uint8), raw_dtype=GGMLQuantizationType.Q8_0)
    _close(writer)
    writer = GGUFWriter(model, "llama")
    writer.add_token_list([f"token {i}" for i in range(200)])
    writer.add_token_types([1] * 200)
    writer.add_token_merges([f"a{i} b{i}" for i in range(100)])
    writer.add_chat_template("{{ messages }}" * 20)
    for i in range(12):
        writer.add_tensor(f"blk.{i}.ffn_up.weight", np.zeros((4, 8), np.float16))
    _close(writer)
    return [plain, model]


def _close(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return a file with one to eight changes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(changed) or 1)
        kind = rng.randrange(6)
        if kind == 0:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            number = rng.choice([*_NUMBERS, len(data), max(0, len(data) - at), len(data) + 1])
            changed[at : at + 8] = struct.pack("<Q", number)
        elif kind == 2:
            changed[at : at + 4] = struct.pack("<I", rng.choice([*range(14), 0xFFFFFFFF, rng.randrange(1 << 32)]))
        elif kind == 3:
            del changed[at : at + rng.randint(1, 64)]
        elif kind == 4:
            start = rng.randrange(len(changed) or 1)
            changed[at:at] = changed[start : start + rng.randint(1, 64)]
        else:
            changed[at:] = b"" if rng.random() < 0.2 else changed[at:]
    return bytes(changed)


def verdict(path: Path) -> str:
    """Read a file; return `read`, `refused`, or what went wrong."""
    size = path.stat().st_size
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        header = read_gguf(path)
    except ArtifactError:
        return "refused"
    except _HangError:
        return "hang"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:200]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    spans = sorted((t.offset, t.offset + t.n_bytes) for t in header.tensors.values())
    inside = all(0 <= start <= end <= size for start, end in spans)
    apart = all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    return "read" if inside and apart else "tensors outside the file or over each other"


class _HangError(BaseException):
    pass


def _on_alarm(*_: object) -> None:
    raise _HangError


def work(job: tuple[int, int, list[Path], Path, int]) -> tuple[Counter[str], float, int]:
    """Read n mutated files; return (verdicts, the slowest in seconds, peak memory over the start's in KiB)."""
    seed, n, sources, keep, limit = job
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, _on_alarm)
    rng, found, slowest = random.Random(seed), Counter[str](), 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = [source.read_bytes() for source in sources]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutated.gguf"
        for i in range(n):
            path.write_bytes(mutated(rng.choice(data), rng))
            started = time.perf_counter()
            said = verdict(path)
            slowest = max(slowest, time.perf_counter() - started)
            found[said] += 1
            if said not in ("read", "refused"):
                (keep / f"{seed}-{i}.gguf").write_bytes(path.read_bytes())
    return found, slowest, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def main() -> None:
    """Fuzz, print what was found, and JSON last; fail if anything but `read` and `refused` was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-mib", type=int, default=1024)
    parser.add_argument("files", nargs="*", type=Path)
    given = parser.parse_args()
    keep = Path(tempfile.mkdtemp(prefix="fuzz-gguf-"))
    with tempfile.TemporaryDirectory() as folder:
        sources = given.files or sound_files(Path(folder))
        step = 2500
        jobs = [
            (given.seed * 1_000_003 + start, min(step, given.n - start), sources, keep, given.limit_mib << 20)
            for start in range(0, given.n, step)
        ]
        started = time.perf_counter()
        with multiprocessing.get_context("spawn").Pool(multiprocessing.cpu_count(), maxtasksperchild=4) as pool:
            results = pool.map(work, jobs, chunksize=1)
    verdicts: Counter[str] = sum((found for found, _, _ in results), Counter())
    report: dict[str, Any] = {
        "files": sum(verdicts.values()),
        "verdicts": dict(verdicts),
        "slowest_ms": 1000 * max(slowest for _, slowest, _ in results),
        "peak_growth_mib": max(growth for _, _, growth in results) / 1024,
        "seconds": time.perf_counter() - started,
    }
    wrong = sum(n for said, n in verdicts.items() if said not in ("read", "refused"))
    print(f"{report['files']:,} files: {dict(verdicts)}, slowest {report['slowest_ms']:.1f} ms, "
          f"memory grew by {report['peak_growth_mib']:.1f} MiB at most")  # fmt: skip
    print(f"kept in {keep}" if wrong else "nothing went wrong")
    print(json.dumps(report))
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
