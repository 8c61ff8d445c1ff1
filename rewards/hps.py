"""HPS v2 and v2.1 (Wu et al. 2023, arXiv 2306.09341): the human preference score, a cosine of CLIP-H features.

The published checkpoint files are open_clip's training format for ViT-H-14. With the published weights scores lie around
0.2 to 0.35, and differences are small: in a sum of rewards it needs a weight above 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import open_clip
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, functional

from rewards.clip import ClipEncoder, default_device
from rewards.errors import RewardError, did_you_mean
from rewards.hub import hub_file

ARCHITECTURE = "ViT-H-14"
REPOSITORY = "xswu/HPSv2"
FILES = {"v2": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


class Hps:
    """Cosine of image and prompt features.

    version: `v2` or `v2.1`, downloaded from the hub. checkpoint: instead of it, a file of that format.
    """

    range: ClassVar = (-1.0, 1.0)

    def __init__(
        self, version: str = "v2.1", checkpoint: str | None = None, batch_size: int = 32, device: str | None = None
    ) -> None:
        if version not in FILES:
            raise RewardError(f"version {version!r} is unknown{did_you_mean(version, FILES)}")
        file = checkpoint or str(hub_file(REPOSITORY, FILES[version]))
        self.encoder = ClipEncoder(ARCHITECTURE, file, device or default_device(), batch_size)
        self.encoder.preprocess = _preprocess(self.encoder.model.visual.image_size)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        return self.encoder.cosines(images, prompts).tolist()


def _preprocess(size: int | tuple[int, int]) -> Callable[[Image.Image], Tensor]:
    """As the published package: a tensor first, then its longer edge resized (bicubic) and the rest padded with black, where
    open_clip resizes the 8-bit image by its shorter edge and crops. Of square images both see the whole."""
    edge = size if isinstance(size, int) else size[0]

    def prepared(image: Image.Image) -> Tensor:
        pixels = functional.to_tensor(image.convert("RGB"))  # (3, H, W) in [0, 1]
        scale = edge / max(pixels.shape[1:])
        height, width = (round(length * scale) for length in pixels.shape[1:])
        pixels = functional.resize(pixels, [height, width], InterpolationMode.BICUBIC, antialias=True)
        down, right = edge - height, edge - width
        pixels = functional.pad(pixels, [right // 2, down // 2, right - right // 2, down - down // 2])
        return functional.normalize(pixels, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)  # type: ignore[arg-type]

    return prepared
