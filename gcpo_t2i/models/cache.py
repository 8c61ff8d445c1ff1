"""Keys and values of a rollout: filled by a prefix, shared out over its group, and attended to in whole blocks."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

BLOCK = 32  # attention runs over multiples of this many positions, see `Cache`


def whole_blocks(positions: int) -> int:
    return -(-positions // BLOCK) * BLOCK


def working_dtype(tensor: Tensor) -> torch.dtype:
    """What a linear layer of these weights, or of this input, runs in here: autocast's precision, else its own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


@dataclass(frozen=True)
class Prefix:
    """What N captions leave behind."""

    keys: list[Tensor]  # per layer (N, kv heads, K, head_dim)
    values: list[Tensor]  # likewise
    mask: Tensor  # (N, K) bool


def cache_keyword(trunk: Any) -> str:
    """What the trunk's library calls the cache that a pass goes on from; the old name warns where there is a new one."""
    return "cache" if "cache" in inspect.signature(type(trunk).forward).parameters else "past_key_values"


def prefill(trunk: Any, embeds: Tensor, mask: Tensor, start: int) -> tuple[Tensor, Prefix]:
    """Runs captions (N, K, D), mask (N, K) bool, at positions start … start+K−1 → last outputs (N, D), keys and values."""
    past = DynamicCache()
    positions = torch.arange(start, start + mask.shape[1], device=embeds.device)[None]
    how: dict[str, Any] = {cache_keyword(trunk): past, "use_cache": True}
    output = trunk(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, **how)
    layers: list[Any] = past.layers
    dtype = working_dtype(embeds)  # autocast leaves both in float32
    keys, values = [layer.keys.to(dtype) for layer in layers], [layer.values.to(dtype) for layer in layers]
    return output.last_hidden_state[:, -1], Prefix(keys, values, mask)


class Cache:
    """Keys and values per layer, each (R, kv heads, C, head_dim), in memory that is allocated once for a whole rollout.

    Attention runs over whole blocks. Unused positions are masked by `bias`, 0 where a position may be attended, else −inf:
    (R, 1, 1, all positions) for `attend_fused`, (R * kv heads, 1, all positions) for `attend_by_products`. On accelerators C is
    the full length from the start, and attention reads a slice. On a CPU, where rollouts take 1.02 to 1.06 times as long that
    way, C grows block by block and is always whole and contiguous: each tensor moves into the spare one, whose place it leaves
    to the next. (Fresh tensors instead would cost a tenth of the rollout in page faults.) Prefix keys are stored once per row,
    not per prompt: splitting the attention in two saves 3 % of it at 20 caption and 144 image positions (18 % at 120 and 576),
    too little for a second kind of cache.
    """

    keys: list[Tensor]
    values: list[Tensor]

    def __init__(self, prefix: Prefix, group: int, length: int, grows: bool) -> None:
        """Room for `length` positions after the prefix, whose rows come `group` times in a row."""
        first, self.grows = prefix.keys[0], grows
        rows, self.filled = len(first) * group, first.shape[2]
        self.shape = (rows, first.shape[1], first.shape[3])  # (R, kv heads, head_dim)
        room = whole_blocks(self.filled + length)
        self.capacity = whole_blocks(self.filled) if grows else room
        size = rows * first.shape[1] * room * first.shape[3]
        self.spare = first.new_empty(size if grows else 0)
        bias = first.new_full((rows, first.shape[1] if grows else 1, 1, room), -torch.inf)
        bias[..., : self.filled].masked_fill_(prefix.mask.repeat_interleave(group, 0)[:, None, None], 0)
        self.bias = bias.flatten(0, 1) if grows else bias
        self.keys, self.values = (
            [
                self._filled(first.new_empty(size), tensor.repeat_interleave(group, 0), self.capacity)
                for tensor in tensors
            ]
            for tensors in (prefix.keys, prefix.values)
        )
        self._operands: list[tuple[Tensor, Tensor]] | None = None

    def _filled(self, memory: Tensor, content: Tensor, capacity: int) -> Tensor:
        """The start of flat `memory` as (R, kv heads, capacity, head_dim): `content`, and zeros behind it, because what is
        masked has weight 0, and 0 times whatever was in memory may be NaN."""
        rows, heads, width = self.shape
        tensor = memory[: rows * heads * capacity * width].view(rows, heads, capacity, width)
        tensor[:, :, : content.shape[2]] = content
        tensor[:, :, content.shape[2] :] = 0
        return tensor

    def span(self, positions: int) -> int:
        """How many positions attention has to run over when `positions` of them are in use; room is made for them."""
        span = whole_blocks(positions)
        if span > self.capacity:
            for tensors in (self.keys, self.values):
                for layer, tensor in enumerate(tensors):
                    tensors[layer] = self._filled(self.spare, tensor, span)
                    self.spare = tensor.as_strided(self.spare.shape, (1,))
            self.capacity = span
            self._operands = None
        return span

    def read(self, span: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values per layer as attention over the first `span` positions takes them: (R, kv heads, span, head_dim) each
        for `attend_fused`; where the cache grows, and `span` is all of it, (R * kv heads, head_dim, span) and
        (R * kv heads, span, head_dim) for `attend_by_products`, kept, as views in every step took 2 % of a rollout."""
        pairs = zip(self.keys, self.values, strict=True)
        if not self.grows:
            return [(keys[:, :, :span], values[:, :, :span]) for keys, values in pairs]
        if self._operands is None:
            self._operands = [(keys.flatten(0, 1).transpose(1, 2), values.flatten(0, 1)) for keys, values in pairs]
        return self._operands


def write(tensor: Tensor, slot: Tensor | int, new: Tensor) -> None:
    """`new` (R, kv heads, d) becomes position `slot`, or (1,), of `tensor` (R, kv heads, C, d)."""
    if isinstance(slot, int):
        tensor.select(2, slot).copy_(new)
    else:
        tensor.index_copy_(2, slot, new[:, :, None])


def attend_by_products(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float) -> Tensor:
    """One position's attention: query (R, heads, d) over keys (R * kv heads, d, C) and values (R * kv heads, C, d), bias
    (R * kv heads, 1, C) → (R, heads * d). Scale and bias are part of the first product."""
    rows, _, d = query.shape
    weights = torch.baddbmm(bias, query.reshape(len(keys), -1, d), keys, alpha=scale).softmax(-1)  # in float32 within
    return torch.bmm(weights, values).view(rows, -1)


def attend_fused(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float) -> Tensor:
    """The same in one kernel, over keys and values (R, kv heads, C, d): what accelerators want."""
    queries = query.unflatten(1, (keys.shape[1], -1))
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scale).reshape(len(query), -1)
