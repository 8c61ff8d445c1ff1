"""How alike the images of a group are, code by code, as the vectors of their codes see it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _unit(vectors: Tensor) -> Tensor:
    """(P,G,H,W,D) → (P,G,T,D) float32 of length 1; a vector of zeros stays."""
    return F.normalize(vectors.float().flatten(2, 3), dim=-1)


def group_similarity(vectors: Tensor) -> Tensor:
    """Vectors of the codes (P,G,H,W,D) → (P,T): mean cosine over all pairs of different images of a group, per place."""
    unit = _unit(vectors)
    group = unit.shape[1]
    own = unit.square().sum(dim=(1, 3))  # Σ_g |v_g|²
    return (unit.sum(dim=1).square().sum(dim=-1) - own) / (group * (group - 1))


def opposite_similarity(vectors: Tensor, advantage: Tensor) -> Tensor:
    """Vectors of the codes (P,G,H,W,D), advantage (P,G) → (B,T): mean cosine of an image's code to those that the images
    of opposite advantage have in the same place.

    Opposite are the others j of image i with A_i·A_j ≤ 0. An image without opposites, which a group of mean 0 does not
    have, gets 0: nothing speaks against its codes.
    """
    unit = _unit(vectors)
    group = unit.shape[1]
    opposite = advantage[:, :, None] * advantage[:, None, :] <= 0  # (P,G,G)
    opposite = opposite & ~torch.eye(group, dtype=torch.bool, device=advantage.device)
    total = opposite.to(unit) @ unit.flatten(2)  # (P,G,T·D), the sum of their vectors
    number = opposite.sum(dim=2).clamp(min=1)  # (P,G)
    cosine = (total.view_as(unit) * unit).sum(dim=-1) / number[..., None]  # (P,G,T)
    return cosine.clamp(-1, 1).flatten(0, 1)
