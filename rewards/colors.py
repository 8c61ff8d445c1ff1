"""The colours of detected objects, as the official GenEval reads them: each object is cut out, the rest of its box painted
grey, and open_clip's zero-shot classifier chooses among ten colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from rewards.boxes import Detection, Limits, filter_detections, ranked_by_class
from rewards.clip import default_device, encoder
from rewards.coco import COLORS
from rewards.rules import Metadata

BACKGROUND = "#999"
LOGIT_SCALE = 100.0


def templates(color: str, name: str) -> list[str]:
    return [f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}", f"a photo of a {color} object"]


class ColorClassifier:
    """Probabilities of the ten colours. model, pretrained: of open_clip, as for the reward `clip`."""

    colors = COLORS

    def __init__(
        self,
        model: str = "ViT-L-14",
        pretrained: str | None = "openai",
        batch_size: int = 64,
        device: str | None = None,
    ) -> None:
        self.encoder = encoder(model, pretrained, device or default_device(), batch_size)
        self._weights: dict[str, Tensor] = {}

    def weights(self, name: str) -> Tensor:
        """(10, D): for each colour the normalised mean of the normalised features of its sentences about this class."""
        if name not in self._weights:
            texts = [text for color in COLORS for text in templates(color, name)]
            features = self.encoder.encode_texts(texts).view(len(COLORS), -1, self.encoder.dim)
            self._weights[name] = F.normalize(features.mean(dim=1), dim=-1)
        return self._weights[name]

    def __call__(self, crops: Sequence[Image.Image], names: Sequence[str]) -> list[dict[str, float]]:
        """Cut-out objects and their classes, both of length N → N times the probability of each colour."""
        if not crops:
            return []
        features = self.encoder.encode_images(crops)  # (N, D)
        weights = torch.stack([self.weights(name) for name in names])  # (N, 10, D)
        probability = (LOGIT_SCALE * torch.einsum("nd,ncd->nc", features, weights)).softmax(dim=-1)
        return [dict(zip(COLORS, row, strict=True)) for row in probability.tolist()]

    def paint(
        self,
        images: Sequence[Image.Image],
        found: Sequence[Sequence[Detection]],
        specs: Sequence[Metadata],
        limits: Limits,
    ) -> list[list[Detection]]:
        """The detections of each image, with colours where its specification asks for them; all crops go in one batch."""
        asked = [asked_for(own, spec, limits) for own, spec in zip(found, specs, strict=True)]
        objects = [(image, own[i]) for image, own, rows in zip(images, found, asked, strict=True) for i in rows]
        colors = iter(self([crop(image, d) for image, d in objects], [d.name for _, d in objects]))
        painted = []
        for own, rows in zip(found, asked, strict=True):
            seen = {i: next(colors) for i in rows}
            painted.append([replace(d, colors=seen[i]) if i in seen else d for i, d in enumerate(own)])
        return painted


def asked_for(detections: Sequence[Detection], spec: Metadata, limits: Limits) -> list[int]:
    """Indices of the detections whose colour matters: the `count` most confident of each class with a colour, among those
    that count for the verdict and among all (which `dense` looks at)."""
    place = {id(detection): index for index, detection in enumerate(detections)}
    wanted: set[int] = set()
    for ranked in (ranked_by_class(detections), filter_detections(detections, spec.get("tag"), limits)):
        for clause in spec.get("include") or ():
            if "color" in clause:
                wanted |= {place[id(d)] for d in ranked.get(clause["class"], [])[: clause["count"]]}
    return sorted(wanted)


def crop(image: Image.Image, detection: Detection) -> Image.Image:
    """The object's box, with grey where its mask, if there is one, says that it is not."""
    image = image.convert("RGB")
    if detection.mask is not None:
        blank = Image.new("RGB", image.size, BACKGROUND)
        image = Image.composite(image, blank, Image.fromarray(np.asarray(detection.mask, np.uint8) * 255))
    x0, y0, x1, y1 = (round(edge) for edge in detection.box)
    return image.crop((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))
