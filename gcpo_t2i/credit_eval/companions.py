"""The groups that some credit rules need: images of the same prompt beside each image that is measured.

`stage` asks in what an image differs from others of opposite advantage, `critical` which codes vary over a group. Credit is
measured on one image per prompt, so each gets GROUP − 1 companions, drawn from the same distribution, and their rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from gcpo_t2i.algo.advantage import group_advantage
from gcpo_t2i.algo.credit import dissimilarity
from gcpo_t2i.algo.critical import critical_tokens
from gcpo_t2i.credit_eval.samples import Sampler, read_tensors, write_tensors
from gcpo_t2i.data import Prompt

COMPANIONS = "companions-{}-{}.safetensors"  # of which images, and of how many
SOURCES = ("images", "scenes")
GROUP = 8  # as in training


def group_scores(
    sampler: Sampler, prompts: Sequence[Prompt], tokens: Tensor, entropy: Tensor, source: str, folder: Path
) -> dict[str, Tensor]:
    """What the rules of groups say of images with codes (N, T) and entropies (N, T), each of its own prompt → (N, T) float32.

    `stage`: dissimilarity to images of opposite advantage; `critical`: 1 for a code that is selected, else 0. Companions
    are made if `folder` has none for `source`. Where all rewards of a group are equal, all are opposites.
    """
    path = folder / COMPANIONS.format(source, len(prompts))
    if not path.exists():
        write_tensors(_drawn(sampler, prompts, source), path)
    stored = read_tensors(path)
    rewards = torch.from_numpy(sampler.value(tokens, prompts))[:, None]  # (N, 1)
    groups = torch.cat([tokens[:, None], stored["tokens"]], dim=1)  # (N, G, T)
    advantage = group_advantage(torch.cat([rewards, stored["rewards"]], dim=1).float())
    vectors = sampler.policy.codebook.cpu()[groups].unflatten(2, sampler.policy.grid)  # (N, G, H, W, D)
    stage = dissimilarity({"code_vectors": vectors, "advantage": advantage})  # (N · G, T)
    every = entropy.repeat_interleave(GROUP, dim=0)  # only those of the first of each group are read
    critical = critical_tokens({"code_vectors": vectors, "entropy": every}, torch.ones_like(every, dtype=torch.bool))
    return {"stage": stage[::GROUP], "critical": critical[::GROUP].float()}


def _drawn(sampler: Sampler, prompts: Sequence[Prompt], source: str) -> dict[str, Tensor]:
    """Codes (N, G − 1, T) of companions and their rewards (N, G − 1)."""
    number = max(1, sampler.config.batch_size // (GROUP - 1))  # prompts at a time
    tokens, rewards = [], []
    for start in track(range(0, len(prompts), number), description=f"companions of {source}"):
        own = prompts[start : start + number]
        places = [(start + i, c, 1 + SOURCES.index(source)) for i in range(len(own)) for c in range(GROUP - 1)]
        drawn = sampler.drawn(own, places).tokens
        value = sampler.value(drawn, [prompt for prompt in own for _ in range(GROUP - 1)])
        tokens.append(drawn.cpu().unflatten(0, (-1, GROUP - 1)))
        rewards.append(torch.from_numpy(value).unflatten(0, (-1, GROUP - 1)))
    return {"tokens": torch.cat(tokens), "rewards": torch.cat(rewards)}
