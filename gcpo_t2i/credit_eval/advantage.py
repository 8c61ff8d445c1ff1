"""The true advantage of every token of an image, by Monte Carlo: ΔV_t = V_t − V_{t−1}, V_t = E[R | y_1 … y_t].

The expectation is over images that the sampler continues from the first t codes. V_T = R is known, and ΣΔV_t = R − V_0.

Plain continuations from every prefix drown in noise: a single ΔV_t is the difference of two means of K rewards. But most
codes leave the sampler no choice (of the embedded model, half have a probability above 0.9999), and the probability of every
code is known. With departure e_t = 1 − π(y_t | y_<t) and Q_t the mean reward of images that begin with y_<t and then take any
*other* code than y_t,

    V_{t−1} = (1 − e_t) V_t + e_t Q_t        hence        ΔV_t = e_t (V_t − Q_t)

Only the Q_t are estimated, from continuations whose first code is drawn among the others; all V follow backwards from
V_T = R. That is a stratified estimate of every V_t, with the place where a continuation leaves the image as the stratum:
unbiased, and a continuation that leaves at s serves all V_t, t < s. The error of ΔV_t has the factor e_t. Number of
continuations at t: e_t · K, as many as of K plain continuations would leave there, rounded up to whole units, none where
e_t < NEGLIGIBLE (Q_t = V_t is assumed there: an error of at most 1e-4 of the range of rewards).

Squares need care: the square of a noisy estimate is too large by its variance. Every Q_t is estimated FOLDS times from disjoint
continuations; products of *different* folds are unbiased (`product`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

FOLDS = 4
UNIT = 2 * FOLDS  # continuations with a common prefix that are run together: one fold's mean is never empty
NEGLIGIBLE = 1e-4


def departures(logp: np.ndarray) -> np.ndarray:
    """Log-probs (N, T) of an image's codes under what sampled them → e_t, the probability of any other code."""
    return -np.expm1(np.minimum(logp.astype(np.float64), 0.0))


def units(departure: np.ndarray, continuations: int) -> np.ndarray:
    """Departures (N, T) → how many UNITs of continuations leave there, (N, T) int."""
    wanted = np.ceil(departure * continuations / UNIT).astype(int)
    return np.where(departure < NEGLIGIBLE, 0, wanted)


def values(rewards: np.ndarray, departure: np.ndarray, others: np.ndarray) -> np.ndarray:
    """R (N,), e (N, T) and Q (N, T, F), NaN where no continuation was run → V_0 … V_T, (N, T + 1, F)."""
    length = departure.shape[1]
    found = np.empty((len(rewards), length + 1, others.shape[2]))
    found[:, length] = rewards[:, None]
    for t in range(length, 0, -1):
        other = np.where(np.isnan(others[:, t - 1]), found[:, t], others[:, t - 1])
        found[:, t - 1] = found[:, t] + departure[:, t - 1, None] * (other - found[:, t])
    return found


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Estimates (…, F) of α and β from the same F independent folds → an unbiased estimate (…) of α · β.

    The mean over all ordered pairs of different folds i ≠ j of a_i b_j.
    """
    folds = a.shape[-1]
    return (a.sum(-1) * b.sum(-1) - (a * b).sum(-1)) / (folds * (folds - 1))


@dataclass(frozen=True)
class Call:
    """One call of the sampler: continuations that leave their image at one position, UNIT for each entry of `rows`."""

    position: int
    number: int  # among the calls of this position
    rows: np.ndarray  # (P,) int, images, each as often as it has units in this call


def calls(planned: np.ndarray, batch_size: int) -> Iterator[Call]:
    """The calls for planned units (N, T), at most `batch_size` continuations each but for a single unit; always the same."""
    per_call = max(1, batch_size // UNIT)
    for position in range(planned.shape[1]):
        rows = np.repeat(np.arange(len(planned)), planned[:, position])
        for number, start in enumerate(range(0, len(rows), per_call)):
            yield Call(position, number, rows[start : start + per_call])


@dataclass
class Tally:
    """What the continuations said so far: their number and the sum of their rewards, and how many calls are done."""

    sums: np.ndarray  # (N, T, F)
    counts: np.ndarray  # (N, T, F)
    done: int = 0

    @classmethod
    def empty(cls, images: int, length: int) -> Tally:
        return cls(np.zeros((images, length, FOLDS)), np.zeros((images, length, FOLDS)))

    def add(self, call: Call, rewards: np.ndarray) -> None:
        """Rewards (P · UNIT,) of the continuations of a call, those of a unit one after another."""
        folded = rewards.reshape(len(call.rows), -1, FOLDS)  # P, 2, F
        np.add.at(self.sums[:, call.position], call.rows, folded.sum(1))
        np.add.at(self.counts[:, call.position], call.rows, folded.shape[1])
        self.done += 1

    def others(self) -> np.ndarray:
        """Q (N, T, F), NaN where nothing was run."""
        return np.divide(self.sums, self.counts, out=np.full_like(self.sums, np.nan), where=self.counts > 0)
