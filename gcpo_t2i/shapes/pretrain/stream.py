"""Fresh ShapesWorld scenes without end. Batch `step` depends on (seed, step) alone, so resuming needs no stored state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gcpo_t2i.shapes.prompts import TAGS, Metadata, sample_scene
from gcpo_t2i.shapes.scenes import Scene, render


@dataclass(frozen=True)
class SceneBatch:
    metadata: list[Metadata]
    scenes: list[Scene]
    images: Tensor  # (N, 3, 48, 48) float32 in [-1, 1]

    @property
    def prompts(self) -> list[str]:
        return [spec["prompt"] for spec in self.metadata]


def to_pixels(images: list[np.ndarray]) -> Tensor:
    """[(H, W, 3) uint8] → (N, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


class SceneStream:
    """Batches of prompts and scenes; `tag_weights` is the share of each category (normalised here)."""

    def __init__(
        self, specs: list[Metadata], batch_size: int, seed: int, tag_weights: Mapping[str, float] | None = None
    ):
        self.by_tag = {tag: [spec for spec in specs if spec["tag"] == tag] for tag in TAGS}
        weights = np.array([(tag_weights or dict.fromkeys(TAGS, 1.0))[tag] for tag in TAGS], float)
        self.shares = weights / weights.sum()
        self.batch_size, self.seed = batch_size, seed

    def batch(self, step: int) -> SceneBatch:
        rng = np.random.default_rng([self.seed, step])
        tags = rng.choice(len(TAGS), size=self.batch_size, p=self.shares)
        metadata = [self.by_tag[TAGS[tag]][rng.integers(len(self.by_tag[TAGS[tag]]))] for tag in tags]
        scenes = [sample_scene(spec, rng) for spec in metadata]
        return SceneBatch(metadata, scenes, to_pixels([render(scene) for scene in scenes]))
