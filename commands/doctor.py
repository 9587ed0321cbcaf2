"""`deepdistill doctor`."""

from __future__ import annotations

import json

from .shared import AsJson, console, tell


def doctor(json_output: AsJson = False) -> None:
    """Show what this machine can run.

    It shows cores, memory, GPU, llama.cpp's build, which models fit, and how graded code is confined.
    """
    from ..localrun.doctor import doctor as run_doctor
    from ..localrun.doctor import print_doctor

    report = run_doctor()
    print_doctor(report, console())
    layers = _confinement()
    if layers is not None:
        tell("grading code: " + (f"confined by {', '.join(layers)}" if layers else "not here: nothing confines it"))
    if json_output:
        print(json.dumps(report.to_json() | {"confinement": layers}))


def _confinement() -> list[str] | None:
    """Return what holds code that a grader runs; None where the graders are not installed or cannot be."""
    try:
        from ..distill.graders.code.sandbox import confinement
    except ImportError:
        return None
    return list(confinement())
