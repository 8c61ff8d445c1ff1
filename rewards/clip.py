"""CLIP score: how well image and prompt agree, as the cosine of their open_clip features, in [-1, 1].

The raw cosine, not the 100 · max(cos, 0) of `torchmetrics` nor the 2.5 · max(cos, 0) of Hessel et al. 2021
(arXiv 2104.08718): a fixed factor belongs to the reward's weight, and a cut at 0 would take the signal away.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from gcpo_t2i.shapes import checkpoint_path
from rewards.errors import RewardError

_MAX_CACHED_TEXTS = 50_000

Images = Sequence[Image.Image] | Tensor  # or uint8 pixels (N, 3, h, w)


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


def _quick_gelu(name: str, pretrained: str | None) -> bool:
    """Whether the weights of this tag were trained with QuickGELU. open_clip only warns where the plain name of the model
    ("ViT-L-14", "openai") says otherwise, and the features would be a little wrong."""
    known = pretrained is not None and open_clip.get_pretrained_cfg(name, pretrained)
    return bool(known and known.get("quick_gelu"))


def _why(error: Exception, name: str, pretrained: str | None) -> str:
    """What went wrong, in one line, with the line that downloads what is missing."""
    if isinstance(error, UnpicklingError):
        return f"'{pretrained}' is no file of weights alone, and loading it could run code; save its state_dict instead"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    known = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    repo = name.removeprefix("hf-hub:") if name.startswith("hf-hub:") else known.get("hf_hub", "").rstrip("/")
    return f"{reason}; if its files are missing, where there is a network: hf download {repo}" if repo else reason


class Encoder:
    """L2-normalised float32 features of images and texts, in batches, without gradient.

    A subclass says what the features of one batch are.
    """

    def __init__(self, device: str, batch_size: int) -> None:
        self.device = device
        self.batch_size = batch_size
        self._texts: dict[str, Tensor] = {}

    def image_features(self, images: Images) -> Tensor:
        raise NotImplementedError

    def text_features(self, texts: list[str]) -> Tensor:
        raise NotImplementedError

    @property
    def dim(self) -> int:
        return self.encode_texts(["a"]).shape[1]

    @torch.no_grad()
    def encode_images(self, images: Images) -> Tensor:
        """N images → (N, D) on the model's device."""
        starts = range(0, len(images), self.batch_size)
        batches = [self.image_features(images[start : start + self.batch_size]) for start in starts]
        return F.normalize(torch.cat(batches).float(), dim=-1)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """N texts → (N, D). Each distinct text is encoded once in the life of the encoder."""
        if len(self._texts) > _MAX_CACHED_TEXTS:
            self._texts.clear()
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        for start in range(0, len(new), self.batch_size):
            chunk = new[start : start + self.batch_size]
            features = F.normalize(self.text_features(chunk).float(), dim=-1)
            self._texts.update(zip(chunk, features, strict=True))
        return torch.stack([self._texts[text] for text in texts])

    def cosines(self, images: Images, texts: Sequence[str]) -> Tensor:
        """N images and their N texts → (N,), in [-1, 1]."""
        if len(images) == 0:
            return torch.zeros(0)
        return (self.encode_images(images) * self.encode_texts(texts)).sum(dim=-1).clamp(-1.0, 1.0)


class ClipEncoder(Encoder):
    """A frozen open_clip model.

    model: `shapesworld` (the shipped checkpoint), an open_clip name with its `pretrained` tag or checkpoint file
        ("ViT-L-14", "openai"), or `hf-hub:org/name`, or `local-dir:folder`.
    """

    def __init__(self, model: str, pretrained: str | None, device: str, batch_size: int) -> None:
        super().__init__(device, batch_size)
        name = _full_name(model, pretrained)
        try:
            # Unlike `create_model_and_transforms`, this one refuses to go on with random weights.
            built: Any = open_clip.create_model_from_pretrained(
                name, pretrained, device=device, force_quick_gelu=_quick_gelu(name, pretrained)
            )
            self.tokenizer = open_clip.get_tokenizer(name)
        except (RuntimeError, ValueError, OSError, UnpicklingError) as error:
            raise RewardError(
                f"CLIP model {model!r} (pretrained {pretrained!r}): {_why(error, name, pretrained)}"
            ) from error
        self.model, self.preprocess = built
        self.model.eval().requires_grad_(False)
        edge = self.model.visual.image_size
        self.size = (edge, edge) if isinstance(edge, int) else tuple(edge)
        self.normalize = self.preprocess.transforms[-1]  # the last of open_clip's steps takes tensors

    def image_features(self, images: Images) -> Tensor:
        return self.model.encode_image(self.prepared(images))

    def prepared(self, images: Images) -> Tensor:
        """(N, 3, h, w) as the model takes them, on its device. Pixels of the size that it takes are not touched by PIL."""
        if isinstance(images, Tensor) and tuple(images.shape[-2:]) == self.size:
            return self.normalize(images.to(self.device).float() / 255)
        if isinstance(images, Tensor):
            images = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).contiguous().cpu().numpy()]
        return torch.stack([self.preprocess(image) for image in images]).to(self.device)

    def text_features(self, texts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(texts).to(self.device))


@lru_cache(maxsize=4)
def encoder(model: str, pretrained: str | None, device: str, batch_size: int) -> ClipEncoder:
    """One encoder per setting: `clip` and `aesthetic` share the weights in memory."""
    return ClipEncoder(model, pretrained, device, batch_size)


class Clip:
    """Cosine of image and prompt features. Settings as in `ClipEncoder`; device: cuda if there is one, by default."""

    range: ClassVar = (-1.0, 1.0)
    takes_pixels: ClassVar = True

    def __init__(
        self, model: str = "shapesworld", pretrained: str | None = None, batch_size: int = 64, device: str | None = None
    ) -> None:
        self.encoder = encoder(model, pretrained, device or default_device(), batch_size)

    def __call__(self, images: Images, prompts: Sequence[str]) -> list[float]:
        return self.encoder.cosines(images, prompts).tolist()
