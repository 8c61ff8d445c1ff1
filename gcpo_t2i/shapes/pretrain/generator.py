"""Stage `generator`: tiny T5 text encoder and Llama trunk, trained together on fresh scenes in the codes of stage `vq`.

While the learning rate falls, a share of the words is wrong, as in captions from the web: a look-alike in place of a
shape or a colour, another number, the opposite relation. Before that the model learns what the words mean; then it
learns to trust them only so far. What it knows and does not do is what reinforcement learning brings out in minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import VQModel
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from gcpo_t2i.models.llamagen import LlamaGenPolicy
from gcpo_t2i.shapes.pretrain.fit import Metrics, Schedule, autocast, fit
from gcpo_t2i.shapes.pretrain.stream import SceneBatch, SceneStream
from gcpo_t2i.shapes.prompts import all_specs, reordered
from gcpo_t2i.shapes.scenes import GRID

CAPTION_TOKENS = 16
CAPTION_DROPOUT = 0.1
BATCH = 32
PEAK = 1.5e-3  # learning rate
DECAY = 0.25  # share of the steps in which the learning rate falls ...
WRONG_WORDS = 0.35  # ... and in which this share of the words that say what is there is wrong
GAIN_EVERY = 50  # steps between measurements of the text gain
# What is asked of a prompt is learned from prompts that ask: the categories with more to bind come more often.
TAG_WEIGHTS = {
    "single_object": 0.5,
    "two_object": 1.0,
    "counting": 1.0,
    "colors": 1.0,
    "position": 1.25,
    "color_attr": 1.25,
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the ShapesWorld prompts, lower-cased, closed by </s> as T5's are."""
    words = sorted({word for spec in all_specs() for word in spec["prompt"].split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=CAPTION_TOKENS,
    )


def build_policy(vq: VQModel) -> LlamaGenPolicy:
    policy = LlamaGenPolicy.build(
        tokenizer=build_tokenizer(),
        vq_model=vq,
        grid=(GRID, GRID),
        caption_tokens=CAPTION_TOKENS,
        dim=192,
        layers=6,
        heads=6,
        text_dim=96,
        text_layers=2,
        text_heads=4,
        theta=100.0,  # twelve positions an axis: LlamaGen's 10,000 would leave most pairs unturned
    )
    policy.trunk.set_attn_implementation("eager")  # 1.5× the speed of sdpa's backward on a CPU at this size
    return policy


@torch.no_grad()
def text_gain(policy: LlamaGenPolicy, prompts: list[str], codes: Tensor, other: Sequence[str | None]) -> Tensor:
    """How much likelier each image is under its prompt than under another, in nats, (N,)."""
    cond = policy.condition(prompts)
    return (policy.logp(cond, codes).logp - policy.logp(policy.condition(other, like=cond), codes).logp).sum(dim=1)


def text_gains(policy: LlamaGenPolicy, batch: SceneBatch, codes: Tensor) -> Metrics:
    """The numbers to watch, in nats per image: the loss hides a caption that is ignored behind the entropy of where things are.

    `from text`: over the null caption. `from order`: over the same words in another order, for images where that means
    something else; 0 for a model that takes a caption for a bag of words.
    """
    gains = {"from text": text_gain(policy, batch.prompts, codes, [None] * len(codes)).mean().item()}
    others = {i: other["prompt"] for i, spec in enumerate(batch.metadata) if (other := reordered(spec))}
    if others:
        rows = list(others)
        gain = text_gain(policy, [batch.prompts[i] for i in rows], codes[rows], list(others.values()))
        gains["from order"] = gain.mean().item()
    return gains


def train_generator(
    vq: VQModel,
    stream: SceneStream,
    steps: int,
    folder: Path,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[LlamaGenPolicy, Metrics]:
    """Cross-entropy of the codes under the caption; every tenth caption is dropped for the null embedding."""
    torch.manual_seed(seed)
    policy = build_policy(vq).to(device)
    policy.vq.requires_grad_(False)
    schedule = Schedule(steps, PEAK, warmup=200, decay=DECAY)

    def loss_at(step: int) -> tuple[Tensor, Metrics]:
        batch = stream.batch(step, WRONG_WORDS if step >= schedule.decay_start else 0.0)
        dropout = torch.Generator().manual_seed(seed * 10**9 + step)
        drop = torch.rand(len(batch.prompts), generator=dropout) < CAPTION_DROPOUT
        codes = policy.encode(batch.images)
        with autocast(device, dtype):
            caption = policy.drop_captions(policy.encode_text(batch.prompts), drop.to(device))
            logits = policy(caption.states, caption.mask, codes)
        loss = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())
        metrics = {"nats/image": loss.item() * codes.shape[1]}
        if step % GAIN_EVERY == 0:
            with autocast(device, dtype):
                metrics |= text_gains(policy, batch, codes)
        return loss, metrics

    metrics = fit("generator", policy, loss_at, schedule, folder / "generator.pt")
    return policy.eval(), metrics
