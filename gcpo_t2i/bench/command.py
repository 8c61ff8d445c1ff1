"""`gcpo-t2i bench`: measures, shows tables, and writes them as JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress

from gcpo_t2i import __version__
from gcpo_t2i.bench import scaling, show
from gcpo_t2i.bench.contest import Result, in_turns
from gcpo_t2i.bench.log_probs import log_prob_ways
from gcpo_t2i.bench.roofline import copy_bandwidth, load_of
from gcpo_t2i.bench.shapes import SHAPES
from gcpo_t2i.bench.workload import Workload
from gcpo_t2i.config import BenchConfig
from gcpo_t2i.env import cpu_model
from gcpo_t2i.errors import UserError
from gcpo_t2i.files import write_text
from gcpo_t2i.folders import check_output_dir

LARGE = ("janus_pro_1b", "janus_pro_7b")  # whose steps on many devices are predicted where there is a GPU


@dataclass
class Found:
    """All that a bench found, seconds and bytes."""

    machine: dict[str, Any]
    images: int  # per step
    codes: int  # per image
    results: dict[str, dict[str, Result]] = field(default_factory=dict)  # part → way → result
    roofline_seconds: float | None = None  # of the rollout
    rows: list[scaling.Row] = field(default_factory=list)
    model: scaling.Model | None = None
    predictions: dict[str, dict[int, float]] = field(default_factory=dict)  # shape → devices → seconds of a step


def bench(config: BenchConfig) -> Path | None:
    """Measures what `config` names and prints it; the folder with bench.json, if one is written. UserError for a shape that
    has no size to vary, a folder that is in use, or too little memory."""
    if "scaling" in config.what and config.shape not in SHAPES:
        raise UserError(f"shape '{config.shape}': scaling varies sizes, and its weights are given; use small_janus")
    folder = None if config.out is None else check_output_dir(config.out, overwrite=config.overwrite)
    work = Workload(config)
    if config.busy and work.device.type != "cpu":
        raise UserError(f"busy counts seconds of processors, and device is {work.device}; drop one of them")
    found = Found(machine(work), config.prompts * config.group_size, work.policy.grid[0] * work.policy.grid[1])
    try:
        with Progress(transient=True) as progress:
            for part in config.what:
                measure(part, work, found, progress)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory on {work.device}; lower --group_size (now {config.group_size}), --prompts (now {config.prompts}) "
            f"or --micro_batch_size (now {config.micro_batch_size})"
        ) from error
    show.show(Console(highlight=False), config, found)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "bench.json", json.dumps({**asdict(found), "settings": asdict(config)}, indent=2) + "\n")
        if found.rows:
            show.draw(folder / "scaling.png", found)
    return folder


def machine(work: Workload) -> dict[str, Any]:
    device = work.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "gcpo_t2i": __version__,
        "bytes_per_second": copy_bandwidth(work.watch),
    }


def measure(part: str, work: Workload, found: Found, progress: Progress) -> None:
    if part == "scaling":
        measure_scaling(work, found, progress)
        return
    makers: dict[str, Callable[[], Any]] = {
        "rollout": work.rollouts,
        "step": work.steps,
        "log_probs": lambda: log_prob_ways(work.watch),
    }
    ways, repeats = makers[part](), work.config.repeats
    task = progress.add_task(part, total=len(ways) * (repeats + 1))
    found.results[part] = in_turns(ways, repeats, work.device, lambda: progress.advance(task))
    if part == "rollout":
        prefix = work.conditions()[0].trimmed().mask.shape[1]
        load = load_of(work.policy, work.rows, prefix, work.element_bytes)
        found.roofline_seconds = load.bytes / found.machine["bytes_per_second"]


def measure_scaling(work: Workload, found: Found, progress: Progress) -> None:
    config = work.config
    base = SHAPES[config.shape]
    total = sum(1 for _ in scaling.variations(base, config.group_size))
    task = progress.add_task("scaling", total=total)
    found.rows = scaling.measured(work, base, lambda: progress.advance(task))
    found.model = scaling.fitted(found.rows)
    shapes = {config.shape, *LARGE} if work.device.type == "cuda" else {config.shape}
    prefix = work.conditions()[0].trimmed().mask.shape[1]
    size = work.element_bytes
    loads = {name: scaling.unbuilt_load(SHAPES[name], found.images, prefix, size) for name in sorted(shapes)}
    found.predictions = {
        name: {count: found.model.step(load, count) for count in scaling.DEVICES} for name, load in loads.items()
    }
