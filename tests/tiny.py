"""A policy of random weights that is made, sampled and trained in well under a second: 4 × 4 codes of 16 px images."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import VQModel
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from gcpo_t2i.models.llamagen import LlamaGenPolicy

WORDS = ["<pad>", "<unk>", "a", "of", "photo", "red", "blue", "circle", "square", "two", "and"]

# A reward that a policy of random weights can learn: pictures should be bright.
BRIGHT = """
import numpy as np

def bright(images, prompts):
    return [float(np.asarray(image).mean()) / 255 for image in images]

def dark(images, prompts):
    return [1 - value for value in bright(images, prompts)]

def broken(images, prompts):
    raise RuntimeError("the GPU caught fire")

def nan(images, prompts):
    return [float("nan")] * len(images)

def short(images, prompts):
    return [0.0] * (len(images) - 1)

def constant(images, prompts):
    return [1.0] * len(images)
"""


def tiny_policy(seed: int = 0) -> LlamaGenPolicy:
    torch.manual_seed(seed)
    vq = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=32,
        norm_num_groups=4,
        sample_size=16,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    )
    with torch.no_grad():
        vq.decoder.conv_out.weight *= 10  # codes that look different, which random ones would not
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    return LlamaGenPolicy.build(
        tokenizer=fast,
        vq_model=vq,
        grid=(4, 4),
        caption_tokens=8,
        dim=32,
        layers=2,
        heads=2,
        text_dim=16,
        text_layers=1,
    ).eval()


def write_tiny_policy(folder: Path) -> Path:
    tiny_policy().save_pretrained(folder / "policy")
    return folder / "policy"


def train_command(model: Path, rewards: Path, folder: Path) -> list[str]:
    """`gcpo-t2i train` for a run of three steps of a second in all, in float32 on every CPU. Options that are added win."""
    prompts = folder / "prompts.txt"
    prompts.write_text("a photo of a red circle\na blue square\ntwo red square\n")
    reward = json.dumps([{"name": f"{rewards}:bright"}])
    return [
        *("train", "--model", str(model), "--train_prompts", str(prompts), "--eval.prompts", str(prompts)),
        *("--rewards", reward, "--eval.rewards", reward, "--prompts_per_step", "2", "--group_size", "4"),
        *("--output_dir", str(folder / "run"), "--steps", "3", "--device", "cpu", "--dtype", "float32"),
        *("--scoring", "conditional"),
        *("--eval.num_prompts", "3", "--eval.samples_per_prompt", "2"),
    ]
