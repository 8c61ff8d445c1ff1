"""CLIP score: how well image and prompt agree, as the cosine of their open_clip features, in [-1, 1].

The raw cosine, not the 100 · max(cos, 0) of `torchmetrics` nor the 2.5 · max(cos, 0) of Hessel et al. 2021
(arXiv 2104.08718): a fixed factor belongs to the reward's weight, and a cut at 0 would take the signal away.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from gcpo_t2i.shapes import checkpoint_path
from rewards.errors import RewardError

_MAX_CACHED_TEXTS = 50_000


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _full_name(model: str, pretrained: str | None) -> str:
    """The name as open_clip takes it. RewardError where open_clip would answer with a page of names."""
    name = f"local-dir:{checkpoint_path('clip')}" if model == "shapesworld" else model
    if name.startswith("local-dir:"):
        folder = name.removeprefix("local-dir:")
        if not Path(folder).is_dir():
            raise RewardError(f"CLIP model {model!r}: no such folder: {folder}")
    elif ":" not in name:
        if name not in open_clip.list_models():
            near = get_close_matches(name, ["shapesworld", *open_clip.list_models()], n=3, cutoff=0.3)
            raise RewardError(f"CLIP model {model!r} is unknown; near: {', '.join(near) or 'none'}")
        if pretrained is None:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
            raise RewardError(f"CLIP model {model!r} needs `pretrained`, a file or one of: {tags}")
    return name


class ClipEncoder:
    """L2-normalised float32 features of a frozen open_clip model, without gradient.

    model: `shapesworld` (the shipped checkpoint), an open_clip name with its `pretrained` tag ("ViT-L-14", "openai"),
        or `hf-hub:org/name`, or `local-dir:folder`.
    """

    def __init__(self, model: str, pretrained: str | None, device: str, batch_size: int) -> None:
        self.device = device
        self.batch_size = batch_size
        name = _full_name(model, pretrained)
        try:
            # Unlike `create_model_and_transforms`, this one refuses to go on with random weights.
            built: Any = open_clip.create_model_from_pretrained(name, pretrained, device=device)
            self.tokenizer = open_clip.get_tokenizer(name)
        except (RuntimeError, ValueError, OSError) as error:
            raise RewardError(f"CLIP model {model!r} (pretrained {pretrained!r}): {error}") from error
        self.model, self.preprocess = built
        self.model.eval().requires_grad_(False)
        self._texts: dict[str, Tensor] = {}

    @property
    def dim(self) -> int:
        return self.encode_texts(["a"]).shape[1]

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """N images → (N, D) on the model's device."""
        features = []
        for start in range(0, len(images), self.batch_size):
            chunk = [self.preprocess(image) for image in images[start : start + self.batch_size]]
            features.append(F.normalize(self.model.encode_image(torch.stack(chunk).to(self.device)).float(), dim=-1))
        return torch.cat(features)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """N texts → (N, D). Each distinct text is encoded once in the life of the encoder."""
        if len(self._texts) > _MAX_CACHED_TEXTS:
            self._texts.clear()
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        for start in range(0, len(new), self.batch_size):
            chunk = new[start : start + self.batch_size]
            features = F.normalize(self.model.encode_text(self.tokenizer(chunk).to(self.device)).float(), dim=-1)
            self._texts.update(zip(chunk, features, strict=True))
        return torch.stack([self._texts[text] for text in texts])


@lru_cache(maxsize=4)
def encoder(model: str, pretrained: str | None, device: str, batch_size: int) -> ClipEncoder:
    """One encoder per setting: `clip` and `aesthetic` share the weights in memory."""
    return ClipEncoder(model, pretrained, device, batch_size)


class Clip:
    """Cosine of image and prompt features. Settings as in `ClipEncoder`; device: cuda if there is one, by default."""

    range: ClassVar = (-1.0, 1.0)

    def __init__(
        self, model: str = "shapesworld", pretrained: str | None = None, batch_size: int = 64, device: str | None = None
    ) -> None:
        self.encoder = encoder(model, pretrained, device or default_device(), batch_size)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        if not images:
            return []
        cosine = (self.encoder.encode_images(images) * self.encoder.encode_texts(prompts)).sum(dim=-1)
        return cosine.clamp(-1.0, 1.0).tolist()
