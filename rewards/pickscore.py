"""PickScore (Kirstain et al. 2023, arXiv 2305.01569): which of two images would people pick for this prompt?

The published score: exp(logit_scale) · cosine of the features of a CLIP-H that was fine-tuned on people's choices. With
the published weights about 15 to 25, where a difference of 1 means odds of e : 1; in a sum with rewards in [0, 1] a weight
of 0.05 or so is in proportion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from rewards import hub
from rewards.clip import Encoder, default_device
from rewards.errors import RewardError


class PickScore(Encoder):
    """exp(logit_scale) · cosine of image and prompt features. Prompts are cut at 77 tokens, as published.

    model: id or folder of a `transformers` CLIP model. processor: of its image processor and tokenizer; the published
        model comes without them, and uses those of the CLIP that it was made from.
    """

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        batch_size: int = 32,
        device: str | None = None,
    ) -> None:
        super().__init__(device or default_device(), batch_size)
        self.model = hub.pretrained(AutoModel, model).to(self.device)
        if not all(hasattr(self.model, name) for name in ("get_image_features", "get_text_features", "logit_scale")):
            raise RewardError(f"'{model}' is a {type(self.model).__name__}, and not a CLIP model")
        self.processor = hub.processor(AutoProcessor, processor)
        self.scale = self.model.logit_scale.exp().item()

    def image_features(self, images: list[Image.Image]) -> Tensor:
        inputs = self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        return _features(self.model.get_image_features(pixel_values=inputs["pixel_values"].to(self.device)))

    def text_features(self, texts: list[str]) -> Tensor:
        inputs = self.processor(text=texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        return _features(self.model.get_text_features(**inputs.to(self.device)))

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        return (self.scale * self.cosines(images, prompts)).tolist()


def _features(output: Any) -> Tensor:
    """(N, D) projected features: transformers before 5 returns them, since then an output that holds them."""
    return output if isinstance(output, Tensor) else output.pooler_output
