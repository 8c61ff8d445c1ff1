"""Reference images: where those of the prompts come from, and how they take the places of samples.

The reference of a prompt is its column `gold`: a picture file, relative to the prompt file, in the size of the model's own
images; or a list of the codes of one. ShapesWorld's own prompts need no column: where no prompt has one, a scene is drawn
for each, always the same with the same seed. References are encoded by the policy's own image tokenizer, and judged by what
that makes of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gcpo_t2i.algo.edits import worst
from gcpo_t2i.data import Prompt
from gcpo_t2i.datasets_prompts import DATASET
from gcpo_t2i.errors import UserError
from gcpo_t2i.maps.pictures import image_size, read_picture
from gcpo_t2i.models.policy import Policy, Rollout
from gcpo_t2i.rollout import Batch, Sampling
from gcpo_t2i.scoring import RewardSet
from gcpo_t2i.shapes import IMAGE_SIZE, render, sample_scene
from gcpo_t2i.shapes.prompts import Metadata, all_specs

COLUMN = "gold"


@dataclass(frozen=True)
class References:
    """The references of prompts from `source`, for one policy. `seed` is that of drawn scenes, if any are to be drawn."""

    policy: Policy
    source: str
    seed: int | None

    @classmethod
    def of(cls, policy: Policy, source: str, prompts: Sequence[Prompt], seed: int) -> References:
        """For ShapesWorld's prompts scenes are drawn, unless a prompt brings a reference: then the others are to have none."""
        return cls(policy, source, None if any(map(given, prompts)) else seed)

    def checked(self, prompts: Sequence[Prompt]) -> list[str]:
        """Notes on prompts without a reference. UserError, with the place of the prompt, for a reference that cannot be
        used, and where there is none at all. Every picture is read once: a run does not end at one that is broken."""
        places = self.policy.grid[0] * self.policy.grid[1]
        for prompt in prompts:
            gold = given(prompt)
            if isinstance(gold, str):
                found = self._picture(prompt).size
                if found != self.size:
                    raise UserError(
                        f"{prompt.place}: {COLUMN} '{gold}' has {found[0]} × {found[1]} pixels, the model's images have "
                        f"{self.size[0]} × {self.size[1]}; scale it to that size"
                    )
            elif gold is not None:
                _check_codes(gold, places, len(self.policy.codebook), prompt.place)
        without = [prompt for prompt in prompts if not self.has(prompt)]
        if len(without) == len(prompts):
            raise UserError(
                f'{self.source}: no prompt has a reference; add the column "{COLUMN}", a picture file or a list of codes'
            )
        if not without:
            return []
        return [
            f"{self.source}: {len(without)} of {len(prompts)} prompts have no reference ({COLUMN}), such as "
            f"'{without[0].text}'; their groups stay as they are"
        ]

    @cached_property
    def size(self) -> tuple[int, int]:
        """(width, height) of the model's images."""
        return image_size(self.policy)

    def has(self, prompt: Prompt) -> bool:
        """Whether there is one: ShapesWorld draws its own prompts for a model that makes its images."""
        drawn = self.seed is not None and prompt.text in _specs() and self.size == (IMAGE_SIZE, IMAGE_SIZE)
        return drawn or given(prompt) is not None

    def codes(self, prompts: Sequence[Prompt]) -> Tensor:
        """(N, T) int64 on the CPU, of N prompts that have a reference."""
        found = list(map(given, prompts))
        pictured = [i for i, gold in enumerate(found) if gold is None or isinstance(gold, str)]
        if pictured:
            with torch.autocast(self.policy.codebook.device.type, enabled=False):  # which would choose other codes
                encoded = self.policy.encode([self._picture(prompts[i]) for i in pictured]).cpu()
            for i, codes in zip(pictured, encoded, strict=True):
                found[i] = codes
        return torch.stack([torch.as_tensor(codes, dtype=torch.int64) for codes in found])

    def _picture(self, prompt: Prompt) -> Image.Image:
        gold = given(prompt)
        if gold is None:
            assert self.seed is not None  # else the prompt has no reference
            words = int.from_bytes(hashlib.sha256(prompt.text.encode()).digest()[:8], "big")
            scene = sample_scene(_specs()[prompt.text], np.random.default_rng((self.seed, words)))
            return Image.fromarray(render(scene))
        folder = Path() if self.source.startswith(DATASET) else Path(self.source).parent
        try:
            return read_picture(folder / gold).image
        except UserError as error:
            raise UserError(f"{prompt.place}: {COLUMN}: {error}") from error


def given(prompt: Prompt) -> Any:
    """What the prompt's column holds; None for an empty cell, as for no column."""
    gold = prompt.columns.get(COLUMN)
    return None if isinstance(gold, str) and not gold.strip() else gold


@cache
def _specs() -> dict[str, Metadata]:
    return {spec["prompt"]: spec for spec in all_specs()}


def _check_codes(gold: Any, places: int, codes: int, place: str) -> None:
    if not isinstance(gold, list) or not all(type(code) is int for code in gold):
        raise UserError(f"{place}: {COLUMN} must be the path of a picture or a list of codes, got {str(gold)[:60]}")
    if len(gold) != places:
        raise UserError(f"{place}: {COLUMN} has {len(gold)} codes, the model's images have {places}")
    if not all(0 <= code < codes for code in gold):
        wrong = next(code for code in gold if not 0 <= code < codes)
        raise UserError(f"{place}: {COLUMN} has the code {wrong}, the model's are 0 to {codes - 1}")


@torch.no_grad()
def inject(
    references: References, batch: Batch, wanted: Sequence[int], rewards: RewardSet, sampling: Sampling
) -> tuple[Batch, int, int]:
    """The batch with references in place of the worst samples of the groups `wanted`, how many, and how many were refused.

    A reference is worth what the rewards say of its decoded image; one that fails itself stays out. What the rollout knows
    of its own samples is scored of it by the policy as it is (teacher-forced): π_old of a reference is that policy, which
    the paper leaves open, so its ratio starts at 1. UserError from the rewards.
    """
    groups = [group for group in wanted if references.has(batch.prompts[group])]
    if not groups:
        return batch, 0, 0
    prompts = [batch.prompts[group] for group in groups]
    tokens = references.codes(prompts)
    images = references.policy.decode(tokens)
    scores = rewards.score(images, prompts)
    right = [i for i, success in enumerate(rewards.successes(scores) or []) if success]
    if right:
        chosen = [groups[i] for i in right]
        own = {name: [values[i] for i in right] for name, values in scores.items()}
        known = references.policy.rescore(
            batch.cond[chosen],
            None if batch.null is None else batch.null[chosen],
            tokens[right].to(batch.rollout.tokens.device),
            guidance=sampling.guidance,
            temperature=sampling.temperature,
            stats=list(batch.rollout.stats),
        )
        batch = _replaced(batch, chosen, known, [images[i] for i in right], own, rewards.total(own))
    return batch, len(right), len(groups) - len(right)


def _replaced(
    batch: Batch,
    groups: Sequence[int],
    known: Rollout,
    images: Sequence[Image.Image],
    scores: dict[str, list[float | None]],
    totals: Sequence[float],
) -> Batch:
    """The batch in which one reference for each of these groups stands where their worst sample was."""
    places = worst(batch.rewards)[list(groups)]  # (n,) within the group
    rows = torch.tensor(groups) * batch.group + places  # (n,)
    all_rewards, success = batch.rewards.clone(), None if batch.success is None else batch.success.clone()
    all_rewards[list(groups), places] = torch.tensor(totals, dtype=all_rewards.dtype)
    if success is not None:
        success[list(groups), places] = True
    all_images, all_scores = list(batch.images), {name: list(values) for name, values in batch.scores.items()}
    for i, row in enumerate(rows.tolist()):
        all_images[row] = images[i]
        for name, values in scores.items():
            all_scores[name][row] = values[i]
    device, rollout = batch.rollout.tokens.device, batch.rollout

    def put(old: Tensor, new: Tensor) -> Tensor:
        return old.index_copy(0, rows.to(device), new.to(old))

    both = rollout.null_logp, known.null_logp
    rollout = Rollout(
        put(rollout.tokens, known.tokens),
        put(rollout.cond_logp, known.cond_logp),
        None if both[0] is None or both[1] is None else put(both[0], both[1]),
        put(rollout.sample_logp, known.sample_logp),
        {name: put(stat, known.stats[name]) for name, stat in rollout.stats.items()},
    )
    return replace(batch, rollout=rollout, images=all_images, scores=all_scores, rewards=all_rewards, success=success)
