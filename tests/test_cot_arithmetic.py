"""Arithmetic in words: problems, solutions, what pupils make of them, and the tokenizer."""

from __future__ import annotations

import re
from itertools import islice

import numpy as np
import pytest

from gcpo_t2i.cot.answers import is_right, right_number
from gcpo_t2i.cot.arithmetic import corpus
from gcpo_t2i.cot.arithmetic.problems import (
    LARGEST,
    Problem,
    Step,
    draw_problem,
    in_words,
    question,
    questions,
    solution,
)
from gcpo_t2i.cot.arithmetic.tokenizer import build_tokenizer

# nine, five more, half of them, doubled, two less: 9, 14, 7, 14, 12
PROBLEM = Problem(9, (Step("add", 5), Step("halve", 2), Step("double", 2), Step("subtract", 2)))


def test_numbers_in_words():
    assert [in_words(n) for n in (0, 13, 20, 42, 99)] == ["zero", "thirteen", "twenty", "forty-two", "ninety-nine"]
    assert len({in_words(n) for n in range(100)}) == 100


def test_a_solution_by_hand():
    assert PROBLEM.answer == 12
    assert solution(PROBLEM) == (
        "nine plus five is fourteen. fourteen by two is seven. seven times two is fourteen. fourteen minus two is twelve. "
        "answer: 12"
    )


def test_a_question_tells_every_step_in_its_order():
    told = question(PROBLEM, np.random.default_rng(0))
    assert re.fullmatch(
        r"(\w+) has nine (\w+)\. (?:He|She) \w+ five more\. Then (?:he|she) (?:loses|gives away) half of them\. "
        r"Then (?:he|she) (?:gets as many again|doubles them)\. Then (?:he|she) (?:loses|sells|gives away) two\. "
        r"How many \2 does \1 have\?",
        told,
    )


def test_problems_stay_within_the_numbers_and_halve_even_ones():
    rng = np.random.default_rng(1)
    for _ in range(300):
        problem = draw_problem(rng, held_out=False)
        number = problem.start
        for step in problem.steps:
            assert step.name != "halve" or number % 2 == 0
            number = step(number)
            assert 1 <= number <= LARGEST


def test_no_held_out_problem_is_trained_on():
    rng = np.random.default_rng(2)
    sides = [{draw_problem(rng, side) for _ in range(300)} for side in (False, True)]
    assert not sides[0] & sides[1]
    assert all(problem.held_out for problem in sides[1])


def test_built_in_questions_are_right_distinct_and_reproducible():
    rows = list(islice(questions(True, 0), 100))
    assert rows == list(islice(questions(True, 0), 100))
    assert len({row["question"] for row in rows}) == 100
    for row in rows:
        number = right_number(row["answer"])
        assert number is not None and is_right(row["gold"], number)


def test_a_pupil_who_misreads_and_is_never_careless(monkeypatch):
    """9 + 5 = 14, halving taken for two less: 12, doubling for two more: 14, two less: 12."""
    monkeypatch.setattr(corpus, "MISREAD", 1.0)
    monkeypatch.setattr(corpus, "CARELESS", 0.0)
    assert corpus.pupils_solution(PROBLEM, np.random.default_rng(0)) == (
        "nine plus five is fourteen. fourteen minus two is twelve. twelve plus two is fourteen. fourteen minus two is twelve. "
        "answer: 12"
    )


def test_pupils_misread_three_in_five(monkeypatch):
    monkeypatch.setattr(corpus, "CARELESS", 0.0)
    rng, doubled = np.random.default_rng(0), Problem(8, (Step("double", 2),))
    wrong = sum(not is_right(corpus.pupils_solution(doubled, rng), right_number(16)) for _ in range(1000))
    assert wrong == pytest.approx(600, abs=3 * (1000 * 0.6 * 0.4) ** 0.5)


def test_wrong_solutions_are_wrong():
    rng = np.random.default_rng(3)
    for _ in range(300):
        problem = draw_problem(rng, held_out=False)
        assert not is_right(corpus.wrong_solution(problem, rng), right_number(problem.answer))


def test_examples_follow_from_seed_and_step_alone():
    assert corpus.draw_examples(0, 5, 8) == corpus.draw_examples(0, 5, 8)
    assert corpus.draw_examples(0, 5, 8) != corpus.draw_examples(0, 6, 8)


def test_the_tokenizer_knows_every_word_and_gives_texts_back():
    tokenizer = build_tokenizer()
    for example in corpus.draw_examples(0, 0, 200):
        for text in (example.user, example.assistant):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == " ".join(text.split())
    assert len(tokenizer("forty-two plus 42")["input_ids"]) == 3


def test_the_chat_template():
    tokenizer = build_tokenizer()
    talk = [{"role": "user", "content": "Ann has two pens."}]
    text = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    assert text == "<|user|>Ann has two pens.<|end|><|assistant|>"
    assert tokenizer.eos_token == "<|end|>"
