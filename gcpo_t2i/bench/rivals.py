"""Other ways to do what the engine does, with the same weights: transformers' own, and the loop of published code."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from gcpo_t2i.models.cache import cache_keyword
from gcpo_t2i.models.policy import Condition, Scores


@contextmanager
def library_defaults(policy: Any) -> Iterator[None]:
    """Precision of matrix products and kind of attention as torch and transformers choose them, where we choose others."""
    precision, attention = torch.get_float32_matmul_precision(), policy.trunk.config._attn_implementation
    torch.set_float32_matmul_precision("highest")
    policy.trunk.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        policy.trunk.set_attn_implementation(attention)


def library_model(policy: Any, lower: bool) -> Any:
    """A Janus policy's model as users of the library load it: all of it in bfloat16 where ours runs its layers in that."""
    if not lower:
        return policy.model
    model = copy.deepcopy(policy.model).to(torch.bfloat16)
    model.set_attn_implementation("sdpa")
    return model


@torch.no_grad()
def library_rollout(model: Any, cond: Condition, guidance: float) -> Tensor:
    """Codes (B, T) by `JanusForConditionalGeneration.generate`: static cache, null prompts of its own, no log-probs."""
    with torch.autocast(cond.mask.device.type, enabled=False):
        return model.generate(
            inputs=cond.states,
            attention_mask=cond.mask.long(),
            generation_mode="image",
            do_sample=True,
            guidance_scale=guidance,
            use_cache=True,
        )


@torch.no_grad()
def plain_rollout(policy: Any, cond: Condition, null: Condition, guidance: float) -> Tensor:
    """Codes (B, T) for B rows of cond and null: growing cache, every row prefilled by itself, no log-probs."""
    rows = Condition.cat([cond, null])
    embeds, mask, cache = policy.prefix(rows), rows.mask, DynamicCache()
    how: dict[str, Any] = {cache_keyword(policy.trunk): cache, "use_cache": True}
    codes: list[Tensor] = []
    for _ in range(policy.grid[0] * policy.grid[1]):
        filled = cache.get_seq_length()
        positions = torch.arange(filled, filled + embeds.shape[1], device=mask.device)[None]
        output = policy.trunk(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, **how)
        positive, negative = policy.head(output.last_hidden_state[:, -1]).chunk(2)
        drawn = torch.multinomial((negative + guidance * (positive - negative)).softmax(-1), 1)  # (B, 1)
        codes.append(drawn)
        embeds = policy.embed_codes(torch.cat([drawn, drawn]))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return torch.cat(codes, dim=1)


class PlainScores:
    """A policy whose log-probs come from the whole vocabulary at all positions at once."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def logp(self, cond: Condition, tokens: Tensor, **unused: Any) -> Scores:
        logits = self.policy(cond.states, cond.mask, tokens)  # (B, T, V)
        return Scores(plain_logp(logits, tokens))


def plain_logp(logits: Tensor, tokens: Tensor) -> Tensor:
    """Logits (B, T, V), tokens (B, T) → log-probs (B, T)."""
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
