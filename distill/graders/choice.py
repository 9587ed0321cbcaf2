"""One of several options, named by its letter (or the digit that is its label) or by its text.

The problem's metadata has the options under `choices`: a list of texts, an object of letter to text, or
`{"label": […], "text": […]}`. The reference is a letter, a text, or an index from 0 into a list of options.
"""

from __future__ import annotations

import json
import re
from typing import Any

from .answer import clean, marked_answer, standing
from .base import CannotTell, Submission

_LETTER = re.compile(r"[(\[{]?\s*([A-Za-z]|\d)\s*[)\]}]?\s*[.:)]?", re.DOTALL)
_LED = re.compile(r"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)\s+)", re.IGNORECASE)
_LETTER_AND_TEXT = re.compile(
    r"(?:[(\[]([A-Za-z]|\d)[)\]]|([A-Za-z]|\d)\s*[.:)]|([A-Z]|\d)\s*[-–—,])\s*(.+)", re.DOTALL
)
_VERB = re.compile(
    r"\b(?:is|be|leaves|go with|going with|choose|pick|select|option|choice|therefore|thus|hence)\b[:,]?|\bit's\b",
    re.IGNORECASE,
)
_DENIED = re.compile(r"(?:\bnot|n't|\bnever)\W*$", re.IGNORECASE)
_PRAISED = re.compile(
    r"(?:^|\b(?:option|choice|answer)\s+)\(?([A-Za-z]|\d)\)?\s+(?:is|would be)\s+(?:the\s+)?(?:correct|right|best)\b",
    re.IGNORECASE,
)
_UNSURE = re.compile(
    r"\b(?:whether|if|unless|might|could|may|maybe|perhaps|either|neither|wrong|incorrect)\b", re.IGNORECASE
)
_LATEX = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")


def grade(submission: Submission) -> float:
    """Return 1.0 if the answer names the reference's option and no other, else 0.0.

    Raises:
        CannotTell: the reference is not among the options, or the answer mentions options without choosing one.
    """
    choices = read_choices(submission.metadata.get("choices"))
    gold = _gold(submission.reference(), choices)
    chosen = find(submission.content, choices, gold)
    return 1.0 if chosen == gold else 0.0


def find(content: str, choices: dict[str, str], gold: str = "") -> str | None:
    """Return the letter of the option that a content chooses; None if its answer names none or several.

    Raises:
        CannotTell: it mentions options without choosing one.
    """
    marked = marked_answer(content, whole_line=True)
    if marked is not None:
        return choose(marked, choices) or _concluded(marked, choices)
    lines = [line for line in standing(content).splitlines() if line.strip()]
    if not lines:
        return None
    last, first = lines[-1], lines[0]
    chosen, concluded = choose(last, choices), _concluded(last, choices)
    opening = choose(first, choices) or _opened(first, choices)
    if chosen is None and None not in (concluded, opening) and concluded != opening:
        raise CannotTell("the answer begins with one option and ends with another")
    chosen = chosen or concluded or opening
    if chosen is None and _mentions(last, choices or {gold: ""}):
        raise CannotTell("the answer mentions options without choosing one")
    return chosen


def _opened(line: str, choices: dict[str, str]) -> str | None:
    """Return the option that a line begins with, if the rest names no other: "Yes. According to the passage, …"."""
    opening, *rest = re.split(r"[.,:;!]\s", line, maxsplit=1)
    letter = choose(opening, choices)
    others = {key: option for key, option in choices.items() if key != letter}
    return None if rest and _mentions(rest[0], others) else letter


def _concluded(line: str, choices: dict[str, str]) -> str | None:
    """Return the option that the last sentence of a line ends with: "That leaves D.", "so I'd go with (B) Lyon"."""
    sentence = re.split(r"(?<=[a-z)][.!?])\s+(?=[A-Z])", line)[-1]
    if praised := _PRAISED.search(sentence):  # "Option A is correct."
        return None if _UNSURE.search(sentence) else choose(praised[1], choices)
    *before, end = _VERB.split(sentence)
    if not before or _UNSURE.search(sentence) or _DENIED.search(before[-1]):
        return None
    return choose(end.lstrip(" ,:"), choices) or _opened(end.lstrip(" ,:"), choices)


def read_choices(choices: Any) -> dict[str, str]:
    """Return the options by letter; an empty dict if there are none.

    Raises:
        CannotTell: the options have no known form, or two are the same.
    """
    if isinstance(choices, str):
        try:
            choices = json.loads(choices)
        except (ValueError, RecursionError) as error:
            raise CannotTell("the choices are not a list") from error
    if not choices:
        return {}
    if isinstance(choices, dict) and {"label", "text"} <= choices.keys():
        labels, texts = choices["label"], choices["text"]
        if not isinstance(labels, list) or not isinstance(texts, list) or len(labels) != len(texts):
            raise CannotTell("the choices' labels and texts are not lists of the same length")
        choices = dict(zip(map(str, labels), texts, strict=True))
    elif isinstance(choices, list):
        choices = {chr(ord("A") + i): text for i, text in enumerate(choices)}
    if not isinstance(choices, dict) or not all(len(str(key)) == 1 for key in choices) or len(choices) > 26:
        raise CannotTell("the choices are neither a list nor letters with texts")
    found = {str(key).upper(): str(text) for key, text in choices.items()}
    if len({_normal(text) for text in found.values()}) < len(found):
        raise CannotTell("two choices are the same")
    return found


def choose(text: str, choices: dict[str, str]) -> str | None:
    """Return the letter of the one option that the whole text names; None if it names none or several."""
    text = clean(_LATEX.sub(r"\1", text))
    text = clean(_LED.sub("", text, count=1)) if _LED.match(text) else text
    named = [letter for letter, option in choices.items() if _normal(option) == _normal(text)]
    named = named or [letter for letter, option in choices.items() if _bare(option) == _bare(text)]
    if named:
        return named[0]
    if match := _LETTER.fullmatch(text):
        letter = match[1].upper()
        return letter if not choices or letter in choices else None
    if match := _LETTER_AND_TEXT.fullmatch(text):
        letter, rest = (match[1] or match[2] or match[3]).upper(), match[4]
        if choices and letter not in choices:
            return None
        if choices and _normal(rest) == _normal(choices[letter]):
            return letter
        others = {key: option for key, option in choices.items() if key != letter}
        return None if _mentions(rest, others or {"": ""}) or re.search(r"[(\[][A-Za-z][)\]]", rest) else letter
    return None


def _mentions(text: str, choices: dict[str, str]) -> bool:
    """Say whether a text has an option's text, or its letter as a word (`A` and `I` may be ordinary words)."""
    label = r"\d" if all(key.isdigit() for key in choices) else "[A-Z]"
    letters = set(re.findall(rf"(?<![\w'’])({label})(?![\w'’])", text)) - (
        {"A", "I"} if re.search(r"\b[AI] [a-z]", text) else set()
    )
    known = letters if "" in choices else letters & set(choices)
    return bool(known) or any(option and f" {_normal(option)} " in f" {_normal(text)} " for option in choices.values())


def _gold(gold: str, choices: dict[str, str]) -> str:
    chosen = choose(gold, choices)
    if chosen is None and gold.strip().isdigit() and int(gold) < len(choices):
        return list(choices)[int(gold)]
    if chosen is None:
        raise CannotTell(f"the reference {gold[:40]!r} is not among the options")
    return chosen


def _bare(text: str) -> str:
    """Return a text in its normal form without an article before it; a capital A may be a letter."""
    return _normal(re.sub(r"^(?:[Tt]he|a|[Aa]n)\s+(?=\w)", "", text))


def _normal(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s.%+\-/]", " ", text.casefold()).split()).rstrip(".")
