"""2-D rotary positions: values by hand, the relative-position identity, and LlamaGen's own interleaved formula."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from gcpo_t2i.models.rope import Rotary2D, rotary_table


def test_angles_by_hand() -> None:
    # head_dim 8, theta 10000: frequencies 10000^0 = 1 and 10000^(-4/8) = 0.01, for rows in pairs 0-1, columns in 2-3.
    # Code 5 of a grid 2 rows x 3 columns is row 1, column 2: angles 1, 0.01, 2, 0.02, held twice (half-split layout).
    cos, sin = rotary_table((2, 3), prefix=4, head_dim=8)
    angles = torch.tensor([1.0, 0.01, 2.0, 0.02] * 2)
    assert cos.shape == sin.shape == (4 + 6, 8)
    torch.testing.assert_close(cos[4 + 5], angles.cos())
    torch.testing.assert_close(sin[4 + 5], angles.sin())
    assert sin[4 + 3, 0] == pytest.approx(math.sin(1))  # code 3 starts row 1
    assert sin[4 + 3, 2] == 0  # in column 0


def test_prefix_is_not_rotated() -> None:
    cos, sin = rotary_table((2, 3), prefix=4, head_dim=8)
    assert (cos[:4] == 1).all() and (sin[:4] == 0).all()


def test_published_prefixes_have_no_queries_and_keys() -> None:
    """LlamaGen multiplies them by cos = sin = 0, so that their products with everything are 0; codes are turned as ever."""
    cos, sin = rotary_table((2, 3), prefix=4, head_dim=8, prefix_cos=0.0)
    x = torch.randn(1, 1, 10, 8, generator=torch.Generator().manual_seed(0))
    turned, _ = apply_rotary_pos_emb(x, x, cos[None], sin[None])
    assert (turned[:, :, :4] == 0).all()
    plain, _ = apply_rotary_pos_emb(x, x, *(table[None] for table in rotary_table((2, 3), prefix=4, head_dim=8)))
    assert torch.equal(turned[:, :, 4:], plain[:, :, 4:]) and torch.equal(plain[:, :, :4], x[:, :, :4])


def _dot(rope: Rotary2D, q: torch.Tensor, k: torch.Tensor, at: int, against: int) -> torch.Tensor:
    rotated_q, _ = apply_rotary_pos_emb(q, q, *rope(q, torch.tensor([[at]])))
    _, rotated_k = apply_rotary_pos_emb(k, k, *rope(k, torch.tensor([[against]])))
    return (rotated_q * rotated_k).sum()


def test_attention_depends_on_row_and_column_differences_alone() -> None:
    rope = Rotary2D((4, 4), prefix=3, head_dim=16)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).unbind(0)

    def at(row: int, col: int) -> int:
        return 3 + row * 4 + col

    reference = _dot(rope, q, k, at(1, 2), at(0, 3))  # rows differ by 1, columns by -1
    torch.testing.assert_close(_dot(rope, q, k, at(3, 0), at(2, 1)), reference)
    torch.testing.assert_close(_dot(rope, q, k, at(2, 1), at(1, 2)), reference)
    assert (_dot(rope, q, k, at(1, 2), at(2, 3)) - reference).abs() > 1e-3  # rows differ by -1
    assert (_dot(rope, q, k, at(1, 2), at(0, 1)) - reference).abs() > 1e-3  # columns differ by +1


def test_equals_the_published_interleaved_formula() -> None:
    """LlamaGen turns the pair (x[2i], x[2i+1]) as a complex number; here pair i is (x[i], x[i + d/2])."""
    d, height, width = 12, 3, 2
    x = torch.randn(height * width, d, generator=torch.Generator().manual_seed(0))
    quarter = d // 4
    frequency = 1.0 / (10000 ** (torch.arange(0, d // 2, 2)[:quarter].float() / (d // 2)))
    grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float()
    angle = torch.cat([grid[:, :1] * frequency, grid[:, 1:] * frequency], dim=1)
    turned = torch.view_as_complex(x.view(-1, d // 2, 2)) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.view_as_real(turned).flatten(1)

    permuted = torch.cat([x[:, 0::2], x[:, 1::2]], dim=1)  # interleaved -> half-split
    rope = Rotary2D((height, width), prefix=5, head_dim=d)
    cos, sin = rope(x, 5 + torch.arange(height * width)[None])
    ours, _ = apply_rotary_pos_emb(permuted[None, None], permuted[None, None], cos, sin)
    torch.testing.assert_close(ours[0, 0], torch.cat([expected[:, 0::2], expected[:, 1::2]], dim=1))


def test_lookup_follows_dtype_and_adds_nothing_to_checkpoints() -> None:
    rope = Rotary2D((2, 2), prefix=1, head_dim=4)
    cos, sin = rope(torch.zeros(1, dtype=torch.bfloat16), torch.tensor([[0, 3]]))
    assert cos.shape == sin.shape == (1, 2, 4) and cos.dtype == torch.bfloat16
    assert not rope.state_dict()


def test_head_dim_must_hold_two_axes() -> None:
    with pytest.raises(ValueError, match=r"divisible by 4.*got 6"):
        rotary_table((2, 2), prefix=1, head_dim=6)
