"""The curve of a training, `curve.jsonl` in the run folder: a line a step, and one a validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CURVE_FILE = "curve.jsonl"


def read_curve(path: Path) -> list[dict[str, Any]]:
    """Return the points of a curve; a line that a kill cut off is left out."""
    points = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            points.append(json.loads(line))
        except ValueError:
            continue
    return points


def cut_curve(path: Path, step: int) -> None:
    """Drop what a run that was killed drew behind its last checkpoint."""
    kept, reached = [], 0
    for point in read_curve(path):
        reached = point.get("step", reached)
        if reached <= step:
            kept.append(json.dumps(point) + "\n")
    path.write_text("".join(kept), encoding="utf-8")
