"""An algorithm is a row: a frozen record of pure functions. The training loop reads rows and knows no algorithm's name.

Any credit goes with any surrogate, averaging and advantage. A rule, surrogate or scale that is in no table works as
well: `dataclasses.replace(resolve("grpo"), credit=CreditRule(...))`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from gcpo_t2i.algo import unknown
from gcpo_t2i.algo.advantage import SCALES, group_advantage, has_spread
from gcpo_t2i.algo.credit import CREDITS, CreditRule, CreditSettings
from gcpo_t2i.algo.critical import CRITICAL, Selection, confidence_weight
from gcpo_t2i.algo.edits import all_failed
from gcpo_t2i.algo.loss import AVERAGING, SURROGATES, Surrogate


@dataclass(frozen=True)
class Algorithm:
    """One algorithm. Every field can be replaced by itself.

    Attributes:
        name: Its name in configs.
        paper: Title and arXiv id.
        advantage: Rewards (P,G) → advantage (P,G).
        credit: How the advantage of a sample is shared out over its tokens.
        surrogate: Which importance ratio the loss clips.
        averaging: Whether samples (`sequence`) or tokens (`token`) weigh the same.
        clip_low: The ratio is clipped below at 1 − clip_low.
        clip_high: The ratio is clipped above at 1 + clip_high.
        keep: Rewards (P,G) → (P,) bool, the groups worth an update; None keeps all. Where it is set, the rollout loop
            draws fresh prompts in place of the groups that it drops, up to a limit of its own.
        rescue: Success (P,G) bool → (P,) bool, the groups in which a reference of the prompt takes the place of the worst
            sample, after `keep` and before the advantage; None: no group.
        select: Which codes are learned from, by policy loss and KL alike; credit and averages are over them. None: all.
        reweight: Log-probs (B,T) of the policy and of the reference → factor (B,T) on the policy loss of each code; None: 1.
    """

    name: str
    paper: str
    advantage: Callable[[Tensor], Tensor] = group_advantage
    credit: CreditRule = CREDITS["uniform"]
    surrogate: Surrogate = SURROGATES["token"]
    averaging: str = "sequence"
    clip_low: float = SURROGATES["token"].clip_low
    clip_high: float = SURROGATES["token"].clip_high
    keep: Callable[[Tensor], Tensor] | None = None
    rescue: Callable[[Tensor], Tensor] | None = None
    select: Selection | None = None
    reweight: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.averaging not in AVERAGING:
            raise unknown("averaging", self.averaging, AVERAGING)
        if not (0 < self.clip_low <= 1 and self.clip_high > 0):
            raise ValueError(
                f"the clip range needs 0 < clip_low <= 1 and clip_high > 0, got {self.clip_low} and {self.clip_high}"
            )


_GRPO = Algorithm(
    "grpo", "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models, arXiv 2402.03300"
)

ROWS: dict[str, Algorithm] = {
    row.name: row
    for row in (
        _GRPO,
        Algorithm(
            "dapo",
            "DAPO: An Open-Source LLM Reinforcement Learning System at Scale, arXiv 2503.14476",
            averaging="token",
            clip_high=0.28,
            keep=has_spread,
        ),
        Algorithm(
            "gspo",
            "Group Sequence Policy Optimization, arXiv 2507.18071",
            surrogate=SURROGATES["sequence"],
            clip_low=SURROGATES["sequence"].clip_low,
            clip_high=SURROGATES["sequence"].clip_high,
        ),
        # These differ from grpo in the credit and in nothing else.
        replace(
            _GRPO,
            name="guidance_gcpo",
            paper="Guidance Contrastive Token Credit Assignment for Discrete Policy Optimization, arXiv 2605.29198",
            credit=CREDITS["guidance"],
        ),
        replace(
            _GRPO,
            name="random_credit",
            paper="none: the control for arXiv 2605.29198, its weights in the wrong places",
            credit=CREDITS["random"],
        ),
        replace(
            _GRPO,
            name="stage",
            paper="STAGE: Stable and Generalizable GRPO for Autoregressive Image Generation, arXiv 2509.25027",
            credit=CREDITS["stage"],
        ),
        replace(
            _GRPO,
            name="entropy_credit",
            paper="after Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning for LLM "
            "Reasoning, arXiv 2506.01939",
            credit=CREDITS["entropy"],
        ),
        Algorithm(
            "gold_gcpo",
            "GCPO: When Contrast Fails, Go Gold, arXiv 2510.07790",
            surrogate=SURROGATES["sequence"],
            clip_low=SURROGATES["sequence"].clip_low,
            clip_high=SURROGATES["sequence"].clip_high,
            rescue=all_failed,
        ),
        replace(
            _GRPO,
            name="critical_gcpo",
            paper="Group Critical-token Policy Optimization for Autoregressive Image Generation, arXiv 2509.22485",
            select=CRITICAL,
            reweight=confidence_weight,
        ),
    )
}

_Record = TypeVar("_Record")


def _pick(kind: str, name: str, table: Mapping[str, _Record]) -> _Record:
    if name not in table:
        raise unknown(kind, name, table)
    return table[name]


def resolve(
    name: str,
    *,
    credit: str | None = None,
    surrogate: str | None = None,
    averaging: str | None = None,
    clip_low: float | None = None,
    clip_high: float | None = None,
    advantage_scale: str | None = None,
) -> Algorithm:
    """The row called `name`, with single parts replaced; None keeps the row's own.

    Another surrogate brings its own clip range, unless one is given: a range of 0.2 would never clip a sequence ratio.

    Raises ValueError, with the nearest known name, for names that are in no table, and for an impossible clip range.
    """
    row = _pick("algorithm", name, ROWS)
    parts: dict[str, Any] = {}
    if credit is not None:
        parts["credit"] = _pick("credit rule", credit, CREDITS)
    if surrogate is not None and surrogate != row.surrogate.name:
        chosen = _pick("surrogate", surrogate, SURROGATES)
        parts |= {"surrogate": chosen, "clip_low": chosen.clip_low, "clip_high": chosen.clip_high}
    if advantage_scale is not None:
        _pick("advantage scale", advantage_scale, SCALES)
        parts["advantage"] = partial(group_advantage, scale=advantage_scale)
    given = {"averaging": averaging, "clip_low": clip_low, "clip_high": clip_high}
    return replace(row, **(parts | {key: value for key, value in given.items() if value is not None}))


def needs(algorithm: Algorithm, settings: CreditSettings, beta: float, entropy_reward: float = 0.0) -> frozenset[str]:
    """Names of what the rollout must provide: what credit and selection read, and `ref_logp` if anything is held against the
    reference: KL (beta > 0), the entropy reward, or the weights of the row.

    For the rows of this file a subset of {"cond_logp", "null_logp", "exact_kl", "js", "entropy", "advantage",
    "code_vectors", "ref_logp"}; a custom rule may name others.
    """
    selection = algorithm.select.needs if algorithm.select else frozenset()
    reference = beta > 0 or entropy_reward > 0 or algorithm.reweight is not None
    return algorithm.credit.needs(settings) | selection | ({"ref_logp"} if reference else set())
