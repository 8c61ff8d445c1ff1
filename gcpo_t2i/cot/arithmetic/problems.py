"""Questions of several steps, and their solutions, written out.

    Ann has seven apples. She finds five more. Then she gives away half of them. How many apples does Ann have?
    seven plus five is twelve. twelve by two is six. answer: 6

A solution is a chain of steps that each start from the result before; a slip in one of them goes on into the answer.
Held-out problems are those whose numbers and operations hash into a tenth, so no training question has them in other
words.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

LARGEST = 60  # of all numbers in a right solution
MOST_ADDED = 12
STEPS = (2, 3, 4)

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
UNITS = _UNITS.split()
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
NAMES = {"Ann": "she", "Ben": "he", "Carl": "he", "Dora": "she", "Eva": "she", "Finn": "he", "Gus": "he", "Hana": "she"}
THINGS = ("apples", "books", "cards", "coins", "marbles", "pens", "shells", "stamps")


def in_words(number: int) -> str:
    """0 … 99 in words, 'forty-two'."""
    if number < len(UNITS):
        return UNITS[number]
    tens, unit = divmod(number, 10)
    return TENS[tens - 2] + (f"-{UNITS[unit]}" if unit else "")


@dataclass(frozen=True)
class Operation:
    """`told`: ways to tell it, of {k} things; `word`: its sign in a solution; `operand`: None if k is chosen freely."""

    told: tuple[str, ...]
    word: str
    apply: Callable[[int, int], int]
    operand: int | None = None


OPERATIONS: dict[str, Operation] = {
    "add": Operation(("finds {k} more", "buys {k} more", "gets {k} more"), "plus", lambda n, k: n + k),
    "subtract": Operation(("loses {k}", "sells {k}", "gives away {k}"), "minus", lambda n, k: n - k),
    "double": Operation(("gets as many again", "doubles them"), "times", lambda n, k: n * k, operand=2),
    "halve": Operation(("loses half of them", "gives away half of them"), "by", lambda n, k: n // k, operand=2),
}
SHARES = {"add": 0.35, "subtract": 0.35, "double": 0.15, "halve": 0.15}


@dataclass(frozen=True)
class Step:
    """One operation on what there is: its name in `OPERATIONS`, and by how much."""

    name: str
    k: int

    def __call__(self, number: int) -> int:
        return OPERATIONS[self.name].apply(number, self.k)


@dataclass(frozen=True)
class Problem:
    start: int
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        number = self.start
        for step in self.steps:
            number = step(number)
        return number

    @property
    def held_out(self) -> bool:
        """By its numbers and operations alone, whatever words it is told in."""
        key = f"{self.start} " + " ".join(f"{step.name} {step.k}" for step in self.steps)
        return zlib.crc32(key.encode()) % 10 == 0


def draw_problem(rng: np.random.Generator, held_out: bool) -> Problem:
    """A problem all of whose numbers are between 1 and LARGEST, of one side of the split."""
    while True:
        number = start = int(rng.integers(2, 21))
        steps: list[Step] = []
        for _ in range(rng.choice(STEPS)):
            step = _draw_step(rng, number)
            number = step(number)
            steps.append(step)
        problem = Problem(start, tuple(steps))
        if problem.held_out == held_out:
            return problem


def _draw_step(rng: np.random.Generator, number: int) -> Step:
    names, shares = list(SHARES), list(SHARES.values())
    while True:
        name = names[rng.choice(len(names), p=shares)]
        operand = OPERATIONS[name].operand
        step = Step(name, operand or int(rng.integers(1, MOST_ADDED + 1)))
        if 1 <= step(number) <= LARGEST and not (name == "halve" and number % 2):
            return step


def question(problem: Problem, rng: np.random.Generator) -> str:
    """The problem as a story, in words that are drawn."""
    name, thing = list(NAMES)[rng.integers(len(NAMES))], THINGS[rng.integers(len(THINGS))]
    told = [f"{name} has {in_words(problem.start)} {thing}."]
    for place, step in enumerate(problem.steps):
        ways = OPERATIONS[step.name].told
        happens = ways[rng.integers(len(ways))].format(k=in_words(step.k))
        told.append(f"Then {NAMES[name]} {happens}." if place else f"{NAMES[name].capitalize()} {happens}.")
    return " ".join([*told, f"How many {thing} does {name} have?"])


def write_out(numbers: Sequence[int], steps: Sequence[Step]) -> str:
    """A worked solution: numbers before, between and after the steps, one more than steps."""
    lines = [
        f"{in_words(before)} {OPERATIONS[step.name].word} {in_words(step.k)} is {in_words(after)}."
        for before, after, step in zip(numbers, numbers[1:], steps, strict=False)
    ]
    return " ".join([*lines, f"answer: {numbers[-1]}"])


def solution(problem: Problem) -> str:
    """The right one."""
    numbers = [problem.start]
    for step in problem.steps:
        numbers.append(step(numbers[-1]))
    return write_out(numbers, problem.steps)


def questions(held_out: bool, seed: int) -> Iterator[dict[str, str]]:
    """Endless rows with `question`, `answer`, and the right solution as `gold`; no two tell the same."""
    rng = np.random.default_rng([seed, int(held_out)])
    seen: set[str] = set()
    while True:
        problem = draw_problem(rng, held_out)
        text = question(problem, rng)
        if text not in seen:
            seen.add(text)
            yield {"question": text, "answer": str(problem.answer), "gold": solution(problem)}
