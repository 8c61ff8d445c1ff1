"""Settings of `gcpo-t2i probe`: those of a training run."""

from __future__ import annotations

from dataclasses import dataclass

from gcpo_t2i.config.base import ConfigError, bounded
from gcpo_t2i.config.train import TrainConfig

FEWEST, MOST = 10, 30  # steps: fewer do not rise out of the noise, more are a training


@dataclass
class ProbeConfig(TrainConfig):
    """The run to probe."""

    output_dir: str | None = None
    """Folder for metrics, images and the verdict; null = a new one among the machine's temporary files."""
    steps: int = bounded(20, "> 0")
    """Optimizer steps of the probe, 10 to 30."""

    def check(self) -> None:
        if not FEWEST <= self.steps <= MOST:
            raise ConfigError(
                "steps",
                f"steps: a probe takes {FEWEST} to {MOST}, not {self.steps}; add --steps 20, which wins over files",
            )
        if self.resume:
            raise ConfigError("resume", "resume: a probe always starts anew; drop it")
        super().check()
