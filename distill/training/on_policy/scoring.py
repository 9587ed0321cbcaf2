"""The teacher's log-probabilities of what the student said, in one pass, kept beside the samples.

Once they are stored no teacher is needed to train: a GPU is rented for the traces, and once more for this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ....errors import TeacherError
from ....localrun.core.reporter import Progress, no_progress
from ...records import Trace, id_key
from ...teachers.base import Teacher
from ...teachers.vocabulary import STRESS_TEXT, is_same, tokenizes_alike
from ...tokenizer import Tokenizer
from ...traces.logprobs import Logprobs, LogprobsWriter, encode


def why_not_scored(teacher: Teacher, tokenizer: Tokenizer) -> str | None:
    """Return why a teacher cannot score the student's tokens; None if it can.

    It needs the student's vocabulary, and to give the log-probabilities of a text that it did not write.
    """
    same = is_same(teacher.vocabulary, tokenizer)
    if same is None:
        same = tokenizes_alike(teacher.tokenize(STRESS_TEXT), tokenizer)
    if same is None:
        return "the teacher does not tell its tokens"
    if not same:
        return "the teacher has another tokenizer"
    messages = [{"role": "user", "content": "2 + 3 ="}]
    try:
        teacher.score(messages, tokenizer("5", add_special_tokens=False).input_ids, top_logprobs=1)
    except TeacherError as error:
        return error.message
    return None


def score_samples(
    samples: Sequence[Trace],
    samples_logprobs: Path,
    teacher: Callable[[], Teacher],
    out: Path,
    top_logprobs: int,
    on_progress: Progress = no_progress,
) -> int:
    """Score the samples that `out` lacks and return how many that were; the teacher is asked for only if there are any.

    `samples_logprobs` is the samples' sidecar, which holds the student's own tokens. A killed run goes on.

    Raises:
        TeacherError: the teacher cannot score.
        ArtifactError: a file is broken, or cannot be written.
    """
    with Logprobs.open(samples_logprobs) as own:
        writer = LogprobsWriter(out, {id_key(trace.id) for trace in samples})
        try:
            with Logprobs.open(out) as there:
                wanted = [trace for trace in samples if trace.id in own and trace.id not in there]
            for done, (trace, ids, top) in enumerate(_scored(wanted, own, teacher, top_logprobs), 1):
                writer.append(encode(trace.id, ids, top))
                on_progress("the teacher scores", done, len(wanted), "")
        finally:
            writer.close()
    return len(wanted)


def _scored(
    wanted: Sequence[Trace], own: Logprobs, teacher: Callable[[], Teacher], top_logprobs: int
) -> Iterator[tuple[Trace, list[int], Any]]:
    """Yield (sample, its tokens, the teacher's distribution at each) as the teacher gives them."""
    if not wanted:
        return
    conversations = []
    for trace in wanted:
        stored = own.get(trace.id)
        assert stored is not None
        conversations.append((trace.messages, stored[0].tolist()))
    for index, top in teacher().score_many(conversations, top_logprobs=top_logprobs):
        yield wanted[index], conversations[index][1], top
