"""Credit for the tokens of a text: which rules and contrasts a text has the tensors for, and their call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gcpo_t2i.algo import unknown
from gcpo_t2i.algo.credit import CREDITS, CreditRule, CreditSettings
from gcpo_t2i.errors import UserError
from gcpo_t2i.seeds import generators

TENSORS = frozenset({"cond_logp", "null_logp", "entropy"})  # what teacher forcing gives without whole rows of logits


@dataclass(frozen=True)
class TextCredit:
    """A credit rule for texts. UserError for names that are in no table, and for rules that need more than `TENSORS`."""

    rule_name: str = "guidance"
    settings: CreditSettings = field(default_factory=CreditSettings)

    def __post_init__(self) -> None:
        if self.rule_name not in CREDITS:
            raise UserError(str(unknown("credit rule", self.rule_name, CREDITS)))
        if missing := self.needs - TENSORS:
            raise UserError(
                f"credit '{self.rule_name}' with contrast '{self.settings.contrast}' needs {', '.join(sorted(missing))}, "
                "which texts do not have; use the credit uniform, guidance, random or entropy with the contrast k3, abs or "
                "log_ratio"
            )

    @classmethod
    def of(cls, rule: str, contrast: str, normalizer: str, top: float, mass: float, temperature: float) -> TextCredit:
        """From single settings; UserError for those that do not go together."""
        try:
            return cls(rule, CreditSettings(contrast, normalizer, top, mass, temperature))
        except ValueError as error:
            raise UserError(str(error)) from error

    @property
    def rule(self) -> CreditRule:
        return CREDITS[self.rule_name]

    @property
    def needs(self) -> frozenset[str]:
        return self.rule.needs(self.settings)

    def __call__(
        self, score: Callable[[str], Tensor], mask: Tensor, seed: int, places: Iterable[tuple[int, ...]]
    ) -> Tensor:
        """Credit (B,T) float32 from `score`, which gives a tensor (B,T) by its name, and mask (B,T) bool.

        `places` tell each sample from all others of the run; the control's shuffles follow from them and the seed.
        """
        tensors = {name: score(name) for name in sorted(self.needs)}
        with torch.no_grad():
            return self.rule.fn(tensors, mask, self.settings, generators(seed, places))
