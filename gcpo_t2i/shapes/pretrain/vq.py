"""Stage `vq`: the image tokenizer, a `diffusers.VQModel` with 4 px cells (12 × 12 codes of a 512-entry codebook).

What the generator needs of a tokenizer is more than good reconstructions: *the same cell must get the same code*. Codes
that also tell what is around the cell reconstruct as well, and bury the caption under noise: trained end to end with
straight-through gradients, this tokenizer spent 2.3 nats per code on it (`code_noise`), which the generator had to learn first.
So the codes are defined first, by k-means on the pixels of distinct cells, and one model learns both directions at once:
the encoder to put each cell nearest to its cluster's codebook entry, the decoder to draw a picture from the entries. What
a cluster leaves open (which grey is behind an edge) the decoder sees in the codes around it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import VQModel
from scipy.cluster.vq import kmeans2
from torch import Tensor
from torch.nn import functional as F

from gcpo_t2i.shapes.pretrain.fit import Metrics, Schedule, autocast, fit
from gcpo_t2i.shapes.pretrain.stream import SceneStream
from gcpo_t2i.shapes.scenes import CELL, IMAGE_SIZE

CODES = 512
BATCH = 32
KMEANS_BATCHES, KMEANS_CELLS = 48, 4000  # scenes looked at, and distinct cells clustered
OBJECT_WEIGHT = 4.0  # of pixels and cells that are not background, a sixth of the picture


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


def cells(images: Tensor) -> Tensor:
    """(N, 3, H, W) → (N * T, 3 * CELL * CELL), the pixels of each cell, in raster order."""
    return F.unfold(images, CELL, stride=CELL).transpose(1, 2).flatten(0, 1)


def cluster_cells(images: Tensor, seed: int) -> Tensor:
    """k-means centres (CODES, 3 * CELL * CELL) of the distinct cells in `images` (N, 3, H, W), each counted once:
    background would take most of the centres if it counted by area."""
    distinct = cells(images).unique(dim=0)
    chosen = np.random.default_rng(seed).permutation(distinct.double().cpu().numpy())[:KMEANS_CELLS]
    centres, _ = kmeans2(chosen, min(CODES, len(chosen)), iter=10, minit="++", seed=seed)  # pyright: ignore[reportCallIssue]
    return torch.from_numpy(centres).float().to(images.device)


def reconstruction_loss(images: Tensor, decoded: Tensor) -> Tensor:
    """Mean absolute error, pixels that are not grey weighted `OBJECT_WEIGHT` times."""
    grey = images.amax(dim=1) - images.amin(dim=1) < 0.02
    weight = torch.where(grey, 1.0, OBJECT_WEIGHT).unsqueeze(1)
    return ((decoded.float() - images).abs() * weight).mean() / weight.mean()


def assignment_loss(latents: Tensor, codebook: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of softmax(−‖z − e‖²) with the target entries, and the share of latents nearest to their target.

    latents (N * T, D), codebook (V, D), targets (N * T,), weight (N * T,). Its minimum is what `VQModel.quantize` does.
    """
    logits = -torch.cdist(latents, codebook).square()
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses * weight).sum() / weight.sum(), (logits.argmax(dim=1) == targets).float().mean()


def train_vq(
    stream: SceneStream, steps: int, folder: Path, seed: int, device: torch.device, dtype: torch.dtype
) -> tuple[VQModel, Metrics]:
    """Trains from nothing (or from the state in `folder`) for `steps` batches of `stream`."""
    torch.manual_seed(seed)
    vq: Any = build_vq()
    vq.to(device)
    torch.nn.init.normal_(vq.quantize.embedding.weight)
    centres = cluster_cells(torch.cat([stream.batch(10**6 + i).images for i in range(KMEANS_BATCHES)]).to(device), seed)

    def loss_at(step: int) -> tuple[Tensor, Metrics]:
        images = stream.batch(step).images.to(device)
        pixels = cells(images)
        targets = torch.cdist(pixels, centres).argmin(dim=1)
        weight = torch.where(pixels.std(dim=1) < 0.01, 1.0, OBJECT_WEIGHT)
        with autocast(device, dtype):
            latents = vq.encode(images).latents.float()
        codebook = vq.quantize.embedding.weight
        assignment, accuracy = assignment_loss(latents.permute(0, 2, 3, 1).flatten(0, 2), codebook, targets, weight)
        entries = codebook[targets].view(len(images), *latents.shape[2:], -1).permute(0, 3, 1, 2)
        with autocast(device, dtype):
            reconstruction = reconstruction_loss(images, vq.decoder(vq.post_quant_conv(entries)))
        metrics = {"l1": reconstruction.item(), "assignment": assignment.item(), "accuracy": accuracy.item()}
        return reconstruction + assignment, metrics

    metrics = fit("vq", vq, loss_at, Schedule(steps, 2e-3), folder / "vq.pt")
    return vq.eval(), metrics


def code_noise(codes: Tensor, images: Tensor) -> float:
    """H(code | pixels of its own cell) in nats: what codes (N, T) of images (N, 3, H, W) tell beyond their cell."""
    codes = codes.flatten()
    _, kinds = cells(images).unique(dim=0, return_inverse=True)
    _, joint = torch.stack([kinds, codes]).unique(dim=1, return_counts=True)
    return _entropy(joint) - _entropy(kinds.bincount())


def _entropy(counts: Tensor) -> float:
    share = counts[counts > 0].double() / counts.sum()
    return -(share * share.log()).sum().item()
