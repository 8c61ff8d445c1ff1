"""Random numbers that follow from a place alone: the same whatever was drawn before, in whatever batch and process."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch


def image_seed(seed: int, *place: int) -> int:
    """32 bits, all that torch's generators on CPUs take in: the first word of numpy's SeedSequence of these numbers."""
    return int(np.random.SeedSequence((seed, *place)).generate_state(1)[0])


def generators(seed: int, places: Iterable[tuple[int, ...]]) -> list[torch.Generator]:
    """A generator for every place: (prompt, image), or whatever else tells one draw from all others."""
    return [torch.Generator().manual_seed(image_seed(seed, *place)) for place in places]
