"""Fresh ShapesWorld scenes without end. Batch `step` depends on (seed, step) alone, so resuming needs no stored state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from gcpo_t2i.models.vq import to_pixels
from gcpo_t2i.shapes.prompts import TAGS, Metadata, misdescribed, sample_scene
from gcpo_t2i.shapes.scenes import Scene, render


@dataclass(frozen=True)
class SceneBatch:
    metadata: list[Metadata]
    scenes: list[Scene]
    images: Tensor  # (N, 3, 48, 48) float32 in [-1, 1]

    @property
    def prompts(self) -> list[str]:
        return [spec["prompt"] for spec in self.metadata]


class SceneStream:
    """Batches of prompts and scenes; `tag_weights` is the share of each category (normalised here)."""

    def __init__(
        self, specs: list[Metadata], batch_size: int, seed: int, tag_weights: Mapping[str, float] | None = None
    ):
        self.specs = specs
        self.by_tag = {tag: [spec for spec in specs if spec["tag"] == tag] for tag in TAGS}
        weights = np.array([(tag_weights or dict.fromkeys(TAGS, 1.0)).get(tag, 0.0) for tag in TAGS], float)
        self.shares = weights / weights.sum()
        self.batch_size, self.seed = batch_size, seed

    def of(self, tag_weights: Mapping[str, float]) -> SceneStream:
        """The same prompts in other shares."""
        return SceneStream(self.specs, self.batch_size, self.seed, tag_weights)

    def batch(self, step: int, wrong: float = 0.0) -> SceneBatch:
        """`wrong`: the share of words in the prompts that their scenes do not agree with (`misdescribed`)."""
        rng = np.random.default_rng([self.seed, step])
        tags = rng.choice(len(TAGS), size=self.batch_size, p=self.shares)
        metadata = [self.by_tag[TAGS[tag]][rng.integers(len(self.by_tag[TAGS[tag]]))] for tag in tags]
        shown = [misdescribed(spec, wrong, rng) for spec in metadata] if wrong else metadata
        scenes = [sample_scene(spec, rng) for spec in shown]
        return SceneBatch(metadata, scenes, to_pixels([render(scene) for scene in scenes]))
