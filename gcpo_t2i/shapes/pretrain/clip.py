"""Stage `clip`: a tiny open_clip CLIP, trained with open_clip's own loss on fresh scenes and their captions.

Two things differ from training on photographs. A batch never holds two captions that mean the same: the world has few
prompts, and a caption's twin would be a wrong answer that is right. What is left of that is inherent, since a red
circle is also a circle; the loss settles it by how often each caption is the one that was given. And half of the
pictures are blurred and noisy, because the model will later judge what comes out of a VQ decoder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip import CLIP, ClipLoss, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from gcpo_t2i.models.vq import to_pixels
from gcpo_t2i.shapes.pretrain.fit import Metrics, Schedule, autocast, fit
from gcpo_t2i.shapes.pretrain.stream import SceneStream
from gcpo_t2i.shapes.prompts import TAGS, Metadata, all_specs, sample_scene, split_key
from gcpo_t2i.shapes.scenes import IMAGE_SIZE, render

BATCH = 128  # scenes drawn; about 110 of them have a caption of their own
# Single objects and counts have few captions, and most further draws of them would only be dropped as twins.
TAG_WEIGHTS = {
    "single_object": 0.25,
    "two_object": 1.0,
    "counting": 1.0,
    "colors": 1.25,
    "position": 2.0,
    "color_attr": 3.0,
}
CONTEXT = 16  # words of a caption, with its start and its end
EMBED_DIM = 128
SOFT_SHARE = 0.5
MAX_LOGIT_SCALE = math.log(100)  # as in Radford et al. 2021 (arXiv 2103.00020)

_SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
_MIRRORED = ("right of", "below")


@cache
def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the ShapesWorld prompts, lower-cased, between <bos> and <eos>."""
    words = sorted({word for spec in all_specs() for word in spec["prompt"].split()})
    vocabulary = {word: i for i, word in enumerate([*_SPECIAL, *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<bos> $A <eos>", special_tokens=[(word, vocabulary[word]) for word in ("<bos>", "<eos>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=CONTEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def tokenize(texts: Sequence[str]) -> Tensor:
    """N captions → ids (N, CONTEXT) int64, as `open_clip.get_tokenizer` gives them for the saved folder."""
    batch = build_tokenizer()(
        list(texts), padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
    )
    return batch["input_ids"]


def model_config() -> dict[str, Any]:
    """`model_cfg` of open_clip's `open_clip_config.json`."""
    tokenizer = build_tokenizer()
    return {
        "embed_dim": EMBED_DIM,
        "vision_cfg": {"image_size": IMAGE_SIZE, "patch_size": 8, "width": 128, "head_width": 32, "layers": 4},
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": len(tokenizer),
            "width": 96,
            "heads": 4,
            "layers": 3,
            "hf_tokenizer_name": "shapesworld",  # only its being there counts: the folder's own tokenizer is loaded
            "pool_type": "eos",
            "eos_id": tokenizer.eos_token_id,
            "pad_id": tokenizer.pad_token_id,
        },
    }


def build_clip() -> CLIP:
    """Randomly initialised; seed with torch.manual_seed before."""
    config = model_config()
    return CLIP(config["embed_dim"], CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"]))


def save_clip(model: CLIP, folder: Path) -> None:
    """Writes the folder that `open_clip.create_model_and_transforms("local-dir:<folder>")` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"size": IMAGE_SIZE, "mode": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3}
    preprocess |= {"interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": model_config(), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    build_tokenizer().save_pretrained(folder)
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})


def load_clip(folder: Path, device: torch.device) -> CLIP:
    """The model that `save_clip` wrote, for evaluation."""
    model = open_clip.create_model(f"local-dir:{folder}", device=device)
    assert isinstance(model, CLIP)
    return model.eval().requires_grad_(False)


def meaning(metadata: Metadata) -> str:
    """What two captions share if they say the same in another order.

    Finer than `split_key`, which also unites "a circle left of a square" with its opposite: the opposite is the one
    caption from which the direction can be learned.
    """
    clauses = metadata["include"]
    for clause in clauses:
        if "position" in clause:
            relation, target = clause["position"]
            pair = [clause["class"], clauses[target]["class"]]
            return " | ".join([split_key(metadata), *(reversed(pair) if relation in _MIRRORED else pair)])
    return split_key(metadata)


def distinct(specs: Sequence[Metadata]) -> list[int]:
    """Indices of the first caption of each meaning, in their order."""
    first: dict[str, int] = {}
    for i, spec in enumerate(specs):
        first.setdefault(meaning(spec), i)
    return list(first.values())


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of images (N, C, H, W), each with its own sigma (N,) in px; 0 leaves it as it is."""
    taps = torch.arange(-6, 7, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-0.5 * (taps / sigma.clamp(min=1e-3)[:, None]).square())  # (N, 13)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(images.shape[1], dim=0)[
        :, None
    ]  # (N·C, 1, 13)
    planes = F.pad(images, (6, 6, 6, 6), mode="replicate").flatten(0, 1)[None]  # (1, N·C, H + 12, W + 12)
    planes = F.conv2d(planes, kernel[:, :, None], groups=len(kernel))
    return F.conv2d(planes, kernel[..., None], groups=len(kernel))[0].view_as(images)


def soften(images: Tensor, generator: torch.Generator) -> Tensor:
    """Some of the images (N, 3, H, W) as a decoder might give them: edges blurred, surfaces uneven."""
    soft, width, level = torch.rand(3, len(images), generator=generator)
    soft = (soft < SOFT_SHARE).float()
    noise = torch.randn(images.shape, generator=generator) * (0.06 * level * soft)[:, None, None, None]
    return (blur(images, soft * (0.2 + 0.7 * width)) + noise).clamp(-1, 1)


def train_clip(
    stream: SceneStream, steps: int, folder: Path, seed: int, device: torch.device, dtype: torch.dtype
) -> tuple[CLIP, Metrics]:
    """Symmetric contrastive loss over the captions of a batch (arXiv 2103.00020). State and log go to `folder`."""
    torch.manual_seed(seed)
    model = build_clip().to(device)
    contrast = ClipLoss()

    def loss_at(step: int) -> tuple[Tensor, Metrics]:
        batch = stream.batch(step)
        keep = distinct(batch.metadata)
        generator = torch.Generator().manual_seed(seed * 10**9 + step)
        images = soften(batch.images[keep], generator).to(device)
        texts = tokenize([batch.prompts[i] for i in keep]).to(device)
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        with autocast(device, dtype):
            image_features, text_features = model.encode_image(images), model.encode_text(texts)
        image_features = F.normalize(image_features.float(), dim=-1)
        text_features = F.normalize(text_features.float(), dim=-1)
        loss = contrast(image_features, text_features, model.logit_scale.exp())
        best = (image_features @ text_features.T).argmax(dim=1).cpu()
        return loss, {"loss": loss.item(), "top-1": (best == torch.arange(len(keep))).float().mean().item()}

    metrics = fit("clip", model, loss_at, Schedule(steps, 1e-3), folder / "clip.pt")
    return model.eval(), metrics


@torch.no_grad()
def retrieval(
    model: CLIP,
    specs: Sequence[Metadata],
    seed: int,
    device: torch.device,
    tag_weights: Mapping[str, float] | None = None,
    candidates: int = 64,
    draws: int = 20,
    repaint: Callable[[Tensor], Tensor] = lambda images: images,
) -> dict[str, float]:
    """Image → text, top-1: the share of scenes whose own caption is the nearest of `candidates` with distinct meanings.

    Captions are drawn uniformly from `specs`, or with `tag_weights` such that each tag's first caption is as likely as
    its weight says; small tags run out, and the others fill up. `repaint` changes the images (N, 3, 48, 48) before
    they are judged. Returns `overall`, and the share for each tag that occurred.
    """
    rng = np.random.default_rng(seed)
    sizes = {tag: sum(spec["tag"] == tag for spec in specs) for tag in TAGS}
    chance = np.array([(tag_weights[spec["tag"]] / sizes[spec["tag"]]) if tag_weights else 1.0 for spec in specs])
    hits: dict[str, list[bool]] = {}
    for _ in range(draws):
        order = [specs[i] for i in rng.choice(len(specs), len(specs), replace=False, p=chance / chance.sum())]
        chosen = [order[i] for i in distinct(order)][:candidates]
        images = repaint(to_pixels([render(sample_scene(spec, rng)) for spec in chosen])).to(device)
        texts = model.encode_text(tokenize([spec["prompt"] for spec in chosen]).to(device), normalize=True)
        best = (model.encode_image(images, normalize=True) @ texts.T).argmax(dim=1).tolist()
        for i, spec in enumerate(chosen):
            hits.setdefault(spec["tag"], []).append(best[i] == i)
    everything = [hit for found in hits.values() for hit in found]
    return {"overall": float(np.mean(everything)), **{tag: float(np.mean(hits[tag])) for tag in TAGS if tag in hits}}
