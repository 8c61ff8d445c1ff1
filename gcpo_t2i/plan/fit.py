"""`micro_batch_size: auto`: as many images as there is memory for, as `gcpo_t2i.plan.memory` expects it."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from gcpo_t2i.config import PlanConfig, TrainConfig, share_of_prompts
from gcpo_t2i.errors import UserError
from gcpo_t2i.models import policy_class
from gcpo_t2i.models.sizes import Sizes, read_sizes, to_train
from gcpo_t2i.plan.counts import Counts
from gcpo_t2i.plan.machine import free_memory, held_bytes
from gcpo_t2i.plan.memory import Memory
from gcpo_t2i.plan.show import gigabytes
from gcpo_t2i.processes import Processes
from gcpo_t2i.run import model_folder
from gcpo_t2i.yaml_files import read_yaml

SHARE = 0.9  # of the free memory: what is expected is not what will be, and others need some as well
MOST_ON_A_CPU = 16  # images; more take longer: a pass over fresh memory waits for every page of it
CURES = (
    "lower --rollout_batch_size or --eval.batch_size (cache), set --gradient_checkpointing (activations), --loss.beta 0 (no "
    "reference) or --lora.rank (fewer trained parameters)"
)


def settle_micro_batch(config: TrainConfig, device: torch.device, processes: Processes, sharded: bool) -> None:
    """Puts a number in the place of `auto`, the same in all processes: that of the run which is gone on with, else of what is
    free now, before the policy is loaded. UserError where not even one image fits."""
    if config.micro_batch_size != "auto":
        return

    def fit() -> int:
        if saved := _saved(config):
            return saved
        folder = model_folder(config.model)
        policy_class(folder)  # its libraries count before the weights do
        sizes, libraries = to_train(read_sizes(folder), config), held_bytes(device)
        run: dict[str, Any] = {item.name: getattr(config, item.name) for item in fields(TrainConfig)}
        planned = PlanConfig(**run, processes=processes.count, sharded=sharded)
        free = free_memory(device, processes.count)
        return fitting(planned, sizes, device, libraries, free)

    config.micro_batch_size = min(processes.gather(processes.together(fit)))


def fitting(config: PlanConfig, sizes: Sizes, device: torch.device, held: int, free: int | None) -> int:
    """The largest power of two, at most the images of a process, with which the peak is within `SHARE` of the `free` bytes,
    of which libraries and rewards have `held` some already. UserError where there is none, or nobody knows (None)."""
    if free is None:
        raise UserError(
            f"micro_batch_size auto goes by the free memory, and {device} is not here to be asked; give a number"
        )
    images = share_of_prompts(config.prompts_per_step, config.processes) * config.group_size
    most = min(images, MOST_ON_A_CPU) if device.type == "cpu" else images

    def peak(size: int) -> int:
        tried = replace(config, micro_batch_size=size)
        return Memory.of(tried, sizes, Counts.of(tried, sizes), sizes.caption_tokens, device, held, 0).peak

    for size in (1 << power for power in reversed(range(most.bit_length()))):
        if peak(size) <= SHARE * free:
            return size
    raise UserError(
        f"micro_batch_size auto: even with 1 image {gigabytes(peak(1))} are needed per process, {SHARE:.0%} of the "
        f"{gigabytes(free)} that are free on {device} may be used; {CURES}"
    )


def _saved(config: TrainConfig) -> int | None:
    """What the run that is gone on with was made with."""
    file = Path(config.output_dir or "") / "config.yaml"
    found = read_yaml(file).get("micro_batch_size") if config.resume and file.is_file() else None
    return found if isinstance(found, int) else None
