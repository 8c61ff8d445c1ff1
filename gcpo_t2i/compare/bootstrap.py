"""Intervals by resampling of what a comparison varies: training seeds and evaluation prompts.

One replicate draws S seeds out of S and, within every tag, as many prompts as the tag has, both with replacement and
independently of each other; every drawn seed sees the same drawn prompts (seeds and prompts are crossed: all runs are
evaluated on the same prompts). The images of a prompt stay together: their mean is one value. A difference of two
algorithms, or of after and before, is taken seed by seed and prompt by prompt before anything is drawn: that is the pairing.
Owen, The Pigeonhole Bootstrap (2007), shows that this does not make intervals too short, up to what few seeds cost:
with S seeds the part of the variance that is theirs comes out (S − 1)/S of what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

REPLICATES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval (2.5 % and 97.5 % quantiles of the replicates)."""

    mean: float
    low: float
    high: float


def bootstrap(values: np.ndarray, tags: Sequence[str], replicates: int = REPLICATES, seed: int = 0) -> Estimate:
    """The mean of values (S, P) over S seeds, tags, and the prompts of each tag, with its interval; tags has length P.

    As in GenEval's score, every tag weighs the same, however many prompts it has.
    """
    seeds, prompts = values.shape
    generator = np.random.default_rng(seed)
    weight = np.zeros(prompts)
    drawn = np.zeros((replicates, prompts))  # the weight of every prompt in every replicate
    names = np.asarray(tags)
    for tag in dict.fromkeys(tags):
        own = np.flatnonzero(names == tag)
        share = 1 / (len(own) * len(set(tags)))
        weight[own] = share
        drawn[:, own] = share * generator.multinomial(len(own), np.full(len(own), 1 / len(own)), replicates)
    drawn_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), replicates) / seeds  # (R, S)
    means = ((drawn_seeds @ values) * drawn).sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(values.mean(0) @ weight), float(low), float(high))
