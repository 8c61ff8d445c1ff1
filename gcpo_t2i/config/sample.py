"""Settings of `gcpo-t2i sample`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gcpo_t2i.config.base import ConfigError, bounded


@dataclass
class SampleConfig:
    """Images from prompts."""

    model: str = "shapesworld"
    """shapesworld (the model that ships with the package) or a policy folder, such as a run's."""
    prompt: str | None = None
    """The prompt; or give a file with prompts."""
    prompts: str | None = None
    """Many prompts: shapesworld:heldout, shapesworld:train, or a .txt or .jsonl file."""
    negative: str | None = None
    """What guidance leads away from; null = the model's own empty prompt. A prompt's own (.jsonl) goes first."""
    num_images: int = bounded(4, "> 0")
    """Images per prompt."""
    batch_size: int = bounded(32, "> 0")
    """Images sampled at a time."""
    guidance: float = bounded(2.0, ">= 0")
    """Scale of classifier-free guidance; 1 = none."""
    temperature: float = bounded(1.0, "> 0")
    """Sampling temperature."""
    top_k: int = bounded(0, ">= 0")
    """Sample among the k most likely codes; 0 = all."""
    top_p: float = bounded(1.0, "in (0, 1]")
    """Sample among the most likely codes that together hold this probability; 1 = all."""
    seed: int = bounded(0, ">= 0")
    """Same seed, same images."""
    out: str = "samples"
    """Folder for the images and their grid."""
    overwrite: bool = False
    """Replace images that are already there."""
    device: str | None = None
    """cpu, cuda or cuda:N; null = cuda if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the model's layers; auto = bfloat16 where the device multiplies it, else float32."""

    def check(self) -> None:
        if (self.prompt is None) == (self.prompts is None):
            raise ConfigError("prompt", "give either --prompt 'a photo of a red circle' or --prompts FILE")
