"""Teacher-forced scoring of given codes: log-probs with gradients to learn from, and all that a rollout knows of its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gcpo_t2i.models.drawing import Sampling, as_rollout, branches, describe
from gcpo_t2i.models.layers import Head
from gcpo_t2i.models.policy import Rollout, Scores

SCORE_BUDGET = 1 << 24  # float32 logits that may exist at once (64 MiB)


def score(
    head: Head,
    hidden: Tensor,
    tokens: Tensor,
    null_hidden: Tensor | None = None,
    *,
    guidance: float = 1.0,
    temperature: float = 1.0,
    entropy: bool = False,
) -> Scores:
    """Log-probs of tokens (B, T) from trunk outputs (B, T, D), differentiable; with null_hidden of the guided mixture.

    Works through chunks of tokens and recomputes each chunk's logits in the backward pass, so that (B, T, V) never
    exists in float32; what fits the budget at once is neither cut nor recomputed.
    """

    def part(hidden: Tensor, tokens: Tensor, null_hidden: Tensor | None) -> tuple[Tensor, Tensor | None]:
        logits = head(hidden).float()
        if null_hidden is not None:
            with torch.no_grad():
                null_logits = head(null_hidden).float()
            logits = torch.lerp(null_logits, logits, guidance)
        if temperature != 1.0:
            logits = logits / temperature
        log_z = logits.logsumexp(-1)  # (B, t)
        logp = logits.gather(-1, tokens[..., None]).squeeze(-1) - log_z
        return logp, log_z - (logits.softmax(-1) * logits).sum(-1) if entropy else None

    batch, length = tokens.shape
    codes = head(hidden[:1, :1].detach()).shape[-1]
    size = max(1, SCORE_BUDGET // (batch * codes))
    if size >= length:
        return Scores(*part(hidden, tokens, null_hidden))
    outputs = []
    for start in range(0, length, size):
        cut = slice(start, start + size)
        null_part = None if null_hidden is None else null_hidden[:, cut]
        outputs.append(checkpoint(part, hidden[:, cut], tokens[:, cut], null_part, use_reentrant=False))
    logps, entropies = zip(*outputs, strict=True)
    return Scores(torch.cat(logps, 1), torch.cat(entropies, 1) if entropy else None)


@torch.no_grad()
def rescore(head: Head, hidden: Tensor, tokens: Tensor, guided: bool, how: Sampling) -> Rollout:
    """Trunk outputs (2B, T, D), cond rows first, or (B, T, D) without null → what the sampler would know of tokens (B, T).

    In chunks of tokens, as `score`. ValueError on settings without a meaning.
    """
    how.check(guided)
    codes = head(hidden[:1, :1]).shape[-1]
    size = max(1, SCORE_BUDGET // (len(hidden) * codes))
    parts = []
    for start in range(0, tokens.shape[1], size):
        cut = slice(start, start + size)
        parts.append(describe(*branches(head(hidden[:, cut]), guided, how), tokens[:, cut], how))
    return as_rollout({name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}, how)
