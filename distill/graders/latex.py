r"""One spelling for the many ways to write mathematics: Unicode signs, LaTeX's decoration, thousands separators.

`plain` gives text in which `\dfrac12`, `½` and `\frac{1}{2}` are the same, as are `1{,}000` and `1,000`, and in which
spacing, delimiters and `\text{}` are gone. It changes how a text is written, never what it means: 5² becomes 5^{2}.
"""

from __future__ import annotations

import re
import unicodedata

_SIGNS = {
    "−": "-", "–": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "∕": "/",
    "⁄": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\leq ", "⩽": r"\leq ", "≥": r"\geq ", "⩾": r"\geq ", "≠": r"\neq ",
    "±": r"\pm ", "’": "'", "≈": r"\approx ", "√": r"\sqrt ", "∪": r"\cup ", "∈": r"\in ", "∅": r"\emptyset ",
    "º": "°", "∴": " ", "⇒": r"\implies ", "→": r"\implies ", "ℝ": r"\mathbb{R}", "∖": r"\setminus ", "％": "%",
    "⟨": r"\langle ", "⟩": r"\rangle ", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2007": " ",
}  # fmt: skip
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))

_SPACES = re.compile(
    r"(\\\\)|\\[,;:! ]|\\q?quad\b|~|\\(?:displaystyle|textstyle|left|right|[bB]ig+[lrm]?|limits)(?![A-Za-z])\.?"
)
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname|unit|rm)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_GROUPS = re.compile(r"(?<=\d)(?:\{,\}|\\,|\\!|,\\!\s*|\\ |~|[\u00a0\u2009\u202f\u2007'])(?=\d{3}(?!\d))")
_NAMES = {
    r"\\[dtc]frac": r"\\frac", r"\\[dt]binom": r"\\binom", r"\\le(?:qslant|q)?(?![A-Za-z])": r"\\leq ",
    r"\\ge(?:qslant|q)?(?![A-Za-z])": r"\\geq ", r"\\ne(?:q)?(?![A-Za-z])": r"\\neq ", r"\\lt(?![A-Za-z])": "<",
    r"\\gt(?![A-Za-z])": ">", r"\\(?:varnothing|empty)(?![A-Za-z])": r"\\emptyset", r"\\%": "%",
    r"\\(?:l?dots|cdots)(?![A-Za-z])": "...", r"\\therefore(?![A-Za-z])": " ",
    r"\\(?:Rightarrow|Longrightarrow|rightarrow|to|iff)(?![A-Za-z])": r"\\implies ",
    r"\\backslash(?![A-Za-z])": r"\\setminus ", r"(?<=\d)\^?\s*\{?\s*(?:st|nd|rd|th)(?![A-Za-z])\s*\}?": "",
    r"\\(?:approx|simeq)(?![A-Za-z])": r"\\approx ",
    r"\s*\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])": "°", r"\\lvert|\\rvert|\\vert(?![A-Za-z])": "|",
    r"\\mathbb\s*\{?([A-Z])\}?": r"\\mathbb{\1}", r"\\(?:cup|bigcup)(?![A-Za-z])": r"\\cup ",
}  # fmt: skip
_MARKUP = re.compile(r"[\\$^_~{*']")
_ARGUMENT = r"\s*(\{[^{}]*\}|\d|[A-Za-z]|\\[A-Za-z]+)"


def plain(text: str) -> str:
    """Return a text in the one spelling: see the module."""
    if text.isascii() and not _MARKUP.search(text):
        return " ".join(text.split())
    text = _without_unicode(text.strip())
    text = _GROUPS.sub("", text).replace("{:}", ":")
    text = text.replace(r"\lbrace", r"\{").replace(r"\rbrace", r"\}")
    text = _SPACES.sub(lambda match: match[1] or " ", text)
    for _ in range(3):  # texts may be nested
        text = _TEXT.sub(r" \1 ", text)
    for old, new in _NAMES.items():
        text = re.sub(old, new, text)
    text = re.sub(r"\\[()\[\]]", " ", text)
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:  # else one of them is a currency
        text = re.sub(r"(?<!\\)\$", "", text)
    text = text.replace(r"\$", "$")
    text = re.sub(r"(?<=[\w)])\*\*(?=[\w(-])", "^", text).replace("**", " ")
    text = _with_braces(text)
    return re.sub(r"\s*([\^_])\s*", r"\1", " ".join(text.split()))


def _without_unicode(text: str) -> str:
    """Return the text with LaTeX for its mathematical signs, and with superscripts and fractions spelt out."""
    if text.isascii():
        return text
    text = re.sub(f"[{''.join(_RAISED)}]+", lambda match: "^{" + "".join(_RAISED[c] for c in match[0]) + "}", text)
    text = re.sub(f"[{''.join(_LOWERED)}]+", lambda match: "_{" + "".join(_LOWERED[c] for c in match[0]) + "}", text)
    return "".join(_SIGNS.get(c) or _vulgar_fraction(c) for c in text)


def _vulgar_fraction(character: str) -> str:
    """Return the LaTeX of a character such as ½, any other unchanged."""
    spelt = unicodedata.decomposition(character)
    if not spelt.startswith("<fraction>"):
        return character
    top, _, bottom = unicodedata.normalize("NFKC", character).partition("⁄")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _with_braces(text: str) -> str:
    r"""Return the text with braces around the arguments of \frac, \binom and \sqrt that LaTeX takes without."""
    two = re.compile(r"\\(frac|binom)" + _ARGUMENT + _ARGUMENT)
    text = two.sub(lambda m: rf"\{m[1]}{_braced(m[2])}{_braced(m[3])}", text)
    text = re.sub(r"\\sqrt\s*(\d+|[A-Za-z])", r"\\sqrt{\1}", text)
    return re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)


def _braced(argument: str) -> str:
    return argument if argument.startswith("{") else "{" + argument + "}"


def split_top(text: str, separator: str) -> list[str]:
    """Split a text where a pattern matches outside of all brackets; the separators are left out.

    A half-open interval's brackets need not be of one kind. A text whose brackets do not match is not split.
    """
    parts, depth, start, pattern = [], 0, 0, re.compile(separator)
    at = 0
    while at < len(text):
        match = pattern.match(text, at) if depth == 0 else None
        if match and match.end() > at:
            parts.append(text[start:at])
            start = at = match.end()
            continue
        if text.startswith((r"\begin", r"\langle"), at):
            depth += 1
        elif text.startswith((r"\end", r"\rangle"), at):
            depth -= 1
        depth += (text[at] in "([{") - (text[at] in ")]}")
        at += 1
    parts.append(text[start:])
    return [part.strip() for part in parts] if depth == 0 else [text.strip()]


def is_balanced(text: str) -> bool:
    """Say whether each bracket in a text is closed after it opens; the kinds may differ, as in [0, 1)."""
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return depth == 0
