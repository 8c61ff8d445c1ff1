"""Which tokens decided the reward: how much of the true advantage the tokens hold that a rule puts first.

The true advantage of a token counts by its square: E ΣΔV_t² = Var(R), as the ΔV_t are the steps of a martingale. So squares
are shares of the variance of the reward, and their sum is held against that variance as a check: against (R − V_0)².
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gcpo_t2i.algo.credit import CONTRASTS, NORMALIZERS
from gcpo_t2i.credit_eval.advantage import FOLDS, Tally, departures, product, values
from gcpo_t2i.credit_eval.intervals import Interval, Resamples
from gcpo_t2i.credit_eval.metrics import membership
from gcpo_t2i.credit_eval.rules import OF_GROUPS, REFERENCE, RULES, Scores, all_scores, credit, fits
from gcpo_t2i.credit_eval.samples import Samples

SHARES = (0.02, 0.05, 0.1, 0.2, 0.4)  # of the tokens of an image
COMPARED = 0.05  # where rules are held against each other: few tokens decide
CURVE = (*(i / 100 for i in range(20)), *(i / 20 for i in range(4, 21)))
BEST = "best"
WEIGHED = (*CONTRASTS, *OF_GROUPS, "entropy", "surprise")  # rules whose scores can be credit


@dataclass(frozen=True)
class Truth:
    """Of N images, from all continuations. Squares and products are unbiased, so single ones may be negative."""

    delta: np.ndarray  # (N, T, F) ΔV of each fold
    gap: np.ndarray  # (N, F) R − V_0
    squares: np.ndarray  # (N, T) ΔV²
    variance: np.ndarray  # (N,) (R − V_0)²

    @classmethod
    def of(cls, samples: Samples, tally: Tally) -> Truth:
        value = values(samples.rewards, departures(samples.tensors["sample_logp"].numpy()), tally.others())
        delta, gap = np.diff(value, axis=1), samples.rewards[:, None] - value[:, 0]
        return cls(delta, gap, product(delta, delta), product(gap, gap))

    @property
    def noise(self) -> np.ndarray:
        """(N,) by how much ΣΔV² would come out too large, were means over all continuations squared."""
        return (self.delta.mean(-1) ** 2 - self.squares).sum(1)


def held(scores: np.ndarray, squares: np.ndarray, share: float) -> np.ndarray:
    """ΔV² that the tokens of the highest scores hold, image by image: (N, T), (N, T) → (N,)."""
    return np.stack([membership(row, share) for row in scores]) * squares @ np.ones(squares.shape[1])


def best_held(delta: np.ndarray, share: float) -> np.ndarray:
    """The same for the best order that can be known: by the squares that half of the folds say, measured on the other half, and
    the other way round. Measured on what it was chosen by, it would hold the luck of the draw as well."""
    half = FOLDS // 2
    parts = delta[..., :half], delta[..., half:]
    found = [
        held(chosen.mean(-1) ** 2, product(measured, measured), share) for chosen, measured in (parts, parts[::-1])
    ]
    return np.mean(found, axis=0)


def shares_held(truth: Truth, scores: Scores, tags: Sequence[str]) -> dict[str, dict[str, dict[str, Interval]]]:
    """Rule, or "best" → "share" and "difference" to the rule of the default credit → share of the tokens → of ΣΔV²."""
    draws, total, best_total = Resamples(tags), truth.squares.sum(1), best_held(truth.delta, 1.0)
    found: dict[str, dict[str, dict[str, Interval]]] = {rule: {"share": {}, "difference": {}} for rule in RULES}
    found[BEST] = {"share": {}}
    for share in SHARES:
        own = {rule: held(scores[rule], truth.squares, share) for rule in RULES}
        for rule, sums in own.items():
            found[rule]["share"][f"{share:g}"] = draws.ratio(sums, total)
            found[rule]["difference"][f"{share:g}"] = draws.ratio(sums - own[REFERENCE], total)
        found[BEST]["share"][f"{share:g}"] = draws.ratio(best_held(truth.delta, share), best_total)
    return found


def curves(truth: Truth, scores: Scores) -> dict[str, list[float]]:
    """Rule, or "best" → share of ΣΔV² that its first tokens hold, for the shares of tokens in CURVE."""
    total, best_total = truth.squares.sum(), best_held(truth.delta, 1.0).sum()
    found = {rule: [float(held(scores[rule], truth.squares, x).sum() / total) for x in CURVE] for rule in RULES}
    return found | {BEST: [float(best_held(truth.delta, x).sum() / best_total) for x in CURVE]}


def cosines(truth: Truth, scores: Scores, tags: Sequence[str]) -> dict[str, dict[str, Interval]]:
    """Rule → normalizer → cosine between what an update does and what it should do, over all tokens of all images: between
    credit · (R − V_0) and ΔV. Uniform credit has 1/√T, as ΣΔV² is the variance of R."""
    draws, total = Resamples(tags), truth.squares.sum(1)
    both = product(np.broadcast_to(truth.gap[:, None], truth.delta.shape), truth.delta)  # (N, T), (R − V_0) · ΔV

    def cosine(weights: np.ndarray) -> Interval:
        return draws.cosine((weights * both).sum(1), (weights**2).sum(1) * truth.variance, total)

    found = {"uniform": dict.fromkeys(NORMALIZERS, cosine(np.ones_like(both)))}
    for rule in WEIGHED:
        found[rule] = {name: cosine(credit(scores[rule], name)) for name in NORMALIZERS if fits(rule, name)}
    return found


def densities(
    values: Mapping[str, np.ndarray], regions: Mapping[str, np.ndarray], tags: Sequence[str]
) -> dict[str, dict[str, Interval]]:
    """Name → region → mean of the values (N, T) on the cells of a region (N, T) bool ÷ their mean over all cells."""
    draws = Resamples(tags)
    return {
        name: {
            region: draws.ratio((own * cells).sum(1) / own.mean(), cells.sum(1).astype(float))
            for region, cells in regions.items()
            if cells.any()
        }
        for name, own in values.items()
    }


def quarters(images: int, cells: int) -> dict[str, np.ndarray]:
    """The four quarters of raster order, each (N, T) bool."""
    quarter = np.arange(cells) * 4 // cells
    names = ("first quarter", "second quarter", "third quarter", "last quarter")
    return {name: np.tile(quarter == i, (images, 1)) for i, name in enumerate(names)}


def thirds(objects: Sequence[Sequence[np.ndarray]], cells: int) -> dict[str, np.ndarray]:
    """From the masks (T,) of the objects of each image: the first, middle and last third of every object's cells in raster
    order, and what lies outside of all objects; each (N, T) bool."""
    names = ("object's first third", "middle third", "last third")
    found = {name: np.zeros((len(objects), cells), bool) for name in (*names, "outside")}
    for image, masks in enumerate(objects):
        for mask in masks:
            for name, part in zip(names, np.array_split(np.flatnonzero(mask), 3), strict=True):
                found[name][image, part] = True
        found["outside"][image] = ~np.any(masks, axis=0) if len(masks) else True
    return found


def find_decisions(samples: Samples, tally: Tally, objects: Sequence[Sequence[np.ndarray]] | None, seed: int) -> dict:
    """All that is said of the advantage, by name. `objects`: the masks of the objects of each image, if they are known."""
    truth = Truth.of(samples, tally)
    scores = all_scores(samples.tensors, truth.squares, seed)
    draws, ones = Resamples(samples.tags), np.ones(len(samples.rewards))
    images, cells = truth.squares.shape
    regions = quarters(images, cells) | (thirds(objects, cells) if objects is not None else {})
    placed = {rule: credit(scores[rule]) for rule in WEIGHED} | {"ΔV²": truth.squares}
    return {
        "images": images,
        "continuations": int(tally.counts.sum()),
        "sum_of_squares": draws.ratio(truth.squares.sum(1), ones),
        "variance": draws.ratio(truth.variance, ones),
        "squares_to_variance": draws.ratio(truth.squares.sum(1), truth.variance),
        "noise": draws.ratio(truth.noise, ones),
        "shares": shares_held(truth, scores, samples.tags),
        "cosines": cosines(truth, scores, samples.tags),
        "densities": densities(placed, regions, samples.tags),
        "curves": curves(truth, scores),
        "maps": {name: own.mean(0).tolist() for name, own in placed.items()},
    }
