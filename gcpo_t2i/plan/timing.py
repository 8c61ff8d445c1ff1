"""Seconds of a run, from short measurements on this machine at the run's own batch sizes.

Measured: a rollout of a few images in full (which also tests model, prompts and rewards), one position of the real
number of rows with the cache empty, half full and full, one real micro-batch forward and backward, one optimizer step,
image decoding, rewards and one write to disk. Scaled: positions to a rollout along the line between these cache
lengths, micro-batches to an update, images to a batch.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from gcpo_t2i.algo.rows import needs
from gcpo_t2i.config import PlanConfig, resolve_algorithm
from gcpo_t2i.data import Prompt, PromptSampler
from gcpo_t2i.models.cache import BLOCK, prefill, whole_blocks
from gcpo_t2i.models.decoding import Decoder
from gcpo_t2i.models.drawing import Sampling as Choice
from gcpo_t2i.models.graphs import Steps
from gcpo_t2i.models.lora import Adapters
from gcpo_t2i.models.policy import Policy
from gcpo_t2i.models.sizes import Sizes
from gcpo_t2i.models.vq import CHUNK
from gcpo_t2i.plan.counts import Counts
from gcpo_t2i.plan.machine import nearest_folder
from gcpo_t2i.plan.memory import FLOAT
from gcpo_t2i.rollout import Batch, Sampling, kept_stats, replay, sample_batch
from gcpo_t2i.run import starting_model
from gcpo_t2i.scoring import RewardSet
from gcpo_t2i.update import Updater

SAMPLES = 8  # images of the rollout that is made in full
REPEATS = 3
PATIENCE = 5.0  # seconds; what takes longer is done once
DISK_SAMPLE = 1 << 26  # bytes


@dataclass(frozen=True)
class Times:
    """Seconds."""

    rollout: float  # per step and round
    decode: float  # images from codes, per step and round
    reward: float  # per step and round
    update: float  # all updates of a step
    replay: float  # all of a step
    evaluation: float  # each
    checkpoint: float  # each

    @property
    def step(self) -> float:
        """With one round of sampling."""
        return self.rollout + self.decode + self.reward + self.update + self.replay

    def run(self, counts: Counts, rounds: int = 1) -> float:
        """All steps, evaluations and checkpoints. Not in it: imports and loading, and what processes tell each other."""
        again = (rounds - 1) * (self.rollout + self.decode + self.reward)
        steps = counts.steps * (self.step + again)
        return steps + counts.evaluations * self.evaluation + counts.checkpoints * self.checkpoint

    def parts(self) -> dict[str, float]:
        return {**asdict(self), "step": self.step}


class Stopwatch:
    """Seconds of calls by `clock`, the wall's by default, to the end of what they started on the device."""

    def __init__(self, accelerator: Accelerator, clock: Callable[[], float] | None = None) -> None:
        self.device, self.lower, self.clock = accelerator.device, accelerator.autocast, clock

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return (self.clock or time.perf_counter)()

    def once(self, call: Callable[[], Any]) -> float:
        start = self.now()
        call()
        return self.now() - start

    def median(self, call: Callable[[], Any]) -> float:
        first = self.once(call)  # slower than the others: it allocates, and compiles kernels
        if first > PATIENCE:
            return first
        return statistics.median(self.once(call) for _ in range(REPEATS))


def measure(
    config: PlanConfig,
    sizes: Sizes,
    counts: Counts,
    policy: Policy,
    rewards: RewardSet,
    eval_rewards: RewardSet,
    prompts: PromptSampler,
    accelerator: Accelerator,
    adapters: Adapters | None = None,
) -> Times:
    """UserError from rewards; torch.OutOfMemoryError where the device is too small."""
    watch, stats = Stopwatch(accelerator), required_stats(config)
    few = prompts.batch(0, min(counts.prompts, SAMPLES))
    one = Sampling(1, config.guidance, config.temperature, config.top_k, config.top_p)
    generator = torch.Generator(accelerator.device).manual_seed(config.seed)
    with watch.lower():
        small = sample_batch(policy, few, rewards, one, generator, stats, need_null=counts.branches == 2)
        prefix, eval_rows = small.cond.trimmed().mask.shape[1], min(config.eval.batch_size, counts.eval_images)
        how = Choice(config.guidance, config.temperature, config.top_k, config.top_p)
        rollout = rollout_seconds(config, counts, policy, prefix, replace(how, stats=stats), watch)
        evaluate = decoding_seconds(policy, prefix, eval_rows, 1, counts.eval_branches, how, watch)
        many = cycled(small, min(counts.images, CHUNK)).rollout.tokens
        decode = watch.median(lambda: policy.decode(many)) / len(many)
    reward, eval_reward = (reward_seconds(each, small, few, watch) for each in (rewards, eval_rewards))
    update, again = update_seconds(config, counts, policy, adapters, small, accelerator, watch)
    per_eval_image = evaluate / eval_rows + decode + eval_reward
    return Times(
        rollout=rollout,
        decode=decode * counts.images,
        reward=reward * counts.images,
        update=update,
        replay=again,
        evaluation=per_eval_image * counts.eval_share,
        checkpoint=disk_seconds(config, 3 * FLOAT * sizes.trainable, watch),
    )


def required_stats(config: PlanConfig) -> frozenset[str]:
    """What the rollouts of training keep besides codes and log-probs."""
    algorithm, settings = resolve_algorithm(config)
    return kept_stats(config, needs(algorithm, settings, config.loss.beta))


def cycled(batch: Batch, images: int) -> Batch:
    """As many images, one per prompt, by repeating those of `batch` in turns."""
    return batch.groups([index % len(batch.prompts) for index in range(images)])


def rollout_seconds(
    config: PlanConfig, counts: Counts, policy: Any, prefix: int, how: Choice, watch: Stopwatch
) -> float:
    """Of all parts in which the images of a step are sampled: whole ones, and the last."""
    group, count = config.group_size, Counter([counts.at_once] * (counts.parts - 1) + [counts.last_part])
    return sum(
        number * decoding_seconds(policy, prefix, images // group, group, counts.branches, how, watch)
        for images, number in count.items()
    )


def decoding_seconds(
    policy: Any, prefix: int, prompts: int, group: int, branches: int, how: Choice, watch: Stopwatch
) -> float:
    """Prefill, and the mean over cache lengths of one position's time, times positions. Runs the real step.

    The time of a position rises linearly with the cache: the trapezoid rule over three lengths.
    """
    trunk = policy.trunk
    rows, length = prompts * branches, policy.grid[0] * policy.grid[1]
    weight = trunk.embed_tokens.weight
    embeds = torch.randn(rows, prefix, weight.shape[1], device=watch.device, dtype=weight.dtype)
    mask = torch.ones(rows, prefix, dtype=torch.bool, device=watch.device)

    @torch.no_grad()
    def start() -> Decoder:
        hidden, filled = prefill(trunk, embeds, mask, 0)
        sizes = {"start": 0, "length": length, "group": group, "guided": branches == 2}
        decoder = Decoder(trunk, policy.embed_codes, policy.head, filled, how=how, **sizes)
        decoder.record(hidden.repeat_interleave(group, 0))
        return decoder

    @torch.no_grad()
    def position(drawn: int) -> float:
        decoder = start()
        cache, growing = decoder.cache, 0.0
        before = whole_blocks(cache.filled + drawn) - BLOCK
        if before >= cache.capacity:  # a cache that grows does so once in every block
            cache.span(before)
            growing = watch.once(lambda: decoder.span(drawn))
        cache.bias[..., : cache.filled + drawn] = 0
        steps = Steps(decoder)

        def one() -> None:
            decoder.index.fill_(drawn)
            steps(decoder.span(drawn))

        steps.warm_up(decoder.span(drawn))
        return watch.median(one) + growing / BLOCK

    first, middle, last = (position(drawn) for drawn in (1, length // 2, length - 1))
    return watch.median(start) + (length - 1) * (first + 2 * middle + last) / 4


def reward_seconds(rewards: RewardSet, batch: Batch, prompts: list[Prompt], watch: Stopwatch) -> float:
    """Per image."""
    return watch.median(lambda: rewards.score(batch.images, prompts)) / len(prompts)


def update_seconds(
    config: PlanConfig,
    counts: Counts,
    policy: Policy,
    adapters: Adapters | None,
    small: Batch,
    accelerator: Accelerator,
    watch: Stopwatch,
) -> tuple[float, float]:
    """Of all updates, and of all replays, of one step, from one micro-batch each. The weights stay what they are."""
    algorithm, _ = resolve_algorithm(config)
    reference = starting_model(policy, adapters) if counts.reference_passes else None
    update = Updater(policy, reference, config, algorithm, accelerator)
    batch = cycled(small, counts.micro_batch)
    images = len(batch.prompts)
    ones = torch.ones(images, device=accelerator.device)  # what has no advantage would be left out
    credit = torch.ones_like(batch.rollout.cond_logp)
    whole = watch.median(lambda: update(batch, ones, credit, lr=0.0))
    optimizer = watch.median(lambda: optimizer_step(update, config.optim.max_grad_norm))
    per_image, again = max(whole - optimizer, 0.0) / images, 0.0
    if counts.replay_passes:
        with watch.lower():
            again = watch.median(lambda: replay(policy, batch, images, config.temperature)) / images
    return counts.updates * (per_image * counts.images + optimizer), counts.updates * again * counts.images


def optimizer_step(update: Updater, max_norm: float) -> None:
    for parameter in update.parameters:
        parameter.grad = torch.zeros_like(parameter)
    nn.utils.clip_grad_norm_(update.parameters, max_norm)
    update.optimizer.step()
    update.optimizer.zero_grad(set_to_none=True)


def disk_seconds(config: PlanConfig, size: int, watch: Stopwatch) -> float:
    """Writing `size` bytes, from the time of at most 64 MB, where the run would be."""
    sample = torch.zeros(min(size, DISK_SAMPLE), dtype=torch.uint8)
    with tempfile.TemporaryDirectory(dir=nearest_folder(config.output_dir)) as folder:
        return (
            watch.once(lambda: save_file({"zeros": sample}, Path(folder) / "sample.safetensors")) * size / len(sample)
        )
