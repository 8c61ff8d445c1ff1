"""The images whose credit is measured: the model's own, with all that its sampler knew, and codes of given pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from gcpo_t2i.config import CreditEvalConfig
from gcpo_t2i.credit_eval.advantage import UNIT, Call
from gcpo_t2i.credit_eval.rules import tensors_of
from gcpo_t2i.data import Prompt
from gcpo_t2i.errors import UserError
from gcpo_t2i.files import whole_file
from gcpo_t2i.models.drawing import STATS
from gcpo_t2i.models.policy import Policy, Rollout
from gcpo_t2i.rollout import conditions
from gcpo_t2i.run import autocast
from gcpo_t2i.scoring import RewardSet
from gcpo_t2i.seeds import generators, image_seed

SAMPLES = "samples.safetensors"


@dataclass(frozen=True)
class Samples:
    """N images of N prompts: codes, what the sampler knew of each (see `rules.tensors_of`), and rewards."""

    prompts: list[Prompt]
    tokens: Tensor  # (N, T) int64
    tensors: dict[str, Tensor]  # each (N, T) float32
    rewards: np.ndarray  # (N,)

    @property
    def tags(self) -> list[str]:
        return tags_of(self.prompts)


def tags_of(prompts: Sequence[Prompt]) -> list[str]:
    return [str(prompt.columns.get("tag", "all")) for prompt in prompts]


@dataclass(frozen=True)
class Sampler:
    """A policy with the settings that it is measured under."""

    policy: Policy
    rewards: RewardSet
    config: CreditEvalConfig
    device: torch.device

    def value(self, tokens: Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        """Codes (B, T) of images of B prompts → the weighted sum of their rewards, (B,)."""
        return np.asarray(self.rewards.total(self.rewards.score(self.policy.decode(tokens), prompts)))

    @torch.no_grad()
    def images(self, prompts: Sequence[Prompt]) -> Samples:
        """One image of each prompt. An image's random numbers follow from the seed and its number alone."""
        parts: list[dict[str, Tensor]] = []
        for start in track(range(0, len(prompts), self.config.batch_size), description="sample"):
            own = prompts[start : start + self.config.batch_size]
            rollout = self.drawn(own, [(start + i, 0) for i in range(len(own))])
            rewards = torch.from_numpy(self.value(rollout.tokens, own))
            parts.append({"tokens": rollout.tokens.cpu(), "rewards": rewards, **tensors_of(rollout)})
        return _samples(prompts, _joined(parts))

    @torch.no_grad()
    def drawn(self, prompts: Sequence[Prompt], places: Sequence[tuple[int, ...]]) -> Rollout:
        """As many images of each prompt as there are places for it, prompt by prompt; a place is an image's seed."""
        with autocast(self.config.dtype, self.device):
            cond, null = conditions(self.policy, prompts)
            return self.policy.sample(
                cond,
                null,
                group=len(places) // len(prompts),
                guidance=self.config.guidance,
                temperature=self.config.temperature,
                generator=generators(self.config.seed, places),
                stats=STATS,
            )

    @torch.no_grad()
    def rescored(self, prompts: Sequence[Prompt], tokens: Tensor) -> dict[str, Tensor]:
        """What the sampler would know of codes (N, T) under their prompts and negative prompts, see `rules.tensors_of`."""
        parts = []
        for rows in torch.arange(len(tokens)).split(self.config.batch_size):
            with autocast(self.config.dtype, self.device):
                cond, null = conditions(self.policy, [prompts[i] for i in rows.tolist()])
                rollout = self.policy.rescore(
                    cond,
                    null,
                    tokens[rows].to(self.device),
                    guidance=self.config.guidance,
                    temperature=self.config.temperature,
                    stats=STATS,
                )
            parts.append(tensors_of(rollout))
        return _joined(parts)

    @torch.no_grad()
    def continued(self, samples: Samples, call: Call) -> np.ndarray:
        """Rewards (P · UNIT,) of continuations that agree with their images up to a position and take another code there."""
        rows = torch.from_numpy(call.rows)
        prompts = [samples.prompts[row] for row in call.rows]
        begun = samples.tokens[rows, : call.position].to(self.device)
        with autocast(self.config.dtype, self.device):
            cond, null = conditions(self.policy, prompts, with_null=self.config.guidance != 1.0)
            rollout = self.policy.sample(
                cond,
                null,
                group=UNIT,
                guidance=self.config.guidance,
                temperature=self.config.temperature,
                generator=torch.Generator().manual_seed(image_seed(self.config.seed, call.position, 1 + call.number)),
                given=begun if call.position else None,
                avoid=samples.tokens[rows, call.position].to(self.device),
            )
        tokens = torch.cat([begun.repeat_interleave(UNIT, 0), rollout.tokens], dim=1)
        return self.value(tokens, [prompt for prompt in prompts for _ in range(UNIT)])


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _samples(prompts: Sequence[Prompt], joined: dict[str, Tensor]) -> Samples:
    tokens, rewards = joined.pop("tokens"), joined.pop("rewards")
    return Samples(list(prompts), tokens, joined, rewards.double().numpy())


def write_samples(samples: Samples, path: Path) -> None:
    rewards = torch.from_numpy(samples.rewards)
    write_tensors({"tokens": samples.tokens, "rewards": rewards, **samples.tensors}, path)


def read_samples(prompts: Sequence[Prompt], path: Path) -> Samples:
    """UserError if the file is damaged."""
    return _samples(prompts, read_tensors(path))


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Whole or not at all."""
    with whole_file(path) as partial:
        partial.write_bytes(save(tensors))


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it, and the same command makes it again") from error
