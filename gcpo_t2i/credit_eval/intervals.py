"""95 % intervals for ratios of sums and for medians, by the bootstrap over images.

As in `gcpo_t2i.evals.statistics`, of the n images of a tag n − 1 are drawn, with replacement, tag by tag. A ratio of sums and
not a mean of ratios: an image whose reward was never in doubt has a true advantage of about 0 and nothing to share out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
MEDIAN_RESAMPLES = 2_000  # they take a sort each
SEED = 0
QUANTILES = (2.5, 97.5)  # per cent


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval; None: not known."""

    mean: float
    low: float | None
    high: float | None


class Resamples:
    """How often each of the images with these tags (N,) is drawn in each resample. Where a tag has one image only, which says
    nothing about others, there are no intervals."""

    def __init__(self, tags: Sequence[str]) -> None:
        generator = np.random.default_rng(SEED)
        names = np.asarray(tags)
        self.counts = np.full((RESAMPLES, len(tags)), np.nan)
        for tag in dict.fromkeys(tags):
            own = np.flatnonzero(names == tag)
            if len(own) > 1:
                drawn = generator.multinomial(len(own) - 1, np.full(len(own), 1 / len(own)), RESAMPLES)
                self.counts[:, own] = drawn * (len(own) / (len(own) - 1))  # every tag keeps its weight

    def ratio(self, above: np.ndarray, below: np.ndarray) -> Interval:
        """Σ above ÷ Σ below over the images, (N,) each; NaN where that is 0 ÷ 0."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return _interval(above.sum() / below.sum(), (self.counts @ above) / (self.counts @ below))

    def cosine(self, product: np.ndarray, one: np.ndarray, other: np.ndarray) -> Interval:
        """Σ product ÷ √(Σ one · Σ other) over the images: inner product and the two squared lengths, (N,) each. NaN where the
        estimate of a square is not above 0."""
        with np.errstate(invalid="ignore", divide="ignore"):
            lengths = np.sqrt((self.counts @ one) * (self.counts @ other))
            return _interval(product.sum() / np.sqrt(one.sum() * other.sum()), (self.counts @ product) / lengths)


def median(values: Sequence[Sequence[float]]) -> Interval:
    """The median of all values; those of one image stay together when images are drawn. Infinities count as what they are."""
    generator, n = np.random.default_rng(SEED), len(values)
    rows = [np.asarray(own, np.float64) for own in values]
    drawn = generator.integers(n, size=(MEDIAN_RESAMPLES, n))
    medians = [np.median(np.concatenate([rows[i] for i in which])) if n > 1 else np.nan for which in drawn]
    return _interval(np.median(np.concatenate(rows)), np.asarray(medians))


def _interval(value: float, draws: np.ndarray) -> Interval:
    if np.isnan(draws).any():
        return Interval(float(value), None, None)
    low, high = np.percentile(draws, QUANTILES)
    return Interval(float(value), float(low), float(high))
