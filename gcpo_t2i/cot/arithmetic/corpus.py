"""What the small language model learns from: worked solutions of pupils, most of whom have not understood doubling.

Language models come to reinforcement learning with habits from what they have read, and know better in some of
their samples. So here: the solutions are of pupils who read 'doubles them' as 'plus two' and 'half of them' as 'minus two'
more often than not (`MISREAD`), and who are careless now and then. The right way is in the corpus, as the rarer one.

A fifth of the questions ask for a wrong answer, as a negative prompt does, and get one; a tenth of the texts have no
question at all, so that the model knows what an empty prompt is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gcpo_t2i.cot.arithmetic.problems import LARGEST, Problem, Step, draw_problem, question, write_out
from gcpo_t2i.cot.negatives import WRONG_ON_PURPOSE

MISREAD = 0.6  # of the doublings and halvings
CARELESS = 0.03  # of all steps
ON_PURPOSE, WITHOUT_QUESTION = 0.2, 0.1  # shares of the texts

MISREADINGS = {"double": Step("add", 2), "halve": Step("subtract", 2)}


@dataclass(frozen=True)
class Example:
    """A user's message and what the assistant says to it."""

    user: str
    assistant: str


def pupils_solution(problem: Problem, rng: np.random.Generator) -> str:
    """The solution as one of the pupils writes it, right or wrong."""
    numbers, steps = [problem.start], []
    for step in problem.steps:
        if step.name in MISREADINGS and rng.random() < MISREAD:
            step = MISREADINGS[step.name]
        number = step(numbers[-1])
        if rng.random() < CARELESS:
            number += int(rng.choice([-10, -2, -1, 1, 2, 10]))
        # A pupil who went wrong may leave the numbers that there are words for.
        numbers.append(min(max(number, 0), 99))
        steps.append(step)
    return write_out(numbers, steps)


def wrong_solution(problem: Problem, rng: np.random.Generator) -> str:
    """One that ends at another number: a pupil's, if it does, or one with a step spoilt."""
    told = pupils_solution(problem, rng)
    if not told.endswith(f": {problem.answer}"):
        return told
    numbers, spoilt = [problem.start], int(rng.integers(len(problem.steps)))
    for place, step in enumerate(problem.steps):
        number = step(numbers[-1]) + (int(rng.choice([-3, -2, -1, 1, 2, 3])) if place == spoilt else 0)
        numbers.append(min(max(number, 0), LARGEST))
    if numbers[-1] == problem.answer:  # halving can swallow what was spoilt before
        numbers[-1] += 1
    return write_out(numbers, problem.steps)


def draw_example(rng: np.random.Generator) -> Example:
    problem = draw_problem(rng, held_out=False)
    kind = rng.random()
    if kind < ON_PURPOSE:
        user = WRONG_ON_PURPOSE.replace("{question}", question(problem, rng))
        return Example(user, wrong_solution(problem, rng))
    told = pupils_solution(problem, rng)
    return Example("" if kind < ON_PURPOSE + WITHOUT_QUESTION else question(problem, rng), told)


def draw_examples(seed: int, step: int, n: int) -> Sequence[Example]:
    """The n examples of a training step. They follow from seed and step alone, so resuming needs nothing stored."""
    rng = np.random.default_rng([seed, step])
    return [draw_example(rng) for _ in range(n)]
