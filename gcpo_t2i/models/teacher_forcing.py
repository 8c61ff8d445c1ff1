"""Teacher-forced scoring of given codes: log-probs with gradients to learn from, and all that a rollout knows of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gcpo_t2i.models.drawing import NULL_HIDDEN, Sampling, as_rollout, branches, describe
from gcpo_t2i.models.layers import Head
from gcpo_t2i.models.policy import Rollout, Scores

SCORE_BUDGET = 1 << 22  # float32 logits that may exist at once (16 MiB)

Part = Callable[[slice, Tensor], tuple[Tensor, ...]]  # positions, their hidden states (B, t, D) → scores, each (B, t)


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

    Works through chunks of tokens, so that (B, T, V) never exists in float32. Where the head is frozen, the gradient of a
    score to its own position's outputs is found along with it; else each chunk's logits are computed again in the backward
    pass. What fits the budget at once is neither cut nor recomputed.
    """

    def part(cut: slice, hidden: Tensor) -> tuple[Tensor, ...]:
        logits = head(hidden).float()
        if null_hidden is not None:
            with torch.no_grad():
                null_logits = head(null_hidden[:, cut]).float()
            logits = torch.lerp(null_logits, logits, guidance)
        logp = (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)
        of_tokens = logp.gather(-1, tokens[:, cut, None]).squeeze(-1)  # (B, t)
        return (of_tokens, -(logp.exp() * logp).sum(-1)) if entropy else (of_tokens,)

    batch, length = tokens.shape
    with torch.enable_grad():
        logits = head(hidden[:1, :1].detach())
    size = max(1, SCORE_BUDGET // (batch * logits.shape[-1]))
    if size >= length:
        return Scores(*part(slice(None), hidden))
    cuts = [slice(start, start + size) for start in range(0, length, size)]
    if torch.is_grad_enabled() and hidden.requires_grad and not logits.requires_grad:
        return Scores(*ByPosition.apply(hidden, part, cuts))
    # contiguous, because torch multiplies a slice by a frozen matrix in a batch of copies of it
    chunks = [checkpoint(part, cut, hidden[:, cut].contiguous(), use_reentrant=False) for cut in cuts]
    return Scores(*(torch.cat(scores, dim=1) for scores in zip(*chunks, strict=True)))


class ByPosition(torch.autograd.Function):
    """Scores (B, T) each of which depends on the outputs of its own position alone: all that a backward pass needs is the
    gradient of every score to these, (B, T, D), and it can be had before anybody knows what the scores will be used for.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, part: Part, cuts: Sequence[slice]) -> tuple[Tensor, ...]:
        scores, slopes = [], []
        for cut in cuts:
            own = hidden[:, cut].detach().contiguous().requires_grad_()
            with torch.enable_grad():
                outputs = part(cut, own)
            last = len(outputs) - 1
            slopes.append(
                [
                    torch.autograd.grad(output, own, torch.ones_like(output), retain_graph=number < last)[0]
                    for number, output in enumerate(outputs)
                ]
            )
            scores.append([output.detach() for output in outputs])
        ctx.save_for_backward(*(torch.cat(parts, dim=1) for parts in zip(*slopes, strict=True)))
        return tuple(torch.cat(parts, dim=1) for parts in zip(*scores, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        slopes = ctx.saved_tensors
        total = sum(own[..., None] * slope for own, slope in zip(gradients, slopes, strict=True))
        return total.to(slopes[0].dtype), None, None  # type: ignore[union-attr]


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
    columns = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    if NULL_HIDDEN in how.stats:
        columns[NULL_HIDDEN] = hidden[len(tokens) :]
    return as_rollout(columns, how)
