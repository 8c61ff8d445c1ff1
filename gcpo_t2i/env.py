"""`gcpo-t2i env`: versions and hardware for a bug report. Names no user, host or folder, and asks no network."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from gcpo_t2i import __version__
from gcpo_t2i.config import EnvConfig
from gcpo_t2i.errors import UserError
from gcpo_t2i.scoring import rewards_package

LIBRARIES = (
    *("torchvision", "transformers", "diffusers", "open_clip_torch", "accelerate", "safetensors", "tokenizers"),
    *("numpy", "scipy", "pillow", "jsonargparse", "rich"),
)
TRACKERS = ("tensorboard", "wandb", "trackio")
VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")

Section = dict[str, str]


def env(config: EnvConfig) -> None:
    """Prints the report as Markdown, or as JSON."""
    found = report()
    print(json.dumps(found, indent=2, ensure_ascii=False) if config.json else markdown(found))


def report() -> dict[str, Section]:
    """Section → what → value, all as text."""
    return {
        "gcpo-t2i": {"version": __version__, "rewards package": _rewards()},
        "system": system(),
        "torch": torch_build(),
        "libraries": {name: installed(name) for name in LIBRARIES},
        "trackers": {name: installed(name) for name in TRACKERS},
        "settings": {
            **{name: os.environ.get(name, "not set") for name in VARIABLES},
            "torch threads": str(torch.get_num_threads()),
        },
    }


def markdown(found: dict[str, Section]) -> str:
    """One table, foldable on GitHub."""
    rows = [
        f"| {section} | {what} | {value.replace('|', '/')} |"
        for section, own in found.items()
        for what, value in own.items()
    ]
    return "\n".join(
        ["<details><summary>gcpo-t2i env</summary>", "", "| | | |", "|---|---|---|", *rows, "", "</details>"]
    )


def system() -> Section:
    memory = psutil.virtual_memory()
    return {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": f"{psutil.cpu_count(logical=False)} physical, {os.cpu_count()} logical, {_usable_cores()} usable",
        "memory": f"{_gigabytes(memory.total)}, {_gigabytes(memory.available)} free",
        "disk": f"{_gigabytes(shutil.disk_usage(Path.cwd()).free)} free in the current folder",
    }


def torch_build() -> Section:
    rows = {"version": torch.__version__, "build": _build()}
    if torch.version.cuda is None and torch.version.hip is None:
        return rows
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    rows |= {"cudnn": str(cudnn), "driver": driver_version(), "cuda available": str(torch.cuda.is_available())}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        rows[f"cuda:{index}"] = f"{device.name}, {_gigabytes(device.total_memory)}"
    return rows


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def cpu_model() -> str:
    """As the kernel names it, else what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def driver_version() -> str:
    """Of the NVIDIA driver, from its own tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "nvidia-smi not found"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "nvidia-smi does not answer"
    return ", ".join(dict.fromkeys(done.stdout.split())) if done.returncode == 0 else "nvidia-smi fails"


def _build() -> str:
    if torch.version.cuda is not None:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip is not None else "CPU only"


def _rewards() -> str:
    try:
        rewards_package()
    except UserError:
        return "shadowed by another package of that name"
    return "found"


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.1f} GB"
