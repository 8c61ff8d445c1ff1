"""How a step grows with its group, codes, vocabulary and width, and what more devices would bring.

Seconds of a rollout are taken as a · bytes + b · operations + c · steps + d · logits, those of an update as e · operations +
f · attention scores, with coefficients ≥ 0 that fit all measured rows best (least squares of relative errors). How many there
are follows from sizes. Over more devices every one samples and learns from as many images as here; gradients are summed in a
ring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import mul
from typing import Any

import numpy as np
import torch

from gcpo_t2i.bench.roofline import Load, load_of
from gcpo_t2i.bench.shapes import Shape, random_policy
from gcpo_t2i.bench.workload import Workload
from gcpo_t2i.errors import UserError
from gcpo_t2i.models.cache import whole_blocks
from gcpo_t2i.models.drawing import Sampling
from gcpo_t2i.plan.machine import free_memory
from gcpo_t2i.plan.show import gigabytes
from gcpo_t2i.plan.timing import decoding_seconds

GROUPS = (1, 2, 4, 8, 16)
SIDES = (12, 16, 24, 32, 64)  # 144 to 4096 codes
VOCABULARIES = (1024, 4096, 16384, 65536)
WIDTHS = (0.5, 1.0, 2.0)
DEVICES = (1, 8, 64)
NODE = 8  # devices that are joined by the faster link
LINKS = {"in a node": 450e9, "between nodes": 50e9}  # bytes per second and device: NVLink 4, 400 Gb/s InfiniBand
UPDATED = 4  # images whose forward and backward pass is measured, at most, and so many codes of theirs
UPDATED_CODES = 4096


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
    """Seconds per unit of what a rollout and an update consist of, in the order of `rollout_terms` and `update_terms`."""

    of_rollout: tuple[float, ...]
    of_update: tuple[float, ...]

    def rollout(self, load: Load) -> float:
        return sum(map(mul, self.of_rollout, rollout_terms(load)))

    def update(self, load: Load) -> float:
        return sum(map(mul, self.of_update, update_terms(load)))

    def step(self, load: Load, devices: int) -> float:
        return self.rollout(load) + self.update(load) + communication(load.gradient_bytes, devices)


def communication(gradient_bytes: float, devices: int) -> float:
    """Seconds of a ring, which passes 2 (n − 1)/n of the gradients through every link; the slowest link decides."""
    return 2 * (devices - 1) / devices * gradient_bytes / LINKS["in a node" if devices <= NODE else "between nodes"]


def rollout_terms(load: Load) -> tuple[float, ...]:
    return load.bytes, load.operations, load.positions, load.logits


def update_terms(load: Load) -> tuple[float, ...]:
    return load.update_operations, load.update_scores


def fitted(rows: Sequence[Row]) -> Model:
    """The model with the smallest relative errors over the rows, none of its coefficients below 0."""
    return Model(
        _coefficients([rollout_terms(row.load) for row in rows], [row.rollout for row in rows]),
        _coefficients([update_terms(row.load) for row in rows], [row.update for row in rows]),
    )


def _coefficients(terms: Sequence[tuple[float, ...]], seconds: Sequence[float]) -> tuple[float, ...]:
    from scipy.optimize import nnls

    matrix = np.array(terms, dtype=float)
    scale = matrix.max(axis=0)
    found, _ = nnls(matrix / scale / np.array(seconds)[:, None], np.ones(len(seconds)))
    return tuple((found / scale).tolist())


def variations(base: Shape, group: int) -> Iterator[tuple[str, int, Shape, int]]:
    """(axis, value, shape, group): one thing differs from the base at a time."""
    for images in GROUPS:
        yield "group", images, base, images
    for side in SIDES:
        yield "codes", side**2, replace(base, side=side), group
    for codes in VOCABULARIES:
        yield "vocabulary", codes, replace(base, codes=codes), group
    for factor in WIDTHS:
        yield "width", base.wider(factor).dim, base.wider(factor), group


def measured(work: Workload, base: Shape, on_progress: Callable[[], None]) -> list[Row]:
    """All variations of the base. Pieces of a rollout and of an update are timed, see `plan.timing`. UserError where one does
    not fit the memory, before the first is measured."""
    rows, policies = [], {}
    prefix = work.conditions()[0].trimmed().mask.shape[1]
    for _, _, shape, group in variations(base, work.config.group_size):
        check_memory(work, shape, group, prefix)
    for axis, value, shape, group in variations(base, work.config.group_size):
        if shape not in policies:
            policies = {shape: work.make(shape)}  # one at a time
        rows.append(_row(work, shape, policies[shape], axis, value, group))
        on_progress()
    return rows


def cache_bytes(work: Workload, shape: Shape, group: int, prefix: int) -> int:
    """Keys and values of both branches of all images."""
    positions = whole_blocks(prefix + shape.side**2 - 1)
    return 2 * shape.layers * shape.dim * work.element_bytes * 2 * work.config.prompts * group * positions


def check_memory(work: Workload, shape: Shape, group: int, prefix: int) -> None:
    needed, free = cache_bytes(work, shape, group, prefix), free_memory(work.device)
    if needed > free:
        raise UserError(
            f"scaling: keys and values of {work.config.prompts * group} images of {shape.side**2} codes take "
            f"{gigabytes(needed)}, {gigabytes(free)} are free; lower --prompts (now {work.config.prompts})"
        )


def _row(work: Workload, shape: Shape, policy: Any, axis: str, value: int, group: int) -> Row:
    config, watch = work.config, work.watch
    cond = policy.condition([prompt.text for prompt in work.prompts]).trimmed()
    prefix, images = cond.mask.shape[1], config.prompts * group
    how = Sampling(config.guidance, stats=("entropy",))
    with watch.lower():
        rollout = decoding_seconds(policy, prefix, config.prompts, group, 2, how, watch)
    size = work.element_bytes
    load, length = load_of(policy, 2 * images, prefix, size), shape.side**2
    one = min(UPDATED, images, max(1, UPDATED_CODES // length))
    codes = torch.zeros(one, length, dtype=torch.int64, device=work.device)
    rows = [index % config.prompts for index in range(one)]
    policy.set_trainable()

    def update() -> None:
        with watch.lower():
            loss = policy.logp(cond[rows], codes).logp.sum()
        loss.backward()
        policy.zero_grad(set_to_none=True)

    seconds = watch.median(update) / one * images
    return Row(axis, value, images, load, rollout, seconds, cache_bytes(work, shape, group, prefix))


def unbuilt_load(shape: Shape, images: int, prefix: int, size: int) -> Load:
    """See `load_of`."""
    return load_of(random_policy(shape, torch.device("meta")), 2 * images, prefix, size)
