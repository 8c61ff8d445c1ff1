"""Memory and disk of this machine, as they are now. Bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import torch

T = TypeVar("T")


def held_bytes(device: torch.device) -> int:
    """What this process holds: allocated on a GPU, else resident. The measure of `peak_memory_mb`, but of now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def growth(device: torch.device, load: Callable[[], T]) -> tuple[T, int]:
    """What `load` returns, and how much memory that took."""
    before = held_bytes(device)
    loaded = load()
    return loaded, max(0, held_bytes(device) - before)


def free_memory(device: torch.device, processes: int = 1) -> int:
    """What this process can have in all: free now, on a CPU its share of that, and what it holds already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return psutil.virtual_memory().available // processes + held_bytes(device)


def free_disk(output_dir: str | None) -> int:
    return shutil.disk_usage(nearest_folder(output_dir)).free


def nearest_folder(output_dir: str | None) -> Path:
    """The run folder, or the first of those around it that exists."""
    path = Path(output_dir or ".").resolve()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
