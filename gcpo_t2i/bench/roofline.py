"""How fast a rollout could be if nothing but memory limited it: the bytes that every step must read, over the speed at which
this machine copies. What is kept in a cache of the processor can be faster than that, on a CPU with a small model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gcpo_t2i.models.llamagen import LlamaGenPolicy
from gcpo_t2i.plan.memory import FLOAT
from gcpo_t2i.plan.timing import Stopwatch

COPIED = {"cuda": 1 << 31, "cpu": 1 << 28}  # bytes
TRIES = 7


def copy_bandwidth(watch: Stopwatch) -> float:
    """Bytes read and written per second by a copy of a large tensor, the best of several."""
    source = torch.ones(COPIED.get(watch.device.type, 1 << 28), dtype=torch.uint8, device=watch.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(watch.once(lambda: target.copy_(source)) for _ in range(TRIES))


@dataclass(frozen=True)
class Load:
    """What a rollout and an update of some images consist of, from the sizes of the policy."""

    positions: int  # steps from code to code
    bytes: float  # that all of them must read: the layers and the head at each, and the cache as far as it is filled
    operations: float  # multiplications and additions of the rollout
    logits: float  # that codes are drawn from
    update_operations: float  # of a forward and a backward pass
    update_scores: float  # that an update's attention takes the softmax of
    gradient_bytes: float


def load_of(policy: Any, rows: int, prefix: int, size: int) -> Load:
    """Of `rows` that decode at once after a prefix of some length; half of them are the images that an update scores.
    `size`: bytes of an element, in layers and in the cache. Weights may be on the device meta."""
    config, weights = policy.trunk.config, list(policy.trunk.layers.parameters())
    head = policy.adapter.head if isinstance(policy, LlamaGenPolicy) else policy.model.model.generation_head
    inner, outer = (sum(weight.numel() for weight in own) for own in (weights, head.parameters()))
    codes = list(head.parameters())[-1].shape[0]  # weight (V, D) or bias (V,) of its last layer
    length = policy.grid[0] * policy.grid[1]
    positions = length - 1
    width = config.num_hidden_layers * config.head_dim
    filled = sum(prefix + step for step in range(1, length))
    cache = 2 * width * config.num_key_value_heads * size * rows * filled
    scores = config.num_hidden_layers * config.num_attention_heads * filled  # of one row
    attention = 4 * config.head_dim * scores
    return Load(
        positions=positions,
        bytes=positions * (inner * size + outer * FLOAT) + cache,
        operations=rows * (2 * (inner + outer) * positions + attention),
        logits=rows * positions * codes,
        update_operations=3 * rows / 2 * (2 * (inner + outer) * (prefix + positions) + attention),
        update_scores=rows / 2 * scores,
        gradient_bytes=FLOAT * sum(weight.numel() for weight in policy.trunk.parameters()),
    )
