"""A Janus of random weights in transformers' own format: 4 × 4 codes of 32 px images, four-word prompts and longer ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
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

BOS, EOS, PAD, BOI = 0, 1, 2, 3
SPECIAL = ["<bos>", "<eos>", "<pad>", "<boi>", "<eoi>", "<image>", "<unk>"]
WORDS = [*SPECIAL, "User:", "Assistant:", "a", "photo", "of", "red", "blue", "circle", "square", "two", "and"]
TEMPLATE = (
    "{% for message in messages %}User: {% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
    " Assistant:"
)


def tiny_processor(pad_token: str = "<pad>") -> JanusProcessor:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    names = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token=pad_token, unk_token="<unk>",
        extra_special_tokens=names,
    )  # fmt: skip
    half = [0.5, 0.5, 0.5]
    images = JanusImageProcessor(image_mean=half, image_std=half, size={"height": 32, "width": 32})
    return JanusProcessor(images, fast, chat_template=TEMPLATE, num_image_tokens=16)


def tiny_config(**text: Any) -> JanusConfig:
    return JanusConfig(
        text_config=LlamaConfig(
            **{
                "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
                "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
            }
            | text
        ),
        vision_config=JanusVisionConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8,
            num_image_tokens=16, projection_dim=32,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=4, num_embeddings=64, latent_channels=32, base_channels=32, channel_multiplier=[1, 1, 1, 1],
            num_res_blocks=1, projection_dim=32, image_token_embed_dim=32,
        ),
        image_token_id=WORDS.index("<image>"),
    )  # fmt: skip


def tiny_model(seed: int = 0) -> JanusForConditionalGeneration:
    """With logits far from uniform, and codes that look different."""
    torch.manual_seed(seed)
    model: Any = JanusForConditionalGeneration(tiny_config()).eval()
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter *= 10 if parameter.ndim == 2 else 1
        for module in (model.model.generation_embeddings, *model.model.generation_aligner.children()):
            if isinstance(getattr(module, "weight", None), torch.Tensor):
                module.weight *= 20
        model.model.generation_head.proj_out.weight *= 10
        model.model.generation_head.vision_head.weight *= 20
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, guidance_scale=5, generation_kwargs={"boi_token_id": BOI}
    )
    return model


def write_tiny_janus(folder: Path, pad_token: str = "<pad>") -> Path:
    """A folder as transformers writes it. `pad_token` is the tokenizer's, for the padding of prompts."""
    tiny_model().save_pretrained(folder)
    tiny_processor(pad_token).save_pretrained(folder)
    return folder
