"""Mask2Former (Cheng et al. 2022, arXiv 2112.01527) on COCO instances: the family that the official GenEval uses.

The official evaluator runs mmdetection's Swin-S checkpoint. The default here is the model's authors' own Swin-S checkpoint
for the same task; what is made of the model's output follows mmdetection, and not `post_process_instance_segmentation` of
transformers, which stretches every mask to 384 x 384 and rounds.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

from rewards.boxes import Detection
from rewards.coco import geneval_names
from rewards.detection import FLOOR, TransformersDetector


class Mask2Former(TransformersDetector):
    """Confidence = class probability · mean probability of the mask's pixels; box = the mask's extent."""

    kind = "mask2former"
    auto = AutoModelForUniversalSegmentation
    processor_kind = AutoImageProcessor

    def __init__(
        self,
        model: str = "facebook/mask2former-swin-small-coco-instance",
        batch_size: int = 16,
        device: str | None = None,
    ) -> None:
        super().__init__(model, batch_size, device)
        self.classes = geneval_names(self.model.config.id2label)

    def detect(self, images: list[Image.Image]) -> list[list[Detection]]:
        inputs = self.processor(images=images, return_tensors="pt").to(self.device)
        output = self.model(**inputs)
        padded = tuple(inputs["pixel_values"].shape[-2:])
        valid = padded
        if "pixel_mask" in inputs:  # images of one size are padded alike, at the right and at the bottom
            mask = inputs["pixel_mask"][0]
            valid = (int(mask.any(dim=1).sum()), int(mask.any(dim=0).sum()))
        rows = zip(output.class_queries_logits, output.masks_queries_logits, images, strict=True)
        return [self._instances(logits, masks, padded, valid, image.size) for logits, masks, image in rows]

    def _instances(
        self, logits: Tensor, masks: Tensor, padded: tuple[int, ...], valid: tuple[int, ...], size: tuple[int, int]
    ) -> list[Detection]:
        """One image: class logits (Q, C + 1) and mask logits (Q, h, w) of its queries → detections.

        As many (query, class) pairs as there are queries compete, so one query may be two objects of different class.
        """
        probability = logits.softmax(dim=-1)[:, :-1]
        best, index = probability.flatten().topk(len(probability))
        best, index = best[best > FLOOR], index[best > FLOOR]
        if not len(best):
            return []
        queries, labels = index // probability.shape[1], index % probability.shape[1]
        pixels = F.interpolate(masks[queries][None], size=padded, mode="bilinear", align_corners=False)
        pixels = pixels[..., : valid[0], : valid[1]]
        pixels = F.interpolate(pixels, size=size[::-1], mode="bilinear", align_corners=False)[0]  # (N, H, W)
        inside = pixels > 0
        area = inside.flatten(1).sum(dim=1)
        quality = (pixels.sigmoid() * inside).flatten(1).sum(dim=1) / (area + 1e-6)
        scores = best * quality
        kept = torch.nonzero((scores > FLOOR) & (area > 0)).flatten()
        return [
            Detection(self.classes[label], _extent(mask), score, mask=mask.cpu().numpy())
            for mask, label, score in zip(inside[kept], labels[kept].tolist(), scores[kept].tolist(), strict=True)
        ]


def _extent(mask: Tensor) -> tuple[float, float, float, float]:
    """The box of the pixels of a mask (H, W), which ends behind the last one."""
    rows, columns = torch.nonzero(mask.any(dim=1)).flatten(), torch.nonzero(mask.any(dim=0)).flatten()
    return float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1
