"""Settings of `gcpo-t2i demo`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gcpo_t2i.config.base import ConfigError, bounded
from gcpo_t2i.config.train import RewardConfig, default_rewards


def shown_rewards() -> list[RewardConfig]:
    """The reward of training, which alone makes the advantage, and two more to look at."""
    return [*default_rewards(), RewardConfig("clip", weight=0.0), RewardConfig("aesthetic", weight=0.0)]


@dataclass
class DemoConfig:
    """A page in the browser that shows the credit."""

    model: str = "shapesworld"
    """shapesworld (the model that ships with the package) or a policy folder, such as a run's."""
    runs_dir: str = "runs"
    """Training runs below this folder can be looked at, and their policies compared with the model."""
    rewards: list[RewardConfig] = field(default_factory=shown_rewards)
    """What images are scored with, as for train; a reward of weight 0 is shown, but makes no advantage."""
    host: str = "127.0.0.1"
    """Address to listen on; 127.0.0.1 = this machine only, 0.0.0.0 = everybody who can reach it, who should need --auth."""
    port: int | None = None
    """Port to listen on; null = the first free one from 7860 on."""
    auth: str | None = None
    """USER:PASSWORD that visitors must give, or a file with one such line per user, which no process list shows."""
    max_images: int = bounded(16, "> 0")
    """Largest group that a visitor can ask for."""
    queue: int = bounded(20, "> 0")
    """Requests that may wait; the model works on one at a time, and more are turned away."""
    device: str | None = None
    """cpu, cuda or cuda:N; null = cuda if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the model's layers; auto = bfloat16 where the device multiplies it, else float32."""

    def check(self) -> None:
        if self.port is not None and not 0 < self.port < 65536:
            raise ConfigError("port", f"port must be between 1 and 65535, not {self.port}")
        if not self.rewards:
            raise ConfigError("rewards", "rewards: at least one is needed, or no image would have an advantage")
        self.users()

    def users(self) -> list[tuple[str, str]] | None:
        """(user, password) of all who may see the page, None if everybody may. ConfigError, which shows no password."""
        if self.auth is None:
            return None
        try:
            is_file = Path(self.auth).is_file()
            text = Path(self.auth).read_text(encoding="utf-8") if is_file else self.auth
        except (OSError, ValueError) as error:
            raise ConfigError("auth", "the file for --auth cannot be read as text") from error
        users = []
        for line in filter(None, map(str.strip, text.splitlines())):
            user, colon, password = line.partition(":")
            if not (user and colon and password):
                raise ConfigError("auth", "auth must be USER:PASSWORD, or a file with such lines")
            users.append((user, password))
        if not users:
            raise ConfigError("auth", "auth names no user; give USER:PASSWORD, or a file with such lines")
        return users
