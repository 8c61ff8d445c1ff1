"""Answers: which words of a text they are, which number that is, and that nothing is evaluated."""

from __future__ import annotations

from fractions import Fraction

import pytest

from gcpo_t2i.cot.answers import MAX_DIGITS, answer_reward, find_answer, is_right, read_number, right_number


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seven plus five is twelve. answer: 12", "12"),
        ("Answer: 3\nno, wait. The answer is 4.", "4."),
        ("so 18 in all\n#### 1,018", "1,018"),
        (r"hence \boxed{42}", "42"),
        (r"\boxed{1}, or rather \boxed{\frac{3}{4}}", r"\frac{3}{4}"),
        (r"answer: 7, that is \boxed{8}. The answer is clear", "8"),  # the box is the stronger mark
        ("it is 18", None),
        ("", None),
        ("unanswered: 3", None),
    ],
)
def test_the_last_marked_answer(text, words):
    assert find_answer(text) == words


@pytest.mark.parametrize(
    ("words", "number"),
    [
        ("18", Fraction(18)),
        ("-3.5", Fraction(-7, 2)),
        ("−2", Fraction(-2)),  # a minus sign, not a hyphen
        ("+.5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("6 / 8", Fraction(3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"\dfrac{1}{2}.", Fraction(1, 2)),
        ("1,234,567", Fraction(1234567)),
        ("$5 in all", Fraction(5)),
        (r"\$12.50", Fraction(25, 2)),
        ("50%", Fraction(50)),
        ("72.", Fraction(72)),
        ("12 apples", Fraction(12)),
        ("007", Fraction(7)),
    ],
)
def test_numbers(words, number):
    assert read_number(words) == number


@pytest.mark.parametrize(
    "words", ["", "many", "x = 3", "1/0", "__import__('os')", "1" * (MAX_DIGITS + 1), "1,2", "1.2.3", "nan", "inf"]
)
def test_no_numbers(words):
    assert read_number(words) is None


def test_an_exponent_is_not_read():
    """Fraction('1e999999999') would fill the memory; here it is a 1 with letters behind it."""
    assert read_number("1e999999999") == 1


def test_equal_numbers_in_other_words_are_the_same_answer():
    assert is_right("answer: 0.750", Fraction(3, 4)) and is_right(r"\boxed{\frac{6}{8}}", Fraction(3, 4))
    assert not is_right("answer: 0.75001", Fraction(3, 4))
    assert not is_right("0.75", Fraction(3, 4))  # not marked


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("18", 18),
        (18, 18),
        (2.5, Fraction(5, 2)),
        ("16 - 3 - 4 = 9, 9 * 2 = 18\n#### 18", 18),
        ("Paris", None),
        (True, None),
    ],
)
def test_the_answer_column(answer, number):
    assert right_number(answer) == number


def test_the_reward_takes_texts_and_conversations():
    talk = [[{"role": "assistant", "content": "answer: 5"}], [{"role": "assistant", "content": "answer: five"}]]
    assert answer_reward(talk, ["5", "5"], prompts=["", ""]) == [1.0, 0.0]
    assert answer_reward(["answer: 5", "answer: 6"], ["5", "5"]) == [1.0, 0.0]
