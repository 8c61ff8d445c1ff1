"""HPS v2 and v2.1 (Wu et al. 2023, arXiv 2306.09341): the human preference score, a cosine of CLIP-H features.

The published checkpoint files are open_clip's training format for ViT-H-14. With the published weights scores lie around
0.2 to 0.35, and differences are small: in a sum of rewards it needs a weight above 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import open_clip
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

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


def _preprocess(size: int | tuple[int, int]) -> transforms.Compose:
    """As the published package: it makes a tensor first and resizes that, where open_clip resizes the image (8 bit)."""
    edge = size if isinstance(size, int) else size[0]
    return transforms.Compose(
        [
            transforms.Lambda(lambda image: image.convert("RGB")),
            transforms.ToTensor(),
            transforms.Resize(edge, interpolation=InterpolationMode.BICUBIC, antialias=True),
            transforms.CenterCrop(edge),
            transforms.Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
        ]
    )
