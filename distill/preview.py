"""What a run would do and cost, without a call: from the problems, the settings, and the traces that are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from .budget import Limits
from .problems import Problem
from .recipe import TeachSettings
from .traces import TraceStore

_CHARACTERS_PER_TOKEN = 4  # of English text, roughly, with today's tokenizers
_LOOKED_AT = 1000  # traces


def preview(problems: Sequence[Problem], settings: TeachSettings, limits: Limits, folder: Path) -> list[str]:
    """Return the plan of a run in lines, with a projection of tokens and dollars."""
    sampling, n_requests = settings.teacher_sampling(), len(problems) * settings.samples
    sources = Counter(problem.source for problem in problems)
    until = f", until {settings.keep} are right" if settings.samples > settings.keep else ""
    lines = [
        f"problems  {len(problems):,} from the training part: {_listed(sources)}",
        f"samples   {settings.samples} of each{until}: at most {n_requests:,} requests to {settings.teacher}",
        f"sampling  temperature {sampling.temperature:g}, top-p {sampling.top_p:g}; "
        f"{sampling.max_tokens:,} tokens or less",
    ]
    n_prompt = sum(len(problem.question) for problem in problems) * settings.samples // _CHARACTERS_PER_TOKEN
    path = folder / "traces.jsonl"
    there = list(islice(TraceStore.read(path), _LOOKED_AT)) if path.exists() else []
    if there:
        n_completion = round(n_requests * sum(trace.usage.completion for trace in there) / len(there))
        how = f"as the {len(there):,} traces there had {n_completion // n_requests:,} on average"
    else:
        n_completion, how = (
            n_requests * sampling.max_tokens,
            "if every answer took its limit; 20 samples will tell better",
        )
    lines.append(f"tokens    about {n_prompt:,} of prompts and {n_completion:,} of answers, {how}")
    if limits.price:
        bound = "" if limits.max_usd is None else f"; it ends at ${limits.max_usd:g}"
        lines.append(f"cost      ${limits.price.of(n_prompt, n_completion):,.2f}{bound}")
    else:
        lines.append("cost      not known: give --price IN,OUT in dollars a million tokens")
    if limits.max_hours is not None:
        lines.append(f"time      it asks for {limits.max_hours:g} hours at most")
    return [
        *lines,
        f"student   {settings.student}, scored on {settings.n_eval:,} held-out problems",
        "nothing was asked",
    ]


def _listed(sources: Counter[str]) -> str:
    few = [f"{n:,} {source}" if len(sources) > 1 else source for source, n in sources.most_common(5)]
    return ", ".join(few) + (f" and {len(sources) - 5} more" if len(sources) > 5 else "")
