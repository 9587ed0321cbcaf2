"""What is judged of traces once they are stored: a JSONL file beside theirs, so that no trace's line ever changes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...localrun.core.append_file import id_key, parse_line, whole_lines
from ..graders.pool import VerdictBy


def verdicts_path(traces_path: Path) -> Path:
    """Return where the later judgements of a traces file stand."""
    return traces_path.with_name(f"{traces_path.stem}.verdicts.jsonl")


@dataclass(frozen=True)
class Judgement:
    """What samples of one problem, or a judge, say of a trace once it is stored: `none` takes an earlier one back."""

    id: str
    verdict_by: Literal["vote", "judge", "none"]
    agreement: float | None = None

    @classmethod
    def from_json(cls, line: str | bytes) -> Judgement:
        """Return the judgement of a line.

        Raises:
            ValueError: the line is no JSON, or no judgement.
        """
        try:
            record = json.loads(line)
            judgement = cls(record["id"], record["verdict_by"], record["agreement"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a judgement: {error}") from error
        if judgement.verdict_by not in ("vote", "judge", "none"):
            raise ValueError(f"not a judgement: verdict_by {judgement.verdict_by!r}")
        return judgement


def read_judgements(path: Path) -> dict[bytes, tuple[VerdictBy, float | None]]:
    """Return (verdict_by, agreement) by the key of the trace, each from its last line; no file: none.

    Raises:
        ArtifactError: a line other than a torn last one is broken.
    """
    judged: dict[bytes, tuple[VerdictBy, float | None]] = {}
    shared: dict[tuple[VerdictBy, float | None], tuple[VerdictBy, float | None]] = {}  # a million take few values
    for number, line in whole_lines(path) if path.exists() else ():
        judgement = parse_line(Judgement.from_json, path, number, line)
        said = (judgement.verdict_by, judgement.agreement)
        judged[id_key(judgement.id)] = shared.setdefault(said, said)
    return judged
