"""Stage `generator`: tiny T5 text encoder and Llama trunk, trained together on fresh scenes in the codes of stage `vq`.

It learns in five phases. *Words*, by cross-entropy alone, which does not teach what their order means: whose colour is
whose, or what is above what, is one bit among the 25 that say where things are, and the model takes a caption for a bag of
words. *Order*: the text encoder's heads are made to look at neighbours, and a contrastive term asks of every picture to be
likelier under its caption than under the same words in another order. (Neighbours that are there from the beginning are
learned to be ignored; docs/shapesworld.md has what was tried.) Then all prompts together, until both have *settled*. Next
*doubt*: a share of the words is wrong, as in captions from the web: a look-alike in place of a shape or a colour, another
number, the opposite relation. The model learns to trust words only so far. Last *distrust*: more of them are wrong, and only
the projector between text encoder and trunk learns from it, so that less of a caption gets through to a trunk that could do
with more. What a model knows and does not do is what reinforcement learning brings out in minutes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from gcpo_t2i.models.attention import CAUSAL_BLOCKS
from gcpo_t2i.models.llamagen import LlamaGenPolicy
from gcpo_t2i.models.trained import in_module
from gcpo_t2i.shapes.pretrain.fit import Metrics, Schedule, autocast, fit
from gcpo_t2i.shapes.pretrain.stream import SceneBatch, SceneStream
from gcpo_t2i.shapes.prompts import TAGS, all_specs, reordered
from gcpo_t2i.shapes.scenes import GRID

CAPTION_TOKENS = 16
CAPTION_DROPOUT = 0.1
BATCH = 32
# Where each head of the text encoder looks from phase `order` on, in words from its own.
NEIGHBOURS = (-1, -1, 1, -2, 2, -3)
NEIGHBOUR_BIAS = 4.0  # in nats: how much more they see of it than of any other word
GAIN_EVERY = 50  # steps between measurements of the text gain
# What is asked of a prompt is learned from prompts that ask: the categories with more to bind come more often.
TAG_WEIGHTS = {
    "single_object": 0.5,
    "two_object": 1.0,
    "counting": 1.0,
    "colors": 1.0,
    "position": 2.0,
    "color_attr": 1.5,
}


@dataclass(frozen=True)
class Phase:
    """Some of the stage's steps, with an optimizer and a learning rate of their own."""

    name: str
    parts: int  # of the stage's steps, see `phase_steps`
    peak: float  # learning rate
    warmup: int
    falls: bool = False  # whether the learning rate falls
    tags: tuple[str, ...] = TAGS
    order_weight: float = 0.0  # of the contrastive term
    wrong_words: float = 0.0  # share of the words that say what is there and are wrong
    module: str | None = None  # the one that is trained, by its name in the policy; all by default


WORDS = Phase("words", parts=52, peak=1.5e-3, warmup=200)
ORDER = Phase("order", parts=8, peak=1.5e-3, warmup=200, tags=("position", "color_attr"), order_weight=0.1)
SETTLE = Phase("settle", parts=16, peak=1e-3, warmup=50, falls=True, order_weight=0.05)
DOUBT = Phase("doubt", parts=3, peak=5e-4, warmup=20, falls=True, wrong_words=0.35)
DISTRUST = Phase("distrust", parts=3, peak=2e-3, warmup=20, falls=True, wrong_words=0.45, module="caption_projector")
PHASES = (WORDS, ORDER, SETTLE, DOUBT, DISTRUST)


def phase_steps(steps: int) -> list[range]:
    """Which of the stage's steps belong to each phase."""
    ends = [round(steps * done / sum(phase.parts for phase in PHASES)) for done in accumulate(p.parts for p in PHASES)]
    return [range(start, end) for start, end in pairwise([0, *ends])]


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
        text_heads=len(NEIGHBOURS),
        theta=100.0,  # twelve positions an axis: LlamaGen's 10,000 would leave most pairs unturned
    )
    policy.trunk.set_attn_implementation(CAUSAL_BLOCKS)
    return policy


@torch.no_grad()
def look_at_neighbours(text_encoder: T5EncoderModel) -> None:
    """Makes every head copy one neighbour's state, so that a word's state tells what stands around it.

    All that a policy knows of the order of words comes from the relative position bias of its text encoder (the trunk
    does not turn the caption's positions), and that starts near 0 and moves by no more than the learning rate a step.
    With output = valueᵀ, the neighbour arrives in the coordinates of its own embedding, which the trunk knows how to read.
    """
    blocks: Any = text_encoder.encoder.block
    bias: Tensor = blocks[0].layer[0].SelfAttention.relative_attention_bias.weight  # (buckets, heads), of all layers
    nn.init.zeros_(bias)
    for head, offset in enumerate(NEIGHBOURS):
        bucket = -offset if offset < 0 else bias.shape[0] // 2 + offset  # T5's: one half of them for each direction
        bias[bucket, head] = NEIGHBOUR_BIAS
    for block in blocks:
        attention = block.layer[0].SelfAttention
        for projection in (attention.q, attention.k):  # T5 does not divide scores by √channels: its queries start small
            nn.init.normal_(projection.weight, std=(attention.d_model * attention.key_value_proj_dim) ** -0.5)
        nn.init.orthogonal_(attention.v.weight)
        attention.o.weight.copy_(attention.v.weight.T)


@torch.no_grad()
def text_gain(policy: LlamaGenPolicy, prompts: list[str], codes: Tensor, other: Sequence[str | None]) -> Tensor:
    """How much likelier each image is under its prompt than under another, in nats, (N,)."""
    cond = policy.condition(prompts)
    return (policy.logp(cond, codes).logp - policy.logp(policy.condition(other, like=cond), codes).logp).sum(dim=1)


def order_loss(policy: LlamaGenPolicy, batch: SceneBatch, codes: Tensor, logits: Tensor, rows: Sequence[int]) -> Tensor:
    """Mean of −log σ(log p(codes | caption) − log p(codes | its words in another order)) over those of `rows` that have one.

    The two share the picture, so what is not about the order cancels out: where things are, how large, on which ground.
    """
    twins = {row: twin["prompt"] for row in rows if (twin := reordered(batch.metadata[row]))}
    if not twins:
        return logits.new_zeros(())
    own, text = list(twins), policy.encode_text(list(twins.values()))
    gain = code_logp(logits[own], codes[own]) - code_logp(policy(text.states, text.mask, codes[own]), codes[own])
    return F.softplus(-gain).mean()


def code_logp(logits: Tensor, codes: Tensor) -> Tensor:
    """log p of whole images, (N,), from logits (N, T, V)."""
    return -F.cross_entropy(logits.float().transpose(1, 2), codes, reduction="none").sum(dim=1)


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
    """Trains from nothing (or from the states in `folder`) for `steps` batches of `stream`, phase by phase."""
    torch.manual_seed(seed)
    policy = build_policy(vq).to(device)
    policy.vq.requires_grad_(False)
    metrics: Metrics = {}
    for phase, own in zip(PHASES, phase_steps(steps), strict=True):
        if phase is ORDER:
            torch.manual_seed(seed)  # whatever came before: a run that goes on here draws the same
            look_at_neighbours(policy.text_encoder)
        metrics = train_phase(policy, phase, stream, own, folder, seed, device, dtype)
    return policy.eval(), metrics


def train_phase(
    policy: LlamaGenPolicy,
    phase: Phase,
    stream: SceneStream,
    steps: range,
    folder: Path,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Metrics:
    """Cross-entropy of the codes under the caption, and the order of its words; every tenth caption is dropped for the
    null embedding. `steps`: the batches to take from `stream`."""
    stream = stream.of({tag: TAG_WEIGHTS[tag] for tag in phase.tags})

    def loss_at(step: int) -> tuple[Tensor, Metrics]:
        batch = stream.batch(steps[step], phase.wrong_words)
        dropout = torch.Generator().manual_seed(seed * 10**9 + steps[step])
        drop = torch.rand(len(batch.prompts), generator=dropout) < CAPTION_DROPOUT
        codes = policy.encode(batch.images)
        with autocast(device, dtype):
            caption = policy.drop_captions(policy.encode_text(batch.prompts), drop.to(device))
            logits = policy(caption.states, caption.mask, codes)
            loss = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())
            metrics = {"nats/image": loss.item() * codes.shape[1]}
            if phase.order_weight:
                kept = (~drop).nonzero().flatten().tolist()
                loss = loss + phase.order_weight * order_loss(policy, batch, codes, logits, kept)
            if step % GAIN_EVERY == 0:
                metrics |= text_gains(policy, batch, codes)
        return loss, metrics

    schedule = Schedule(len(steps), phase.peak, warmup=phase.warmup, decay=float(phase.falls))
    with only(policy, phase.module):
        return fit(phase.name, policy, loss_at, schedule, folder / f"generator_{phase.name}.pt")


@contextmanager
def only(policy: nn.Module, module: str | None) -> Iterator[None]:
    """Only the parameters of `module` can be trained meanwhile; all for None."""
    others = [p for name, p in policy.named_parameters() if module is not None and not in_module(name, module)]
    frozen = [parameter for parameter in others if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
