"""Settings of `gcpo-t2i rewards serve`."""

from __future__ import annotations

from dataclasses import dataclass, field

from gcpo_t2i.config.base import ConfigError, bounded
from gcpo_t2i.config.train import RewardConfig, check_reward_names, default_rewards


@dataclass
class RewardsServeConfig:
    """Rewards for several trainers, over HTTP."""

    rewards: list[RewardConfig] = field(default_factory=default_rewards)
    """A list of {name, kwargs}, as for train; weights are the trainers' business."""
    host: str = "127.0.0.1"
    """Address to listen at. There is no password: open another than 127.0.0.1 (0.0.0.0 = all) in a trusted network only."""
    port: int = bounded(8000, ">= 0")
    """Port to listen at; 0 = any free one."""
    device: str | None = None
    """cpu, cuda or cuda:N; null = cuda if there is one."""

    def check(self) -> None:
        if not self.rewards:
            raise ConfigError("rewards", "rewards: at least one is needed, or there is nothing to serve")
        if self.port > 65535:
            raise ConfigError("port", f"port must be at most 65535, not {self.port}")
        check_reward_names("rewards", self.rewards)
