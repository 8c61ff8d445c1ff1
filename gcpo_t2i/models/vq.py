"""Images ↔ codes with a `diffusers.VQModel`. Codes are (N, T) int64, row by row; pixels are float in [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import VQModel
from PIL import Image
from torch import Tensor

from gcpo_t2i.models.pictures import Pictures

CHUNK = 16  # images per call: a decoder's activations are far larger than its image, and bigger calls gain no speed


Images = Sequence[Image.Image | np.ndarray] | np.ndarray | Tensor


def to_pixels(images: Images) -> Tensor:
    """PIL images of one size, uint8 arrays (h, w, 3) or (N, h, w, 3), or float pixels (N, 3, h, w) in [-1, 1] → the latter."""
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"expected float pixels (N, 3, h, w) in [-1, 1], got {images.dtype} {tuple(images.shape)}")
        return images
    if not isinstance(images, np.ndarray):
        images = np.stack([np.asarray(i.convert("RGB") if isinstance(i, Image.Image) else i) for i in images])
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"expected a uint8 array (N, h, w, 3), got {images.dtype} {images.shape}")
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> Pictures:
    """Float pixels (N, 3, h, w) in [-1, 1] (clipped) → N RGB images."""
    return Pictures(((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))


def _weight(vq: VQModel) -> Tensor:
    return vq.quantize.embedding.weight


def _nearest(vq: VQModel, latents: Tensor) -> Tensor:
    """Latents (N, D, H, W) → codes (N * H * W,)."""
    lengths = _weight(vq).norm(dim=1)
    if torch.allclose(lengths, torch.ones_like(lengths)):
        # LlamaGen's: the nearest of such codes does not depend on a latent's length, but rounding errors do
        latents = F.normalize(latents, dim=1)
    return vq.quantize(latents)[2][2]


@torch.no_grad()
def encode_images(vq: VQModel, images: Images, grid: tuple[int, int]) -> Tensor:
    """Images → codes (N, H*W) int64 on the tokenizer's device. ValueError when their size does not give `grid`."""
    weight = _weight(vq)
    codes = []
    for pixels in to_pixels(images).split(CHUNK):
        latents = vq.encode(pixels.to(weight.device, weight.dtype)).latents  # (n, D, H, W)
        if tuple(latents.shape[-2:]) != tuple(grid):
            size = tuple(pixels.shape[-2:])
            raise ValueError(f"images of {size} pixels give a code map of {tuple(latents.shape[-2:])}, expected {grid}")
        codes.append(_nearest(vq, latents).view(pixels.shape[0], -1))
    return torch.cat(codes)


@torch.no_grad()
def decode_pixels(vq: VQModel, codes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Codes (N, H*W) → float pixels (N, 3, h, w) in about [-1, 1]."""
    weight = _weight(vq)
    pixels = []
    for part in codes.to(weight.device).split(CHUNK):
        pixels.append(_decode(vq, weight[part].view(part.shape[0], *grid, -1).permute(0, 3, 1, 2).contiguous()))
    return torch.cat(pixels)


def _decode(vq: VQModel, quantised: Tensor) -> Tensor:
    # force_not_quantize alone would look codes up again where the config says `lookup_from_codebook`
    hidden = vq.post_quant_conv(quantised)
    return vq.decoder(hidden, quantised if vq.config["norm_type"] == "spatial" else None)


def decode_codes(vq: VQModel, codes: Tensor, grid: tuple[int, int]) -> Pictures:
    """Codes (N, H*W) → N RGB images."""
    return to_images(decode_pixels(vq, codes, grid))
