"""Prove that a GGUF is its checkpoint: it is valid, gives the same tokens, renders the same prompts, says the same.

The reference is transformers, run in float32. Where it is not installed, or the weights were quantized, the report says
"not proved" and why. The greedy proof asks both for n_tokens whether or not the turn ends before: transformers decodes,
and llama.cpp's most likely token is read after each of those tokens. Up to the first difference that is the same as
decoding twice, and what follows is compared too. Two implementations add in another order, so where the best two tokens
lie closer than that rounding either may come first: a tie is counted and reported, and disproves nothing.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DeepDistillError
from ...localrun.core.generation import Message
from ...localrun.core.reporter import Progress, no_progress
from ...localrun.engine.engine import Engine
from ...localrun.gguf.header import read_gguf
from ..convert.ftypes import FTYPES, UNQUANTIZED

STRESS = (
    "Hello world! It's 3 o'clock, I'LL wait; they've said 'stone'.\n\n\n  two spaces   three\t\ttabs \n \r\n end  "
    "0 12 345 6789 01234567890 3.14159 1,000,000 -7 x²+y³=½ ٣٤ Ⅷ\n"
    "def f(x):\n    return {'a': [x**2 for _ in range(10)], \"b\": x != 0}  # ok\n\n\tif (a<=b && c|d) --> ~^@\n"
    "Grüße, naïve café — “quotes” … Привет, мир! 你好，世界。こんにちは 안녕 नमस्ते ไทย العربية עברית\n"
    "🚀👩‍💻🏳️‍🌈 ∑∫√ ﬁ \u00a0\u200b\u2028 ------======= !!!??? ''''''```` <b>html</b> http://x.y/?q=1&r=%20\n"
    "a + b - c = ?   ( 5 +  7 )\n      7"
)
_BATCH = 8
# Logits apart at which two tokens tie. llama.cpp rounds activations to the weights' type before it multiplies.
_TIE = {"F32": 0.01, "F16": 0.02, "BF16": 0.2}


@dataclass(frozen=True)
class Proof:
    """Whether something holds, None if that was not proved, and the figures or the reason."""

    holds: bool | None
    detail: str

    def __str__(self) -> str:
        """Return it as a line of the report."""
        return {True: "yes", False: "NO", None: "not proved"}[self.holds] + f": {self.detail}"


@dataclass(frozen=True)
class Difference:
    """The first token that differs: which prompt, after how many tokens, both ids, and how close the choice was.

    `margin` is by how much transformers' logit of its token is above that of llama.cpp's.
    """

    prompt: int
    position: int
    expected: int
    got: int
    margin: float


@dataclass(frozen=True)
class Proofs:
    """What was proved. `n_equal` of `n_tokens` greedy tokens are equal, each given transformers' tokens before it."""

    valid: Proof
    tokens: Proof
    template: Proof
    greedy: Proof
    n_equal: int = 0
    n_tokens: int = 0
    first_difference: Difference | None = None

    @property
    def failed(self) -> bool:
        """Whether anything was disproved."""
        return any(proof.holds is False for proof in (self.valid, self.tokens, self.template, self.greedy))

    def summary(self) -> list[str]:
        """Return a line a proof."""
        return [
            f"valid file: {self.valid}",
            f"same tokens: {self.tokens}",
            f"same prompts: {self.template}",
            f"same greedy output: {self.greedy}",
        ]


def prove(
    student_dir: Path,
    gguf_path: Path,
    questions: Sequence[str],
    n_tokens: int = 64,
    *,
    on_progress: Progress = no_progress,
) -> Proofs:
    """Prove a GGUF against the checkpoint that it was made from, with questions asked as a chat's first turn.

    Never raises for a bad file: that is what `valid` says.
    """
    try:
        header = read_gguf(gguf_path)
        engine = Engine(gguf_path, n_ctx=4096)
    except DeepDistillError as error:
        skipped = Proof(None, "the file does not load")
        return Proofs(Proof(False, str(error)), skipped, skipped, skipped)
    with engine:
        number = header.metadata.get("general.file_type")
        ftype = next((name for name, (one, _) in FTYPES.items() if one == number), "its type")
        valid = Proof(True, f"{len(header.tensors)} tensors read back, loaded by llama.cpp")
        if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None:
            skipped = Proof(None, "transformers is not installed")
            return Proofs(valid, skipped, skipped, skipped)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # transformers' own, of no use to whoever made a GGUF
                return _against_transformers(valid, student_dir, engine, ftype, questions, n_tokens, on_progress)
        except (DeepDistillError, OSError, ValueError, RuntimeError, ImportError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            skipped = Proof(None, f"transformers cannot run {student_dir}: {first}")
            return Proofs(valid, skipped, skipped, skipped)


def _against_transformers(
    valid: Proof,
    student_dir: Path,
    engine: Engine,
    ftype: str,
    questions: Sequence[str],
    n_tokens: int,
    on_progress: Progress,
) -> Proofs:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(student_dir, local_files_only=True)
    tokens = _same_tokens(tokenizer, engine)
    template, prompts = _same_prompts(tokenizer, engine, questions)
    if ftype not in UNQUANTIZED:
        skipped = Proof(None, f"{ftype} rounds the weights, so its output may differ; F32, F16 and BF16 are compared")
        return Proofs(valid, tokens, template, skipped)
    if not prompts:
        return Proofs(valid, tokens, template, Proof(None, "no questions to ask"))
    on_progress("proving", 0, len(prompts), "transformers decodes")
    expected = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    found = _greedy(student_dir, engine, expected, n_tokens, on_progress)
    total = len(prompts) * n_tokens
    greedy = _judge(found, len(prompts), n_tokens, ftype)
    return Proofs(valid, tokens, template, greedy, total - len(found), total, found[0] if found else None)


def _same_tokens(tokenizer: Any, engine: Engine) -> Proof:
    """Compare token ids on the stress text, with every special token between its lines."""
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if not (t.lstrip or t.rstrip)]
    lines = STRESS.split("\n")
    mixed = "".join(
        f"{special[i % len(special)] if special else ''}{lines[i % len(lines)]}" for i in range(len(special))
    )
    n_tokens = 0
    for text in (STRESS, mixed, *lines):
        expected, got = list(tokenizer(text)["input_ids"]), engine.tokenize(text)
        if expected != got:
            at = next(
                (i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got))
            )
            around = tokenizer.decode(expected[max(0, at - 2) : at + 3])
            detail = f"at {around!r} transformers has {expected[at : at + 4]}, the GGUF {got[at : at + 4]}"
            return Proof(False, detail)
        n_tokens += len(got)
    return Proof(True, f"{n_tokens:,} token ids of a stress text, {len(special)} special tokens among it")


def _same_prompts(tokenizer: Any, engine: Engine, questions: Sequence[str]) -> tuple[Proof, list[str]]:
    """Compare rendered conversations, text and token ids; return transformers' rendering of the questions too."""
    if not tokenizer.chat_template:
        return Proof(None, "the checkpoint has no chat template"), list(questions)
    turns: list[Message] = [
        {"role": "user", "content": "2 + 2 = ?"},
        {"role": "assistant", "content": "4", "reasoning_content": "2 + 2 = 4"},
        {"role": "user", "content": "And  3 + 3?\n"},
    ]
    asked: list[list[Message]] = [[{"role": "user", "content": question}] for question in questions]
    prompts, n_compared = [], 0
    for conversation in [turns[:1], turns, *asked]:
        for thinking in (True, False):
            expected = tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
            )
            try:
                got = engine.render(conversation, thinking=thinking)
            except DeepDistillError as error:
                return Proof(False, str(error)), []
            ids = tokenizer(expected, add_special_tokens=False)["input_ids"]
            if got != expected or _without_bos(engine.tokenize(got), ids) != ids:
                return Proof(False, f"the GGUF renders {got[:80]!r}…, transformers {expected[:80]!r}…"), []
            n_compared += 1
        prompts.append(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
    return Proof(True, f"{n_compared} rendered conversations, text and token ids"), prompts[2:]


def _without_bos(got: list[int], expected: list[int]) -> list[int]:
    """Drop the BOS that the engine puts before a prompt whose template has none."""
    return got[1:] if len(got) == len(expected) + 1 else got


def _greedy(
    student_dir: Path, engine: Engine, prompts: list[list[int]], n_tokens: int, on_progress: Progress
) -> list[Difference]:
    """Return every token that differs, given transformers' tokens before it."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32, local_files_only=True).eval()
    # Nothing of the checkpoint's own: no penalties, and no end, so that every prompt gives n_tokens.
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=n_tokens, pad_token_id=0)
    found: list[Difference] = []
    for start in range(0, len(prompts), _BATCH):
        batch = prompts[start : start + _BATCH]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        with torch.inference_mode():
            made = model.generate(input_ids=ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True)
        for i, prompt in enumerate(batch):
            expected = made.sequences[i, width:].tolist()
            logits = engine.logits(prompt + expected[:-1])[len(prompt) - 1 :]
            got = logits.argmax(-1).tolist()
            for at in (j for j in range(n_tokens) if got[j] != expected[j]):
                row: np.ndarray[Any, Any] = made.logits[at][i].numpy()
                margin = float(row[expected[at]] - row[got[at]])
                found.append(Difference(start + i, at, expected[at], got[at], margin))
        on_progress("proving", start + len(batch), len(prompts), f"{len(found)} tokens differ")
    return found


def _judge(found: Sequence[Difference], n_prompts: int, n_tokens: int, ftype: str) -> Proof:
    total = n_prompts * n_tokens
    detail = f"{total - len(found):,} of {total:,} tokens on {n_prompts} prompts"
    if found:
        first = found[0]
        detail += (
            f"; the first difference: prompt {first.prompt} after {first.position} tokens, transformers "
            f"{first.expected}, the GGUF {first.got}, logits {first.margin:.4f} apart"
        )
    ties = sum(one.margin <= _TIE[ftype] for one in found)
    if ties:
        detail += f"; {ties} of {len(found)} are ties within {_TIE[ftype]}"
    return Proof(ties == len(found), detail)
