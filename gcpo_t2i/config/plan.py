"""Settings of `gcpo-t2i plan`: those of `train`, so that a run's command line can be planned by changing one word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gcpo_t2i.config.base import ConfigError, bounded
from gcpo_t2i.config.train import TrainConfig, share_of_prompts


@dataclass
class PlanConfig(TrainConfig):
    """A run before it is started."""

    processes: int = bounded(1, "> 0")
    """Processes (GPUs) that the run is to be started on."""
    sharded: bool = False
    """Spread what learns, and the reference, over the processes, as configs/accelerate/fsdp2.yaml does."""
    measure: bool = True
    """Load the model and time pieces of a step here; false = counts and memory only, also for a device that is not here."""
    gpu: Literal["a100", "h100", "h200"] | None = None
    """In place of device and measure: a GPU that is not here (80, 80 and 141 GB), by its data sheet. Says whether memory does,
    and how long a step takes at least."""
    json: bool = False
    """Print JSON instead of tables."""

    def check(self) -> None:
        super().check()
        share_of_prompts(self.prompts_per_step, self.processes)
        if self.gpu and self.device:
            raise ConfigError("gpu", f"gpu {self.gpu} takes the place of device {self.device!r}; drop one of them")
        if self.sharded and (self.processes == 1 or self.lora.rank is not None):
            raise ConfigError("sharded", "sharded needs processes above 1, and weights that are trained (no lora.rank)")
