"""How a step grows with its group, codes, vocabulary and width, and what more devices would bring.

Seconds of a rollout are taken as a · bytes + b · operations + c · steps, those of an update as d · operations, with
coefficients ≥ 0 that fit all measured rows best (least squares of relative errors). What bytes and operations are follows
from sizes. Over more devices every one samples and learns from as many images as here; gradients are summed in a ring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from gcpo_t2i.bench.roofline import Load, load_of
from gcpo_t2i.bench.shapes import Shape, random_policy
from gcpo_t2i.bench.workload import Workload
from gcpo_t2i.models.cache import whole_blocks
from gcpo_t2i.models.drawing import Sampling
from gcpo_t2i.plan.timing import decoding_seconds

GROUPS = (1, 2, 4, 8, 16)
SIDES = {"cpu": (12, 16, 24, 32), "cuda": (12, 16, 24, 32, 64)}  # 144 to 4096 codes
VOCABULARIES = (1024, 4096, 16384, 65536)
WIDTHS = (0.5, 1.0, 2.0)
DEVICES = (1, 8, 64)
NODE = 8  # devices that are joined by the faster link
LINKS = {"in a node": 450e9, "between nodes": 50e9}  # bytes per second and device: NVLink 4, 400 Gb/s InfiniBand
UPDATED = 4  # images whose forward and backward pass is measured


@dataclass(frozen=True)
class Row:
    """One measured size: what differs from the base, seconds of a step's rollout and update, bytes of the cache."""

    axis: str
    value: int
    images: int
    load: Load
    rollout: float
    update: float
    cache_bytes: int


@dataclass(frozen=True)
class Model:
    """Seconds per byte, operation and position of a rollout, and per operation of an update."""

    byte: float
    operation: float
    position: float
    update_operation: float

    def rollout(self, load: Load) -> float:
        return self.byte * load.bytes + self.operation * load.operations + self.position * load.positions

    def update(self, load: Load) -> float:
        return self.update_operation * load.update_operations

    def step(self, load: Load, devices: int) -> float:
        return self.rollout(load) + self.update(load) + communication(load.gradient_bytes, devices)


def communication(gradient_bytes: float, devices: int) -> float:
    """Seconds of a ring, which passes 2 (n − 1)/n of the gradients through every link; the slowest link decides."""
    return 2 * (devices - 1) / devices * gradient_bytes / LINKS["in a node" if devices <= NODE else "between nodes"]


def fitted(rows: Sequence[Row]) -> Model:
    """The model with the smallest relative errors over the rows, none of its coefficients below 0."""
    from scipy.optimize import nnls

    terms = np.array([[row.load.bytes, row.load.operations, row.load.positions] for row in rows], dtype=float)
    scale = terms.max(axis=0)
    seconds = np.array([row.rollout for row in rows])
    found, _ = nnls(terms / scale / seconds[:, None], np.ones(len(rows)))
    shares = np.array([row.load.update_operations / row.update for row in rows])
    byte, operation, position = (found / scale).tolist()
    return Model(byte, operation, position, float(shares.sum() / (shares**2).sum()))


def variations(base: Shape, group: int, kind: str) -> Iterator[tuple[str, int, Shape, int]]:
    """(axis, value, shape, group): one thing differs from the base at a time."""
    for images in GROUPS:
        yield "group", images, base, images
    for side in SIDES.get(kind, SIDES["cpu"]):
        yield "codes", side**2, replace(base, side=side), group
    for codes in VOCABULARIES:
        yield "vocabulary", codes, replace(base, codes=codes), group
    for factor in WIDTHS:
        yield "width", base.wider(factor).dim, base.wider(factor), group


def measured(work: Workload, base: Shape, on_progress: Callable[[], None]) -> list[Row]:
    """All variations of the base. Pieces of a rollout and of an update are timed, see `plan.timing`."""
    rows, policies = [], {}
    for axis, value, shape, group in variations(base, work.config.group_size, work.device.type):
        if shape not in policies:
            policies = {shape: work.make(shape)}  # one at a time
        rows.append(_row(work, policies[shape], axis, value, group))
        on_progress()
    return rows


def _row(work: Workload, policy: Any, axis: str, value: int, group: int) -> Row:
    config, watch = work.config, work.watch
    cond = policy.condition([prompt.text for prompt in work.prompts]).trimmed()
    prefix, images = cond.mask.shape[1], config.prompts * group
    how = Sampling(config.guidance, stats=("entropy",))
    with watch.lower():
        rollout = decoding_seconds(policy, prefix, config.prompts, group, 2, how, watch)
    size = work.element_bytes
    load, one = load_of(policy, 2 * images, prefix, size), min(UPDATED, images)
    codes = torch.zeros(one, policy.grid[0] * policy.grid[1], dtype=torch.int64, device=work.device)
    rows = [index % config.prompts for index in range(one)]
    policy.set_trainable()

    def update() -> None:
        with watch.lower():
            loss = policy.logp(cond[rows], codes).logp.sum()
        loss.backward()
        policy.zero_grad(set_to_none=True)

    seconds = watch.median(update) / one * images
    trunk = policy.trunk.config
    positions = whole_blocks(prefix + load.positions)
    held = 2 * trunk.num_hidden_layers * trunk.num_key_value_heads * trunk.head_dim * size * 2 * images * positions
    return Row(axis, value, images, load, rollout, seconds, held)


def unbuilt_load(shape: Shape, images: int, prefix: int, size: int) -> Load:
    """See `load_of`."""
    return load_of(random_policy(shape, torch.device("meta")), 2 * images, prefix, size)
