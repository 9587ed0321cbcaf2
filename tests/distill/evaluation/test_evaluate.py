from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deepdistill.distill.curation.filters import fault_of_text
from deepdistill.distill.evaluation.evaluate import is_loop, sum_up, wilson_interval
from deepdistill.distill.problems.similarity import word_hashes
from deepdistill.distill.recipe.gathering import CurationRecipe
from deepdistill.distill.recipe.training import TrainingRecipe
from deepdistill.distill.records import Grade, Problem, TeacherInfo, Trace, Verdict
from deepdistill.distill.teachers import pocket_dir
from deepdistill.distill.teachers.endpoint.stream import LoopWatch
from deepdistill.distill.teachers.huggingface.loading import load_tokenizer
from deepdistill.distill.traces.logprobs import Logprobs, LogprobsWriter, encode
from deepdistill.distill.training.on_policy.dataset import SampleLogprobs, mix
from deepdistill.localrun.core.generation import Completion, Sampling, TopLogprobs
from deepdistill.localrun.core.loops import LoopDetector

DONE = Completion("42", "6*7=42", True, "stop", 10, 5, 3, 0.1, (1, 2, 3, 4, 5))


@pytest.mark.parametrize(("right", "n"), [(0, 10), (27, 200), (100, 200), (200, 200)])
def test_wilson_interval_solves_its_own_equation(right: int, n: int) -> None:
    # The interval's ends are the shares p whose normal test just accepts the observed share x:
    # (x - p)^2 = z^2 p(1-p)/n.
    for p in wilson_interval(right, n):
        if 1e-9 < p < 1 - 1e-9:
            assert abs(right / n - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n))


def as_text(tokens: Sequence[int]) -> str:
    """Return a word of letters for each token, so that every reader of the text cuts it alike."""
    return "".join(" " + "".join("abcdefghij"[int(digit)] for digit in str(token)) for token in tokens)


def is_loop_to_scores(tokens: Sequence[int], path: Path) -> bool:
    found = is_loop(replace(DONE, token_ids=tuple(tokens)))
    assert is_loop(replace(DONE, token_ids=None, reasoning_content=None, content=as_text(tokens))) is found
    return found


def is_loop_to_filters(tokens: Sequence[int], path: Path) -> bool:
    everything_else_passes = CurationRecipe(max_repeated=1.0)
    words = word_hashes(as_text(tokens))
    return fault_of_text(trace_of(as_text(tokens)), words, everything_else_passes) == "looped"


def is_loop_to_training(tokens: Sequence[int], path: Path) -> bool:
    top = TopLogprobs(np.array(tokens, np.int32)[:, None], np.zeros((len(tokens), 1), np.float32))
    sample, path = trace_of("", "wrong"), path / f"{len(list(path.iterdir()))}.bin"
    with closing(LogprobsWriter(path, set())) as writer:
        writer.write(encode(sample.id, tokens, top))
        writer.sync()
    with Logprobs(path) as own:
        mixture = mix(
            load_tokenizer(pocket_dir()),
            [sample],
            logprobs=SampleLogprobs(own),
            training=TrainingRecipe(max_length=4000),
        )
    return mixture.counts["loops"] == 1


def is_loop_to_the_chat(tokens: Sequence[int], path: Path) -> bool:
    detector = LoopDetector()
    return [detector.add(token) for token in tokens][-1] is not None


def is_loop_to_the_endpoint(tokens: Sequence[int], path: Path) -> bool:
    return LoopWatch().add(as_text(tokens) + " end")


def trace_of(content: str, verdict: Verdict = "right") -> Trace:
    problem, grade = Problem("7", "6 * 7 =", "42", "s", "number"), Grade("42", verdict, "grader", 1.0)
    done = replace(DONE, content=content, reasoning_content=None)
    return Trace.make(problem, done, grade=grade, info=TeacherInfo("t", "gguf"), teacher="t", sampling=Sampling())


USERS = [
    is_loop_to_scores,
    is_loop_to_filters,
    is_loop_to_training,
    is_loop_to_the_chat,
    is_loop_to_the_endpoint,
]


@pytest.mark.parametrize("is_a_loop", USERS, ids=lambda user: user.__name__)
@pytest.mark.parametrize(
    ("head", "period", "n_tokens", "expected"),
    [
        (20, 1, 63, False),
        (20, 1, 64, True),
        (0, 21, 63, False),
        (0, 21, 64, True),
        (50, 30, 89, False),
        (50, 30, 90, True),
        (9, 512, 1536, True),
        (9, 600, 1799, False),
        (9, 600, 1800, True),  # no user looks only so far back
        (200, 1, 0, False),
    ],
)
def test_scores_filters_training_and_chat_call_the_same_texts_loops(
    is_a_loop: Callable[[Sequence[int], Path], bool],
    head: int,
    period: int,
    n_tokens: int,
    expected: bool,
    tmp_path: Path,
) -> None:
    tokens = [*range(1000, 1000 + head), *(i % period for i in range(n_tokens))]
    assert is_a_loop(tokens, tmp_path) is expected


def test_reaching_the_limit_without_an_answer_is_a_loop() -> None:
    assert is_loop(replace(DONE, content="", finish_reason="length"))
    assert not is_loop(replace(DONE, finish_reason="length"))
    assert not is_loop(DONE)


def test_a_score_counts_failed_requests_as_wrong_and_closure_only_where_thinking_opened() -> None:
    open_ended = replace(DONE, closed=False, content="", finish_reason="length", completion_tokens=11)
    plain = replace(DONE, closed=None, reasoning_content=None)
    got = sum_up([DONE, open_ended, plain], 2, seconds=7.0, n_failed=1)
    assert (got.n, got.accuracy, got.closed, got.looped, got.n_failed) == (4, 0.5, 0.5, 0.25, 1)
    assert got.tokens_per_answer == pytest.approx(7)
    assert got.tokens_per_s == pytest.approx(3)
    assert sum_up([plain], 0, seconds=1.0).closed is None
