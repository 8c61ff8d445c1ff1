"""Settings of `gcpo-t2i compare`: which runs, and what they share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from gcpo_t2i.config.base import ConfigError, bounded, validate
from gcpo_t2i.config.train import TrainConfig


@dataclass
class CompareConfig:
    """The comparison."""

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

    def check(self) -> None:
        for key, values in {"algorithms": self.algorithms, "seeds": self.seeds}.items():
            if not values:
                raise ConfigError(key, f"{key}: at least one is needed")
            for value in values:
                if values.count(value) > 1:
                    raise ConfigError(key, f"{key}: {value} is there twice")
        for key in ("resume", "overwrite"):
            if getattr(self.train, key):
                raise ConfigError(
                    f"train.{key}", f"train.{key}: finished runs stay and others go on by themselves; drop it"
                )
        for algorithm in self.algorithms:
            try:
                validate(replace(self.train, algorithm=algorithm, seed=min(self.seeds)))
            except ConfigError as error:
                key = {"algorithm": "algorithms", "seed": "seeds"}.get(error.key, f"train.{error.key}")
                raise ConfigError(key, f"{key}: {error}") from error
