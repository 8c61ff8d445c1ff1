"""Settings of `gcpo-t2i pretrain`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gcpo_t2i.config.base import bounded, check_resume


@dataclass
class PretrainConfig:
    """The checkpoints that ship with the package, made again from nothing."""

    stage: Literal["all", "vq", "generator", "clip", "aesthetic", "reasoner"] = "all"
    """What to train, or all: aesthetic needs clip, clip and generator need vq, and reasoner is for itself."""
    output_dir: str = "checkpoints"
    """Folder for the checkpoints."""
    vq_steps: int = bounded(1500, "> 0")
    """Optimizer steps of the image tokenizer."""
    generator_steps: int = bounded(4100, "> 0")
    """Optimizer steps of the generator."""
    clip_steps: int = bounded(2500, "> 0")
    """Optimizer steps of the tiny CLIP."""
    aesthetic_steps: int = bounded(1000, "> 0")
    """Optimizer steps of the aesthetic head."""
    reasoner_steps: int = bounded(2000, "> 0")
    """Optimizer steps of the language model that does arithmetic in words."""
    seed: int = bounded(0, ">= 0")
    """Seed of everything random."""
    threads: int = bounded(0, ">= 0")
    """CPU threads; 0 = all cores."""
    resume: bool = False
    """Go on with what is in output_dir."""
    overwrite: bool = False
    """Delete the named stages and what was made from them, and start them again."""
    device: str | None = None
    """cpu, cuda or cuda:N; null = cuda if there is one."""

    def check(self) -> None:
        check_resume(self.resume, self.overwrite, self.output_dir)
