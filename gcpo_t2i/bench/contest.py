"""Several ways to do the same, in one process and in turns, so that a busy machine slows all of them."""

from __future__ import annotations

import ctypes
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

Phases = dict[str, float]
CLEAR_PEAK = "5"  # see proc_pid_clear_refs(5)


@dataclass(frozen=True)
class Result:
    """Of one way: seconds by phase (medians), and the memory that it took at most on top of what was held before."""

    seconds: Phases
    peak_bytes: int | None  # None where the system does not say

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def in_turns(
    ways: Mapping[str, Callable[[], Phases]], repeats: int, device: torch.device, on_progress: Callable[[], None]
) -> dict[str, Result]:
    """Each way once to warm up, then `repeats` times in turns. Memory is the most of any time but the first."""
    for way in ways.values():
        way()
        on_progress()
    found: dict[str, list[Phases]] = {name: [] for name in ways}
    peaks: dict[str, list[int]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            with peak_memory(device, peaks[name]):
                found[name].append(way())
            on_progress()
    return {
        name: Result(
            {phase: statistics.median(one[phase] for one in runs) for phase in runs[0]}, max(peaks[name], default=None)
        )
        for name, runs in found.items()
    }


@contextmanager
def peak_memory(device: torch.device, found: list[int]) -> Iterator[None]:
    """Adds the bytes that what runs inside took at most to `found`: allocated on CUDA, resident on a CPU with Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        found.append(torch.cuda.max_memory_allocated(device) - before)
        return
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not (status.exists() and os.access(clear, os.W_OK)):
        yield
        return
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; else what was freed before counts as held
    if give_back is not None:
        give_back(0)
    clear.write_text(CLEAR_PEAK)
    before = psutil.Process().memory_info().rss
    yield
    lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    found.append(max(0, int(lines[0].split()[1]) * 1024 - before))
