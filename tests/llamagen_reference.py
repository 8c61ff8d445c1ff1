"""What the published LlamaGen modules made of seeded weights, and those weights again.

The published code (github.com/FoundationVision/LlamaGen at ce98ec4) is not here. Two files hold facts about it:
`llamagen_layout.json` the names and shapes of the tensors of its modules, and `llamagen_golden.safetensors` what the
two tiny ones computed, in float32 on a CPU, with `tensors()` loaded into them, from `captions()`, `codes()` and `images()`:

- `autoregressive/models/gpt.py` (`Transformer` with ModelArgs dim 64, n_layer 3, n_head 4, multiple_of 32, caption_dim 32,
  vocab_size 512, block_size 16, cls_token_num 120, model_type t2i; eval mode), called with `idx=codes[:, :-1]`, `input_pos`
  0 … 134 and the mask of `dataset/t2i.py` → `cond_logits`, of every 8th code; with the null embedding for a caption →
  `null_logits`.
- `autoregressive/models/generate.py` with `emb_masks`, `cfg_scale` 7.5 and `top_k` 1 → `greedy`.
- `tokenizer/tokenizer_image/vq_model.py` (`VQModel` with codebook_size 512 and z_channels 32; its Encoder and Decoder
  made with ch 32): `encode` → `image_codes`; `decode_code` of the first two → `pixels`, every 7th row and column.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent
HEADS, GRID = 4, (4, 4)
LENGTHS = (7, 1, 120)  # caption tokens of each row


def layout(kind: str, size: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published module `kind` (gpt, vq) of a size: B, L, XL, XXL, 3B, tiny; 16, tiny."""
    entry = json.loads((FOLDER / "llamagen_layout.json").read_text())[kind][size]
    shapes = {}
    for name, shape in entry["tensors"].items():
        for layer in range(entry["layers"]) if name.startswith("layers.0.") else [0]:
            shapes[name.replace("layers.0.", f"layers.{layer}.")] = tuple(shape)
    return shapes


def golden() -> dict[str, Tensor]:
    return load_file(FOLDER / "llamagen_golden.safetensors")


def _seeded(name: str, shape: tuple[int, ...]) -> Tensor:
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith("codebook_used"):
        return torch.zeros(shape)
    if "norm" in name and name.endswith("weight"):
        return torch.from_numpy(1 + normal / 10)
    if len(shape) == 1:
        return torch.from_numpy(normal / 10)
    if "embedding" in name:
        return torch.from_numpy(normal)
    return torch.from_numpy(normal * (np.prod(shape[1:]) ** -0.5).astype(np.float32))


def tensors(kind: str) -> dict[str, Tensor]:
    """The tiny module's state dict: seeded by the names of its tensors, in a stream that numpy froze."""
    return {name: _seeded(name, shape) for name, shape in layout(kind, "tiny").items()}


def captions() -> tuple[Tensor, Tensor]:
    """Text-encoder states (3, 120, 32), zero where padded, and their mask (3, 120), padded left."""
    states = torch.from_numpy(np.random.RandomState(1).standard_normal((3, 120, 32)).astype(np.float32))
    mask = torch.arange(120)[None] >= 120 - torch.tensor(LENGTHS)[:, None]
    return states * mask[..., None], mask


def codes() -> Tensor:
    return torch.from_numpy(np.random.RandomState(2).randint(0, 512, (3, 16)))


def images() -> np.ndarray:
    """Four images of ramps with noise, uint8 (4, 256, 256, 3), in operations that round alike everywhere."""
    random = np.random.RandomState(3)
    x, y = np.arange(256)[None, :, None] / 256, np.arange(256)[:, None, None] / 256
    ramps = np.stack([np.abs((x * a + y * b) % 2 - 1) for a, b in random.uniform(-6, 6, (4, 2, 3))])
    return (200 * ramps + random.uniform(0, 55, ramps.shape)).astype(np.uint8)
