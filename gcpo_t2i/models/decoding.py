"""The one decoding engine: guided sampling with a key/value cache.

Every family is a `transformers.LlamaModel` trunk behind three things of its own: prefix embeddings, a code embedding and
an output head. A step from one code to the next works in place on buffers that are there for the whole rollout, with its
position in a tensor, so that the same function runs eagerly and can be captured (see `gcpo_t2i.models.graphs`). Left out:
beam search, stop tokens (an image has T codes), paging.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gcpo_t2i.models import graphs
from gcpo_t2i.models.cache import Cache, Prefix, attend_by_products, attend_fused, prefill, write
from gcpo_t2i.models.drawing import NULL_HIDDEN, Sampling, as_rollout, pick, uniform_numbers
from gcpo_t2i.models.layers import Head, Layer, engine_layers, rms_norm
from gcpo_t2i.models.policy import Generators, Rollout

# ---- one position


def rotary_rows(trunk: Any, like: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """(cos, sin) of positions first, first + 1, …, each (count, d), for `rotated`: the first half of sin is negated."""
    positions = torch.arange(first, first + count, device=like.device)[None]
    cos, sin = (table[0] for table in trunk.rotary_emb(like, positions))
    half = sin.shape[-1] // 2
    return cos, torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(…, d) turned by rows (1, d) of `rotary_rows`: transformers' `apply_rotary_pos_emb`, in three kernels for q and k."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def decode_step(
    layers: list[Layer], x: Tensor, slot: Tensor, rotary: tuple[Tensor, Tensor], cache: Cache, span: int
) -> Tensor:
    """Embeddings (R, D) of one position through all layers → (R, D), before the last norm.

    The position's keys and values go into the cache at `slot` (1,); attention runs over its first `span` positions.
    """
    rows, kv_heads, d = cache.shape
    last = (-kv_heads,)
    attend = attend_by_products if cache.grows else attend_fused
    # a CPU copies much faster to a place that it is told as a number
    place = int(slot) if x.device.type == "cpu" else slot
    cache.bias.index_fill_(-1, slot, 0)
    bias = cache.bias[..., :span]
    for layer, keys, values, known in zip(layers, cache.keys, cache.values, cache.read(span), strict=True):
        # (R, heads + kv heads, d) and (R, kv heads, d)
        qk, value = layer.qkv(x).view(rows, -1, d).tensor_split(last, dim=1)
        query, key = rotated(qk, *rotary).to(keys.dtype).tensor_split(last, dim=1)
        write(keys, place, key)
        write(values, place, value)
        x = layer.out(x, attend(query, *known, bias, layer.scale))
        gate, up = layer.gate_up(x).chunk(2, dim=-1)
        x = layer.down(x, layer.activation(gate).mul_(up))
    return x


# ---- sampling


class Decoder:
    """A rollout on its way: how many codes are drawn (`index`), the last ones (`tokens`), and what is kept of all."""

    def __init__(
        self,
        trunk: Any,
        embed: Head,
        head: Head,
        prefix: Prefix,
        *,
        start: int,
        length: int,
        group: int,
        guided: bool,
        how: Sampling,
        generator: Generators | None = None,
    ) -> None:
        """`start` is the position of the prefixes' first column. See `sample` for the others."""
        self.embed, self.head, self.guided, self.how = embed, head, guided, how
        self.cache = Cache(prefix, group, length - 1, grows=prefix.mask.device.type == "cpu")
        self.layers, self.norm = engine_layers(trunk), rms_norm(trunk.norm)  # copied into what memory the cache leaves
        self.first = self.cache.filled - 1  # the slot of code t is first + t + 1
        device, batch = prefix.mask.device, self.cache.shape[0] // (2 if guided else 1)
        self.uniform = uniform_numbers(batch, length, generator, device)
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.rotary = rotary_rows(trunk, embed(self.tokens[:1]), start + self.first, length)  # row t turns code t − 1
        self.columns: dict[str, Tensor] = {}  # name → (B, T), or (B, T, D)

    def record(self, outputs: Tensor, avoid: Tensor | None = None) -> None:
        """Draws the next code of every sample from the trunk's outputs (R, D), and keeps what there is to know about it."""
        uniform = self.uniform.index_select(1, self.index).squeeze(1)
        found = pick(self.head(outputs), uniform, self.guided, self.how, avoid)
        if NULL_HIDDEN in self.how.stats:
            found[NULL_HIDDEN] = outputs[len(self.tokens) :]
        if not self.columns:
            shape = self.uniform.shape
            self.columns = {name: column.new_empty(*shape, *column.shape[1:]) for name, column in found.items()}
        for name, column in found.items():
            self.columns[name].index_copy_(1, self.index, column[:, None])
        self.tokens.copy_(found["tokens"])
        self.index += 1

    def span(self, drawn: int) -> int:
        """The `span` of the step after which `drawn` + 1 codes are there."""
        return self.cache.span(self.cache.filled + drawn)

    def step(self, span: int) -> None:
        """From the last codes to the next ones. Everything it changes is changed in place."""
        embeds = self.embed(self.tokens)
        x = torch.cat([embeds, embeds]) if self.guided else embeds
        cos, sin = (rows.index_select(0, self.index) for rows in self.rotary)
        x = decode_step(self.layers, x, self.index + self.first, (cos, sin), self.cache, span)
        self.record(self.norm(x))


@torch.no_grad()
def sample(
    trunk: Any,
    embed: Head,
    head: Head,
    prefix: Tensor,
    mask: Tensor,
    *,
    start: int,
    length: int,
    group: int,
    guided: bool,
    how: Sampling,
    generator: Generators | None = None,
    avoid: Tensor | None = None,
) -> Rollout:
    """Prefixes (2P, K, D), cond rows first, or (P, K, D) when not `guided`, at position `start` → P*group samples.

    Each prefix runs once and its cache is expanded over the group; both branches decode in one batch of 2B rows.
    `embed` maps codes (B,) to (B, D), `head` outputs (R, D) to logits (R, V). `avoid` (P,) is not drawn as the first code.
    ValueError on settings without a meaning.
    """
    how.check(guided)
    hidden, filled = prefill(trunk, prefix, mask, start)
    decoder = Decoder(
        *(trunk, embed, head, filled),
        start=start,
        length=length,
        group=group,
        guided=guided,
        how=how,
        generator=generator,
    )
    barred = None if avoid is None else avoid.repeat_interleave(group)
    decoder.record(hidden.repeat_interleave(group, 0), barred)
    graphs.advance(decoder, length)
    return as_rollout(decoder.columns, how)
