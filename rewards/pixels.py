"""Images as tensors, for rewards that say `takes_pixels = True`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def by_size(images: Sequence[Any]) -> Iterator[tuple[list[int], Tensor]]:
    """The places of images of one size, and their uint8 pixels (N, 3, h, w), for each size that there is.

    An image sequence with `pixels` of its own, such as a policy decodes to, gives these, on their device; else they are
    made from PIL images, on the CPU.
    """
    if isinstance(pixels := getattr(images, "pixels", None), Tensor):
        yield list(range(len(pixels))), pixels
        return
    arrays = [np.asarray(image.convert("RGB")) for image in images]
    for shape in dict.fromkeys(array.shape for array in arrays):
        places = [place for place, array in enumerate(arrays) if array.shape == shape]
        yield places, torch.from_numpy(np.stack([arrays[place] for place in places])).permute(0, 3, 1, 2)
