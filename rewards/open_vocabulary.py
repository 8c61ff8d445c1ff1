"""Detectors that look for any words: OWLv2 and Grounding DINO. By default they look for COCO's 80 classes, all at once, so
that a word which is not there must stand back behind the one that is.

Their confidences are lower than Mask2Former's, for which GenEval's thresholds 0.3 and 0.9 were chosen: see docs/rewards.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor
from transformers.image_transforms import center_to_corners_format

from rewards.boxes import Detection
from rewards.coco import CLASSES
from rewards.detection import FLOOR, TransformersDetector
from rewards.errors import RewardError


class Owlv2(TransformersDetector):
    """OWLv2 (Minderer et al. 2023, arXiv 2306.09683). classes: words to look for, as "a photo of a WORD"."""

    kind = "owlv2"
    auto = AutoModelForZeroShotObjectDetection
    processor_kind = AutoProcessor

    def __init__(
        self,
        model: str = "google/owlv2-base-patch16-ensemble",
        classes: Sequence[str] = CLASSES,
        batch_size: int = 16,
        device: str | None = None,
    ) -> None:
        super().__init__(model, batch_size, device)
        self.classes = tuple(classes)
        self.queries = self._queries()

    @torch.no_grad()
    def _queries(self) -> Tensor:
        """(C, D) features of the words: the same for every image, so they are made once."""
        texts = [f"a photo of a {name}" for name in self.classes]
        tokens = self.processor(text=texts, return_tensors="pt").to(self.device)
        output = self.model.owlv2.get_text_features(**tokens)
        return output if isinstance(output, Tensor) else output.pooler_output

    def detect(self, images: list[Image.Image]) -> list[list[Detection]]:
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"].to(self.device)
        grid, _ = self.model.image_embedder(pixels)  # (B, h, w, D)
        features = grid.flatten(1, 2)
        logits, _ = self.model.class_predictor(features, self.queries.expand(len(images), -1, -1))  # (B, h·w, C)
        output = SimpleNamespace(logits=logits, pred_boxes=self.model.box_predictor(features, grid))
        sizes = [image.size[::-1] for image in images]
        found = self.processor.image_processor.post_process_object_detection(output, FLOOR, sizes)
        rows = zip(found, images, strict=True)
        return [self.detections(own["boxes"], own["scores"], own["labels"], image.size) for own, image in rows]


class GroundingDino(TransformersDetector):
    """Grounding DINO (Liu et al. 2023, arXiv 2303.05499). classes: words to look for, in one caption.

    A box's confidence in a class is the mean over the class's tokens, as in the published evaluation on COCO.
    """

    kind = "grounding-dino"
    auto = AutoModelForZeroShotObjectDetection
    processor_kind = AutoProcessor

    def __init__(
        self,
        model: str = "IDEA-Research/grounding-dino-tiny",
        classes: Sequence[str] = CLASSES,
        batch_size: int = 8,
        device: str | None = None,
    ) -> None:
        super().__init__(model, batch_size, device)
        self.classes = tuple(classes)
        self.caption = ". ".join(name.lower() for name in self.classes) + "."
        self.tokens = self._tokens()

    def _tokens(self) -> Tensor:
        """(C, L) share of each of the caption's L tokens in each class; rows sum to 1."""
        ids = self.processor.tokenizer(self.caption)["input_ids"]
        limit = self.model.config.max_text_len
        if len(ids) > limit:
            raise RewardError(
                f"{len(self.classes)} classes make a caption of {len(ids)} tokens, and '{self.name}' reads {limit}; "
                "name fewer (classes)"
            )
        stop = self.processor.tokenizer.convert_tokens_to_ids(".")
        groups: list[list[int]] = [[]]
        for position, token in enumerate(ids[1:-1], start=1):  # between [CLS] and [SEP]
            if token == stop:
                groups.append([])
            else:
                groups[-1].append(position)
        spans = [group for group in groups if group]
        if len(spans) != len(self.classes):
            raise RewardError(
                f"classes {list(self.classes)} cannot be told apart in a caption; names hold no full stops"
            )
        shares = torch.zeros(len(spans), len(ids))
        for row, span in zip(shares, spans, strict=True):
            row[span] = 1 / len(span)
        return shares.to(self.device)

    def detect(self, images: list[Image.Image]) -> list[list[Detection]]:
        texts = [self.caption] * len(images)
        output: Any = self.model(**self.processor(images=images, text=texts, return_tensors="pt").to(self.device))
        probability = output.logits.sigmoid()[..., : self.tokens.shape[1]] @ self.tokens.T  # (B, Q, C)
        scores, labels = probability.max(dim=-1)
        found = []
        for image, boxes, own, names in zip(images, output.pred_boxes, scores, labels, strict=True):
            kept = own > FLOOR
            corners: Any = center_to_corners_format(boxes[kept]) * torch.tensor((*image.size, *image.size)).to(boxes)
            found.append(self.detections(corners, own[kept], names[kept], image.size))
        return found
