"""Stage `vq`: the image tokenizer, a `diffusers.VQModel` with 4 px cells (12 × 12 codes of a 512-entry codebook).

A warm-up without quantisation comes first; k-means on its latents then initialises the codebook, so that every entry is
in use from the start and no commitment schedule is needed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import VQModel
from scipy.cluster.vq import kmeans2
from torch import Tensor

from gcpo_t2i.shapes.pretrain.fit import Metrics, Schedule, autocast, fit
from gcpo_t2i.shapes.pretrain.stream import SceneStream
from gcpo_t2i.shapes.scenes import IMAGE_SIZE

CODES = 512
WARMUP_SHARE = 0.2
KMEANS_POINTS = 8000


def build_vq() -> VQModel:
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 48, 96),
        layers_per_block=1,
        latent_channels=16,
        vq_embed_dim=16,
        num_vq_embeddings=CODES,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,  # attention would let one object change the codes of another
        lookup_from_codebook=True,
    )


def _reconstruction_loss(images: Tensor, decoded: Tensor) -> Tensor:
    """Mean absolute error, with pixels that are not background weighted four times: they are a sixth of the picture."""
    grey = images.amax(dim=1) - images.amin(dim=1) < 0.02
    weight = torch.where(grey, 1.0, 4.0).unsqueeze(1)
    return ((decoded.float() - images).abs() * weight).mean() / weight.mean()


@torch.no_grad()
def init_codebook(vq: VQModel, images: Tensor, seed: int) -> None:
    """Codebook entries become the k-means centres of the latents of `images` (N, 3, H, W)."""
    latents = torch.cat([vq.encode(chunk).latents for chunk in images.split(64)])  # type: ignore[union-attr]
    points = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).double().cpu().numpy()
    points = np.unique(points.round(2), axis=0)  # background would be most of the points, and most of the centres
    points = np.random.default_rng(seed).permutation(points)[:KMEANS_POINTS]
    centres, _ = kmeans2(points, CODES, iter=10, minit="++", seed=seed)
    vq.quantize.embedding.weight.copy_(torch.from_numpy(centres))


def train_vq(
    stream: SceneStream, steps: int, folder: Path, seed: int, device: torch.device, dtype: torch.dtype
) -> tuple[VQModel, Metrics]:
    """Trains from nothing (or from the state in `folder`) for `steps` batches of `stream`; L1 + commitment loss."""
    torch.manual_seed(seed)
    vq = build_vq().to(device)
    warmup = round(WARMUP_SHARE * steps)

    def autoencoder_loss(step: int) -> tuple[Tensor, Metrics]:
        images = stream.batch(step).images.to(device)
        with autocast(device, dtype):
            latents = vq.encode(images).latents  # type: ignore[union-attr]
            loss = _reconstruction_loss(images, vq.decoder(vq.post_quant_conv(latents)))
        return loss + 1e-3 * latents.float().square().mean(), {"l1": loss.item()}

    def quantised_loss(step: int) -> tuple[Tensor, Metrics]:
        images = stream.batch(warmup + step).images.to(device)
        with autocast(device, dtype):
            latents = vq.encode(images).latents  # type: ignore[union-attr]
        quantised, commitment, _ = vq.quantize(latents.float())
        with autocast(device, dtype):
            loss = _reconstruction_loss(images, vq.decoder(vq.post_quant_conv(quantised)))
        return loss + commitment, {"l1": loss.item(), "commit": commitment.item()}

    quantised_file = folder / "vq.pt"
    if not quantised_file.exists():
        fit("vq warm-up", vq, autoencoder_loss, Schedule(warmup, 1e-3, floor=0.5), folder / "vq_warmup.pt")
        init_codebook(vq, torch.cat([stream.batch(10**6 + i).images for i in range(12)]).to(device), seed)
    metrics = fit("vq", vq, quantised_loss, Schedule(steps - warmup, 1e-3), quantised_file)
    return vq.eval(), metrics


@torch.no_grad()
def codes_of(vq: VQModel, images: Tensor) -> Tensor:
    """(N, 3, H, W) in [-1, 1] → codes (N, T) int64 in raster order."""
    latents = vq.encode(images).latents.float()  # type: ignore[union-attr]
    codes = vq.quantize(latents)[2][2]
    return codes.reshape(len(images), -1)


@torch.no_grad()
def reconstruct(vq: VQModel, images: Tensor) -> list[np.ndarray]:
    """What is left of `images` after the codes: [(H, W, 3) uint8]."""
    quantised = vq.quantize(vq.encode(images).latents)[0]  # type: ignore[union-attr]
    decoded = vq.decoder(vq.post_quant_conv(quantised))
    pixels = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return list(pixels.permute(0, 2, 3, 1).cpu().numpy())
