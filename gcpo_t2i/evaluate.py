"""Scores on held-out prompts with seeds of their own: the same images at every evaluation but for what training changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from PIL import Image

from gcpo_t2i.config import EvalConfig
from gcpo_t2i.data import Prompt, PromptSampler
from gcpo_t2i.models.policy import Policy
from gcpo_t2i.processes import ALONE, Processes
from gcpo_t2i.rollout import Sampling, sample_batch
from gcpo_t2i.scoring import RewardFailed, RewardSet, Scores
from gcpo_t2i.seeds import generators

Z95 = 1.959964  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Evaluation:
    """Every image's scores, aligned with `prompts` (one entry per image)."""

    prompts: list[Prompt]
    scores: Scores
    images: list[Image.Image]

    def metrics(self) -> dict[str, float]:
        """`eval/<label>` with `_ci95`, its half-width; where prompts carry tags also `eval/<label>/<tag>`.

        With tags the overall score is GenEval's: the mean over tags of the mean over images. Half-widths are of the
        normal approximation over images, for the given prompts.
        """
        rows: dict[str, float] = {}
        tags = [prompt.columns.get("tag") for prompt in self.prompts]
        for name, values in self.scores.items():
            per_tag = {
                str(tag): [value for value, own in zip(values, tags, strict=True) if own == tag and value is not None]
                for tag in dict.fromkeys(tags)
            }
            means = {tag: _mean_and_variance(found) for tag, found in per_tag.items() if found}
            if not means:
                continue
            rows[f"eval/{name}"] = sum(mean for mean, _ in means.values()) / len(means)
            rows[f"eval/{name}_ci95"] = Z95 * math.sqrt(sum(var for _, var in means.values())) / len(means)
            if any(tag is not None for tag in tags):
                for tag, (mean, variance) in means.items():
                    rows[f"eval/{name}/{tag}"] = mean
                    rows[f"eval/{name}/{tag}_ci95"] = Z95 * math.sqrt(variance)
        return rows


def _mean_and_variance(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and the variance of that mean."""
    count = len(values)
    mean = math.fsum(values) / count
    spread = math.fsum((value - mean) ** 2 for value in values) / max(count - 1, 1)
    return mean, spread / count


def eval_prompts(prompts: Sequence[Prompt], config: EvalConfig) -> list[Prompt]:
    """`num_prompts` of them, in turns over their tags, each `samples_per_prompt` times in a row."""
    chosen = PromptSampler(prompts, config.seed).batch(0, config.num_prompts)
    return [prompt for prompt in chosen for _ in range(config.samples_per_prompt)]


def evaluate(
    policy: Policy,
    prompts: Sequence[Prompt],
    rewards: RewardSet,
    sampling: Sampling,
    seed: int,
    batch_size: int,
    on_progress: Callable[[int], None] = lambda done: None,
    processes: Processes = ALONE,
) -> Evaluation:
    """One image for each entry of `prompts`, scored. Same policy, prompts, seed and batch size: same images.

    The processes take batches in turn, and all get everything.
    """
    starts = range(0, len(prompts), batch_size)
    own: dict[int, tuple[Scores, list[Image.Image]]] = {}

    def take(starts: Sequence[int]) -> None:
        for start in starts:
            part = list(prompts[start : start + batch_size])
            draws = generators(seed, [(start + i, 0) for i in range(len(part))])
            batch = sample_batch(policy, part, rewards, sampling, draws, need_null=False)
            own[start] = batch.scores, list(batch.images)  # off the device: all images of an evaluation are kept

    for turn in range(0, len(starts), processes.count):
        mine = turn + processes.index
        processes.together(partial(take, starts[mine : mine + 1]), RewardFailed)
        on_progress(min(len(prompts), (turn + processes.count) * batch_size))  # by all, also by one without a batch
    found = {start: batch for each in processes.gather(own) for start, batch in each.items()}
    ordered = [found[start] for start in starts]
    scores = {label: [score for batch, _ in ordered for score in batch[label]] for label in rewards.rewards}
    return Evaluation(list(prompts), scores, [image for _, images in ordered for image in images])
