"""Small models of random weights, saved as the published ones are: CLIP for transformers and for open_clip."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def pictures(number: int, size: tuple[int, int] = (40, 30), seed: int = 0) -> list[Image.Image]:
    """Coarse patterns of colour, which models of random weights tell apart, of a size that must be resized and cropped."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (number, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(pattern).resize(size, Image.Resampling.NEAREST) for pattern in coarse]


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's own kind of tokenizer, with an alphabet and no merges: a token per letter."""
    symbols = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocab = {symbol: number for number, symbol in enumerate(symbols)}
    return CLIPTokenizer(vocab=vocab, merges=[])


def save_clip(folder: Path, seed: int = 0) -> str:
    """A `transformers` CLIP of 32 px with its processor: what PickScore reads."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    for parameter in model.parameters():  # its initial weights are too small for scores to differ
        parameter.data.mul_(3)
    model.logit_scale.data.fill_(4.6)
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    images.save_pretrained(folder)  # preprocessor_config.json and the tokenizer's files, as the published folders have
    tokenizer.save_pretrained(folder)
    return str(folder)


def add_open_clip_architecture(folder: Path, name: str, width: int = 16) -> None:
    """Registers a small architecture with open_clip, with CLIP's own byte-pair tokenizer, as its large ones are there."""
    vision = {"image_size": 32, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    folder.mkdir(parents=True, exist_ok=True)
    config = {"embed_dim": width, "vision_cfg": vision, "text_cfg": text}
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


def open_clip_state(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return open_clip.create_model(name).state_dict()
