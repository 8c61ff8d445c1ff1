"""Small models of random weights, saved as the published ones are: CLIP for transformers and open_clip, and detectors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    SwinConfig,
)

from rewards.coco import CLASSES

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


VOC_SPELLING = {"motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "potted plant": "pottedplant"}
VOC_SPELLING |= {"dining table": "diningtable", "tv": "tvmonitor", "computer mouse": "mouse", "tv remote": "remote"}
VOC_SPELLING |= {"computer keyboard": "keyboard"}


def save_mask2former(folder: Path, size: dict[str, int], labels: dict[int, str]) -> str:
    """A Mask2Former of some thousand weights; its class head is sharpened, so that it is sure of what it says."""
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],  # type: ignore[call-arg]
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=12,
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
    )
    model = Mask2FormerForUniversalSegmentation(config)
    model.class_predictor.weight.data.mul_(40)
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size=size, num_labels=len(labels)).save_pretrained(folder)
    return str(folder)


def save_owlv2(folder: Path) -> str:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 40, "pad_token_id": tokenizer.pad_token_id}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 64, "patch_size": 16}
    model = Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=vision, projection_dim=16))
    for parameter in model.owlv2.parameters():
        parameter.data.mul_(3)
    model.save_pretrained(folder)
    images = Owlv2ImageProcessor(size={"height": 64, "width": 64})
    tokenizer.model_max_length = 40
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    return str(folder)


def save_grounding_dino(folder: Path) -> str:
    """With a BERT vocabulary in which the special tokens and the full stop have the numbers that the model relies on."""
    torch.manual_seed(0)
    words = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}
    known = sorted({word for name in CLASSES for word in name.split()})
    free = (number for number in range(200, 1500) if number not in words.values())
    words |= {word: next(free) for word in known if word != "donut"}
    words |= {"don": next(free), "##ut": next(free)}  # a word of two tokens
    vocab = {f"[unused{number}]": number for number in range(1100) if number not in words.values()} | words
    lines = [word for word, _ in sorted(vocab.items(), key=lambda item: item[1])]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n")
    tokenizer = BertTokenizer.from_pretrained(folder)
    bert = BertConfig(vocab_size=1100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage2", "stage3", "stage4"],  # type: ignore[call-arg]
    )
    config = GroundingDinoConfig(
        backbone_config=swin,
        text_config=bert,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=20,
    )
    model = GroundingDinoForObjectDetection(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    return str(folder)
