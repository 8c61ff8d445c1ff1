"""Several ways to do the same, in one process and in turns, so that a busy machine slows all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from gcpo_t2i.bench.memory import TensorMemory

Phases = dict[str, float]


@dataclass(frozen=True)
class Result:
    """Of one way: seconds by phase (medians), and the bytes of tensors that it took at most on top of those before."""

    seconds: Phases
    peak_bytes: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def in_turns(
    ways: Mapping[str, Callable[[], Phases]], repeats: int, device: torch.device, on_progress: Callable[[], None]
) -> dict[str, Result]:
    """Each way once to warm up, then `repeats` times in turns. On a CPU, memory is counted apart from that: it takes time."""
    peaks: dict[str, int] = {}
    for name, way in ways.items():
        way()
        if device.type != "cuda":
            _, peaks[name] = counted(way, device)
        on_progress()
    found: dict[str, list[Phases]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            if device.type == "cuda":
                phases, peaks[name] = counted(way, device)
            else:
                phases = way()
            found[name].append(phases)
            on_progress()
    return {
        name: Result({phase: statistics.median(one[phase] for one in runs) for phase in runs[0]}, peaks[name])
        for name, runs in found.items()
    }


def counted(way: Callable[[], Phases], device: torch.device) -> tuple[Phases, int]:
    """What `way` returns, and how many bytes its tensors took at most, on top of those that were there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        phases = way()
        return phases, torch.cuda.max_memory_allocated(device) - before
    with TensorMemory() as held:
        phases = way()
    return phases, held.peak
