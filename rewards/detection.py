"""What the detectors of `transformers` have in common: images in batches of one size, and pictures to test them with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from rewards import hub
from rewards.boxes import Detection
from rewards.clip import default_device
from rewards.errors import RewardError
from rewards.self_test import Known, drawings

FLOOR = 0.1  # confidence below which nothing is reported: three times less than what counts for anything


class TransformersDetector:
    """A detector for `GenEval` on a model of `transformers`. A subclass names the kind and detects in a batch.

    model: id of the hub or local folder. batch_size: images per forward pass.
    """

    colors_by_clip = True
    kind: ClassVar[str]  # model_type of the checkpoint's config
    auto: ClassVar[Any]  # the Auto class that loads it
    processor_kind: ClassVar[Any]
    classes: tuple[str, ...]

    def __init__(self, model: str, batch_size: int, device: str | None) -> None:
        self.name, self.batch_size, self.device = model, batch_size, device or default_device()
        self.model = hub.pretrained(self.auto, model).to(self.device)
        if self.model.config.model_type != self.kind:
            raise RewardError(f"'{model}' is a {self.model.config.model_type}, and not a {self.kind}")
        self.processor = hub.processor(self.processor_kind, model)

    def detect(self, images: list[Image.Image]) -> list[list[Detection]]:
        """The objects of RGB images of one size."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        found: list[list[Detection]] = [[] for _ in images]
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            by_size.setdefault(image.size, []).append(index)
        for rows in by_size.values():
            for start in range(0, len(rows), self.batch_size):
                part = rows[start : start + self.batch_size]
                for index, own in zip(part, self.detect([images[i].convert("RGB") for i in part]), strict=True):
                    found[index] = own
        return found

    def known(self) -> list[Known]:
        """Drawings whose classes this detector has."""
        return [(image, names) for image, names in drawings() if any(name in self.classes for name in names)]

    def detections(self, boxes: Tensor, scores: Tensor, labels: Tensor, size: tuple[int, int]) -> list[Detection]:
        """Boxes (N, 4) in px of an image of `size` (width, height), clipped to it; scores and class indices (N,)."""
        limit = torch.tensor((*size, *size), device=boxes.device, dtype=boxes.dtype)
        inside = boxes.clamp(min=0).minimum(limit)
        rows = zip(inside.tolist(), scores.tolist(), labels.tolist(), strict=True)
        return [Detection(self.classes[label], (box[0], box[1], box[2], box[3]), score) for box, score, label in rows]
