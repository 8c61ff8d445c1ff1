"""Group advantage: how much better a sample did than the other samples of its prompt.

    A = (r − mean of the group) / (std + eps)

`scale` says which std divides:

- `group`: of the group (GRPO, arXiv 2402.03300);
- `batch`: of all rewards of the step (arXiv 2508.08221), so that an easy prompt with little spread is not blown up;
- `none`: no division (Dr. GRPO, arXiv 2503.20783).

The std is the unbiased one (÷ n − 1), as in TRL and in the code published with arXiv 2605.29198.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gcpo_t2i.algo import unknown

# scale → the divisor, from rewards (P,G) and eps
SCALES: dict[str, Callable[[Tensor, float], Tensor | float]] = {
    "group": lambda rewards, eps: rewards.std(dim=1, keepdim=True) + eps,  # (P,1)
    "batch": lambda rewards, eps: rewards.std() + eps,  # ()
    "none": lambda rewards, eps: 1.0,
}


def has_spread(rewards: Tensor) -> Tensor:
    """(P,G) → (P,) bool: whether the rewards of a group differ at all. Without spread a group carries no signal.

    A NaN counts as spread, so that it surfaces as a NaN loss and is not dropped in silence.
    """
    return rewards.amax(dim=1) != rewards.amin(dim=1)


def group_advantage(rewards: Tensor, scale: str = "group", eps: float = 1e-4) -> Tensor:
    """Rewards (P,G), any unit → advantage (P,G) float32, mean 0 in every group, exactly 0 in a group without spread.

    Every scale subtracts the mean of the group, so every scale needs a group: with G = 1 all advantages would be 0
    and nothing would be learned. For `batch` pass the rewards of the whole step (of all processes). `eps` has the
    unit of the rewards; `none` does not use it.

    Raises ValueError: unknown scale, rewards that are not (P,G), G < 2.
    """
    if scale not in SCALES:
        raise unknown("advantage scale", scale, SCALES)
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"a group advantage compares at least 2 samples of each prompt, got rewards (P,G) of shape "
            f"{tuple(rewards.shape)}; use a group size of 2 or more"
        )
    rewards = rewards.float()
    centred = rewards - rewards.mean(dim=1, keepdim=True)  # (P,G)
    scaled = centred / SCALES[scale](rewards, eps)
    # The mean of equal floats can be off by one bit, which eps would blow up to a thousandth.
    return torch.where(has_spread(rewards)[:, None], scaled, torch.zeros_like(scaled))
