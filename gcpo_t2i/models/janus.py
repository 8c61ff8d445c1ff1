"""Janus and Janus-Pro policies (arXiv 2410.13848, 2501.17811) on `transformers.JanusForConditionalGeneration`.

The prefix is the chat template around the prompt, BOS first and the begin-of-image token (boi) last; image codes come in
through `generation_embeddings` and `generation_aligner`, logits out of `generation_head`. Sampling, null prompt and images
are those of the library's `generate(generation_mode="image")`; docs/parity.md lists what differs and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import JanusForConditionalGeneration, JanusProcessor

from gcpo_t2i.errors import UserError
from gcpo_t2i.models import folder
from gcpo_t2i.models.hub import local_folder
from gcpo_t2i.models.pictures import Pictures
from gcpo_t2i.models.policy import Condition
from gcpo_t2i.models.trunk import TrunkPolicy
from gcpo_t2i.models.vq import CHUNK, to_pixels


class JanusPolicy(TrunkPolicy):
    """See `gcpo_t2i.models.policy.Policy` for the contract. Conditions hold token ids: the trunk embeds them itself.

    Codes are drawn and scored in float32, whatever the rest of the model is: `generation_head` and the image tokenizer
    stay float32. The vision encoder, which only understanding images needs, is kept to be saved with the rest.
    """

    def __init__(self, model: JanusForConditionalGeneration, processor: JanusProcessor) -> None:
        super().__init__()
        self.model: Any = model  # its submodules are known at run time only
        self.processor: Any = processor
        side = self.model.config.vq_config.num_patches
        self.grid = (side, side)
        self.bos, self.boi, self.pad = special_tokens(model, processor)
        self.model.model.generation_head.float()
        self.model.model.vqmodel.float()
        self.train(self.training)

    @property
    def trunk(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.model.model.language_model

    @property
    def device(self) -> torch.device:
        return self.trunk.embed_tokens.weight.device

    def train(self, mode: bool = True) -> Self:
        """As nn.Module.train, but the image tokenizer stays in eval mode."""
        super().train(mode)
        self.model.model.vqmodel.eval()
        return self

    def set_trainable(self) -> list[nn.Parameter]:
        """Freezes all but the trunk, and returns it: what the paper trains. Code embeddings, aligner and head stay."""
        self.requires_grad_(False)
        self.trunk.requires_grad_(True)
        return list(self.trunk.parameters())

    # ---- captions

    @torch.no_grad()
    def condition(self, texts: Sequence[str | None], like: Condition | None = None) -> Condition:
        """Captions → Condition of token ids (N, L) in the chat template, padded left to the longest.

        None rows are those of `like` with pad tokens between BOS and boi, under its mask; without `like`, those of an
        empty prompt.
        """
        if like is not None and len(like) != len(texts):
            raise ValueError(f"{len(texts)} texts, but `like` has {len(like)} rows")
        given = self._tokenize([text or "" for text in texts])
        length = max(given.mask.shape[1], 0 if like is None else like.mask.shape[1])
        given = given.padded(length)
        like = given if like is None else like.padded(length)
        kept = (like.states == self.bos) | (like.states == self.boi)
        null = like.states.masked_fill(~kept, self.pad)
        is_null = torch.tensor([text is None for text in texts], device=self.device)[:, None]
        return Condition(
            torch.where(is_null, null, given.states), torch.where(is_null, like.mask, given.mask)
        ).trimmed()

    def _tokenize(self, texts: Sequence[str]) -> Condition:
        chats = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in texts]
        prompts = self.processor.apply_chat_template(chats, add_generation_prompt=True)
        batch = self.processor(
            text=prompts, generation_mode="image", padding=True, padding_side="left", return_tensors="pt"
        ).to(self.device)
        return Condition(batch["input_ids"], batch["attention_mask"].bool())

    # ---- what scoring and sampling ask for

    def prefix(self, condition: Condition) -> Tensor:
        return self.trunk.embed_tokens(condition.states)

    def embed_codes(self, codes: Tensor) -> Tensor:
        embeds = self.model.prepare_embeddings_for_image_generation(codes)
        return embeds.to(self.trunk.embed_tokens.weight.dtype)  # under autocast the residual stream stays float32

    def head(self, hidden: Tensor) -> Tensor:
        head = self.model.model.generation_head
        with torch.autocast(hidden.device.type, enabled=False):
            return head(hidden.to(head.vision_head.weight.dtype)).float()

    # ---- images

    @torch.no_grad()
    def encode(self, images: Any) -> Tensor:
        """PIL images, a uint8 array (N, h, w, 3) or float pixels (N, 3, h, w) in [-1, 1] → codes (N, T) int64.

        The nearest entry by angle, as Janus was trained (and decodes); the library's own `encode` forgets to normalise.
        ValueError when the size of the images does not give the grid.
        """
        vq, codes = self.model.model.vqmodel, []
        codebook = F.normalize(vq.quantize.embedding.weight, dim=-1)  # (V, D)
        for pixels in to_pixels(images).split(CHUNK):
            with torch.autocast(self.device.type, enabled=False):
                latents = vq.quant_conv(vq.encoder(pixels.to(codebook.device, codebook.dtype)))  # (n, D, H, W)
                if tuple(latents.shape[-2:]) != self.grid:
                    size = tuple(pixels.shape[-2:])
                    raise ValueError(
                        f"images of {size} pixels give a code map of {tuple(latents.shape[-2:])}, expected {self.grid}"
                    )
                codes.append((F.normalize(latents.flatten(2).transpose(1, 2), dim=-1) @ codebook.T).argmax(-1))
        return torch.cat(codes)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Pictures:
        """Codes (N, T) → N RGB images, by the library's decoder and post-processing."""
        parts = []
        for part in tokens.split(CHUNK):
            with torch.autocast(self.device.type, enabled=False):
                pixels = self.model.decode_image_tokens(part.to(self.device)).float()  # (n, h, w, 3)
            parts.append(self.processor.postprocess(list(pixels), return_tensors="pt")["pixel_values"])  # (n, 3, h, w)
        return Pictures(torch.cat(parts))

    @property
    def codebook(self) -> Tensor:
        return self.model.model.vqmodel.quantize.embedding.weight.detach()

    # ---- folder

    def save_pretrained(self, path: str | Path) -> None:
        """Writes transformers' own format, which `JanusForConditionalGeneration` and `JanusProcessor` load."""
        with folder.no_progress_bars():
            self.model.save_pretrained(path)
            self.processor.save_pretrained(path)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Loads a local folder or a repository of the hub, in eval mode. dtype None is float32; output head and image
        tokenizer are float32 always. UserError names the file that is missing or damaged, or a token that is unknown.
        """
        path = local_folder(path)
        folder.read_index(path, [cls.__name__])
        with folder.no_progress_bars(), folder.reading(path):
            processor = JanusProcessor.from_pretrained(path, local_files_only=True)
            loaded: Any = JanusForConditionalGeneration.from_pretrained(
                path,
                dtype=dtype or torch.float32,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # to name them, which the library's own error does not
                output_loading_info=True,
            )
            model, info = loaded
            folder.require_complete(path, info)
            check_sizes(model)
            policy = cls(model, processor)
        return policy.to(device).eval()


def check_sizes(model: JanusForConditionalGeneration) -> None:
    """ValueError when the parts are not of one model."""
    config: Any = model.config  # its parts are known at run time only
    vq, vision, text = config.vq_config, config.vision_config, config.text_config
    if vision.num_image_tokens != vq.num_patches**2:
        raise ValueError(
            f"num_image_tokens {vision.num_image_tokens} is not the number of codes {vq.num_patches} × {vq.num_patches}"
        )
    if len({text.hidden_size, vq.projection_dim, vq.image_token_embed_dim}) > 1:
        raise ValueError(
            f"the parts disagree on width: text {text.hidden_size}, code embedding {vq.projection_dim}, "
            f"output head {vq.image_token_embed_dim}"
        )


def special_tokens(model: JanusForConditionalGeneration, processor: JanusProcessor) -> tuple[int, int, int]:
    """Ids of BOS, boi, and the pad token of the null prompt, which differ between the sizes. UserError if one is unknown.

    The pad token is that of generation_config.json, as in the library: a tokenizer may pad prompts with another one.
    """
    tokenizer: Any = processor.tokenizer  # type: ignore[attr-defined]
    bos, boi, padding = tokenizer.bos_token_id, tokenizer.boi_token_id, tokenizer.pad_token_id
    found = {"bos_token": bos, "boi_token": boi, "pad_token": padding}
    if absent := [name for name, value in found.items() if value is None]:
        raise UserError(f"the tokenizer has no {' and no '.join(absent)}; save it with the special tokens of Janus")
    pad = getattr(model.generation_config, "pad_token_id", None)
    return bos, boi, padding if pad is None else pad
