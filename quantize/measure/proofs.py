"""Prove that a GGUF equals its checkpoint: it is valid, and its tokens, prompts and greedy answers are the same.

The reference is transformers in float32. If it is not installed, or the weights were quantized, the report says "not
proved" and why. For the greedy proof, transformers decodes n_tokens, past the turn's end if need be, and llama.cpp
predicts each of these tokens from those before it. Up to the first difference that is the same as decoding twice, and
the rest is compared too. Two implementations add up in different orders, so if the two best tokens are closer than this
rounding, either may win: such a tie is counted and reported, and disproves nothing.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import DeepDistillError
from ...localrun.core.generation import Message
from ...localrun.core.reporter import SILENT, Reporter
from ...localrun.core.text import first_line
from ...localrun.engine.engine import Engine
from ...localrun.families.template import render
from ...localrun.gguf.header import read_gguf
from ..convert.ftypes import FTYPES, UNQUANTIZED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STRESS = (
    "Hello world! It's 3 o'clock, I'LL wait; they've said 'stone'.\n\n\n  two spaces   three\t\ttabs \n \r\n end  "
    "0 12 345 6789 01234567890 3.14159 1,000,000 -7 x²+y³=½ ٣٤ Ⅷ\n"
    "def f(x):\n    return {'a': [x**2 for _ in range(10)], \"b\": x != 0}  # ok\n\n\tif (a<=b && c|d) --> ~^@\n"
    "Grüße, naïve café — “quotes” … Привет, мир! 你好，世界。こんにちは 안녕 नमस्ते ไทย العربية עברית\n"
    "🚀👩‍💻🏳️‍🌈 ∑∫√ ﬁ \u00a0\u200b\u2028 ------======= !!!??? ''''''```` <b>html</b> http://x.y/?q=1&r=%20\n"
    "a + b - c = ?   ( 5 +  7 )\n      7"
)
_BATCH = 8
# Two tokens tie if their logits are this close. llama.cpp rounds activations to the weights' type before it multiplies.
_TIE = {"F32": 0.01, "F16": 0.02, "BF16": 0.2}


@dataclass(frozen=True)
class Proof:
    """Whether a claim holds, or None if nothing was proved, with the figures or the reason."""

    holds: bool | None
    detail: str

    def __str__(self) -> str:
        """Return the line for the report."""
        return {True: "yes", False: "NO", None: "not proved"}[self.holds] + f": {self.detail}"


@dataclass(frozen=True)
class Difference:
    """A token that differs: in which prompt, after how many tokens, both ids, and how close the choice was.

    `margin` is transformers' logit of its own token minus its logit of llama.cpp's.
    """

    prompt: int
    position: int
    expected: int
    got: int
    margin: float


@dataclass(frozen=True)
class Proofs:
    """The four proofs. `n_equal` of `n_tokens` greedy tokens are equal, each after transformers' tokens before it."""

    valid: Proof
    tokens: Proof = Proof(None, "the file does not load")
    template: Proof = Proof(None, "the file does not load")
    greedy: Proof = Proof(None, "the file does not load")
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
    *,
    questions: Sequence[str],
    n_tokens: int = 64,
    report: Reporter = SILENT,
) -> Proofs:
    """Prove a GGUF against the checkpoint that it was made from, with questions as the first turn of a chat.

    It never raises for a bad file: `valid` says what is wrong.
    """
    try:
        header = read_gguf(gguf_path)
        engine = Engine(gguf_path, n_ctx=4096)
    except DeepDistillError as error:
        return Proofs(Proof(False, str(error)))
    with engine:
        number = header.metadata.get("general.file_type")
        ftype = next((name for name, (ours, _) in FTYPES.items() if ours == number), "its type")
        valid = Proof(True, f"{len(header.tensors)} tensors read back, loaded by llama.cpp")
        if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None:
            return _not_proved(valid, "transformers is not installed")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # from inside transformers, and nothing that the user could change
                tokenizer = _load_tokenizer(student_dir)
                tokens = _same_tokens(tokenizer, engine)
                template, prompts = _same_prompts(tokenizer, engine, questions)
                proofs = Proofs(valid, tokens, template, _not_greedy(ftype, prompts))
                if ftype not in UNQUANTIZED or not prompts:
                    return proofs
                ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
                report.progress("proving", 0, total=len(ids), note="transformers decodes")
                found = _greedy(student_dir, engine, prompts=ids, n_tokens=n_tokens, report=report)
                return _judged(proofs, found, n_prompts=len(ids), n_tokens=n_tokens, ftype=ftype)
        except (DeepDistillError, OSError, ValueError, RuntimeError, ImportError) as error:
            return _not_proved(valid, f"transformers cannot run {student_dir}: {first_line(error)}")


def _not_proved(valid: Proof, reason: str) -> Proofs:
    skipped = Proof(None, reason)
    return Proofs(valid, skipped, skipped, skipped)


def _not_greedy(ftype: str, prompts: Sequence[str]) -> Proof:
    if ftype not in UNQUANTIZED:
        return Proof(None, f"{ftype} rounds the weights, so its output may differ; only F32, F16 and BF16 are compared")
    return Proof(None, "" if prompts else "no questions to ask")


def _load_tokenizer(student_dir: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return AutoTokenizer.from_pretrained(student_dir, local_files_only=True, trust_remote_code=False)


def _same_tokens(tokenizer: PreTrainedTokenizerBase, engine: Engine) -> Proof:
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
            at = next(i for i, (a, b) in enumerate(zip_longest(expected, got)) if a != b)
            around = tokenizer.decode(expected[max(0, at - 2) : at + 3])
            detail = f"at {around!r} transformers has {expected[at : at + 4]}, the GGUF {got[at : at + 4]}"
            return Proof(False, detail)
        n_tokens += len(got)
    return Proof(True, f"{n_tokens:,} token ids of a stress text, {len(special)} special tokens among it")


def _same_prompts(
    tokenizer: PreTrainedTokenizerBase, engine: Engine, questions: Sequence[str]
) -> tuple[Proof, list[str]]:
    """Compare rendered conversations, text and token ids; return transformers' rendering of the questions too."""
    if not tokenizer.chat_template:
        return Proof(None, "the checkpoint has no chat template"), list(questions)
    turns: list[Message] = [
        {"role": "user", "content": "2 + 2 = ?"},
        {"role": "assistant", "content": "4", "reasoning_content": "2 + 2 = 4"},
        {"role": "user", "content": "And  3 + 3?\n"},
    ]
    chats: list[list[Message]] = [[{"role": "user", "content": question}] for question in questions]
    prompts, n_compared = [], 0
    for conversation in [turns[:1], turns, *chats]:
        for thinking in (False, True):
            try:
                got = engine.render(conversation, thinking=thinking)
                # transformers bounds no template: one that has no end, or only with more variables, ends here
                known = tokenizer.special_tokens_map
                render(tokenizer.get_chat_template(), conversation, thinking=thinking, variables=known)
            except DeepDistillError as error:
                return Proof(False, str(error)), []
            expected = str(
                tokenizer.apply_chat_template(
                    conversation, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
                )
            )
            ids = tokenizer(expected, add_special_tokens=False)["input_ids"]
            if got != expected or _without_bos(engine.tokenize(got), ids) != ids:
                return Proof(False, f"the GGUF renders {got[:80]!r}…, transformers {expected[:80]!r}…"), []
            n_compared += 1
        prompts.append(expected)
    return Proof(True, f"{n_compared} rendered conversations, text and token ids"), prompts[2:]


def _without_bos(got: list[int], expected: list[int]) -> list[int]:
    """Drop the BOS that the engine puts before a prompt whose template has none."""
    return got[1:] if len(got) == len(expected) + 1 else got


def _greedy(
    student_dir: Path, engine: Engine, *, prompts: list[list[int]], n_tokens: int, report: Reporter
) -> list[Difference]:
    """Return every token that differs, each after transformers' tokens before it."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(
        student_dir, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    # In place of the checkpoint's config: without penalties and without an end, so every prompt gives n_tokens.
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=n_tokens, pad_token_id=0)
    found: list[Difference] = []
    for start in range(0, len(prompts), _BATCH):
        batch = prompts[start : start + _BATCH]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        with torch.inference_mode():
            out = model.generate(input_ids=ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True)
        for i, prompt in enumerate(batch):
            expected = out.sequences[i, width:].tolist()
            logits = engine.logits(prompt + expected[:-1])[len(prompt) - 1 :]
            got = logits.argmax(-1).tolist()
            for at in (j for j in range(n_tokens) if got[j] != expected[j]):
                row: np.ndarray[Any, Any] = out.logits[at][i].numpy()
                margin = float(row[expected[at]] - row[got[at]])
                found.append(Difference(start + i, at, expected[at], got[at], margin))
        report.progress("proving", start + len(batch), total=len(prompts), note=f"{len(found)} tokens differ")
    return found


def _judged(proofs: Proofs, found: Sequence[Difference], *, n_prompts: int, n_tokens: int, ftype: str) -> Proofs:
    """Return the proofs with that of the greedy output."""
    total = n_prompts * n_tokens
    greedy = judge(found, n_prompts=n_prompts, n_tokens=n_tokens, ftype=ftype)
    first = found[0] if found else None
    return replace(proofs, greedy=greedy, n_equal=total - len(found), n_tokens=total, first_difference=first)


def judge(found: Sequence[Difference], *, n_prompts: int, n_tokens: int, ftype: str) -> Proof:
    """Return whether all the tokens that differ are ties of an unquantized type."""
    total = n_prompts * n_tokens
    detail = f"{total - len(found):,} of {total:,} tokens on {n_prompts} prompts"
    if found:
        first = found[0]
        detail += (
            f"; the first difference: prompt {first.prompt} after {first.position} tokens, transformers "
            f"{first.expected}, the GGUF {first.got}, logits {first.margin:.4f} apart"
        )
    n_ties = sum(difference.margin <= _TIE[ftype] for difference in found)
    if n_ties:
        detail += f"; {n_ties} of {len(found)} are ties within {_TIE[ftype]}"
    return Proof(n_ties == len(found), detail)
