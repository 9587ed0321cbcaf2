r"""The same mathematical value: numbers with units, sets, tuples, intervals, matrices, equations, formulas.

The answer counts as a whole or not at all: `\boxed{7 or 8}` is two values and `\boxed{3\pi}` is not 3. What is no
mathematics can only be right, if it is the same text, or unknown. `math:tolerance=0.01` also takes values within one
per cent of the reference.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

from . import expression
from .answer import clause_of, clean, marked_answer, math_spans, standing
from .base import CannotTell, Submission, options
from .latex import plain
from .number import percentages, plain_lines, tolerance
from .quantity import hedges, parse, quantities
from .units import asked_unit, measured
from .values import Equation, Scalar, Sequence, Several, Value, Words, read, squeezed, tight

_OPTIONS: dict[str, Callable[[str], Any]] = {"tolerance": tolerance, "absolute": tolerance}
_RATIO = re.compile(r"(?<![\d:.])(\d{1,9})\s*(?::|to)\s*(\d{1,9})(?![\d:.])")
_HAS_VALUE = re.compile(
    r"\d|\\|\b[A-Za-z]\b|[+*/^|(∅]|\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen"
    r"|\w+ty|hundred|thousand|million|half|third|quarter|infinity)\b",
    re.IGNORECASE,
)
"""What a text without any of these cannot be: a number, a formula, or words for one."""


def load(argument: str) -> None:
    """Check the argument, and import the libraries, sympy with them."""
    import latex2sympy2_extended  # noqa: F401

    options(argument, _OPTIONS)


def grade(submission: Submission) -> float:
    """Return 1.0 for the same value as the reference, 0.0 for another.

    Raises:
        CannotTell: the reference is not mathematics, or the answer cannot be read.
    """
    gold_text = clean(plain(submission.reference()))
    if not gold_text:
        raise CannotTell("the reference answer is empty")
    slack = options(submission.argument, _OPTIONS)
    answer_text = find(submission.content)
    if answer_text is None:
        return 0.0
    if tight(gold_text) == tight(answer_text):
        return 1.0
    gold = read(gold_text)
    if isinstance(gold, Words):
        if gold == read(answer_text):
            return 1.0
        if _RATIO.fullmatch(gold_text):
            return _same_ratio(gold_text, answer_text)
        raise CannotTell(f"the reference {submission.reference()[:40]!r} is not mathematics")
    if answer_text.count("{") != answer_text.count("}") or not _HAS_VALUE.search(answer_text):
        return 0.0
    answer = read(answer_text)
    if isinstance(answer, Words):
        answer = _mined(answer_text)
    if isinstance(gold, Scalar) and isinstance(answer, Scalar) and gold.number and not gold.unit:
        gold = replace(gold, unit=asked_unit(submission.problem.get("question", ""), answer.unit))
    return 1.0 if is_same(gold, answer, slack) else 0.0


def _same_ratio(gold: str, answer: str) -> float:
    """Return 1.0 if an answer has one ratio, and that is the reference: `2:3`, or "2 to 3"."""
    found = _RATIO.findall(answer)
    if len(found) != 1:
        raise CannotTell("the answer is not one ratio")
    (a, b), (c, d) = (map(int, pair) for pair in (_RATIO.findall(gold)[0], found[0]))
    if (a, b) != (c, d) and a * d == b * c:
        raise CannotTell("the ratios are the same, but for a factor")
    return 1.0 if (a, b) == (c, d) else 0.0


def find(content: str) -> str | None:
    """Return the text of the answer in plain spelling: the marked one, else the last formula or line; None if none."""
    marked = marked_answer(content)
    if marked is not None:
        spans = math_spans(marked)
        if len(spans) == 1 and not hedges(clause_of(marked[: spans[0].start()])):
            before, after = marked[: spans[0].start()].strip(), marked[spans[0].end() :].strip()
            if before or after[:1] in ",;(":
                return clean(plain(spans[0][0]))
        return clean(plain(marked)) or None
    content = standing(content)
    lines = plain_lines(content)
    if not lines:
        return None
    if formulas := _last_formulas(content):
        return clean(plain(formulas))
    sentences = [part for part in re.split(r"(?<=[.!?])\s+(?=[A-Z])", lines[-1]) if part]
    if len(sentences) > 1 and not re.search(r"[.!?:*)\]}$`]$", lines[-1]) and not re.search(r"\d", sentences[-1]):
        raise CannotTell("the reply is cut off")
    return clean(lines[-1])


def _last_formulas(content: str) -> str:
    """Return the formula that a content ends with, or several that a sentence joins ("$1$ and $2$"); "" without any.

    Raises:
        CannotTell: the sentence compares or doubts.
    """
    spans = math_spans(content)
    if not spans or re.search(r"\w", content[spans[-1].end() :]):
        return ""
    joined = [spans[-1]]
    for before, after in zip(spans[-2::-1], spans[:0:-1], strict=False):
        if content[before.end() : after.start()].strip(" \n") not in (",", ";", "and", ", and", "or", ", or"):
            break
        joined.insert(0, before)
    sentence = content[: joined[0].start()].rstrip().rpartition("\n")[2]
    if hedges(re.split(r"[,;:.!?]\$?\s", sentence)[-1][-60:] + " "):
        raise CannotTell("the answer compares or doubts")
    return ", ".join(span[0] for span in joined)


def _mined(text: str) -> Value:
    """Return the one quantity in a sentence, or in its last clause, that neither compares nor doubts."""
    text = re.split(r"(?<![<>!~])=", text)[-1].strip()
    for sentence in (clause_of(text), text, re.split(r"[,;:]\s", text)[-1]):
        if number := parse(clean(sentence)):
            return Scalar(sentence, number, number.unit)
        found = [] if hedges(sentence) else quantities(sentence)
        if len(found) == 1:
            return Scalar(sentence, found[0], found[0].unit)
    raise CannotTell(f"the answer {text[:40]!r} is not mathematics")


def is_same(gold: Value, answer: Value, slack: dict[str, Any] | None = None) -> bool:
    """Say whether two values are the same; `slack` has a tolerance, as a share or absolute.

    Raises:
        CannotTell: they cannot be compared.
    """
    slack = slack or {}
    if isinstance(gold, Several) and len(gold.items) == 1 and not isinstance(answer, Several):
        return is_same(gold.items[0], answer, slack)
    if isinstance(answer, Several) and len(answer.items) == 1 and not isinstance(gold, Several):
        return is_same(gold, answer.items[0], slack)
    if isinstance(gold, Several) and isinstance(answer, Several):
        return _same_set(gold.items, answer.items, slack)
    if isinstance(gold, Sequence) and isinstance(answer, Sequence):
        brackets = [(one.opening, one.closing) for one in (gold, answer)]
        if len(gold.items) != len(answer.items) or (brackets[0] != brackets[1] and not _is_row(gold, answer)):
            return False
        return all(is_same(one, other, slack) for one, other in zip(gold.items, answer.items, strict=True))
    if isinstance(gold, Scalar) and isinstance(answer, Scalar):
        return _same_scalar(gold, answer, slack)
    if isinstance(gold, Equation | Scalar) and isinstance(answer, Equation | Scalar):
        return _same_equation(gold, answer)
    if (pair := _in_order(gold, answer)) is not None:
        return is_same(*pair, slack)
    if isinstance(gold, Several | Sequence) and isinstance(answer, Several | Sequence):
        raise CannotTell("one is in order, the other is not")
    return False


def _in_order(gold: Value, answer: Value) -> tuple[Value, Value] | None:
    """Return a point and a list of named coordinates (`x = 1, y = 2`) as two points; None if they are not that."""
    pair = [gold, answer]
    for i, (one, other) in enumerate(((gold, answer), (answer, gold))):
        if isinstance(one, Several) and isinstance(other, Sequence) and len(one.items) == len(other.items):
            named = {item.name: replace(item, name="") for item in one.items if isinstance(item, Scalar) and item.name}
            if len(named) == len(one.items) and all(len(name) == 1 for name in named):
                pair[i] = Sequence(tuple(named[name] for name in sorted(named)), other.opening, other.closing)
                return pair[0], pair[1]
    return None


def _is_row(gold: Sequence, answer: Sequence) -> bool:
    """Say whether brackets do not matter: of vectors of three and more values, which are no intervals."""
    return len(gold.items) > 2 or any(isinstance(item, Sequence) for item in (*gold.items, *answer.items))


def _same_set(gold: tuple[Value, ...], answer: tuple[Value, ...], slack: dict[str, Any]) -> bool:
    left = list(answer)
    for item in gold:
        match = next((other for other in left if _may_be(item, other) and is_same(item, other, slack)), None)
        if match is None:
            return False
        left.remove(match)
    # {1, 1} is {1}
    return all(any(_may_be(item, other) and is_same(item, other, slack) for item in gold) for other in left)


def _may_be(one: Value, other: Value) -> bool:
    """Say whether two values of lists can be the same: not those of other names."""
    return not (isinstance(one, Scalar) and isinstance(other, Scalar) and one.name and other.name) or (
        squeezed(one.name) == squeezed(other.name)
    )


def _same_scalar(gold: Scalar, answer: Scalar, slack: dict[str, Any]) -> bool:
    if gold.name and answer.name and squeezed(gold.name) != squeezed(answer.name):
        raise CannotTell(f"the answer is {answer.name}, not {gold.name}")
    if "°" in (gold.unit, answer.unit) and gold.unit != answer.unit and "\\pi" in gold.text + answer.text:
        return _same_angle(gold, answer)
    if "%" in (gold.unit, answer.unit) and gold.number and answer.number:
        return any(one == other for one, other in percentages(gold.number, answer.number))
    is_same_unit = _same_unit(gold.unit, answer.unit)
    if gold.number and answer.number:
        values = gold.number.value, answer.number.value
        is_same_value = _same_number(*values, slack) or _is_rounding(gold, answer, values=values)
    else:
        is_same_value = _same_formula(gold, answer, slack)
    if is_same_value and is_same_unit is None:
        raise CannotTell(f"{answer.unit[:20]!r} may not be {gold.unit[:20]!r}")
    return is_same_value and bool(is_same_unit)


def _same_number(gold: Any, answer: Any, slack: dict[str, Any]) -> bool:
    return bool(abs(gold - answer) <= abs(gold) * slack.get("tolerance", 0) + slack.get("absolute", 0))


def _same_formula(gold: Scalar, answer: Scalar, slack: dict[str, Any]) -> bool:
    if {gold.text, answer.text} & {r"\infty", r"-\infty", r"+\infty"}:
        return gold.text.removeprefix("+") == answer.text.removeprefix("+")
    one, other = expression.read(gold.text), expression.read(answer.text)
    if expression.is_same(one, other):
        return True
    values = expression.value_of(one), expression.value_of(other)
    if None in values:
        return False
    if slack and all(isinstance(value, Fraction) or value.is_real for value in values):
        gold_value, answer_value = (Fraction(str(value)) for value in values)
        return _same_number(gold_value, answer_value, slack)
    return _is_rounding(gold, answer, values=values)


def _is_rounding(gold: Scalar, answer: Scalar, *, values: tuple[Any, Any]) -> bool:
    """Return False, for values that differ.

    Raises:
        CannotTell: one is a correct rounding, to four or more digits, of the other, which has no finite decimals.
    """
    for rounded, exact in ((answer.number, values[0]), (gold.number, values[1])):
        if rounded is None or rounded.n_digits < 4 or _has_finite_decimals(exact):
            continue
        if not isinstance(exact, Fraction) and not exact.is_real:
            continue
        distance = abs(Fraction(str(exact)) - rounded.value)
        if distance <= Fraction(1, 2 * 10**rounded.n_decimals):
            raise CannotTell("one is the other rounded; a tolerance would accept it: math:tolerance=0.001")
    return False


def _has_finite_decimals(value: Any) -> bool:
    if not isinstance(value, Fraction):
        return False
    denominator = value.denominator
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1


def _same_unit(gold: str, answer: str) -> bool | None:
    """Say whether an answer's unit is the reference's; None if it cannot be told. An answer may leave it out."""
    if not gold or not answer or gold == answer:
        return True
    units = measured(Fraction(1), gold), measured(Fraction(1), answer)
    if None not in units:  # first: 5 mW are not 5 MW
        return units[0] == units[1]
    return True if _singular(gold) == _singular(answer) else None


def _singular(noun: str) -> str:
    return noun.casefold().removesuffix("es").removesuffix("s").removesuffix("e")


def _same_angle(gold: Scalar, answer: Scalar) -> bool:
    one, other = (
        rf"({item.text.rstrip('°')}) \cdot \frac{{\pi}}{{180}}" if item.unit == "°" else item.text
        for item in (gold, answer)
    )
    return expression.is_same(expression.read(one), expression.read(other))


def _same_equation(gold: Equation | Scalar, answer: Equation | Scalar) -> bool:
    sides = []
    for item in (gold, answer):
        if isinstance(item, Scalar) and not item.name:
            return False
        left, right = (item.left, item.right) if isinstance(item, Equation) else (item.name, item.text)
        sides.append(expression.read(left) - expression.read(right))
    return expression.is_multiple(*sides)
