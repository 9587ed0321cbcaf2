"""The families of reasoning-gym problems that the pocket teacher answers, and the refusal of all others."""

from __future__ import annotations

from pathlib import Path

from ...errors import TeacherError
from ..problems.load import with_params

TEMPLATE_PATH = Path(__file__).with_name("chat_template.jinja")
FAMILIES: dict[str, dict[str, tuple[int, int]]] = {
    "chain_sum": {"min_terms": (2, 4), "max_terms": (2, 4), "min_digits": (1, 2), "max_digits": (1, 2)},
    "leg_counting": {"min_animals": (2, 5), "max_animals": (2, 5), "min_instances": (1, 15), "max_instances": (1, 15)},
    "simple_geometry": {"min_sides": (3, 6), "max_sides": (3, 6), "min_angle": (10, 170), "max_angle": (10, 170)},
    "count_bits": {"min_n": (1, 9999), "max_n": (1, 9999)},
}
"""For each family's settings the least and the greatest value that the teacher has seen."""


def check_source(problem_source: str) -> None:
    """Return if the pocket teacher has learned problems of this source.

    Every parameter counts, with reasoning-gym's own default where the source gives none. A parameter that the table of
    families does not bound has to be at its default.

    Raises:
        TeacherError: `code` "pocket-cannot-answer"; the hint lists its families with their parameters.
        UsageError: reasoning-gym has no such data set or parameter.
    """
    refused = _unlearned(problem_source)
    if refused is not None:
        families = "; ".join(
            f"gym:{name} with " + ", ".join(f"{key} {low} to {high}" for key, (low, high) in ranges.items())
            for name, ranges in FAMILIES.items()
        )
        raise TeacherError(
            f"the pocket teacher has not learned {refused}",
            f"it answers {families}. For anything else give another --teacher",
            code="pocket-cannot-answer",
        )


def _unlearned(problem_source: str) -> str | None:
    """Return what of a source the pocket teacher has not learned, in words; None if it has learned all of it."""
    if not problem_source.startswith("gym:"):
        return problem_source
    name, config = with_params(problem_source)
    if name not in FAMILIES:
        return f"gym:{name}"
    ranges, (_, defaults) = FAMILIES[name], with_params(f"gym:{name}")
    for key, value in config.items():
        low, high = ranges.get(key, (None, None))
        is_learned = value == defaults[key] if low is None or high is None else low <= value <= high
        if not is_learned and key not in ("seed", "size"):
            return f"gym:{name} with {key}={value}"
    return None
