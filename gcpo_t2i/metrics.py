"""What a training step measures of its samples and of its time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gcpo_t2i.algo.edits import all_failed
from gcpo_t2i.processes import ALONE, Processes
from gcpo_t2i.rollout import Batch
from gcpo_t2i.run import peak_memory_mb
from gcpo_t2i.update import Metrics


def diversity(tokens: Tensor, group: int) -> float:
    """Share of code positions in which two images of a group differ, mean over pairs and groups. tokens (B, T)."""
    groups = tokens.view(-1, group, tokens.shape[1])  # (P, G, T)
    same = (groups[:, :, None] == groups[:, None, :]).float().mean(dim=-1)  # (P, G, G)
    pairs = group * (group - 1)
    return (1 - (same.sum(dim=(1, 2)) - group) / pairs).mean().item()


def sample_metrics(batch: Batch, drawn: Sequence[Batch], top40_mass: Tensor, processes: Processes = ALONE) -> Metrics:
    """What the samples of a step look like, those of all processes. `reward*` and `frac_*` are over all groups drawn, the
    rest over those kept; top40_mass (B,)."""
    rollout = batch.rollout
    means = {
        "entropy": rollout.stats["entropy"].mean().item(),
        "diversity": diversity(rollout.tokens, batch.group),
        "logp_gap/guided": (rollout.sample_logp - rollout.cond_logp).abs().mean().item(),
        "credit/top40_mass": top40_mass.mean().item(),
    }
    own = [(part.rewards, part.success) for part in drawn]
    each = processes.gather((own, batch.scores, means, 0 if batch.idle else len(batch.prompts)))
    groups = sum(count for *_, count in each)
    all_rewards = torch.cat([rewards for drawn, *_ in each for rewards, _ in drawn])
    success = [right for drawn, *_ in each for _, right in drawn if right is not None]
    values = {
        name: [score for _, scores, _, count in each if count for score in scores[name] if score is not None]
        for name in batch.scores
    }
    return {
        "reward": all_rewards.mean().item(),
        "reward_std": all_rewards.std(dim=1).mean().item(),
        "frac_reward_zero_std": (all_rewards.amax(1) == all_rewards.amin(1)).float().mean().item(),
        **({"frac_all_failed": all_failed(torch.cat(success)).float().mean().item()} if success else {}),
        **{f"rewards/{name}/mean": sum(own) / len(own) for name, own in values.items() if own},
        **{f"rewards/{name}/min": min(own) for name, own in values.items() if own},
        **{f"rewards/{name}/max": max(own) for name, own in values.items() if own},
        **{name: sum(own[name] * count for *_, own, count in each) / groups for name in means},
    }


def timing(batch: Batch, images: int, step_time: float, update_time: float) -> Metrics:
    return {
        "step_time": step_time,
        "rollout_time": batch.seconds["rollout"],
        "reward_time": batch.seconds["reward"],
        "update_time": update_time,
        "images_per_second": images / step_time,
        "tokens_per_second": images * batch.rollout.tokens.shape[1] / step_time,
        "peak_memory_mb": peak_memory_mb(batch.rollout.tokens.device),
    }
