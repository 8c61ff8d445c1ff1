"""`gcpo-t2i plan`: what a training run will take, before it is started."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from gcpo_t2i.config import PlanConfig
from gcpo_t2i.data import PromptSampler, load_prompts
from gcpo_t2i.errors import UserError
from gcpo_t2i.models import policy_class
from gcpo_t2i.models.policy import Policy
from gcpo_t2i.models.sizes import Sizes, read_sizes, to_train
from gcpo_t2i.plan.counts import Counts
from gcpo_t2i.plan.datasheet import GPUS, Least, least_times
from gcpo_t2i.plan.fit import CURES, fitting
from gcpo_t2i.plan.machine import free_disk, free_memory, growth, held_bytes
from gcpo_t2i.plan.memory import FLOAT, Memory
from gcpo_t2i.plan.show import gigabytes, show
from gcpo_t2i.plan.timing import Times, measure
from gcpo_t2i.run import load_to_train, make_accelerator, model_folder, named_device, resolve_device
from gcpo_t2i.scoring import RewardSet, scored_name

CAPTIONS = 64  # prompts whose captions are looked at for their length


@dataclass(frozen=True)
class Plan:
    """What was worked out. Memory in bytes and per process, time in seconds; None for what was not measured."""

    device: str
    sizes: Sizes
    counts: Counts
    memory: Memory
    free_memory: int | None  # of the device
    times: Times | None = None
    least: Least | None = None  # of a GPU that is not here
    warnings: list[str] = field(default_factory=list)

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint: the trained parameters and AdamW's two moments of each."""
        return 3 * FLOAT * self.sizes.trainable

    @property
    def fits(self) -> bool:
        """False where it is known that memory will not do."""
        return self.free_memory is None or self.memory.peak <= self.free_memory

    def as_dict(self) -> dict[str, Any]:
        counts = {**asdict(self.counts), "rows": self.counts.rows, "forward_passes": self.counts.forward_passes}
        memory = {**self.memory.parts(), "peak": self.memory.peak}
        times = None if self.times is None else {**self.times.parts(), "run": self.times.run(self.counts)}
        return {**asdict(self), "counts": counts, "memory": memory, "times": times}


def plan(config: PlanConfig) -> None:
    """Works out the plan and prints it. UserError for what `train` would refuse at its start, but the run folder."""
    result = make_plan(config)
    if config.json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        show(config, result)


def make_plan(config: PlanConfig) -> Plan:
    """The plan of the run that `config` describes. Of what it loads and writes to measure it leaves nothing behind."""
    if config.gpu:
        config = replace(config, measure=False)
    folder = model_folder(config.model)
    sizes = to_train(read_sizes(folder), config)
    sampler = PromptSampler(load_prompts(config.train_prompts), config.seed, config.train_mix)
    load_prompts(config.eval.prompts)
    device = _device(config)
    on_cpu = device.type == "cpu"
    here = config.measure or on_cpu  # whether what a device holds can be asked
    policy_class(folder)  # its libraries count before the weights do
    libraries = held_bytes(device) if on_cpu else 0
    rewards, reward_bytes = growth(device, lambda: _load_rewards(config, device)) if here else (None, 0)
    policy, adapters = load_to_train(config, device) if config.measure else (None, None)
    prefix = sizes.caption_tokens if policy is None else _longest_caption(policy, sampler)
    free = free_memory(device, config.processes) if here else GPUS[config.gpu].memory if config.gpu else None
    if config.micro_batch_size == "auto":
        config = replace(config, micro_batch_size=fitting(config, sizes, device, libraries + reward_bytes, free))
    counts = Counts.of(config, sizes)
    memory = Memory.of(config, sizes, counts, prefix, device, libraries, reward_bytes)
    least = least_times(config, sizes, counts, prefix, GPUS[config.gpu]) if config.gpu else None
    result = Plan(config.gpu or str(device), sizes, counts, memory, free, least=least)
    result.warnings.extend(cautions(config, result))
    if policy is None or rewards is None or not result.fits:
        return result
    try:
        times = measure(config, sizes, counts, policy, *rewards, sampler, make_accelerator(config), adapters)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory on {device} while measuring; lower --micro_batch_size (now {config.micro_batch_size}) or "
            f"--rollout_batch_size (now {counts.at_once}), or plan without it: --measure false"
        ) from error
    return replace(result, times=times)


def _device(config: PlanConfig) -> torch.device:
    if config.gpu:
        return torch.device("cuda")
    return resolve_device(config.device) if config.measure or config.device is None else named_device(config.device)


def _load_rewards(config: PlanConfig, device: torch.device) -> tuple[RewardSet, RewardSet]:
    training = RewardSet.load(config.rewards, str(device))
    return training, RewardSet.load(config.eval.rewards, str(device), label=scored_name)


def _longest_caption(policy: Policy, sampler: PromptSampler) -> int:
    """Caption tokens of the longest among the first prompts, to which a batch is padded."""
    return policy.condition([prompt.text for prompt in sampler.batch(0, CAPTIONS)]).trimmed().mask.shape[1]


def cautions(config: PlanConfig, result: Plan) -> list[str]:
    """What may be a mistake, one sentence each."""
    counts, found = result.counts, []
    if not result.fits and result.free_memory is not None:
        found.append(
            f"memory: {gigabytes(result.memory.peak)} are needed per process, {gigabytes(result.free_memory)} are free; "
            f"lower --micro_batch_size (activations), {CURES}" + ("" if config.gpu else ". Times were not measured")
        )
    if config.group_size == 2:
        found.append("group_size 2: the mean of two images is a poor baseline, and many pairs will have equal rewards")
    for name in ("micro_batch_size", "rollout_batch_size"):
        size = getattr(config, name)
        if isinstance(size, int) and size > counts.images:
            found.append(
                f"{name} {size} is more than the {counts.images} images of a process: {counts.images} does the same"
            )
    if config.processes > 1 and result.device == "cpu":
        found.append("processes: on one CPU they share its cores and its memory, and take longer than is said here")
    kept = counts.checkpoints if config.keep_last is None else min(counts.checkpoints, config.keep_last + 1)
    needed = kept * result.checkpoint_bytes  # + 1: an old one goes when the new one is whole
    if needed > free_disk(config.output_dir):
        found.append(
            f"disk: {kept} checkpoints take {gigabytes(needed)}, {gigabytes(free_disk(config.output_dir))} are free; "
            f"lower --keep_last (now {config.keep_last})"
        )
    return found
