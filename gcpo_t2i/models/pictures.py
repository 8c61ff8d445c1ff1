"""Decoded images, which stay on the device that made them until somebody asks for one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from PIL import Image
from torch import Tensor


class Pictures(Sequence[Image.Image]):
    """N RGB images: `pixels`, uint8 (N, 3, h, w), for those who take tensors, and PIL images, each made when it is first asked
    for."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels
        self._made: dict[int, Image.Image] = {}

    def __len__(self) -> int:
        return len(self.pixels)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        if places not in self._made:
            self._made[places] = Image.fromarray(self.pixels[places].permute(1, 2, 0).contiguous().cpu().numpy())
        return self._made[places]


def join_pictures(parts: Sequence[Sequence[Image.Image]]) -> Sequence[Image.Image]:
    """Images one after another: as pixels, where all parts are and have one size."""
    if len(parts) == 1:
        return parts[0]
    pixels = [part.pixels for part in parts if isinstance(part, Pictures)]
    if len(pixels) == len(parts) and len({tensor.shape[1:] for tensor in pixels}) == 1:
        return Pictures(torch.cat(pixels))
    return [image for part in parts for image in part]
