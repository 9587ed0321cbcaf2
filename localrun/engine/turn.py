"""One unfinished answer: which token comes next, the text so far, and when it ends.

The engine and the batch both drive this, so that a thinking budget, the loop guard, stop strings and grammars mean the
same in a chat and in an evaluation. Tokens that the model did not choose (the hint and the closing tag) are queued and
join the sequence like any others: the model has read them when it continues.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Sequence

from ..core.generation import FinishReason, Guidance, Sampling
from ..core.loops import LoopDetector, VarietyGauge
from ..families.thinking import (
    THINK,
    Part,
    Tags,
    ThinkingParser,
    n_held_back,
    prompt_closes_thinking,
    prompt_opens_thinking,
)
from .llama import Context, Model
from .sampler import Sampler

_HINT = "\nI have to answer now.\n"
_MOST_GRACE = 48  # tokens for the end of a line before the hint, and as many after it to finish a thought
_MOST_ROOM = 256  # tokens kept for the answer

Piece = tuple[Part, str]


class Turn:
    """One sequence's answer. `finish_reason` is None until it ends."""

    def __init__(
        self,
        model: Model,
        prompt: str,
        *,
        sampling: Sampling,
        guidance: Guidance,
        seed: int,
        limit: int,
        tags: Tags | None = None,
    ) -> None:
        """Begin to answer a rendered prompt with at most `limit` tokens; the caller has checked the grammar."""
        self._model, self._guidance, self.limit = model, guidance, limit
        self._tags = tags or THINK
        self.reading = Reading(prompt_opens_thinking(prompt, self._tags), model.piece, self._tags)
        self._sampler = Sampler(model, sampling, guidance=guidance, seed=seed)
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._queue: deque[int] = deque()
        self._hinted = self._closing = False
        self._awaits_constraint = guidance.is_constrained
        self._loops = LoopDetector() if guidance.loop_guard else None
        self._variety: VarietyGauge | None = None  # of the part that went in circles, since then
        self._fought_in: Part | None = None
        self._notes: list[str] = []
        self._stops = StopStrings(guidance.stop) if guidance.stop else None
        self._answer: list[str] = []
        self._close = model.tokenize(f"\n{self._tags.close}\n\n", whole=False)
        self._hint = model.tokenize(_HINT, whole=False)
        self._plan_thinking()
        if guidance.think_budget is not None or prompt_closes_thinking(prompt, self._tags):
            self.reading.forbid_tags()
        if guidance.ensures_answer:
            self._wind_down_if_due()
        self._constrain_if_due()

    def _plan_thinking(self) -> None:
        """Set how long the thinking may be, and between which tokens the hint that it has to end is put."""
        self._budget = self.limit - min(_MOST_ROOM, max(self.limit // 4, 1))
        if self._guidance.think_budget is not None:
            self._budget = min(self._budget, self._guidance.think_budget)
        grace = min(_MOST_GRACE, self._budget // 6)
        self._hint_last = self._budget - len(self._close) - len(self._hint) - grace
        self._hint_first = self._hint_last - grace

    def take_note(self) -> str | None:
        """Return what the budget or the guard did since the last call."""
        note = "; ".join(self._notes) or None
        self._notes.clear()
        return note

    @property
    def answer(self) -> str:
        """The answer so far, without what a stop string cut off."""
        return "".join(self._answer)

    @property
    def can_speculate(self) -> bool:
        """Whether the next tokens are the model's own choice, so that drafts of them make sense."""
        return not self._queue

    def next_token(self, context: Context, index: int) -> int:
        """Return the next token: one that is to be put there, or one sampled from an entry of the last batch."""
        if self._queue:
            token = self._queue.popleft()
            self._sampler.accept(token)
            return token
        banned = self._model.eog if self._needs_words() else frozenset[int]()
        token = self._sampler.sample(context, index, banned)
        if self._awaits_constraint and not self.reading.decided and not self._may_open(token):
            self._constrain()  # this is answer from its first token on
            token = self._sampler.sample(context, index, banned)
        if token in self._model.eog and self._guidance.ensures_answer and self.reading.part == "thinking":
            self._close_thinking()  # the model wanted to end its turn in the middle of the thinking
            return self.next_token(context, index)
        return token

    def _needs_words(self) -> bool:
        """Whether the turn must not end yet: there was thinking, and no answer so far."""
        return self._guidance.ensures_answer and self.reading.closed is True and not self.reading.has_answer

    def add(self, token: int) -> list[Piece]:
        """Add a token to the text; return what can be shown now, in order, as (part, text)."""
        pieces = self._add(token)
        self._answer += [text for part, text in pieces if part == "answer"]
        return pieces

    def _add(self, token: int) -> list[Piece]:
        self.tokens.append(token)
        if token in self._model.eog:
            return self._finish("stop", [])
        pieces = self._until_stop(self.reading.add(token))
        if self.finish_reason is None and self._loops:
            self._guard(token)
        if self.finish_reason is None and len(self.tokens) >= self.limit:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            return self._finish(self.finish_reason, pieces)
        if self._guidance.ensures_answer:
            self._wind_down_if_due()
        self._constrain_if_due()
        return pieces

    def _finish(self, reason: FinishReason, pieces: list[Piece]) -> list[Piece]:
        stopped = self._stops is not None and self._stops.found
        if not stopped:
            pieces = pieces + self._until_stop(self.reading.finish())
            pieces += [("answer", held)] if self._stops and (held := self._stops.finish()) else []
        self.finish_reason = "stop" if self._stops is not None and self._stops.found else reason
        return pieces

    def _until_stop(self, pieces: list[Piece]) -> list[Piece]:
        if self._stops is None:
            return pieces
        kept = [(part, self._stops.feed(text) if part == "answer" else text) for part, text in pieces]
        if self._stops.found:
            self.finish_reason = "stop"
        return [(part, text) for part, text in kept if text]

    def _wind_down_if_due(self) -> None:
        """Put the hint, and later the closing tag, once the budget says so."""
        if self._queue or self._closing or self.reading.part != "thinking":
            return
        n = self.reading.n_reasoning
        if n + len(self._close) >= self._budget:
            if not self._hinted:
                self._notes.append(f"the thinking was closed after {n} tokens")
            self._close_thinking()
        elif not self._hinted and n >= self._hint_first > 0 and (n >= self._hint_last or self._ends_line()):
            self._hinted = True
            self.reading.forbid_tags()
            self._notes.append(f"the thinking was told to end after {n} tokens")
            self._queue.extend(self._hint)

    def _ends_line(self) -> bool:
        return self._model.piece(self.tokens[-1]).endswith(b"\n")

    def _close_thinking(self) -> None:
        self._closing = True
        self.reading.forbid_tags()
        self._queue.extend(self._close)

    def _guard(self, token: int) -> None:
        """React to a loop: with DRY first, then by ending the thinking or the answer.

        Under DRY a loop may become one pattern in ever new words: that is ended too, in the part that looped.
        """
        assert self._loops
        period, part = self._loops.add(token), self.reading.part
        is_stuck = self._variety is not None and self._variety.add(token) and part == self._fought_in
        if (period is None and not is_stuck) or self._queue:
            return
        self._loops.reset()
        if self._fought_in is None:
            self._fought_in, self._variety = part, VarietyGauge()
            self.reading.forbid_tags()
            self._sampler.fight_loops(self.tokens)
            self._notes.append(f"the {part} goes in circles of {period} tokens; repetition is penalized from here")
        elif part == "thinking":
            self._notes.append("the thinking still goes in circles and was closed")
            self._queue.extend([] if self._hinted else self._hint)
            self._close_thinking()
        else:
            self._notes.append("the answer still goes in circles and was ended")
            self.finish_reason = "loop"

    def _constrain_if_due(self) -> None:
        """Start the grammar or the schema once the answer begins."""
        if self._awaits_constraint and self.reading.part == "answer" and self.reading.decided:
            self._constrain()

    def _constrain(self) -> None:
        self._awaits_constraint = False
        self._sampler.constrain(after_thinking=self.reading.closed is True)

    def _may_open(self, token: int) -> bool:
        """Say whether a first token may begin the opening tag."""
        text = self._model.piece(token).decode("utf-8", "replace").lstrip()
        return self._tags.open.startswith(text) or text.startswith(self._tags.open)

    def close(self) -> None:
        """Free the sampler. More than one call does no harm."""
        self._sampler.close()


class Reading(ThinkingParser):
    """The text of one sequence so far, read from its tokens."""

    def __init__(self, starts_inside: bool, piece: Callable[[int], bytes], tags: Tags = THINK) -> None:
        """Read tokens whose bytes `piece` gives."""
        super().__init__(starts_inside, tags)
        self._piece = piece
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # characters may be split over tokens
        self._thoughts: list[str] = []
        self._n_before_close = 0
        self.has_answer = False  # more than white space

    def add(self, token: int) -> list[Piece]:
        """Return the text that can be shown with this token, in order, as (part, text)."""
        self._n_before_close += not self.closed
        return self._keep(self.feed(self._decoder.decode(self._piece(token))))

    def finish(self) -> list[Piece]:
        """Return what was held back, at the end of the stream."""
        return self._keep(self.feed(self._decoder.decode(b"", final=True)) + super().finish())

    def _keep(self, pieces: list[Piece]) -> list[Piece]:
        self._thoughts += [text for part, text in pieces if part == "thinking"]
        self.has_answer = self.has_answer or any(part == "answer" and not text.isspace() for part, text in pieces)
        return pieces

    @property
    def n_reasoning(self) -> int:
        """How many tokens the thinking took, up to and including the one that closes it; 0 if it never opened."""
        return self._n_before_close if self.opened else 0

    @property
    def reasoning(self) -> str | None:
        """The thinking; None if it never opened."""
        return "".join(self._thoughts) if self.opened else None


class StopStrings:
    """Cuts a stream of text before the first of some strings, holding back what may begin one."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = [string for string in strings if string]
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """Return the text that certainly comes before any stop string."""
        if self.found:
            return ""
        self._held += text
        starts = [at for string in self._strings if (at := self._held.find(string)) >= 0]
        if starts:
            self.found = True
            return self._held[: min(starts)]
        cut = len(self._held) - n_held_back(self._held, *self._strings)
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def finish(self) -> str:
        """Return what was held back, at the end of the stream."""
        held, self._held = self._held, ""
        return "" if self.found else held
