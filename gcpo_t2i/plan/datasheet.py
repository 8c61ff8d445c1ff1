"""The least time of a step on a GPU that is not here, from its data sheet.

What a rollout must read at every position (the layers, the head, the cache as far as it is filled) over the memory's
bandwidth, or what it must multiply over the speed in bfloat16, whichever takes longer; of an update, the products alone:

    a pass over one image    F = 2·n·S + 2·D·V·T + 2·N·H·d·S²      S = prefix + T − 1, n parameters of the trunk's layers
    with its backward pass   F·(2 + 1 if the layers' weights are trained + 1 if they are recomputed)

Left out: the image decoder, rewards, evaluations, AdamW, messages between GPUs. No GPU reaches its data sheet, so a step takes
longer than this; by how much, only a measurement tells.
"""

from __future__ import annotations

from dataclasses import dataclass

from gcpo_t2i.config import PlanConfig
from gcpo_t2i.models.sizes import Sizes
from gcpo_t2i.plan.counts import Counts

FLOAT, LOWER = 4, 2  # bytes: the head, and all else


@dataclass(frozen=True)
class Gpu:
    memory: int  # bytes that a process can have
    bandwidth: float  # bytes/s
    products: float  # multiplications and additions per second in bfloat16, dense


GPUS = {
    "a100": Gpu(79 << 30, 2.039e12, 312e12),  # SXM, 80 GB
    "h100": Gpu(79 << 30, 3.35e12, 989e12),  # SXM, 80 GB
    "h200": Gpu(139 << 30, 4.8e12, 989e12),  # SXM, 141 GB
}


@dataclass(frozen=True)
class Least:
    """Seconds per step, at least."""

    rollout: float
    update: float

    @property
    def step(self) -> float:
        return self.rollout + self.update


def least_times(config: PlanConfig, sizes: Sizes, counts: Counts, prefix: int, gpu: Gpu) -> Least:
    """Of one round of sampling and all updates of a step, in one process. `prefix`: caption tokens."""
    width, kv_width = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    layers = sizes.layers * sizes.dim * (2 * width + 2 * kv_width + 3 * sizes.mlp_dim)
    head, length = sizes.dim * sizes.codes, sizes.positions
    filled = sum(range(prefix + 1, prefix + length))  # positions that the T − 1 steps after the first attend to
    rows = counts.images * counts.branches
    read = counts.parts * (length - 1) * (LOWER * layers + FLOAT * head)
    read += 2 * sizes.layers * kv_width * LOWER * rows * filled
    products = rows * (2 * (layers + head) * (length - 1) + 4 * sizes.layers * width * filled)
    span = prefix + length - 1
    image = 2 * layers * span + 2 * head * length + 2 * sizes.layers * width * span**2
    backward = 2 + (config.lora.rank is None) + config.gradient_checkpointing
    alone = (counts.reference_passes + counts.null_passes + counts.replay_passes) / counts.gradient_passes
    update = counts.updates * counts.images * image * (backward + alone)
    return Least(max(read / gpu.bandwidth, products / gpu.products), update / gpu.products)
