"""Settings of `gcpo-t2i compare`: which runs, and what they share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from gcpo_t2i.config.base import ConfigError, bounded, validate
from gcpo_t2i.config.cot import CotTrainConfig
from gcpo_t2i.config.train import TrainConfig


@dataclass
class CompareConfig:
    """The comparison."""

    of: Literal["images", "texts"] = "images"
    """What is trained: models that draw, as gcpo-t2i train does, or models that reason, as gcpo-t2i cot train does."""
    algorithms: list[str] = field(default_factory=lambda: ["grpo", "dapo", "gspo", "guidance_gcpo", "random_credit"])
    """Algorithms to compare, one run for each of them and each seed."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the runs; the same for every algorithm, so that scores can be paired."""
    output_dir: str = "runs/compare"
    """Folder for the runs, the table and the figure; a comparison that is there already goes on."""
    jobs: int = bounded(0, ">= 0")
    """Runs at a time; 0 = as many as the CPU cores allow, or one for each GPU."""
    threads: int = bounded(1, "> 0")
    """CPU threads of each run."""
    train: TrainConfig = field(default_factory=TrainConfig)
    cot: CotTrainConfig = field(default_factory=CotTrainConfig)

    @property
    def group(self) -> str:
        """The name of the settings that the runs share."""
        return {"images": "train", "texts": "cot"}[self.of]

    @property
    def runs(self) -> TrainConfig | CotTrainConfig:
        """These settings."""
        return {"images": self.train, "texts": self.cot}[self.of]

    def check(self) -> None:
        for key, values in {"algorithms": self.algorithms, "seeds": self.seeds}.items():
            if not values:
                raise ConfigError(key, f"{key}: at least one is needed")
            for value in values:
                if values.count(value) > 1:
                    raise ConfigError(key, f"{key}: {value} is there twice")
        group, runs = self.group, self.runs
        for key in ("resume", "overwrite"):
            if getattr(runs, key):
                raise ConfigError(
                    f"{group}.{key}", f"{group}.{key}: finished runs stay and others go on by themselves; drop it"
                )
        for algorithm in self.algorithms:
            try:
                validate(replace(runs, algorithm=algorithm, seed=min(self.seeds)))
            except ConfigError as error:
                key = {"algorithm": "algorithms", "seed": "seeds"}.get(error.key, f"{group}.{error.key}")
                raise ConfigError(key, f"{key}: {error}") from error
