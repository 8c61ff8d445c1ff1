"""Answers: found in a text, read as a number, compared. Nothing that a model writes is evaluated.

Numbers are exact: integers, decimals, fractions (3/4, \\frac{3}{4}). Thousands separators, a currency sign in front and a
per cent sign behind are left out. No exponents, and at most MAX_DIGITS digits: "1e999999999" would fill the memory.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

MAX_DIGITS = 40

_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_MARKED = re.compile(r"(?:####|\banswer\s*(?:is|:|=)+)\s*([^\n]*)", re.IGNORECASE)
_DIGITS = rf"\d{{1,{MAX_DIGITS}}}"
_GROUPED = r"\d{1,3}(?:,\d{3}){1,12}"
_DECIMAL = rf"[-+−]?(?:(?:{_GROUPED}|{_DIGITS})(?:\.{_DIGITS})?|\.{_DIGITS})"
_FIRST = re.compile(rf"\s*[$€£]?\s*({_DECIMAL}(?:\s*/\s*{_DIGITS})?)(?![\d,.]*\d)\s*%?")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")


def find_answer(text: str) -> str | None:
    """The words of the last marked answer: in \\boxed{…}, after ####, or after 'answer:' or 'answer is' on that line."""
    marks = [*_BOXED.finditer(text), *_MARKED.finditer(text)]
    if not marks:
        return None
    boxed = [mark for mark in marks if mark.re is _BOXED]
    return (boxed or marks)[-1].group(1).strip()


def read_number(words: str) -> Fraction | None:
    """The number that the words begin with, such as '18', '-3.5', '3/4', '1,000', '$5 in all'; None if there is none."""
    words = _FRACTION.sub(r"\1/\2", words.replace("\\$", "$").replace("\\!", "").replace("{,}", ","))
    match = _FIRST.match(words)
    if match is None:
        return None
    above, _, below = match.group(1).replace(",", "").replace("−", "-").replace(" ", "").partition("/")
    if below and not int(below):
        return None
    return Fraction(above) / int(below or 1)


def right_number(answer: Any) -> Fraction | None:
    """The number of an `answer` column: a number, the words of one, or a solution that marks it."""
    if isinstance(answer, bool) or answer is None:
        return None
    text = str(answer)
    found = find_answer(text)
    return read_number(text if found is None else found)


def is_right(text: str, number: Fraction) -> bool:
    """Whether a model's text has a marked answer that is this number."""
    found = find_answer(text)
    return found is not None and read_number(found) == number


def said(completion: Any) -> str:
    """The text of a completion of TRL: a text, or the messages of a conversation."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def answer_reward(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """A reward function of TRL: 1 for a right answer, else 0. Needs the column `answer`."""
    numbers = [right_number(one) for one in answer]
    return [
        float(number is not None and is_right(said(completion), number))
        for completion, number in zip(completions, numbers, strict=True)
    ]
