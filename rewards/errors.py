"""The one exception of this package. It stands alone: `rewards` takes nothing from `gcpo_t2i` but its shapes."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class RewardError(ValueError):
    """A reward that cannot be loaded, or that returned something no training step should see.

    `sample`: the index of the prompt or image that it is about, if it is about one.
    """

    def __init__(self, message: str, sample: int | None = None) -> None:
        super().__init__(message)
        self.sample = sample


def did_you_mean(value: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for a near match, else `; known: a, b`. To be appended to an error message."""
    names = sorted(known)
    near = get_close_matches(value, names, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(names)}"
