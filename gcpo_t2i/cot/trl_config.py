"""`GuidanceGRPOConfig`: TRL's GRPOConfig and the settings of credit, negative prompts and gold answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import GRPOConfig

from gcpo_t2i.algo.credit import CreditSettings
from gcpo_t2i.cot.negatives import WRONG_ON_PURPOSE, check_template
from gcpo_t2i.cot.text_credit import TextCredit


@dataclass
class GuidanceGRPOConfig(GRPOConfig):
    """TRL's settings, all with TRL's defaults, and a few more."""

    credit: str = field(
        default="guidance",
        metadata={
            "help": "How the advantage is shared out over tokens: guidance, uniform (TRL's own), random or entropy."
        },
    )
    credit_contrast: str = field(
        default=CreditSettings.contrast, metadata={"help": "Evidence per token: k3, abs or log_ratio."}
    )
    credit_normalizer: str = field(
        default=CreditSettings.normalizer,
        metadata={"help": "Evidence to weights with mean 1: power_rank, mean, softmax or none."},
    )
    credit_top: float = field(
        default=CreditSettings.top, metadata={"help": "power_rank: this share of an answer's tokens ..."}
    )
    credit_mass: float = field(
        default=CreditSettings.mass, metadata={"help": "power_rank: ... holds this share of its credit."}
    )
    credit_temperature: float = field(
        default=CreditSettings.temperature, metadata={"help": "softmax: temperature, in nats of evidence."}
    )
    negative_template: str = field(
        default=WRONG_ON_PURPOSE,
        metadata={
            "help": "The negative prompt, with the question in the place of {question}; '' for the empty prompt."
        },
    )
    negative_column: str | None = field(
        default=None, metadata={"help": "Column of the data with negative prompts, in place of the template."}
    )
    gold_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the data with right answers, texts or messages. In a group without a success one takes the "
            "place of the answer with the lowest reward (arXiv 2510.07790)."
        },
    )
    success_reward: float = field(
        default=1.0,
        metadata={"help": "gold_column: an answer is right if the weighted sum of its rewards is at least this."},
    )

    def __post_init__(self):
        super().__post_init__()
        check_template(self.negative_template)
        self.text_credit()

    def text_credit(self) -> TextCredit:
        """The credit rule. UserError for unknown names and what does not go together."""
        return TextCredit.of(
            self.credit,
            self.credit_contrast,
            self.credit_normalizer,
            self.credit_top,
            self.credit_mass,
            self.credit_temperature,
        )
