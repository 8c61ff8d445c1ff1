"""Settings of `gcpo-t2i eval`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from gcpo_t2i.config.base import ConfigError, bounded, check_resume
from gcpo_t2i.config.train import RewardConfig, check_reward_names, default_eval_rewards

DEFAULT_PROMPTS = "shapesworld:heldout"
OF_IMAGES = {"prompts", "images", "against", "output_dir", "batch_size", "rewards", "resume", "overwrite", "device"}
OF_RESULTS = {"results", "against"}


@dataclass
class EvaluationConfig:
    """A policy, or a folder of images, scored on prompts in GenEval's format."""

    model: str = "shapesworld"
    """What is evaluated: shapesworld (the model that ships with the package) or a policy folder."""
    images: str | None = None
    """Instead of a model: a folder of images in GenEval's layout, whoever made them."""
    results: str | None = None
    """Instead of a model: the folder of a finished evaluation, to show it again or to compare it."""
    against: str | None = None
    """Compare with the finished evaluation in this folder, prompt by prompt and seed by seed."""
    prompts: str | None = None
    """shapesworld:heldout, shapesworld:train, or a .jsonl file in GenEval's format, or a .txt file with a prompt per line; null
    = shapesworld:heldout, or those in the folder of images."""
    prompts_per_tag: int | None = bounded(None, "> 0")
    """At most so many prompts of each tag, a fixed choice; null = all."""
    samples_per_prompt: int = bounded(4, "> 0")
    """Images per prompt."""
    batch_size: int = bounded(60, "> 0")
    """Images sampled at a time, and scored at a time; no image's seed depends on it."""
    guidance: float = bounded(2.0, ">= 0")
    """Scale of classifier-free guidance; 1 = none."""
    temperature: float = bounded(1.0, "> 0")
    """Sampling temperature."""
    top_k: int = bounded(0, ">= 0")
    """Sample among the k most likely codes; 0 = all."""
    top_p: float = bounded(1.0, "in (0, 1]")
    """Sample among the most likely codes that together hold this probability; 1 = all."""
    seed: int = bounded(0, ">= 0")
    """Each image's own seed follows from this one, the number of its prompt and its number among that prompt's images."""
    rewards: list[RewardConfig] = field(default_factory=default_eval_rewards)
    """Scores to report; their weights are not used."""
    output_dir: str | None = None
    """Folder for images, results and recipe; null = the first unused evals/MODEL-N."""
    resume: bool = False
    """Go on with the evaluation in output_dir, with its settings unless they are given again; images that are there stay."""
    overwrite: bool = False
    """Delete the evaluation in output_dir."""
    device: str | None = None
    """cpu, cuda or cuda:N; null = cuda if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the model's layers; auto = bfloat16 where the device multiplies it, else float32."""

    def check(self) -> None:
        if self.results is not None:
            self._allow_only(OF_RESULTS, "results", "were chosen when these results were made")
        elif self.images is not None:
            self._allow_only(OF_IMAGES, "images", "were chosen when these images were made")
        check_resume(self.resume, self.overwrite, self.output_dir)
        check_reward_names("rewards", self.rewards)
        if not self.rewards:
            raise ConfigError("rewards", "rewards: at least one is needed, or nothing would be scored")

    def _allow_only(self, allowed: set[str], source: str, why: str) -> None:
        default = type(self)()
        for name in (item.name for item in fields(self) if item.name not in allowed):
            if getattr(self, name) != getattr(default, name):
                raise ConfigError(
                    name, f"--{name} does not go with --{source}: such settings {why}; drop one of the two"
                )
