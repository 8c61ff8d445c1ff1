"""What every command's config is built with: bounds on its numbers, and errors that name the setting."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import field
from difflib import get_close_matches
from typing import Any, Protocol, TypeVar, runtime_checkable

from gcpo_t2i.errors import UserError, did_you_mean

T = TypeVar("T")

BOUNDS = {
    "> 0": lambda x: x > 0,
    ">= 0": lambda x: x >= 0,
    "in (0, 1)": lambda x: 0 < x < 1,
    "in [0, 1)": lambda x: 0 <= x < 1,
    "in (0, 1]": lambda x: 0 < x <= 1,
}


def bounded(default: T, bound: str) -> T:
    """A dataclass field with a default and a bound, one of `BOUNDS`, that `validate` enforces on it (None and words pass)."""
    return field(default=default, metadata={"bound": bound})


def or_empty(default: str) -> str:
    """A dataclass field with a default, for which a text of no characters can be typed too: --key ""."""
    return field(default=default, metadata={"or_empty": True})


class ConfigError(UserError):
    """A setting that cannot be; `key` is its dotted name, by which the command line says which file it came from."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def suggest(value: str, known: Iterable[str]) -> str:
    """`did_you_mean`, but 'gcpo' and its misspelling 'gpco' mean one of those called so, where difflib would say 'grpo'."""
    names = list(known)
    letters = [name for name in names if sorted(name.rpartition("_")[2]) == sorted(value)]
    if letters and not get_close_matches(value, names, cutoff=0.8):
        *others, last = (f"'{name}'" for name in letters)
        return f"; did you mean {', '.join(others)}{' or ' if others else ''}{last}?"
    return did_you_mean(value, names)


@runtime_checkable
class Checked(Protocol):
    """A config whose settings must go together in ways that bounds on each of them do not say."""

    def check(self) -> None:
        """Raises ConfigError for the first settings that do not."""
        ...


def validate(config: Any) -> None:
    """Raises ConfigError for the first setting, or combination of settings, that no command could work with."""
    for key, value, bound in _bounded_values(config):
        if not (value is None or isinstance(value, str) or (math.isfinite(value) and BOUNDS[bound](value))):
            raise ConfigError(key, f"{key} must be {bound}, not {value}")
    if isinstance(config, Checked):
        config.check()


def check_resume(resume: bool, overwrite: bool, output_dir: str | None) -> None:
    """Raises ConfigError where it is open which run to go on with, or whether to."""
    if resume and overwrite:
        raise ConfigError("resume", "resume and overwrite exclude each other; drop one of them")
    if resume and output_dir is None:
        raise ConfigError("resume", "resume which run? Name its folder with --output_dir")


def _bounded_values(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted key, value, bound) of every field that has a bound."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from _bounded_values(value, f"{prefix}{item.name}.")
        elif "bound" in item.metadata:
            yield prefix + item.name, value, item.metadata["bound"]
