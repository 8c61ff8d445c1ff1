"""The loss of a micro-batch, such that the sum over all micro-batches of all processes is the loss of the whole step.

    loss = Σ surrogate · weight  +  beta · Σ kl · base_weight [· kl_factor]  −  entropy_coef · Σ entropy · base_weight

Token weights carry the counts of the whole step and sum to 1 over it, so the size of a micro-batch and the number of
processes do not change the gradient: add the losses up, divide by nothing. (Data-parallel wrappers that *average*
gradients over processes need the loss times the number of processes.) The base weight is the weight under uniform
credit: credit moves the policy term only.

Deviations from the code published with arXiv 2605.29198: it takes the ratio to the current policy itself, so that it
never clips and makes one update per rollout; here the ratio is to the policy that sampled. Its entropy term is a reward
for staying near the entropy of the reference; here it is the usual bonus.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gcpo_t2i.algo import unknown

MAX_LOG_RATIO = 20.0


class Terms(NamedTuple):
    """What a surrogate returns, all (B,T): loss to be minimised, importance ratio, and whether the clip is active."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


SurrogateFn = Callable[[Tensor, Tensor, Tensor, Tensor, float, float], Terms]


def _log_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """log π − log π_old, float32, 0 at invalid tokens. Beyond ±20 something is broken, and exp must stay finite."""
    gap = logp.float() - old_logp.detach().float()
    return torch.where(mask, gap, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _clipped(ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Terms:
    """−min(ρA, clip(ρ, 1 − clip_low, 1 + clip_high)·A); the clip is active where it takes the gradient away."""
    advantage = advantage.float()[:, None]  # (B,1)
    low, high = 1 - clip_low, 1 + clip_high
    loss = -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    clipped = ((ratio < low) & (advantage < 0)) | ((ratio > high) & (advantage > 0))
    return Terms(loss, ratio, clipped)


def token_surrogate(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> Terms:
    """PPO's clipped ratio per token, ρ_t = π(y_t)/π_old(y_t).

    GRPO, arXiv 2402.03300; with clip_high > clip_low DAPO, arXiv 2503.14476.
    logp, old_logp (B,T) nats, advantage (B,), mask (B,T) bool. Gradient of token t where not clipped: −A·ρ_t·∇logp_t.
    """
    return _clipped(_log_ratio(logp, old_logp, mask).exp(), advantage, clip_low, clip_high)


def sequence_surrogate(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> Terms:
    """One ratio for the whole image, s = exp(mean_t log π(y_t)/π_old(y_t)) (GSPO, arXiv 2507.18071).

    In the paper's GSPO-token form, ρ_t = sg[s]·π(y_t)/sg[π(y_t)]: every token has the value s and its own gradient
    −A·s·∇logp_t, so that token weights compose with it. Under uniform weights the gradient is that of GSPO itself.
    Same arguments as `token_surrogate`.
    """
    log_ratio = _log_ratio(logp, old_logp, mask)
    length = mask.sum(dim=1, keepdim=True).clamp(min=1)
    log_s = log_ratio.detach().sum(dim=1, keepdim=True) / length  # (B,1)
    return _clipped((log_s + (log_ratio - log_ratio.detach())).exp(), advantage, clip_low, clip_high)


@dataclass(frozen=True)
class Surrogate:
    """A surrogate and the clip range of its paper. Ranges differ by three orders of magnitude between surrogates."""

    name: str
    fn: SurrogateFn
    clip_low: float
    clip_high: float


SURROGATES: dict[str, Surrogate] = {
    "token": Surrogate("token", token_surrogate, clip_low=0.2, clip_high=0.2),
    "sequence": Surrogate("sequence", sequence_surrogate, clip_low=3e-4, clip_high=4e-4),
}


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(π ‖ π_ref) from samples of π: exp(d) − d − 1 with d = ref_logp − logp.

    (B,T) nats → (B,T) float32 nats, ≥ 0, differentiable in logp. Only the upper side of d can overflow, so
    only it is cut (at 20).
    """
    d = (ref_logp.detach().float() - logp.float()).clamp(max=MAX_LOG_RATIO)
    return torch.expm1(d) - d


def kl_reweight(credit: Tensor) -> Tensor:
    """Factor on the KL of each token, 0.5 + 0.5·clip(2 − 2w, 0, 1): half for credit ≥ 1 (arXiv 2605.29198)."""
    return 0.5 + 0.5 * (2 - 2 * credit).clamp(0, 1)


# averaging → weight of each token under uniform credit, from mask (B,T), sequences and tokens of the whole step
AVERAGING: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "sequence": lambda mask, sequences, tokens: mask / (mask.sum(dim=1, keepdim=True).clamp(min=1) * sequences),
    "token": lambda mask, sequences, tokens: mask / tokens,
}


def token_weights(credit: Tensor, mask: Tensor, averaging: str, total_sequences: float, total_tokens: float) -> Tensor:
    """Credit (B,T) with mean 1 per sample, mask (B,T) bool → weights (B,T) float32 that sum to 1 over the whole step.

    `sequence`: the mean over samples of the mean over their tokens (GRPO). `token`: the mean over all tokens (DAPO),
    so that longer samples weigh more. `total_sequences` (with at least one valid token) and `total_tokens` (valid
    ones) count the whole step, over all micro-batches and processes.
    """
    if averaging not in AVERAGING:
        raise unknown("averaging", averaging, AVERAGING)
    return credit.float() * AVERAGING[averaging](mask, total_sequences, total_tokens)


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    weight: Tensor,
    base_weight: Tensor,
    *,
    surrogate: SurrogateFn,
    clip_low: float,
    clip_high: float,
    ref_logp: Tensor | None = None,
    beta: float = 0.0,
    kl_factor: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss () of a micro-batch, to be minimised, and its metrics. The formula is at the head of this file.

    logp (B,T) with gradient; old_logp (B,T), equal to logp on the first update of a rollout; advantage (B,); mask
    (B,T) bool; weight and base_weight (B,T) from `token_weights` with the credit and with ones; ref_logp (B,T) of the
    frozen reference; kl_factor (B,T), for instance `kl_reweight(credit)`, None for 1; entropy (B,T) nats, with
    gradient if entropy_coef is not 0. No gradient flows into old_logp, ref_logp or the weights.

    Metrics, () without gradient: loss; ratio, clip_ratio (share of tokens whose gradient the clip took), and, where
    their tensors are given, kl (without kl_factor, not multiplied by beta) and entropy. Each is a sum weighted by
    base_weight, so over micro-batches and processes they *add up* to the mean over the step, like the loss.

    Raises ValueError for beta without ref_logp, and entropy_coef without entropy.
    """
    if beta and ref_logp is None:
        raise ValueError(f"beta {beta} needs ref_logp, the log-probs under the reference policy")
    if entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef {entropy_coef} needs entropy, the entropy of the policy at each token")

    weight, base_weight = weight.detach(), base_weight.detach()
    terms = surrogate(logp, old_logp, advantage, mask, clip_low, clip_high)
    loss = (terms.loss * weight).sum()
    metrics = {"ratio": (terms.ratio * base_weight).sum(), "clip_ratio": (terms.clipped * base_weight).sum()}
    if ref_logp is not None:
        kl = torch.where(mask, kl_k3(logp, ref_logp), 0.0) * base_weight
        loss = loss + beta * (kl if kl_factor is None else kl * kl_factor.detach()).sum()
        metrics["kl"] = kl.sum()
    if entropy is not None:
        spread = (torch.where(mask, entropy.float(), 0.0) * base_weight).sum()
        loss = loss - entropy_coef * spread
        metrics["entropy"] = spread
    metrics["loss"] = loss
    return loss, {name: value.detach() for name, value in metrics.items()}
