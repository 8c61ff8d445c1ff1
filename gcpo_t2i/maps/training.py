"""A step of training, seen: its samples, and beside them what its update reinforces and suppresses."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from gcpo_t2i.images import MIN_CELL, PAD, PAPER, sample_grid
from gcpo_t2i.maps.draw import advantage_scale, legend, overlay
from gcpo_t2i.rollout import Batch


def grid_with_maps(batch: Batch, maps: Tensor, prompts: int) -> Image.Image:
    """The first `prompts` groups: images over their rewards, and beside them the images under their maps, over the mean.

    maps (B, H, W): credit × advantage of every code, on one scale for all. The mean of a map is the image's advantage where
    credit has mean 1.
    """
    group, shown = batch.group, batch.prompts[:prompts]
    count = len(shown) * group
    maps = maps[:count].float().cpu()
    scale = advantage_scale(maps)
    images = batch.images[:count]
    drawn = [overlay(image, own, scale, least=MIN_CELL) for image, own in zip(images, maps, strict=True)]
    rewards, means = batch.rewards[: len(shown)].tolist(), maps.mean((1, 2)).view(-1, group).tolist()
    cuts = [slice(start, start + group) for start in range(0, count, group)]
    left = [(p.text, images[cut], own) for p, cut, own in zip(shown, cuts, rewards, strict=True)]
    right = [("", drawn[cut], own) for cut, own in zip(cuts, means, strict=True)]
    key = "green is reinforced, purple suppressed. Under a map: its mean; under a sample: its reward"
    return _page([sample_grid(left), sample_grid(right)], legend(scale, key))


def _page(columns: Sequence[Image.Image], foot: Image.Image) -> Image.Image:
    """Images side by side, and one line under them."""
    gap = 4 * PAD
    width, height = sum(image.width + gap for image in columns) - gap, max(image.height for image in columns)
    page = Image.new("RGB", (max(width, foot.width), height + foot.height), PAPER)
    left = 0
    for image in columns:
        page.paste(image, (left, 0))
        left += image.width + gap
    page.paste(foot, (0, height))
    return page
