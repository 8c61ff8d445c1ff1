"""The ways to score tokens that are held against the truth: contrasts of the credit, rules of groups, and controls.

stage      difference from images of the same prompt and of opposite advantage (see `companions`)
critical   1 for the codes that `critical_gcpo` learns from, else 0
uniform    every token alike: what plain GRPO does
random     random numbers
position   the mean of the truth at this place over all other images: all that can be known from the place alone
entropy    of the distribution that sampled the code
surprise   −log of the probability with which the code was sampled
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from gcpo_t2i.algo.credit import CONTRASTS, NORMALIZERS, CreditSettings
from gcpo_t2i.models.policy import Rollout

OF_GROUPS = ("stage", "critical")
CONTROLS = ("uniform", "random", "position", "entropy", "surprise")
RULES = (*CONTRASTS, *OF_GROUPS, *CONTROLS)
REFERENCE = CreditSettings().contrast  # what differences are to

Scores = dict[str, np.ndarray]  # rule → (N, T) float64


def tensors_of(rollout: Rollout) -> dict[str, Tensor]:
    """What rules read of a rollout with a null branch and all stats, each (N, T) float32 on the CPU."""
    named = {"cond_logp": rollout.cond_logp, "null_logp": rollout.null_logp, "sample_logp": rollout.sample_logp}
    return {name: tensor.cpu() for name, tensor in {**named, **rollout.stats}.items() if tensor is not None}


def contrasts(tensors: Mapping[str, Tensor]) -> Scores:
    """The evidence of every contrast."""
    return {name: contrast.fn(tensors).double().numpy() for name, contrast in CONTRASTS.items()}


def all_scores(tensors: Mapping[str, Tensor], truth: np.ndarray, seed: int) -> Scores:
    """The scores of every rule for N images, of which `truth` (N, T) holds what is to be found. `tensors`: those of
    `tensors_of`, and what `companions.group_scores` adds."""
    of_groups = {name: tensors[name].double().numpy() for name in OF_GROUPS}
    return (
        contrasts(tensors)
        | of_groups
        | {
            "uniform": np.zeros(truth.shape),
            "random": np.random.default_rng(seed).random(truth.shape),
            "position": mean_of_others(truth),
            "entropy": tensors["entropy"].double().numpy(),
            "surprise": -tensors["sample_logp"].double().numpy(),
        }
    )


def mean_of_others(truth: np.ndarray) -> np.ndarray:
    """(N, T) → for every image the mean over the other N − 1; 0 for a single one."""
    return (truth.sum(0) - truth) / max(len(truth) - 1, 1)


def fits(rule: str, normalizer: str) -> bool:
    """Whether credit by this normalizer is not negative."""
    return NORMALIZERS[normalizer].signed or not (rule in CONTRASTS and CONTRASTS[rule].signed)


def credit(scores: np.ndarray, normalizer: str = CreditSettings().normalizer) -> np.ndarray:
    """(N, T) scores → credit with the settings that training has by default, mean 1 over the tokens of an image."""
    evidence = torch.from_numpy(scores)
    weights = NORMALIZERS[normalizer].fn(evidence, torch.ones_like(evidence, dtype=torch.bool), CreditSettings())
    return weights.double().numpy()
