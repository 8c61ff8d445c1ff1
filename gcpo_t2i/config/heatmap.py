"""Settings of `gcpo-t2i heatmap`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from gcpo_t2i.config.base import ConfigError, bounded
from gcpo_t2i.config.train import CreditConfig, RewardConfig, check_known, check_reward_names, default_rewards

OF_SAMPLING = ("num_images", "guidance", "seed")


@dataclass
class HeatmapConfig:
    """Credit maps of one prompt's images."""

    prompt: str = "a photo of a red circle and a blue square"
    """What the images should show."""
    negative: str | None = None
    """What the prompt is compared with, and what guidance leads away from; null = the model's own empty prompt."""
    model: str = "shapesworld"
    """shapesworld (the model that ships with the package) or a policy folder, such as a run's."""
    compare: str | None = None
    """A second model, drawn above the first with the same seed: what training changed."""
    image: str | None = None
    """Explain this picture (PNG, JPEG, WEBP, GIF, BMP) instead of sampling: where is the prompt in it?"""
    phrases: list[str] = field(default_factory=list)
    """Words of the prompt, each for one more map: where does the model act differently without them?"""
    num_images: int = bounded(4, "> 0")
    """Size of the group, whose images are compared with each other."""
    guidance: float = bounded(2.0, ">= 0")
    """Scale of classifier-free guidance; 1 = none."""
    temperature: float = bounded(1.0, "> 0")
    """Temperature of sampling and of the predictions that are compared."""
    seed: int = bounded(0, ">= 0")
    """Same seed, same images; those of gcpo-t2i sample."""
    contrast: str = CreditConfig.contrast
    """How the predictions with and without the prompt are compared: k3, exact_kl, abs, log_ratio or js."""
    normalizer: str = CreditConfig.normalizer
    """How contrasts become weights with mean 1: power_rank, mean, softmax or none."""
    top: float = bounded(CreditConfig.top, "in (0, 1)")
    """power_rank: this share of an image's tokens ..."""
    mass: float = bounded(CreditConfig.mass, "in (0, 1)")
    """power_rank: ... holds this share of its credit."""
    credit_temperature: float = bounded(CreditConfig.temperature, "> 0")
    """softmax: temperature, in nats; higher is more uniform."""
    rewards: list[RewardConfig] = field(default_factory=default_rewards)
    """What the advantage is made of, as for train. geneval judges prompts in the words of ShapesWorld."""
    out: str = "heatmaps"
    """Folder for the figure, the single maps and the arrays."""
    overwrite: bool = False
    """Replace the heatmaps that are already there."""
    device: str | None = None
    """cpu, cuda or cuda:N; null = cuda if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the model's layers; auto = bfloat16 where the device multiplies it, else float32."""

    def check(self) -> None:
        self.credit()
        check_reward_names("rewards", self.rewards)
        if not self.rewards:
            raise ConfigError("rewards", "rewards: at least one is needed, or no image would have an advantage")
        if self.image is not None:
            default = type(self)()
            for name in OF_SAMPLING:
                if getattr(self, name) != getattr(default, name):
                    raise ConfigError(
                        name, f"--{name} is for sampling, and --image is explained as it is; drop one of the two"
                    )

    def credit(self) -> Any:
        """The `algo.credit.CreditSettings`; imports torch. ConfigError for unknown names and what does not go together."""
        from gcpo_t2i.algo import credit

        check_known(
            {"contrast": (self.contrast, credit.CONTRASTS), "normalizer": (self.normalizer, credit.NORMALIZERS)}
        )
        try:
            return credit.CreditSettings(self.contrast, self.normalizer, self.top, self.mass, self.credit_temperature)
        except ValueError as error:
            raise ConfigError("contrast", str(error)) from error
