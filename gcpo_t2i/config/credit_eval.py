"""Settings of `gcpo-t2i credit-eval`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gcpo_t2i.config.base import ConfigError, bounded
from gcpo_t2i.config.train import RewardConfig, check_reward_names, default_rewards

Truth = Literal["objects", "phrases", "advantage"]


@dataclass
class CreditEvalConfig:
    """Credit maps, held against the truth."""

    model: str = "shapesworld"
    """Whose credit is measured: shapesworld (the model that ships with the package) or a policy folder."""
    truths: list[Truth] = field(default_factory=lambda: ["objects", "phrases", "advantage"])
    """What maps are held against: objects (where they are), phrases (where the object is that a phrase names), advantage (which
    tokens decided the reward; the one that takes its time). The first two need a model of ShapesWorld's images."""
    prompts: str = "shapesworld:train"
    """shapesworld:train, whose prompts get credit in training, shapesworld:heldout, or a .txt or .jsonl file."""
    scenes_per_tag: int = bounded(50, "> 0")
    """Scenes that are drawn for prompts of each tag, whose objects are known exactly."""
    images_per_tag: int = bounded(40, "> 0")
    """Images that the model makes for prompts of each tag."""
    continuations: int = bounded(64, "> 0")
    """How exact values are: at least as exact as a mean over so many continuations from every prefix of every image. Only those
    that leave their image at once need to be drawn."""
    rewards: list[RewardConfig] = field(default_factory=default_rewards)
    """What the advantage is of: a list of {name, weight, kwargs}, as in training."""
    guidance: float = bounded(2.0, ">= 0")
    """Scale of classifier-free guidance while sampling; 1 = none."""
    temperature: float = bounded(1.0, "> 0")
    """Sampling temperature."""
    batch_size: int = bounded(64, "> 0")
    """Images sampled at a time."""
    seed: int = bounded(0, ">= 0")
    """Same seed and settings, same numbers."""
    output_dir: str = "runs/credit-eval"
    """Folder for what is sampled and found; what is there already goes on."""
    device: str | None = None
    """cpu, cuda or cuda:N; null = cuda if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the model's layers; auto = bfloat16 where the device multiplies it, else float32."""

    def check(self) -> None:
        if not self.truths:
            raise ConfigError("truths", "truths: at least one of objects, phrases, advantage is needed")
        check_reward_names("rewards", self.rewards)
