"""LlamaGen's image tokenizer (`tokenizer/tokenizer_image/vq_model.py`) as a `diffusers.VQModel`.

The two are one architecture, taming-transformers', under other names: attention in the innermost blocks and between them,
downsampling that pads right and below, group norm with eps 1e-6. Left out: `codebook_used`, a record of training. Other:
LlamaGen normalises its codes to length 1 whenever it uses them; here the codebook is saved normalised.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import VQModel
from torch import Tensor

from gcpo_t2i.convert.checkpoints import require_tensors, shape_of
from gcpo_t2i.errors import UserError

UNUSED = {"quantize.codebook_used"}
CODEBOOK = "quantize.embedding.weight"

# diffusers' names → LlamaGen's, applied in this order
RENAMED = (
    ("encoder.down_blocks.", "encoder.conv_blocks."),
    ("decoder.up_blocks.", "decoder.conv_blocks."),
    ("mid_block.resnets.0.", "mid.0."),
    ("mid_block.attentions.0.", "mid.1."),
    ("mid_block.resnets.1.", "mid.2."),
    (".resnets.", ".res."),
    (".attentions.", ".attn."),
    (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."),
    ("conv_norm_out.", "norm_out."),
    (".conv_shortcut.", ".nin_shortcut."),
    (".group_norm.", ".norm."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".to_out.0.", ".proj_out."),
)


def published_name(name: str) -> str:
    for ours, theirs in RENAMED:
        name = name.replace(ours, theirs)
    return name


def read_config(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of the VQModel whose tensors these are. UserError when they are not of LlamaGen's tokenizer."""
    codes, code_dim = shape_of(path, tensors, CODEBOOK, 2)
    latent_channels = shape_of(path, tensors, "encoder.conv_out.weight", 4)[0]
    channels = []
    while (name := f"encoder.conv_blocks.{len(channels)}.res.0.conv2.weight") in tensors:
        channels.append(shape_of(path, tensors, name, 4)[0])
    if len(channels) < 2 or channels[0] % 32:
        raise UserError(
            f"{path}: its blocks have {channels} channels, which are not those of LlamaGen's image tokenizer"
        )
    plain = len(channels) - 1
    return {
        "down_block_types": ("DownEncoderBlock2D",) * plain + ("AttnDownEncoderBlock2D",),
        "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * plain,
        "block_out_channels": tuple(channels),
        "layers_per_block": 2,
        "latent_channels": latent_channels,
        "num_vq_embeddings": codes,
        "vq_embed_dim": code_dim,
        "lookup_from_codebook": True,
    }


def convert_vq(path: Path, tensors: Mapping[str, Tensor]) -> VQModel:
    """LlamaGen's tokenizer in float32, on the tensors' device. UserError lists tensors that do not fit; `path` names them."""
    config = read_config(path, tensors)
    with torch.device("meta"):
        vq = VQModel(**config)
    ours = vq.state_dict()
    given = {name: tensor for name, tensor in tensors.items() if name not in UNUSED}
    require_tensors(path, given, {published_name(name): _published_shape(name, t) for name, t in ours.items()})
    state = {name: given[published_name(name)].float().reshape(t.shape) for name, t in ours.items()}
    state[CODEBOOK] = F.normalize(state[CODEBOOK], dim=-1)
    vq.load_state_dict(state, assign=True)
    return vq.eval()


def _published_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    """LlamaGen's attention projects by 1 × 1 convolutions, diffusers' by linear layers."""
    is_projection = ".attentions." in name and tensor.ndim == 2
    return (*tensor.shape, 1, 1) if is_projection else tuple(tensor.shape)
