"""Policies of random weights in the sizes of published models: what is measured does not depend on what they draw."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import VQModel
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessor,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from gcpo_t2i.models.janus import JanusPolicy
from gcpo_t2i.models.llamagen import LlamaGenPolicy

SPECIAL = ["<bos>", "<eos>", "<pad>", "<boi>", "<eoi>", "<image>", "<unk>"]
WORDS = [*SPECIAL, "User:", "Assistant:", "a", "photo", "of", "red", "blue", "green", "circle", "square", "two", "and"]
TEMPLATE = (
    "{% for message in messages %}User: {% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
    " Assistant:"
)


@dataclass(frozen=True)
class Shape:
    """What time and memory of a step depend on; the image tokenizer has the published layout at `vq_channels`."""

    family: str  # janus or llamagen
    dim: int
    layers: int
    heads: int
    mlp_dim: int
    side: int = 24  # of the square map of codes
    codes: int = 16384
    vq_channels: int = 128  # of its widest feature map
    vq_scale: int = 16  # pixels per code
    caption_tokens: int = 120  # LlamaGen's

    def wider(self, factor: float) -> Shape:
        """Heads stay as wide as they are."""
        heads = max(1, round(self.heads * factor))
        dim = self.dim // self.heads * heads
        return replace(self, dim=dim, heads=heads, mlp_dim=round(self.mlp_dim * dim / self.dim / 8) * 8)


SHAPES = {
    "small_janus": Shape("janus", 256, 8, 8, 704, side=16, codes=4096, vq_channels=32, vq_scale=8),
    "janus_pro_1b": Shape("janus", 2048, 24, 16, 5632),
    "janus_pro_7b": Shape("janus", 4096, 30, 32, 11008),
    "llamagen_xl": Shape("llamagen", 1280, 36, 20, 3584, side=16),
}


def random_policy(shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """The policy, in eval mode. The same weights each time."""
    torch.manual_seed(0)
    with torch.device(device):
        policy = janus(shape, dtype) if shape.family == "janus" else llamagen(shape, dtype)
    return policy.to(device).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    words.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
    )


def janus(shape: Shape, dtype: torch.dtype) -> JanusPolicy:
    """Without a vision encoder to speak of, which only understanding images needs."""
    size, ids = shape.side * shape.vq_scale, {word: i for i, word in enumerate(WORDS)}
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=shape.dim,
            intermediate_size=shape.mlp_dim,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=16384,
            pad_token_id=ids["<pad>"],
            bos_token_id=ids["<bos>"],
            eos_token_id=ids["<eos>"],
        ),
        vision_config=JanusVisionConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=size,
            patch_size=shape.vq_scale,
            num_image_tokens=shape.side**2,
            projection_dim=shape.dim,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=shape.codes,
            latent_channels=2 * shape.vq_channels,
            base_channels=shape.vq_channels,
            channel_multiplier=[1, 1, 2, 2, 4] if shape.vq_scale == 16 else [1, 1, 2, 2],
            num_res_blocks=2,
            projection_dim=shape.dim,
            image_token_embed_dim=shape.dim,
        ),
        image_token_id=ids["<image>"],
    )
    model: Any = JanusForConditionalGeneration._from_config(config, dtype=dtype)
    model.generation_config = GenerationConfig(
        bos_token_id=ids["<bos>"],
        eos_token_id=ids["<eos>"],
        pad_token_id=ids["<pad>"],
        generation_kwargs={"boi_token_id": ids["<boi>"]},
    )
    half = [0.5, 0.5, 0.5]
    images = JanusImageProcessor(image_mean=half, image_std=half, size={"height": size, "width": size})
    processor = JanusProcessor(images, tokenizer(), chat_template=TEMPLATE, num_image_tokens=shape.side**2)
    return JanusPolicy(model, processor)


def llamagen(shape: Shape, dtype: torch.dtype) -> LlamaGenPolicy:
    blocks = 5 if shape.vq_scale == 16 else 4
    vq = VQModel(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=tuple(shape.vq_channels * factor for factor in (1, 1, 2, 2, 4)[:blocks]),
        latent_channels=8,
        vq_embed_dim=8,
        num_vq_embeddings=shape.codes,
        sample_size=shape.side * shape.vq_scale,
        lookup_from_codebook=True,
    )
    policy = LlamaGenPolicy.build(
        tokenizer=tokenizer(),
        vq_model=vq,
        grid=(shape.side, shape.side),
        caption_tokens=shape.caption_tokens,
        dim=shape.dim,
        layers=shape.layers,
        heads=shape.heads,
        mlp_dim=shape.mlp_dim,
    )
    policy.to(dtype)
    policy.vq.float()
    return policy
