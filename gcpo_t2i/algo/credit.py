"""Credit: how the advantage of a sample is shared out over its tokens. Weights ≥ 0, mean 1 over the valid tokens.

Guidance credit (arXiv 2605.29198): sampled tokens y are scored under the prompt x and under a null or negative prompt
x⁻, in float32 and without gradient, and the tokens on which the two disagree get the credit:

    a_t = log π(y_t | x, y_<t)      b_t = log π(y_t | x⁻, y_<t)
    contrast, by default k3, Schulman's estimate of KL(π(·|x) ‖ π(·|x⁻)):
        δ = clip(b − a, ±20)        η = exp(δ) − δ − 1
    normalizer, by default power_rank, which gives the share `top` of the tokens the share `mass` of the weight:
        p = rank(η) / N             w = p^α / mean(p^α)          α = ln(1 − mass) / ln(1 − top) − 1

Deviations from the published code: it clamps η to 10 *before* it ranks, and breaks ties by position, so that ten
equal tokens get weights from 0.02 to 2.71; here nothing is clamped before the ranking and equal evidence gets equal
credit (average ranks).

Two rules need no null prompt. Entropy: weights by how unsure the policy was of a code. STAGE (arXiv 2509.25027): an image
whose code agrees with those of images of opposite advantage would be pulled both ways there, so the credit goes to where
it differs from them:

    w_t = (1 − cos_t) / 2 over its mean         cos_t: mean cosine to the codes of those images (`groups`)

A new credit rule is a function with the signature `CreditFn` and a `CreditRule` that names it; `CREDITS` makes it
selectable by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gcpo_t2i.algo import unknown
from gcpo_t2i.algo.groups import opposite_similarity
from gcpo_t2i.algo.loss import kl_reweight

MAX_LOG_RATIO = 20.0

# --- full-vocabulary statistics, for the decoding engine, which has both rows of logits at hand -----------------------


def _log_softmax(logits: Tensor) -> Tensor:
    """(…,V) → float32 log-probs. A code that is ruled out (logit −inf) gets the lowest finite one: 0·log 0 is then
    0."""
    logp = logits.float().log_softmax(dim=-1)
    return logp.clamp(min=torch.finfo(logp.dtype).min)


def exact_kl(cond_logits: Tensor, null_logits: Tensor) -> Tensor:
    """KL(π(·|x) ‖ π(·|x⁻)) = Σ_v p_v (log p_v − log q_v) from two rows of logits (…,V) → (…) float32, nats, ≥ 0."""
    logp, null_logp = _log_softmax(cond_logits), _log_softmax(null_logits)
    return (logp.exp() * (logp - null_logp)).sum(dim=-1).clamp(min=0)  # rounding may leave −1e-8


def js(cond_logits: Tensor, null_logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence ½ KL(p ‖ m) + ½ KL(q ‖ m), m = ½(p + q).

    Two rows of logits (…,V) → (…) float32, nats, in [0, ln 2].
    """
    logp, null_logp = _log_softmax(cond_logits), _log_softmax(null_logits)
    middle = torch.logaddexp(logp, null_logp) - math.log(2)
    terms = logp.exp() * (logp - middle) + null_logp.exp() * (null_logp - middle)
    return 0.5 * terms.sum(dim=-1).clamp(min=0)


def entropy(logits: Tensor) -> Tensor:
    """−Σ_v p_v log p_v of logits (…,V) → (…) float32, nats, in [0, ln V]. Differentiable, for the entropy bonus."""
    return entropy_of(_log_softmax(logits))


def entropy_of(logp: Tensor) -> Tensor:
    """The entropy of normalized log-probs (…,V), in their precision: a product that autocast knows would lower it."""
    return -(logp.exp() * logp).sum(dim=-1)


# --- contrasts: rollout tensors (B,T) → evidence (B,T) ----------------------------------------------------------------

Tensors = Mapping[str, Tensor]


def _gap(tensors: Tensors) -> Tensor:
    """log π(y|x) − log π(y|x⁻), in float32 before the subtraction."""
    return tensors["cond_logp"].float() - tensors["null_logp"].float()


def _k3(tensors: Tensors) -> Tensor:
    delta = (-_gap(tensors)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (torch.expm1(delta) - delta).clamp(min=0)  # exp(δ) − 1 would lose every δ below 1e-4 to rounding


@dataclass(frozen=True)
class Contrast:
    """Evidence per token, and the names of the rollout tensors that it `needs`. `signed` evidence may be negative."""

    fn: Callable[[Tensors], Tensor]
    needs: frozenset[str]
    signed: bool = False


_BOTH = frozenset({"cond_logp", "null_logp"})

CONTRASTS: dict[str, Contrast] = {
    "k3": Contrast(_k3, _BOTH),
    "exact_kl": Contrast(lambda tensors: tensors["exact_kl"].float(), frozenset({"exact_kl"})),
    "abs": Contrast(lambda tensors: _gap(tensors).abs(), _BOTH),
    # pointwise mutual information: the most for what the prompt made likelier, the least for what it made unlikelier
    "log_ratio": Contrast(_gap, _BOTH, signed=True),
    "js": Contrast(lambda tensors: tensors["js"].float(), frozenset({"js"})),
}


# --- normalizers: evidence (B,T) → credit (B,T) -----------------------------------------------------------------------


def _average_ranks(evidence: Tensor, mask: Tensor) -> Tensor:
    """(B,T) → ranks 1…N among the N valid tokens of each sample, ties get the average of the ranks that they span.

    Infinite evidence has a rank; NaN stays NaN, so that a broken log-prob does not become a plausible weight.
    """
    values = torch.where(mask, evidence, torch.inf).contiguous()  # invalid tokens behind all others
    ordered = values.sort(dim=1).values
    below = torch.searchsorted(ordered, values)
    upto = torch.searchsorted(ordered, values, right=True)
    upto = torch.minimum(upto, mask.sum(dim=1, keepdim=True))
    return torch.where(values.isnan(), values, (below + upto + 1) / 2)


def _mean_one(weight: Tensor, mask: Tensor) -> Tensor:
    """Weights ≥ 0 → 0 at invalid tokens and mean 1 over the valid ones. A sample whose weights are all 0 gets 1
    each."""
    weight = torch.where(mask, weight, 0.0)
    total, count = weight.sum(dim=1, keepdim=True), mask.sum(dim=1, keepdim=True)
    return torch.where(total == 0, mask.float(), weight / total * count)


def _power_rank(evidence: Tensor, mask: Tensor, settings: CreditSettings) -> Tensor:
    alpha = math.log(1 - settings.mass) / math.log(1 - settings.top) - 1
    share = _average_ranks(evidence, mask) / mask.sum(dim=1, keepdim=True)
    return _mean_one(share.pow(alpha), mask)


def _mean(evidence: Tensor, mask: Tensor, settings: CreditSettings) -> Tensor:
    return _mean_one(evidence, mask)


def _softmax(evidence: Tensor, mask: Tensor, settings: CreditSettings) -> Tensor:
    scores = (evidence / settings.temperature).masked_fill(~mask, torch.finfo(evidence.dtype).min)
    return _mean_one(scores.softmax(dim=1), mask)


def _none(evidence: Tensor, mask: Tensor, settings: CreditSettings) -> Tensor:
    return torch.where(mask, evidence, 0.0)


@dataclass(frozen=True)
class Normalizer:
    """Evidence → credit. `signed`: it makes weights ≥ 0 also out of negative evidence."""

    fn: Callable[[Tensor, Tensor, CreditSettings], Tensor]
    signed: bool


NORMALIZERS: dict[str, Normalizer] = {
    "power_rank": Normalizer(_power_rank, signed=True),
    "mean": Normalizer(_mean, signed=False),
    "softmax": Normalizer(_softmax, signed=True),
    "none": Normalizer(_none, signed=False),
}


@dataclass(frozen=True)
class CreditSettings:
    """How token credit is computed from the two predictions.

    Attributes:
        contrast: Evidence per token. k3: low-variance KL estimate; exact_kl: KL over the whole vocabulary;
            abs: |log-ratio|; log_ratio: signed log-ratio; js: Jensen-Shannon divergence.
        normalizer: Evidence to weights with mean 1. power_rank: by rank, the share `top` of the tokens holds the
            share `mass` of the weight; mean: evidence over its mean; softmax: with `temperature`; none: the raw
            evidence, whose mean is not 1, so that it also scales the learning rate.
        top: Share of the tokens of a sample that holds the share `mass` of its credit (power_rank), between 0 and 1.
        mass: Share of the credit that those tokens hold (power_rank), from `top` (all equal) to below 1.
        temperature: Temperature of the softmax normalizer, in nats of evidence.
    """

    contrast: str = "k3"
    normalizer: str = "power_rank"
    top: float = 0.4
    mass: float = 0.8
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.contrast not in CONTRASTS:
            raise unknown("contrast", self.contrast, CONTRASTS)
        if self.normalizer not in NORMALIZERS:
            raise unknown("normalizer", self.normalizer, NORMALIZERS)
        if not 0 < self.top <= self.mass < 1:
            raise ValueError(f"credit needs 0 < top <= mass < 1, got top {self.top} and mass {self.mass}")
        if not self.temperature > 0:
            raise ValueError(f"credit temperature must be above 0, got {self.temperature}")
        if CONTRASTS[self.contrast].signed and not NORMALIZERS[self.normalizer].signed:
            raise ValueError(
                f"normalizer '{self.normalizer}' would make negative weights of the signed contrast "
                f"'{self.contrast}'; use the normalizer power_rank or softmax, or the contrast abs"
            )


# --- rules ------------------------------------------------------------------------------------------------------------

Generators = Sequence[torch.Generator]  # one for each sample: its draws do not depend on the batch that it is in
CreditFn = Callable[[Tensors, Tensor, CreditSettings, Generators], Tensor]


def evidence(tensors: Tensors, mask: Tensor, settings: CreditSettings) -> Tensor:
    """The contrast before normalisation: tensors (B,T) → (B,T) float32 without gradient, 0 at invalid tokens.

    Raises ValueError if `tensors` lacks one that the contrast needs.
    """
    contrast = CONTRASTS[settings.contrast]
    if missing := contrast.needs - tensors.keys():
        raise ValueError(
            f"the contrast '{settings.contrast}' needs {', '.join(sorted(missing))}, "
            f"the rollout has {', '.join(sorted(tensors)) or 'nothing'}"
        )
    return torch.where(mask, contrast.fn(tensors).detach(), 0.0)


def uniform_credit(tensors: Tensors, mask: Tensor, settings: CreditSettings, generators: Generators) -> Tensor:
    """Every valid token gets 1: plain GRPO."""
    return mask.float()


def guidance_credit(tensors: Tensors, mask: Tensor, settings: CreditSettings, generators: Generators) -> Tensor:
    """Tokens get credit by how much the prompt changed their prediction (arXiv 2605.29198, see the head of this file).

    tensors (B,T) log-probs or divergences in nats, mask (B,T) bool → credit (B,T) float32, ≥ 0, 0 at invalid tokens,
    mean 1 over the valid tokens of each sample (except under the normalizer `none`). If all evidence of a sample is
    equal, for instance since the negative prompt is the prompt, its credit is uniform.
    """
    return NORMALIZERS[settings.normalizer].fn(evidence(tensors, mask, settings), mask, settings)


def random_credit(tensors: Tensors, mask: Tensor, settings: CreditSettings, generators: Generators) -> Tensor:
    """The control: the weights of `guidance_credit`, shuffled over the valid positions of each sample.

    The draws are made on the generators' devices, so that CPU generators give the same shuffle everywhere.
    """
    credit = guidance_credit(tensors, mask, settings, generators)
    rows = [torch.rand(mask.shape[1], generator=own, device=own.device) for own in generators]
    draw = torch.stack(rows).to(mask.device)
    source = draw.masked_fill(~mask, 2.0).argsort(dim=1)  # the valid positions in random order, then the invalid ones
    target = (~mask).to(torch.uint8).argsort(dim=1, stable=True)  # the valid positions in order, then the invalid ones
    return torch.empty_like(credit).scatter_(1, target, credit.gather(1, source))


def entropy_credit(tensors: Tensors, mask: Tensor, settings: CreditSettings, generators: Generators) -> Tensor:
    """The less sure the policy was of a code, the more credit; the normalizer says how much.

    After arXiv 2506.01939, which trains a language model on the 20 % of its tokens with the highest entropy alone. Needs
    `entropy` (B,T) of the distribution that sampled.
    """
    return NORMALIZERS[settings.normalizer].fn(tensors["entropy"].float(), mask, settings)


def dissimilarity(tensors: Tensors) -> Tensor:
    """(1 − cos)/2 in [0, 1], (B,T) float32, from `code_vectors` (P,G,H,W,D) and `advantage` (P,G)."""
    return (1 - opposite_similarity(tensors["code_vectors"], tensors["advantage"])) / 2


def stage_credit(tensors: Tensors, mask: Tensor, settings: CreditSettings, generators: Generators) -> Tensor:
    """Codes get credit by how much they differ from those of images of opposite advantage (arXiv 2509.25027).

    Contrast and normalizer do not apply: the paper's weights are the dissimilarities themselves. Deviations from the
    published code: it divides them by their mean over the group, so that an image which differs more weighs more, and
    here by the mean of the image; where all of a group failed alike it counts an image among its own opposites.
    """
    return _mean_one(dissimilarity(tensors), mask)


@dataclass(frozen=True)
class CreditRule:
    """A way to share out the advantage.

    Attributes:
        name: Its name in configs.
        fn: Tensors of the rollout → credit (B,T).
        needs: Names of the tensors that `fn` reads under given settings: (B,T) ones of the rollout, `advantage` (P,G), or
            `code_vectors` (P,G,H,W,D), the image tokenizer's vectors of the codes.
        kl_factor: The same tensors, and the credit → factor (B,T) on the KL of each token, where `kl_reweight` is on.
    """

    name: str
    fn: CreditFn
    needs: Callable[[CreditSettings], frozenset[str]]
    kl_factor: Callable[[Tensors, Tensor], Tensor] = lambda tensors, credit: kl_reweight(credit)


def _contrast_needs(settings: CreditSettings) -> frozenset[str]:
    return CONTRASTS[settings.contrast].needs


CREDITS: dict[str, CreditRule] = {
    "uniform": CreditRule("uniform", uniform_credit, lambda settings: frozenset()),
    "guidance": CreditRule("guidance", guidance_credit, _contrast_needs),
    "random": CreditRule("random", random_credit, _contrast_needs),
    "entropy": CreditRule("entropy", entropy_credit, lambda settings: frozenset({"entropy"})),
    "stage": CreditRule(
        "stage",
        stage_credit,
        lambda settings: frozenset({"code_vectors", "advantage"}),
        # on the dissimilarity itself: 1 for cos ≥ 0, falling to 1/2 where the code is the opposite of the others'
        kl_factor=lambda tensors, credit: kl_reweight(dissimilarity(tensors)),
    ),
}


def top_mass(credit: Tensor, mask: Tensor, top: float = 0.4) -> Tensor:
    """Share of its credit that the heaviest `top` of a sample's tokens hold: (B,T) ≥ 0 → (B,) in [top, 1].

    Uniform credit gives `top`. The token on the border counts in part: with T = 144 and top = 0.4 the 57 heaviest count
    whole and the next one to 0.6. A sample without valid tokens gives 0.
    """
    ordered = torch.where(mask, credit.float(), 0.0).sort(dim=1, descending=True).values
    wanted = top * mask.sum(dim=1, keepdim=True)  # (B,1), in tokens
    counted = (wanted - torch.arange(mask.shape[1], device=mask.device)).clamp(0, 1)
    total = ordered.sum(dim=1)
    return torch.where(total == 0, total, (ordered * counted).sum(dim=1) / total)
