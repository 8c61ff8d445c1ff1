"""Settings of `gcpo-t2i rewards check`."""

from __future__ import annotations

from dataclasses import dataclass, field

from gcpo_t2i.config.base import bounded
from gcpo_t2i.config.train import RewardConfig, default_eval_rewards, default_rewards


@dataclass
class MoreRewardsConfig:
    """The rewards of another part of a training config."""

    rewards: list[RewardConfig] = field(default_factory=list)
    """More rewards to check, as --config finds them in a training config."""


@dataclass
class RewardsCheckConfig:
    """What rewards say about images that are known."""

    rewards: list[RewardConfig] = field(default_factory=lambda: [*default_rewards(), *default_eval_rewards()])
    """A list of {name, weight, kwargs}, as for train; by default all that training and its evaluation use."""
    eval: MoreRewardsConfig = field(default_factory=MoreRewardsConfig)
    images: str | None = None
    """A .jsonl file with your own known good images: a prompt, its image (a path beside the file), and whatever columns the
    rewards use, per line; null = scenes of ShapesWorld."""
    num_images: int = bounded(48, "> 0")
    """Images of each kind: good, bad, blank, noise."""
    seed: int = bounded(0, ">= 0")
    """Same seed, same images."""
    device: str | None = None
    """cpu, cuda or cuda:N; null = cuda if there is one."""
