"""Attention in blocks against the formula, and as a trunk runs it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gcpo_t2i.models import attention
from gcpo_t2i.models.attention import CAUSAL_BLOCKS, blocks, causal_blocks
from tests.tiny import tiny_policy

LOWEST = torch.finfo(torch.float32).min


def test_blocks_are_of_equal_size_and_end_where_their_last_query_may_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", 4)
    found = [(rows.start, rows.stop, seen.stop) for rows, seen in blocks(9, 9)]
    assert found == [(0, 3, 3), (3, 6, 6), (6, 9, 9)]
    assert [(rows.start, rows.stop, seen.stop) for rows, seen in blocks(5, 12)] == [(0, 3, 10), (3, 5, 12)]
    assert [(rows.stop, seen.stop) for rows, seen in blocks(1, 1)] == [(1, 1)]


def formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """(B, S, H, d), one query at a time."""
    batch, heads, queries, _ = query.shape
    groups = heads // key.shape[1]
    out = torch.empty(batch, queries, heads, query.shape[-1])
    for b in range(batch):
        for h in range(heads):
            for s in range(queries):
                scores = key[b, h // groups] @ query[b, h, s] * scaling + mask[b, 0, s]
                out[b, s, h] = scores.softmax(0) @ value[b, h // groups]
    return out


@pytest.mark.parametrize("queries", [9, 5])
def test_values_and_gradients_are_those_of_the_formula(monkeypatch: pytest.MonkeyPatch, queries: int) -> None:
    """Two queries per key head, a caption padded by two on the left, all positions or the last five of them."""
    monkeypatch.setattr(attention, "BLOCK", 4)
    torch.manual_seed(0)
    keys = 9
    query, key, value = (
        torch.randn(2, heads, length, 3, requires_grad=True) for heads, length in ((4, queries), (2, keys), (2, keys))
    )
    mask = torch.full((keys, keys), LOWEST).triu(1)[None, None].repeat(2, 1, 1, 1)
    mask[1, :, :, :2] = LOWEST
    mask = mask[:, :, -queries:]
    weight = torch.randn(2, queries, 4, 3)
    if queries == keys:
        weight[1, :2] = 0  # padding may look at nothing; what comes out there is never used
    ours, theirs = causal_blocks(None, query, key, value, mask, 0.7)[0], formula(query, key, value, mask, 0.7)
    torch.testing.assert_close(ours * (weight != 0), theirs * (weight != 0))
    gradients = [torch.autograd.grad((out * weight).sum(), (query, key, value)) for out in (ours, theirs)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("lower", [False, True])
def test_a_trunk_scores_as_with_the_attention_of_the_library(monkeypatch: pytest.MonkeyPatch, lower: bool) -> None:
    """Captions of different lengths, so that there is padding; in bfloat16 too, which has no number as low as the mask's."""
    monkeypatch.setattr(attention, "BLOCK", 8)
    policy = tiny_policy()
    codes = torch.randint(16, (3, 16), generator=torch.Generator().manual_seed(1))
    cond = policy.condition(["a red circle", "two blue squares and a green star", "a"])
    found = []
    for name in ("eager", CAUSAL_BLOCKS):
        policy.trunk.set_attn_implementation(name)
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            found.append(policy(cond.states, cond.mask, codes))
    assert found[0].isfinite().all()
    torch.testing.assert_close(found[1], found[0], atol=2e-2 if lower else 1e-5, rtol=0)
