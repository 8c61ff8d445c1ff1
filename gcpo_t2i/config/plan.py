"""Settings of `gcpo-t2i plan`: those of `train`, so that a run's command line can be planned by changing one word."""

from __future__ import annotations

from dataclasses import dataclass

from gcpo_t2i.config.base import bounded
from gcpo_t2i.config.train import TrainConfig, share_of_prompts


@dataclass
class PlanConfig(TrainConfig):
    """A run before it is started."""

    processes: int = bounded(1, "> 0")
    """Processes (GPUs) that the run is to be started on."""
    measure: bool = True
    """Load the model and time pieces of a step here; false = counts and memory only, also for a device that is not here."""
    json: bool = False
    """Print JSON instead of tables."""

    def check(self) -> None:
        super().check()
        share_of_prompts(self.prompts_per_step, self.processes)
