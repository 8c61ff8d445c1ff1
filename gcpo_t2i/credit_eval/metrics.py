"""How well scores of cells find what they should find. Pure functions on the cells of one image; equal scores are shared out,
so that constant scores give exactly what scores at random give on average."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata


def auroc(scores: np.ndarray, mask: np.ndarray) -> float:
    """Probability that a cell of the mask scores above one outside, ties counted half: (T,), (T,) bool → [0, 1].

    From the ranks, as the Mann-Whitney statistic. NaN for a mask that is empty or full.
    """
    inside = int(mask.sum())
    outside = len(mask) - inside
    if not inside or not outside:
        return float("nan")
    return float((rankdata(scores)[mask].sum() - inside * (inside + 1) / 2) / (inside * outside))


def average_precision(scores: np.ndarray, mask: np.ndarray) -> float:
    """Σ over thresholds of (recall gained) · precision, a threshold for each distinct score: (T,), (T,) bool → (0, 1].

    Constant scores give the share of the mask. NaN for an empty mask.
    """
    if not mask.any():
        return float("nan")
    _, which = np.unique(-scores, return_inverse=True)  # 0 for the highest score
    found, taken = np.bincount(which, weights=mask).cumsum(), np.bincount(which).cumsum()
    return float((np.diff(found, prepend=0) * found / taken).sum() / mask.sum())


def inside(weights: np.ndarray, mask: np.ndarray) -> float:
    """Share of the weights (T,) ≥ 0 that lies in the mask (T,) bool."""
    return float(weights[mask].sum() / weights.sum())


def membership(scores: np.ndarray, share: float) -> np.ndarray:
    """How much of each cell is among the highest `share` of all T: (T,) in [0, 1], with sum share · T.

    The cell on the border counts in part. Cells of equal score count the same, which is what a random order among them
    gives on average.
    """
    counted = np.clip(share * len(scores) - np.arange(len(scores)), 0, 1)  # by falling score
    _, which = np.unique(-scores, return_inverse=True)
    size = np.bincount(which)
    first = size.cumsum() - size
    sums = np.add.reduceat(counted, first)
    return (sums / size)[which]


def density_ratio(weights: np.ndarray, named: np.ndarray, other: np.ndarray) -> float:
    """Mean weight on the cells of one mask ÷ mean weight on those of another: (T,) ≥ 0, two (T,) bool → [0, ∞]; 1 where both
    are 0."""
    here, there = float(weights[named].mean()), float(weights[other].mean())
    if here == there:
        return 1.0
    return here / there if there else float("inf")
