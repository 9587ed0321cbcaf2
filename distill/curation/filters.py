"""The filters of curation that look at one trace alone."""

from __future__ import annotations

from collections.abc import Mapping

from ...localrun.core.loops import find_loop
from ...localrun.core.text import shorten
from ..problems.similarity import Words, repeated_share
from ..problems.split import bucket_of
from ..recipe.gathering import CurationRecipe
from ..records import Trace, question_in

FILTERS = {
    "held_out": "the question is not in the training bucket of the split",
    "wrong": "the grader says the answer is wrong",
    "unknown": "no grader could judge the answer, and no vote or judge that counts accepts it",
    "cut_off": "the teacher reached its limit or failed before it finished",
    "looped": "the trace ends in a loop, or most of it is repetition",
    "no_answer": "the trace ends in its thinking, without an answer",
    "no_reasoning": "the trace has no reasoning to learn from",
    "stray_tags": "think tags are left in the text, so it is uncertain where the thinking ends",
    "too_short": "fewer tokens than min_tokens",
    "overlong": "more tokens than max_trace_tokens",
    "too_easy": "the untrained student solves the problem more often than max_pass_rate",
    "too_hard": "the untrained student solves the problem less often than min_pass_rate",
    "contaminated": "the question is in the evaluation, or shares words in a row with a question that is",
    "same_question": "another problem has nearly the same question",
    "same_trace": "another trace has nearly the same text",
    "over_problem_cap": "enough other traces of the problem are kept",
    "over_source_cap": "enough traces of the source are kept",
    "too_long": "more tokens of the student than --max-length",
}
"""Every filter, in the order in which they apply; a trace counts for the first that drops it. `too_long` is counted
when the rows are made, since it needs the student's tokenizer."""

LONG_SHARE_SMALL = 0.2
"""`long_share` for students under 3 B parameters, who learn less from long chains than from short ones, and most from a
mix. Source: Li et al., Small models struggle to learn from strong reasoners, arXiv 2502.12143; the share is ours."""

N_EXCERPT = 100  # characters


def fault_of(trace: Trace, settings: CurationRecipe, pass_rate: Mapping[str, float]) -> str | None:
    """Return the filter that drops a trace for anything but its text, or None."""
    if settings.train_bucket and bucket_of(question_of(trace)) != "train":
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
    """Return the filter that drops a trace for its text, or None; `words` are those of reasoning and answer, [W]."""
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
    """Return the question of a trace, without halves of surrogate pairs, which have no hash."""
    return question_in(trace.messages).encode("utf-8", "replace").decode()


def excerpt(trace: Trace) -> str:
    """Return one line that shows a trace: its question and the beginning of its answer."""
    return f"{shorten(question_of(trace), N_EXCERPT)} → {shorten(trace.content, 60)}"
