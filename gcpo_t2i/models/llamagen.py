"""LlamaGen text-to-image policies (arXiv 2406.06525): a caption prefix, then image codes, on a `transformers.LlamaModel`.

The sequence is that of `gcpo_t2i.models.trunk`. Differences from the published module: q and k are laid out in half-split
rotary pairs, so that a stock LlamaModel runs it; caption positions are rotated by the identity, but in converted
checkpoints, whose trunk has `rotary_prefix_cos` 0 as the published code; in pre-training the null embedding is learned
(there it stays at its random initial value). `gcpo-t2i convert llamagen` converts published weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import VQModel
from torch import Tensor, nn
from transformers import LlamaModel, PreTrainedTokenizerFast, T5EncoderModel

from gcpo_t2i.models import captions, folder, vq
from gcpo_t2i.models import llamagen_parts as parts
from gcpo_t2i.models.llamagen_parts import Adapter
from gcpo_t2i.models.pictures import Pictures
from gcpo_t2i.models.policy import Condition
from gcpo_t2i.models.rope import Rotary2D
from gcpo_t2i.models.trunk import TrunkPolicy


class LlamaGenPolicy(TrunkPolicy):
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
        batch = captions.tokenize(self.tokenizer, texts, length, return_tensors="pt")
        mask = batch["attention_mask"].to(self.device)  # (N, L)
        states = self.text_encoder(input_ids=batch["input_ids"].to(self.device), attention_mask=mask).last_hidden_state
        count = mask.sum(1, keepdim=True)  # (N, 1)
        column = torch.arange(length, device=self.device)[None]  # (1, L)
        source = (column + count) % length  # valid columns [0, count) end up in [L − count, L)
        states = states.gather(1, source[..., None].expand_as(states))
        mask = column >= (length - count.clamp(min=1))  # an empty caption keeps one position to predict code 0 from
        return Condition(states * mask[..., None].to(states.dtype), mask)

    def read(self, text: str) -> captions.Reading:
        """What of a caption the model does not read."""
        return captions.read_caption(self.tokenizer, text, self.caption_tokens)

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

    # ---- what scoring and sampling ask for

    def prefix(self, condition: Condition) -> Tensor:
        """Captions projected to the trunk's width (N, L, dim)."""
        dtype = self.trunk.embed_tokens.weight.dtype  # under autocast the residual stream stays float32, as usual
        return self.adapter.caption_projector(condition.states.to(dtype)).to(dtype)

    def embed_codes(self, codes: Tensor) -> Tensor:
        return self.trunk.embed_tokens(codes)

    def head(self, hidden: Tensor) -> Tensor:
        return self.adapter.head(hidden)

    # ---- images

    def encode(self, images: Any) -> Tensor:
        """PIL images, a uint8 array (N, h, w, 3) or float pixels (N, 3, h, w) in [-1, 1] → codes (N, T) int64."""
        return vq.encode_images(self.vq, images, self.grid)

    def decode(self, tokens: Tensor) -> Pictures:
        """Codes (N, T) → N RGB images."""
        return vq.decode_codes(self.vq, tokens, self.grid)

    @property
    def codebook(self) -> Tensor:
        return self.vq.quantize.embedding.weight.detach()

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
