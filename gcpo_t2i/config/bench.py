"""Settings of `gcpo-t2i bench`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gcpo_t2i.config.base import ConfigError, bounded

Part = Literal["rollout", "step", "log_probs", "scaling"]
Rival = Literal["library", "plain"]
Shape = Literal["shapesworld", "small_janus", "janus_pro_1b", "janus_pro_7b", "llamagen_xl"]


@dataclass
class BenchConfig:
    """How fast sampling and training are here, and how fast they could be."""

    what: list[Part] = field(default_factory=lambda: ["rollout", "step"])
    """What is measured: rollout (images and log-probs), step (rollout, credit, update), log_probs (of an update, against the
    whole vocabulary at once), scaling (with group, codes, vocabulary and width; and what more devices would bring)."""
    shape: Shape = "shapesworld"
    """shapesworld (the model that ships with the package), or random weights in the sizes of a published model: janus_pro_1b,
    janus_pro_7b, llamagen_xl; small_janus is one for a CPU."""
    rivals: list[Rival] = field(default_factory=lambda: ["library", "plain"])
    """What is measured against, in turns and with the same weights: library (generate of transformers, for Janus) and plain (a
    loop over a growing cache, and separate passes for log-probs)."""
    prompts: int = bounded(8, "> 0")
    """Prompts per step."""
    group_size: int = bounded(8, "> 0")
    """Images per prompt."""
    guidance: float = bounded(5.0, ">= 0")
    """Scale of classifier-free guidance; both branches run at any."""
    micro_batch_size: int = bounded(16, "> 0")
    """Images per forward and backward pass of an update."""
    lora_rank: int | None = bounded(None, "> 0")
    """step: train adapters of this rank; null = the weights."""
    gradient_checkpointing: bool = False
    """step: keep only the inputs of layers for the backward pass."""
    repeats: int = bounded(5, "> 0")
    """How often each is measured, after once to warm up; medians are shown."""
    busy: bool = False
    """Count the processor seconds of this process instead of the wall clock: for a machine with other work, on one thread
    (OMP_NUM_THREADS=1). On a CPU only."""
    device: str | None = None
    """cpu, cuda or cuda:N; null = cuda if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the model's layers; auto = bfloat16 where the device multiplies it, else float32."""
    out: str | None = None
    """Folder for bench.json and, of scaling, scaling.png; null = print only."""
    overwrite: bool = False
    """Replace the results that are already there."""

    def check(self) -> None:
        if not self.what:
            raise ConfigError("what", "what: at least one of rollout, step, log_probs, scaling is needed")
        if self.group_size == 1 and "step" in self.what:
            raise ConfigError("group_size", "group_size 1 leaves no group to compare an image with; use 2 or more")
        if self.busy and (self.device or "cpu") != "cpu":
            raise ConfigError(
                "busy", f"busy counts seconds of processors, and device is {self.device}; drop one of them"
            )
