"""LlamaGen text-to-image policies (arXiv 2406.06525): a caption prefix, then image codes, on a `transformers.LlamaModel`.

The sequence is [L caption positions, padded left, causal][T image codes]; the logits of code t come from position
L − 1 + t, so T codes need the prefix and codes[:-1] as inputs. Differences from the published module: q and k are laid
out in half-split rotary pairs, so that a stock LlamaModel runs it; caption positions are rotated by the identity, but in
converted checkpoints, whose trunk has `rotary_prefix_cos` 0 as the published code; in pre-training the null embedding is
learned (there it stays at its random initial value). `gcpo-t2i convert llamagen` converts published weights.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import VQModel
from PIL import Image
from torch import Tensor, nn
from transformers import LlamaModel, PreTrainedTokenizerFast, T5EncoderModel

from gcpo_t2i.models import decoding, folder, teacher_forcing, vq
from gcpo_t2i.models import llamagen_parts as parts
from gcpo_t2i.models.llamagen_parts import Adapter
from gcpo_t2i.models.policy import Condition, Generators, Rollout, Scores
from gcpo_t2i.models.rope import Rotary2D


class LlamaGenPolicy(nn.Module):
    """See `gcpo_t2i.models.policy.Policy` for the contract. Text encoder and tokenizer are always in eval mode."""

    def __init__(
        self,
        trunk: LlamaModel,
        adapter: Adapter,
        text_encoder: T5EncoderModel,
        tokenizer: PreTrainedTokenizerFast,
        vq_model: VQModel,
        grid: tuple[int, int],
    ) -> None:
        super().__init__()
        self.grid = (int(grid[0]), int(grid[1]))
        self.trunk, self.adapter, self.text_encoder, self.vq = trunk, adapter, text_encoder, vq_model
        self.tokenizer = tokenizer
        self._parts.check()
        config: Any = trunk.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        prefix_cos = getattr(config, "rotary_prefix_cos", 1.0)
        rotary = Rotary2D(self.grid, self.caption_tokens, head_dim, config.rope_parameters["rope_theta"], prefix_cos)
        trunk.register_module("rotary_emb", rotary.to(trunk.device))
        self.train(self.training)

    @property
    def _parts(self) -> parts.Parts:
        return parts.Parts(self.trunk, self.adapter, self.text_encoder, self.tokenizer, self.vq)

    @classmethod
    def build(
        cls,
        *,
        tokenizer: PreTrainedTokenizerFast,
        vq_model: VQModel,
        grid: tuple[int, int],
        caption_tokens: int,
        dim: int,
        layers: int,
        heads: int,
        kv_heads: int | None = None,
        mlp_dim: int | None = None,
        text_dim: int = 64,
        text_layers: int = 2,
        text_heads: int = 4,
        text_mlp_dim: int | None = None,
        theta: float = 10000.0,
    ) -> Self:
        """A randomly initialised policy from sizes, for pre-training and tests. Seed with torch.manual_seed before.

        Weights of trunk and adapter are normal with std 0.6/sqrt(dim). kv_heads below heads (LlamaGen's `n_kv_head`)
        makes a smaller cache, hence faster sampling. mlp_dim defaults to 8/3 dim rounded up to 32, text_mlp_dim to
        2 text_dim. No dropout anywhere: a policy whose log-probs are random cannot be compared with its own rollout.
        """
        codes = vq_model.config["num_vq_embeddings"]
        trunk = parts.new_trunk(
            codes=codes,
            positions=caption_tokens + grid[0] * grid[1],
            dim=dim,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads or heads,
            mlp_dim=mlp_dim or -(-dim * 8 // 96) * 32,
            theta=theta,
        )
        text_encoder = parts.new_text_encoder(
            tokenizer, text_dim, text_layers, text_heads, text_mlp_dim or 2 * text_dim
        )
        adapter = parts.new_adapter(text_dim, dim, codes, caption_tokens)
        return cls(trunk, adapter, text_encoder, tokenizer, vq_model, grid)

    @property
    def caption_tokens(self) -> int:
        """L, the fixed number of caption positions."""
        return self.adapter.uncond_embedding.shape[0]

    @property
    def device(self) -> torch.device:
        return self.adapter.uncond_embedding.device

    def train(self, mode: bool = True) -> Self:
        """As nn.Module.train, but text encoder and VQ stay in eval mode: published T5 configs carry dropout."""
        super().train(mode)
        self.text_encoder.eval()
        self.vq.eval()
        return self

    def set_trainable(self) -> list[nn.Parameter]:
        """Freezes all but trunk, caption projector and head (the null prompt stays a fixed reference); returns those.

        The paper trains the whole generator transformer; in LlamaGen that includes projector and head.
        """
        self.requires_grad_(False)
        for module in (self.trunk, self.adapter.caption_projector, self.adapter.head):
            module.requires_grad_(True)
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    # ---- captions

    def encode_text(self, texts: Sequence[str]) -> Condition:
        """Captions → Condition, with gradient to the text encoder (pre-training trains it). Cut at L tokens.

        The tokenizer pads right and T5 never looks at padding; states move to the right end of the L columns, as
        LlamaGen does at sampling.
        """
        length = self.caption_tokens
        batch = self.tokenizer(
            list(texts),
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        mask = batch["attention_mask"].to(self.device)  # (N, L)
        states = self.text_encoder(input_ids=batch["input_ids"].to(self.device), attention_mask=mask).last_hidden_state
        count = mask.sum(1, keepdim=True)  # (N, 1)
        column = torch.arange(length, device=self.device)[None]  # (1, L)
        source = (column + count) % length  # valid columns [0, count) end up in [L − count, L)
        states = states.gather(1, source[..., None].expand_as(states))
        mask = column >= (length - count.clamp(min=1))  # an empty caption keeps one position to predict code 0 from
        return Condition(states * mask[..., None].to(states.dtype), mask)

    @torch.no_grad()
    def condition(self, texts: Sequence[str | None], like: Condition | None = None) -> Condition:
        """Captions → Condition without gradient. None rows are the null caption under the mask of `like`'s row.

        LlamaGen samples its null caption under the caption's own mask; without `like` the mask is all ones.
        """
        if like is not None and len(like) != len(texts):
            raise ValueError(f"{len(texts)} texts, but `like` has {len(like)} rows")
        is_null = torch.tensor([text is None for text in texts], dtype=torch.bool, device=self.device)
        given = self.encode_text([text or "" for text in texts])
        mask = torch.ones_like(given.mask) if like is None else like.mask
        return self.drop_captions(Condition(given.states, torch.where(is_null[:, None], mask, given.mask)), is_null)

    def drop_captions(self, condition: Condition, drop: Tensor) -> Condition:
        """Rows where `drop` (B,) bool is True become the null caption (with gradient to it), under their own mask."""
        null = self.adapter.uncond_embedding.to(condition.states.dtype) * condition.mask[..., None]
        return Condition(torch.where(drop[:, None, None], null, condition.states), condition.mask)

    # ---- scoring

    def hidden(self, states: Tensor, mask: Tensor, codes: Tensor) -> Tensor:
        """states (B, L, D), mask (B, L), codes (B, T) → trunk outputs (B, T, dim) that predict each code."""
        prefix, mask = self._prefix(Condition(states, mask))  # (B, K, dim)
        embeds = torch.cat([prefix, self.trunk.embed_tokens(codes[:, :-1])], dim=1)
        valid = torch.cat([mask, mask.new_ones(codes.shape[0], codes.shape[1] - 1)], dim=1)
        start = self.caption_tokens - prefix.shape[1]
        positions = torch.arange(start, start + embeds.shape[1], device=embeds.device)[None]
        output = self.trunk(inputs_embeds=embeds, attention_mask=valid, position_ids=positions, use_cache=False)
        return output.last_hidden_state[:, prefix.shape[1] - 1 :]

    def _prefix(self, condition: Condition) -> tuple[Tensor, Tensor]:
        condition = condition.trimmed()
        dtype = self.trunk.embed_tokens.weight.dtype  # under autocast the residual stream stays float32, as usual
        return self.adapter.caption_projector(condition.states.to(dtype)).to(dtype), condition.mask

    def forward(self, states: Tensor, mask: Tensor, codes: Tensor) -> Tensor:
        """Teacher-forced logits (B, T, V) float32 of codes (B, T) under caption states (B, L, D) and mask (B, L)."""
        return self.adapter.head(self.hidden(states, mask, codes))

    def logp(
        self,
        cond: Condition,
        tokens: Tensor,
        *,
        temperature: float = 1.0,
        null: Condition | None = None,
        guidance: float = 1.0,
        entropy: bool = False,
    ) -> Scores:
        """Log-probs (B, T) float32 of tokens (B, T), differentiable; with `null`, of null + guidance * (cond − null).

        The null branch gets no gradient. `entropy` is of the same distribution. See `teacher_forcing.score`.
        """
        hidden = self.hidden(cond.states, cond.mask, tokens)
        null_hidden = None
        if null is not None and guidance != 1.0:
            with torch.no_grad():
                null_hidden = self.hidden(null.states, null.mask, tokens)
        return teacher_forcing.score(
            self.adapter.head, hidden, tokens, null_hidden, guidance=guidance, temperature=temperature, entropy=entropy
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
        how = decoding.Sampling(guidance, temperature, stats=stats)
        return teacher_forcing.rescore(self.adapter.head, hidden, tokens, null is not None, how)

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
    ) -> Rollout:
        """P rows of cond and null → B = P*group images' codes and their log-probs. See `decoding.sample`.

        With `null`, both branches run even at guidance 1: the contrast needs them. Without, guidance must be 1.
        `given` (P, n): the codes that images begin with, n < T; the rollout is of the T − n others.
        """
        rows = (
            cond
            if null is None
            else Condition(torch.cat([cond.states, null.states]), torch.cat([cond.mask, null.mask]))
        )
        with torch.no_grad():
            prefix, mask = self._prefix(rows)
        start, length = self.caption_tokens - prefix.shape[1], self.grid[0] * self.grid[1]
        if given is not None:
            codes = given if null is None else torch.cat([given, given])
            prefix = torch.cat([prefix, self.trunk.embed_tokens(codes)], dim=1)
            mask = torch.cat([mask, mask.new_ones(codes.shape)], dim=1)
            length -= given.shape[1]
        return decoding.sample(
            self.trunk,
            self.trunk.embed_tokens,
            self.adapter.head,
            prefix,
            mask,
            start=start,
            length=length,
            group=group,
            guided=null is not None,
            how=decoding.Sampling(guidance, temperature, top_k, top_p, stats),
            generator=generator,
        )

    # ---- images

    def encode(self, images: Any) -> Tensor:
        """PIL images, a uint8 array (N, h, w, 3) or float pixels (N, 3, h, w) in [-1, 1] → codes (N, T) int64."""
        return vq.encode_images(self.vq, images, self.grid)

    def decode(self, tokens: Tensor) -> list[Image.Image]:
        """Codes (N, T) → N RGB images."""
        return vq.decode_codes(self.vq, tokens, self.grid)

    # ---- folder

    def save_pretrained(self, path: str | Path) -> None:
        """Writes model_index.json and trunk/, adapter/, text_encoder/, tokenizer/, vq/ (safetensors and json)."""
        parts.save_parts(self._parts, self.grid, Path(path), type(self).__name__)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Loads what `save_pretrained` wrote, from disk alone, in eval mode. dtype None is float32; the VQ model is
        float32 always. UserError names the part that is missing, damaged, or of a shape that does not fit.
        """
        folder.read_index(path, [cls.__name__])
        loaded, grid = parts.load_parts(Path(path), dtype or torch.float32)
        return cls(*loaded, grid=grid).to(device).eval()
