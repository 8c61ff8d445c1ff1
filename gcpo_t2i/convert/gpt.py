"""LlamaGen's transformer (`autoregressive/models/gpt.py` of github.com/FoundationVision/LlamaGen) as trunk and adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaModel

from gcpo_t2i.convert.checkpoints import require_tensors, shape_of
from gcpo_t2i.errors import UserError
from gcpo_t2i.models.llamagen_parts import Adapter, new_trunk

UNUSED = {"freqs_cis"}  # a table that some versions saved; rope.py computes it

TRUNK = {"tok_embeddings.weight": "embed_tokens.weight", "norm.weight": "norm.weight"}
LAYER = {
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
ADAPTER = {
    "cls_embedding.cap_proj.fc1.weight": "caption_projector.0.weight",
    "cls_embedding.cap_proj.fc2.weight": "caption_projector.2.weight",
    "cls_embedding.uncond_embedding": "uncond_embedding",
    "output.weight": "head.weight",
}


@dataclass(frozen=True)
class Size:
    """What the names of the published sizes stand for."""

    layers: int
    dim: int
    heads: int


SIZES = {
    "B": Size(12, 768, 12),
    "L": Size(24, 1024, 16),
    "XL": Size(36, 1280, 20),
    "XXL": Size(48, 1536, 24),
    "3B": Size(24, 3200, 32),
}


@dataclass(frozen=True)
class Shape:
    """All that the tensors' shapes follow from."""

    name: str  # of the size
    size: Size
    codes: int
    mlp_dim: int
    text_dim: int
    caption_tokens: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Published name → shape."""
        d, m = self.size.dim, self.mlp_dim
        layer = {
            "attention.wqkv.weight": (3 * d, d),
            "attention.wo.weight": (d, d),
            "feed_forward.w1.weight": (m, d),
            "feed_forward.w3.weight": (m, d),
            "feed_forward.w2.weight": (d, m),
            "attention_norm.weight": (d,),
            "ffn_norm.weight": (d,),
        }
        return {
            "cls_embedding.uncond_embedding": (self.caption_tokens, self.text_dim),
            "cls_embedding.cap_proj.fc1.weight": (d, self.text_dim),
            "cls_embedding.cap_proj.fc2.weight": (d, d),
            "tok_embeddings.weight": (self.codes, d),
            **{f"layers.{i}.{name}": shape for i in range(self.size.layers) for name, shape in layer.items()},
            "norm.weight": (d,),
            "output.weight": (self.codes, d),
        }


def read_shape(path: Path, tensors: Mapping[str, Tensor], size: str | None) -> Shape:
    """The model's shape from its tensors, all of them checked. UserError if it is not of a known size, or not of `size`.

    The number of heads is in no tensor: it follows from the size, hence from layers and width.
    """
    if "cls_embedding.embedding_table.weight" in tensors:
        raise UserError(f"{path} is conditioned on classes (c2i), not on text; take one of the t2i checkpoints")
    codes, dim = shape_of(path, tensors, "tok_embeddings.weight", 2)
    caption_tokens, text_dim = shape_of(path, tensors, "cls_embedding.uncond_embedding", 2)
    mlp_dim, _ = shape_of(path, tensors, "layers.0.feed_forward.w1.weight", 2)
    layers = 1 + max(int(found[1]) for name in tensors if (found := re.match(r"layers\.(\d+)\.", name)))
    known = next((name for name, s in SIZES.items() if (s.layers, s.dim) == (layers, dim)), None)
    if known is None and size is None:
        sizes = ", ".join(f"{name} {s.layers} × {s.dim}" for name, s in SIZES.items())
        raise UserError(f"{path}: {layers} layers of width {dim} are no published size ({sizes})")
    if known is not None and size not in (None, known):
        raise UserError(f"{path} is of size {known}, not {size}; drop --size, or name the other file")
    name = size or str(known)
    shape = Shape(name, SIZES[name], codes, mlp_dim, text_dim, caption_tokens)
    require_tensors(path, {name: tensor for name, tensor in tensors.items() if name not in UNUSED}, shape.tensors())
    return shape


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of a q or k projection (heads * d, D): LlamaGen turns channels 2i and 2i+1 of a head, rotate_half i and i + d/2."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def convert_gpt(tensors: Mapping[str, Tensor], shape: Shape, positions: int) -> tuple[LlamaModel, Adapter]:
    """Tensors that `read_shape` checked → trunk and adapter in float32, on the tensors' device. `positions`: of a sequence."""
    size = shape.size
    with torch.device("meta"):
        trunk = new_trunk(
            codes=shape.codes,
            positions=positions,
            dim=size.dim,
            layers=size.layers,
            heads=size.heads,
            kv_heads=size.heads,
            mlp_dim=shape.mlp_dim,
            prefix_cos=0.0,
        )
        adapter = Adapter(shape.text_dim, size.dim, shape.codes, shape.caption_tokens)
    state = {ours: tensors[name].float() for name, ours in TRUNK.items()}
    for i in range(size.layers):
        layer = f"layers.{i}."
        query, key, value = tensors[f"{layer}attention.wqkv.weight"].float().chunk(3)
        state[f"{layer}self_attn.q_proj.weight"] = half_split(query, size.heads)
        state[f"{layer}self_attn.k_proj.weight"] = half_split(key, size.heads)
        state[f"{layer}self_attn.v_proj.weight"] = value.clone()
        state |= {layer + ours: tensors[layer + name].float() for name, ours in LAYER.items()}
    trunk.load_state_dict(state, assign=True)
    adapter.load_state_dict({ours: tensors[name].float() for name, ours in ADAPTER.items()}, assign=True)
    return trunk, adapter
