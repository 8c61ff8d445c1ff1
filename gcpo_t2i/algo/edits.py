"""Batch edits: what happens to the samples of a step, or to their rewards, before these become advantages.

An edit is a pure function that says *what* is to be done; models, images and rewards are the rollout's business. The
third edit, leaving out groups without signal (DAPO), is `advantage.has_spread`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def all_failed(success: Tensor) -> Tensor:
    """Success (P,G) bool → (P,) bool: the groups in which no sample is right, and which get a reference.

    GCPO, "When Contrast Fails, Go Gold" (arXiv 2510.07790): the reference takes the place of one sample, here of the one
    with the lowest reward (`worst`), and the advantage is normalised within the group as it is then. A group with at
    least one success stays as it is.

    What the paper leaves open: which π_old the ratio of a reference is to. It was not sampled, so π_old is here
    the policy before the update, teacher-forced on the reference: its ratio starts at 1, as that of any sample.
    """
    return ~success.any(dim=1)


def worst(rewards: Tensor) -> Tensor:
    """Rewards (P,G) → (P,) int64: the sample with the lowest reward of each group, the first of several."""
    return rewards.argmin(dim=1)


def entropy_reward(rewards: Tensor, entropy: Tensor, ref_entropy: Tensor, factor: float) -> Tensor:
    """Rewards (P,G) with STAGE's entropy reward (arXiv 2509.25027) → (P,G) float32.

        e = 1 / (1 + (H_ref − H)²)      r + factor · (e − mean of e over the best of the group), for the best alone

    entropy and ref_entropy (P,G): mean over the codes of a sample of the entropy of policy and reference, nats. The best
    are those with the highest reward of their group; if all rewards are equal, all are. It does not raise the mean
    of the best: it tells those that are alike apart, by who stayed near the entropy of the reference.
    """
    rewards = rewards.float()
    best = rewards == rewards.amax(dim=1, keepdim=True)  # (P,G)
    near = 1 / (1 + (ref_entropy.float() - entropy.float()).square())
    mean = (near * best).sum(dim=1, keepdim=True) / best.sum(dim=1, keepdim=True)
    return torch.where(best, rewards + factor * (near - mean), rewards)
