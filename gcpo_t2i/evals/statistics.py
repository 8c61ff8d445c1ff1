"""Means over tags, and intervals by the bootstrap over prompts. Pure functions on numbers.

The prompts are taken for a sample of all prompts of their tag, so they are what is drawn again, tag by tag; an image's own
luck is in its prompt's mean. Of n prompts n − 1 are drawn, with replacement: drawing n gives a variance that is too small
by the factor (n − 1)/n, which matters for a tag of two prompts (McCarthy and Snowden 1985, "The bootstrap and finite
population sampling"; Rao and Wu 1988). A tag of one prompt says nothing about others: no interval, there and overall.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000
SEED = 0
QUANTILES = (2.5, 97.5)  # per cent
CHUNK = 1 << 22  # numbers drawn at a time
UNTAGGED = "(none)"  # the tag of prompts without one


@dataclass(frozen=True)
class Estimate:
    """A mean, its 95 % interval (None: not known), and the number of prompts behind it."""

    mean: float
    low: float | None
    high: float | None
    prompts: int


@dataclass(frozen=True)
class Estimates:
    """`overall` is the mean over tags, as GenEval has it; `tags` is empty if no prompt has one."""

    overall: Estimate
    tags: dict[str, Estimate]

    def as_json(self) -> dict[str, Any]:
        return {"overall": asdict(self.overall), "tags": {tag: asdict(own) for tag, own in self.tags.items()}}


def resampled_means(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(n,) values of prompts → (RESAMPLES,) means of n − 1 of them; NaN for n = 1."""
    n = len(values)
    if n == 1:
        return np.full(RESAMPLES, np.nan)
    size = max(1, CHUNK // n)
    sizes = [min(size, RESAMPLES - start) for start in range(0, RESAMPLES, size)]
    return np.concatenate([values[generator.integers(n, size=(rows, n - 1))].mean(axis=1) for rows in sizes])


def estimate(means: Mapping[str, Sequence[float]]) -> Estimates:
    """Tag → means of its prompts (at least one) → the estimates of each tag and overall. Same numbers, same intervals."""
    generator = np.random.default_rng(SEED)
    tags, draws = {}, []
    for tag, own in means.items():
        values = np.asarray(own, np.float64)
        draws.append(resampled_means(values, generator))
        tags[tag] = _estimate(float(values.mean()), draws[-1], len(values))
    mean = math.fsum(own.mean for own in tags.values()) / len(tags)
    overall = _estimate(mean, np.mean(draws, axis=0), sum(own.prompts for own in tags.values()))
    return Estimates(overall, {} if tags.keys() == {UNTAGGED} else tags)


def _estimate(mean: float, draws: np.ndarray, prompts: int) -> Estimate:
    if np.isnan(draws).any():
        return Estimate(mean, None, None, prompts)
    low, high = (float(bound) for bound in np.percentile(draws, QUANTILES))
    return Estimate(mean, low, high, prompts)
