"""Rewards: what an image is worth. A reward is a function

    fn(images: list[PIL.Image], prompts: list[str], **columns: list) -> list[float | None]

with one score per image; None says "does not apply to this sample". `columns` are the prompts' own fields, one entry
per image, and a function gets those that it has parameters for. A class is made with its settings, then called so.
A reward may declare `range = (low, high)` as an attribute; scores outside of it are then errors. And `success = least`:
an image with this score or more is right, which algorithms ask for that learn from groups in which all failed. And
`takes_pixels = True`: it then gets, in place of the list, uint8 pixels (N, 3, h, w) on the device that they were made on.

    reward = load_reward("geneval", score="dense")         # built in: see BUILT_IN
    reward = load_reward("my/folder/brightness.py:score")  # or "pkg.module:name"
    scores = score(reward, images, prompts, columns)       # checked: number of scores, finite, in range

Importing this package imports neither torch nor open_clip: each built-in loads what it needs when it is made.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gcpo_t2i import __version__
from rewards.errors import RewardError, did_you_mean
from rewards.loading import load_object, make

if TYPE_CHECKING:
    from rewards.geneval import Verdict

BUILT_IN = {
    "aesthetic": "rewards.aesthetic:Aesthetic",
    "clip": "rewards.clip:Clip",
    "geneval": "rewards.geneval:GenEval",
    "hps": "rewards.hps:Hps",
    "pickscore": "rewards.pickscore:PickScore",
    "remote": "rewards.remote:Remote",
}

# Rounding of a cosine or of a mean must not stop a run; a wrong scale (percent, logits) is off by far more.
_RANGE_SLACK = 1e-4


@dataclass(frozen=True)
class Reward:
    """A loaded reward. `range`: the closed interval that its scores must lie in, None for no bound. `success`: the score
    from which an image is right, None if there is none."""

    name: str
    fn: Callable[..., Sequence[float | None]]
    range: tuple[float, float] | None = None
    success: float | None = None


def load_reward(name: str, /, default_device: str | None = None, **settings: Any) -> Reward:
    """A built-in reward by name, or any function or class by `pkg.module:name` or `path/to/file.py:name`.

    `settings` go to the class; so does `default_device`, if it has a parameter `device` that they leave open. Raises
    RewardError for unknown names and settings and for code that fails to load.
    """
    if ":" not in name and name not in BUILT_IN:
        raise RewardError(
            f"reward {name!r} is unknown{did_you_mean(name, BUILT_IN)}; "
            "your own is named as pkg.module:name or path/to/file.py:name"
        )
    try:
        target = load_object(BUILT_IN.get(name, name))
    except RewardError as error:
        raise RewardError(f"reward {name!r}: {error}") from error
    fn = make(f"reward {name!r}", target, settings, default_device)
    return Reward(name, fn, getattr(fn, "range", None), getattr(fn, "success", None))


def _accepted(reward: Reward, columns: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """The columns that the reward's signature names, all of them if it takes `**columns`."""
    parameters = list(inspect.signature(reward.fn).parameters.values())[2:]
    by_keyword = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [p.name for p in by_keyword if p.default is p.empty and p.name not in columns]
    if missing:
        have = ", ".join(columns) or "none"
        raise RewardError(f"reward {reward.name!r} needs the column {missing[0]!r}; the prompts have: {have}")
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return {key: list(values) for key, values in columns.items()}
    return {p.name: list(columns[p.name]) for p in by_keyword if p.name in columns}


def _number(reward: Reward, index: int, value: Any) -> float | None:
    if value is None:
        return None
    if getattr(value, "ndim", None) == 0:  # a 0-d array or tensor
        value = value.item()
    where = f"reward {reward.name!r} returned {value!r} for image {index}"
    if not isinstance(value, Real):
        raise RewardError(f"{where}: not a number")
    number = float(value)
    if not math.isfinite(number):
        raise RewardError(f"{where}: not finite")
    if reward.range is not None:
        low, high = reward.range
        if not low - _RANGE_SLACK <= number <= high + _RANGE_SLACK:
            raise RewardError(f"{where}: outside its range [{low:g}, {high:g}]")
    return number


def score(
    reward: Reward,
    images: Sequence[Any],
    prompts: Sequence[str],
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> list[float | None]:
    """One checked score per image; None where the reward does not apply.

    Raises RewardError, always with the reward's name, if it raises, lacks a column, or returns the wrong number of
    scores, something that is not a number, NaN or infinity, or a value outside its declared range.
    """
    accepted = _accepted(reward, columns or {})
    if getattr(reward.fn, "takes_pixels", False):
        return _scores_of_pixels(reward, images, prompts, accepted)
    return _checked(reward, _called(reward, reward.fn, list(images), list(prompts), **accepted), len(images))


def _scores_of_pixels(
    reward: Reward, images: Sequence[Any], prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]
) -> list[float | None]:
    """In one call for all images of one size."""
    from rewards.pixels import by_size

    found: dict[int, float | None] = {}
    for places, pixels in by_size(images):
        own = {name: [values[place] for place in places] for name, values in columns.items()}
        values = _called(reward, reward.fn, pixels, [prompts[place] for place in places], **own)
        found |= zip(places, _checked(reward, values, len(places)), strict=True)
    return [found[place] for place in range(len(images))]


def judge(
    reward: Reward,
    images: Sequence[Any],
    prompts: Sequence[str],
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> tuple[list[float | None], list[Verdict | None]]:
    """As `score`, and why: the `geneval.Verdict` of each image, from the same detection pass; None from other rewards."""
    from rewards.geneval import GenEval

    if not isinstance(reward.fn, GenEval):
        return score(reward, images, prompts, columns), [None] * len(images)
    verdicts = _called(reward, reward.fn.judge, list(images), **_accepted(reward, columns or {}))
    return _checked(reward, reward.fn.scores(verdicts), len(images)), verdicts


def check_prompts(reward: Reward, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None) -> None:
    """Before there are images: RewardError for a column that the reward lacks, and for metadata that `geneval` refuses."""
    from rewards.geneval import GenEval

    accepted = _accepted(reward, columns or {})
    if isinstance(reward.fn, GenEval):
        _called(reward, reward.fn.specs, len(prompts), **accepted)


def version_of(thing: Any) -> str:
    """Which code a reward's function or a detector is: the version of gcpo-t2i if it is built in, else the SHA-256 of the
    file that defines it."""
    code = thing if inspect.isroutine(thing) else type(thing)
    if code.__module__.partition(".")[0] == __name__:
        return f"gcpo-t2i {__version__}"
    try:
        source = Path(inspect.getfile(code))
    except TypeError as error:  # compiled, or typed into an interpreter
        raise RewardError(
            f"{code.__module__}.{code.__qualname__} comes from no file that could be told apart"
        ) from error
    return f"sha256:{hashlib.sha256(source.read_bytes()).hexdigest()}"


def _called(reward: Reward, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `fn` of the reward returns; whatever it raises becomes a RewardError that names the reward."""
    try:
        return fn(*args, **kwargs)
    except RewardError as error:
        raise RewardError(f"reward {reward.name!r}: {error}", error.sample) from error
    except Exception as error:
        raise RewardError(f"reward {reward.name!r} raised {type(error).__name__}: {error}") from error


def _checked(reward: Reward, values: Any, number: int) -> list[float | None]:
    """The values as floats. RewardError unless they are `number` finite scores or Nones, in the reward's range."""
    if not hasattr(values, "__len__") or not hasattr(values, "__iter__") or isinstance(values, (str, bytes, Mapping)):
        kind = type(values).__name__
        raise RewardError(f"reward {reward.name!r} returned {kind}, expected a list of {number} scores")
    if len(values) != number:
        raise RewardError(f"reward {reward.name!r} returned {len(values)} scores, expected {number}")
    return [_number(reward, index, value) for index, value in enumerate(values)]


def weighted_sum(scores: Mapping[str, Sequence[float | None]], weights: Mapping[str, float]) -> list[float]:
    """sum over rewards of weight · score, per sample; a None contributes 0, as if the reward were not there.

    The weights are taken as they are (not normalised), so a mixture of prompts with and without a reward's metadata
    keeps one scale. Raises RewardError if the two mappings name different rewards or the lengths differ.
    """
    if set(scores) != set(weights):
        raise RewardError(f"rewards {sorted(scores)} and weights {sorted(weights)} do not name the same rewards")
    lengths = {name: len(values) for name, values in scores.items()}
    if len(set(lengths.values())) > 1:
        raise RewardError(f"rewards differ in their number of scores: {lengths}")
    rows = zip(*([weights[name] * (value or 0.0) for value in values] for name, values in scores.items()), strict=True)
    return [math.fsum(row) for row in rows]


__all__ = [
    "BUILT_IN",
    "Reward",
    "RewardError",
    "check_prompts",
    "judge",
    "load_reward",
    "score",
    "version_of",
    "weighted_sum",
]
