"""2-D rotary positions of LlamaGen, as a drop-in for the `rotary_emb` of a `transformers.LlamaModel`."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rotary_table(
    grid: tuple[int, int], prefix: int, head_dim: int, theta: float = 10000.0, prefix_cos: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (prefix + H*W, head_dim) float32, in transformers' half-split layout (`rotate_half`).

    Sequence position prefix + row*W + col is image code (row, col): the first half of the head_dim/2 frequency pairs
    turns by `row`, the second half by `col`, both with the frequencies theta^(-4i/head_dim), as in LlamaGen's
    `precompute_freqs_cis_2d` (github.com/FoundationVision/LlamaGen). Pair i is held in channels i and i + head_dim/2.
    The `prefix` positions of the caption have cos `prefix_cos` and sin 0: with 1 nothing turns them; with 0, as in
    LlamaGen, queries and keys are zero there, so that a caption position weighs exp(0) in every attention.
    """
    if head_dim % 4:
        raise ValueError(f"head_dim must be divisible by 4 for two rotary axes, got {head_dim}")
    height, width = grid
    quarter = head_dim // 4
    frequency = theta ** (-torch.arange(quarter, dtype=torch.float32) * 4 / head_dim)
    rows = torch.arange(height).repeat_interleave(width)  # (T,)
    cols = torch.arange(width).repeat(height)  # (T,)
    angle = torch.cat([rows[:, None] * frequency, cols[:, None] * frequency], dim=1)  # (T, head_dim/2)
    angle = torch.cat([torch.zeros(prefix, 2 * quarter), angle])
    angle = torch.cat([angle, angle], dim=1)
    cos = angle.cos()
    cos[:prefix] = prefix_cos
    return cos, angle.sin()


class Rotary2D(nn.Module):
    """Looks (cos, sin) up by position: positions < prefix are the caption, position prefix + i is image code i."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self, grid: tuple[int, int], prefix: int, head_dim: int, theta: float = 10000.0, prefix_cos: float = 1.0
    ) -> None:
        super().__init__()
        cos, sin = rotary_table(grid, prefix, head_dim, theta, prefix_cos)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids (N, S) → (cos, sin), each (N, S, head_dim) in x's dtype, as LlamaModel asks of its rotary_emb."""
        return self.cos[position_ids].to(x.dtype), self.sin[position_ids].to(x.dtype)
