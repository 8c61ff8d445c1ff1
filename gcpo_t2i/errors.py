"""The exceptions that the command line prints as a line instead of a stack trace."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Something the user can mend. The message names the thing, the value, and the cure."""

    everywhere = False  # whether all processes of a run raise it, so that one may say it for all


def everywhere(error: UserError) -> UserError:
    """The error, marked as one that all processes of the run raise."""
    error.everywhere = True
    return error


class ProcessLost(UserError):
    """Another process of the run has ended, and nothing can go on without it."""


class Stopped(Exception):
    """The user or the scheduler asked a run to end. `signal` is what they asked with; the message says how to go on."""

    everywhere = True

    def __init__(self, signal: int, message: str = "") -> None:
        super().__init__(message)
        self.signal = signal


def did_you_mean(value: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for a near match, else `; known: a, b, c`. To be appended to an error message."""
    names = sorted(known)
    near = get_close_matches(value, names, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(names)}"
