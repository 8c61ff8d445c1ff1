"""What every family shares: scoring and sampling with a `transformers.LlamaModel` behind a caption prefix.

The sequence is [L caption positions, padded left, causal][T image codes]; the logits of code t come from position
L − 1 + t, so T codes need the prefix and codes[:-1] as inputs. A family brings the prefix, the embedding of codes, the
output head, captions, images and the folder.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaModel

from gcpo_t2i.models import decoding, drawing, teacher_forcing
from gcpo_t2i.models.captions import Reading
from gcpo_t2i.models.policy import Condition, Generators, Rollout, Scores


class TrunkPolicy(nn.Module):
    """See `gcpo_t2i.models.policy.Policy` for the contract. A family sets `grid` and `trunk`, and defines three methods."""

    grid: tuple[int, int]
    trunk: LlamaModel

    def prefix(self, condition: Condition) -> Tensor:
        """Embedded captions (N, L, dim), with gradient, in the dtype of the trunk's weights."""
        raise NotImplementedError

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Codes (…) → (…, dim)."""
        raise NotImplementedError

    def head(self, hidden: Tensor) -> Tensor:
        """Trunk outputs (…, dim) → logits (…, V) float32."""
        raise NotImplementedError

    def read(self, text: str) -> Reading:
        """What of a caption the model does not read: nothing, where the tokenizer has no unknown words and no limit."""
        return Reading((), "")

    # ---- scoring

    def hidden(self, states: Tensor, mask: Tensor, codes: Tensor) -> Tensor:
        """states (B, L, …), mask (B, L), codes (B, T) → trunk outputs (B, T, dim) that predict each code."""
        condition = Condition(states, mask).trimmed()
        prefix = self.prefix(condition)  # (B, K, dim)
        embeds = torch.cat([prefix, self.embed_codes(codes[:, :-1])], dim=1)
        valid = torch.cat([condition.mask, mask.new_ones(codes.shape[0], codes.shape[1] - 1)], dim=1)
        start = mask.shape[1] - prefix.shape[1]
        positions = torch.arange(start, start + embeds.shape[1], device=embeds.device)[None]
        output = self.trunk(inputs_embeds=embeds, attention_mask=valid, position_ids=positions, use_cache=False)
        return output.last_hidden_state[:, prefix.shape[1] - 1 :]

    def forward(self, states: Tensor, mask: Tensor, codes: Tensor) -> Tensor:
        """Teacher-forced logits (B, T, V) float32 of codes (B, T) under caption states (B, L, …) and mask (B, L)."""
        return self.head(self.hidden(states, mask, codes))

    def logp(
        self,
        cond: Condition,
        tokens: Tensor,
        *,
        temperature: float = 1.0,
        null: Condition | Tensor | None = None,
        guidance: float = 1.0,
        entropy: bool = False,
    ) -> Scores:
        """Log-probs (B, T) float32 of tokens (B, T), differentiable; with `null`, of null + guidance * (cond − null).

        The null branch gets no gradient, and no pass where its outputs (B, T, dim) are given. `entropy` is of the same
        distribution. See `teacher_forcing.score`.
        """
        hidden = self.hidden(cond.states, cond.mask, tokens)
        null_hidden = null if isinstance(null, Tensor) else None
        if isinstance(null, Condition) and guidance != 1.0:
            with torch.no_grad():
                null_hidden = self.hidden(null.states, null.mask, tokens)
        return teacher_forcing.score(
            self.head, hidden, tokens, null_hidden, guidance=guidance, temperature=temperature, entropy=entropy
        )

    @torch.no_grad()
    def rescore(
        self,
        cond: Condition,
        null: Condition | None,
        tokens: Tensor,
        *,
        guidance: float = 1.0,
        temperature: float = 1.0,
        stats: Collection[str] = (),
    ) -> Rollout:
        """What the sampler would know of codes (B, T), whoever made them, under B rows of cond and null. No gradients."""
        conditions = [cond] if null is None else [cond, null]
        hidden = torch.cat([self.hidden(c.states, c.mask, tokens) for c in conditions])
        how = drawing.Sampling(guidance, temperature, stats=stats)
        return teacher_forcing.rescore(self.head, hidden, tokens, null is not None, how)

    # ---- sampling

    def sample(
        self,
        cond: Condition,
        null: Condition | None,
        *,
        group: int,
        guidance: float,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: Generators | None = None,
        stats: Collection[str] = (),
        given: Tensor | None = None,
        avoid: Tensor | None = None,
    ) -> Rollout:
        """P rows of cond and null → B = P*group images' codes and their log-probs. See `decoding.sample`.

        With `null`, both branches run even at guidance 1: the contrast needs them. Without, guidance must be 1.
        `given` (P, n): the codes that images begin with, n < T; the rollout is of the T − n others. `avoid` (P,): a code
        that is not drawn as the first of them.
        """
        whole = cond if null is None else Condition.cat([cond, null])
        rows = whole.trimmed()
        start, length = whole.mask.shape[1] - rows.mask.shape[1], self.grid[0] * self.grid[1]
        with torch.no_grad():
            prefix, mask = self.prefix(rows), rows.mask
            if given is not None:
                codes = given if null is None else torch.cat([given, given])
                prefix = torch.cat([prefix, self.embed_codes(codes)], dim=1)
                mask = torch.cat([mask, mask.new_ones(codes.shape)], dim=1)
                length -= given.shape[1]
        return decoding.sample(
            self.trunk,
            self.embed_codes,
            self.head,
            prefix,
            mask,
            start=start,
            length=length,
            group=group,
            guided=null is not None,
            how=drawing.Sampling(guidance, temperature, top_k, top_p, stats),
            generator=generator,
            avoid=avoid,
        )


@contextmanager
def recomputed(policy: Any, wanted: bool) -> Iterator[None]:
    """Where `wanted`: forward passes inside keep only the inputs of the trunk's layers, and their backward passes, wherever
    these are, compute the rest again.

    Set on the layers themselves. The trunk's own switch also makes embeddings require gradients, and it is tied to
    training mode, in which no layer would fill the cache of a rollout.
    """
    layers = list(policy.trunk.layers) if wanted else []
    for layer in layers:
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        layer.gradient_checkpointing = layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False
