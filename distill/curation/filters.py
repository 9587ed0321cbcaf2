"""The filters of curation that look at one trace alone."""

from __future__ import annotations

from collections.abc import Mapping

from ...localrun.core.loops import find_loop
from ..problems.similarity import Words, repeated_share
from ..problems.split import bucket_of
from ..recipe import CurationRecipe
from ..records import Trace

FILTERS = {
    "held_out": "the question is not in the training bucket of the split",
    "wrong": "the grader says the answer is wrong",
    "unknown": "no grader could judge the answer, and no vote or judge that counts favours it",
    "cut_off": "the teacher reached its limit, or failed, before it ended",
    "looped": "the trace goes in circles, or says most things more than once",
    "no_answer": "the trace ends in its thinking: there is no answer",
    "no_reasoning": "the trace holds no reasoning to learn from",
    "stray_tags": "think tags are left in the text: where the thinking ends is uncertain",
    "too_short": "fewer tokens than min_tokens",
    "overlong": "more tokens than max_trace_tokens",
    "too_easy": "the untrained student solves the problem more often than max_pass_rate",
    "too_hard": "the untrained student solves the problem less often than min_pass_rate",
    "contaminated": "the question stands in the evaluation, or shares words in a row with a question that does",
    "same_question": "another problem asks nearly the same",
    "same_trace": "another trace says nearly the same",
    "over_problem_cap": "enough other traces of the problem are kept",
    "over_source_cap": "enough traces of the source are kept",
    "too_long": "more tokens of the student than --max-length",
}
"""Every filter in the order in which they are asked; a trace counts for the first that takes it. `too_long` is counted
where the rows are made, once the student's tokenizer is there."""

LONG_SHARE_SMALL = 0.2
"""`long_share` for students under 3 B parameters, who learn less from long chains than from short ones, and most from a
mix. Source: Li et al., Small models struggle to learn from strong reasoners, arXiv 2502.12143; the share is ours."""

_N_EXCERPT = 100  # characters


def fault_of(trace: Trace, settings: CurationRecipe, pass_rate: Mapping[str, float]) -> str | None:
    """Return the filter that takes a trace whatever its text says, or None."""
    if settings.train_bucket and bucket_of(next(iter(_user_turns(trace)), "")) != "train":
        return "held_out"
    if settings.verified and trace.verdict == "wrong":
        return "wrong"
    favours = ("vote", "judge") if settings.accept is None else settings.accept
    if settings.verified and trace.verdict == "unknown" and trace.verdict_by not in favours:
        return "unknown"
    if settings.whole and trace.finish_reason in ("length", "error"):
        return "cut_off"
    if settings.max_repeated is not None and trace.finish_reason == "loop":
        return "looped"
    if settings.whole and not trace.content.strip():
        return "no_answer"
    if settings.reasoning and not (trace.reasoning_content or "").strip():
        return "no_reasoning"
    rate = pass_rate.get(trace.problem_id)
    if rate is not None and settings.max_pass_rate is not None and rate > settings.max_pass_rate:
        return "too_easy"
    if rate is not None and settings.min_pass_rate is not None and rate < settings.min_pass_rate:
        return "too_hard"
    return None


def fault_of_text(trace: Trace, words: Words, settings: CurationRecipe) -> str | None:
    """Return the filter that takes a trace for what it says, or None; `words` are those of reasoning and answer."""
    text = f"{trace.reasoning_content or ''} {trace.content}"
    if settings.whole and ("<think>" in text or "</think>" in text):
        return "stray_tags"
    n_tokens = trace.usage.completion or len(words)
    if settings.min_tokens is not None and n_tokens < settings.min_tokens:
        return "too_short"
    if settings.max_trace_tokens is not None and n_tokens > settings.max_trace_tokens:
        return "overlong"
    if settings.max_repeated is None:
        return None
    return "looped" if repeated_share(words) > settings.max_repeated or find_loop(words.tolist()) else None


def question_of(trace: Trace) -> str:
    """Return what was asked: the user's turns."""
    return "\n".join(_user_turns(trace))


def _user_turns(trace: Trace) -> list[str]:
    turns = (turn["content"] or "" for turn in trace.messages if turn["role"] == "user")
    return [turn.encode("utf-8", "replace").decode() for turn in turns]  # half a surrogate pair cannot be hashed


def excerpt(trace: Trace) -> str:
    """Return one line that tells which trace this is: the question, and how it ends."""
    return f"{shorten(question_of(trace))} → {shorten(trace.content, 60)}"


def shorten(text: str, n: int = _N_EXCERPT) -> str:
    """Return the text on one line, cut to n characters; what a terminal would obey is left out."""
    line = "".join(c if c.isprintable() else "�" for c in " ".join(text[: 4 * n].split()))
    return line if len(line) <= n else line[: n - 1] + "…"
